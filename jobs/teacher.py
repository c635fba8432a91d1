"""The LLM asked again what it was asked before: how often it agrees with itself, the ceiling of any specialist's agreement.

Off unless `evaluation.teacher_repeats` says how many validation calls of each task to ask again. The captured answer is the
first one, so that a change of the LLM since then counts as disagreement too. Kept beside the report and not in it, because
asking once more gives other answers: the same conversion stays the same release.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from cluster.calls import read_call_columns
from cluster.records import Example, Split, TaskSpec
from cluster.store import Store
from jobs.judge import TEACHER_SETTING, PricedLLM
from jobs.llm_node import llm_node_of
from jobs.recipe import Recipe
from training.discover import IDENTITY_FILE
from training.gate import clopper_pearson_interval, one_call_per_session
from training.probe import spread
from training.text_graders import SelfAgreement, agrees


def measure_teacher(
    recipe: Recipe,
    tasks: Sequence[TaskSpec],
    by_split: Mapping[Split, Mapping[str, Sequence[Example]]],
    say: Callable[[str], None],
) -> dict[str, SelfAgreement]:
    """Ask again, one call a session; nothing where the recipe asks for nothing. Gold answers are no LLM's.

    Raises:
        ConfigError: it is asked for, and the first LLM is no endpoint that names a model, or its key is not set.
    """
    num_calls = recipe.evaluation.teacher_repeats
    asked = [task for task in tasks if task.reference == "llm"]
    if not num_calls or not asked:
        return {}
    config = llm_node_of(recipe, f"{TEACHER_SETTING}={num_calls}", "ask again").config

    async def run() -> tuple[dict[str, SelfAgreement], PricedLLM]:
        llm = PricedLLM(config, recipe.evaluation.teacher_max_usd, TEACHER_SETTING)
        try:
            found = {}
            for task in asked:
                calls = one_call_per_session(list(by_split["validation"].get(task.task_id, ())), seed=1)
                found[task.task_id] = await _ask_again(llm, task, spread(calls, num_calls) if calls else [], recipe)
            return found, llm
        finally:
            await llm.close()

    found, llm = asyncio.run(run())
    say(f"teacher: {llm.num_asked} calls asked again, {llm.usd:.4f} USD, {llm.num_refused} not asked for its bound")
    return {task_id: one for task_id, one in found.items() if one.num_answered}


def plan_teacher(recipe: Recipe, store: Store) -> dict[str, float | int | None]:
    """What asking again would take: questions (of the tasks of the last discovery; None before one), their expected price
    by what captured calls cost (None where that is not known), and the bound; None where upstream.0 has no prices, so that
    nothing is counted against it."""
    num_calls = recipe.evaluation.teacher_repeats
    num_tasks = len(store.read_json(IDENTITY_FILE)["tasks"]) if store.exists(IDENTITY_FILE) else None
    costs = [usd for usd in read_call_columns(store, ["cost_usd"])["cost_usd"].to_pylist() if usd]
    questions = None if num_tasks is None else num_tasks * num_calls
    usd = questions * sum(costs) / len(costs) if questions is not None and costs else None
    facts = {"calls_per_task": num_calls, "max_questions": questions, "expected_usd": usd}
    llm = recipe.upstream[0] if recipe.upstream else None
    is_priced = llm is not None and bool(llm.prompt_usd_per_million or llm.completion_usd_per_million)
    bound = recipe.evaluation.teacher_max_usd if is_priced else None
    return {**facts, "max_usd": bound if num_calls else 0.0}


async def _ask_again(llm: PricedLLM, task: TaskSpec, calls: Sequence[Example], recipe: Recipe) -> SelfAgreement:
    grader = recipe.evaluation.grader_of(task.kind)

    async def one(call: Example) -> bool | None:
        body = {key: value for key, value in call.request.items() if key not in ("stream", "stream_options")}
        message = await llm.complete(body)
        return None if message is None else bool(await agrees(message, call, task, grader, None))

    said = [one for one in await asyncio.gather(*map(one, calls)) if one is not None]
    interval = clopper_pearson_interval(said.count(False), len(said)) if said else (0.0, 1.0)
    return SelfAgreement(
        num_answered=len(said), num_agreements=said.count(True), interval=(1 - interval[1], 1 - interval[0])
    )
