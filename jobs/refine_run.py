"""S6, second half: a plan -> a release in which what the plan names is trained anew and everything else is as it was.

Tasks that the plan trains go through the stages of a conversion (jobs/train.py, jobs/validate.py): those with a specialist on
its base, the others through S4. A candidate is released where its gate opens and, if a specialist serves the task, where it is
shown to be no worse on the calls that the gate was certified on (training/regression.py); else what stands stays. Every
other task keeps its specialist, gate, stage or refusal. What the steward did while this ran is kept as well.

The result stands beside the plan, refinements/DATE-HASH.result.json: a plan that has one is not run again, and one that was
cut off continues, because everything it makes is named by what it is made from.
"""

from __future__ import annotations

import asyncio
import pathlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cluster import registry
from cluster.engine import Engine
from cluster.errors import InputError
from cluster.prompts import PromptFormat
from cluster.quarantine import QuarantineRow, write_quarantine
from cluster.records import Example, Release, Specialist, Split, TaskSpec
from cluster.store import Store
from jobs.adapters import Start
from jobs.convert import make_specialist
from jobs.judge import open_judge
from jobs.provenance import save_config
from jobs.recipe import Recipe, work_folder
from jobs.refine import Material, Routing, check_task, in_use, load_material, routing_of
from jobs.refine_facts import (
    RESULT_SUFFIX,
    Known,
    Outcome,
    Result,
    fresh_of,
    learned_calls,
    read_known,
    specialist_of,
    training_for,
)
from jobs.train import Onward, Trained, scope_of, train, train_onward
from jobs.validate import (
    AnswerRate,
    EngineOf,
    ask_held_out,
    group_by_model,
    most_in_flight,
    rates_of,
    save_agreements,
    validation_engine,
)
from training.discover import save_discovery
from training.evaluation import Candidate, Evaluation, ask_calibration
from training.gate import Outcome as Answer
from training.ledger import CalibrationLedger
from training.refine import RETIRED, Plan, TaskPlan, num_replayed, sessions_needed
from training.regression import compare
from training.selection import group_by_task
from training.snapshot import load_snapshot
from training.splits import SPLITS, position_of
from training.worth import Rates

_ENOUGH_FRESH = 1.6
"""Times the fewest calibration sessions; from so many fresh ones on the spent ones are left out."""


class _Group(NamedTuple):
    """Tasks that one fleet trains on one base."""

    base: str
    lora_rank: int
    is_warm: bool


class _Work(NamedTuple):
    """What a run works with."""

    recipe: Recipe
    store: Store
    plan: Plan
    folder: pathlib.Path
    material: Material
    routing: Routing
    by_split: dict[Split, dict[str, list[Example]]]
    """As served; train redacted and without what is quarantined."""
    learned_from: dict[Split, dict[str, list[Example]]]
    """Train and validation, redacted."""
    old: dict[str, Specialist]
    """task_id -> the specialist that serves it, or was withdrawn."""
    say: Callable[[str], None]


def run_plan(
    recipe: Recipe, store: Store, plan: Plan, say: Callable[[str], None] = print, engine_of: EngineOf | None = None
) -> Result:
    """Carry a plan out and publish the release; serves nothing. Needs what `jobs.convert.convert` needs.

    Raises:
        InputError: another release is served than the plan is about and was derived from, or the store's tasks changed.
    """
    path = f"{plan.name}{RESULT_SUFFIX}"
    if store.exists(path):
        say(f"refine: {plan.name} has been run")
        return Result.model_validate(store.read_json(path))
    _check_served(store, plan)
    if not store.exists(f"{plan.name}.json"):
        store.write_json(f"{plan.name}.json", plan.model_dump(mode="json"))
    work = _prepare(recipe, store, plan, say)
    refused: dict[str, str] = {}
    evaluations: dict[str, tuple[Candidate, Evaluation]] = {}
    if plan.trained():
        candidates = _train(work, refused)
        evaluations = _validate(work, candidates, engine_of or (lambda model: validation_engine(recipe, model)))
    result = _release(work, refused, evaluations)
    if result.release != plan.release:
        # With the recipe's own delta; the plan tells what was left of it.
        save_config(store, result.release, recipe)
    store.write_json(path, result.model_dump(mode="json"))
    for task_id, outcome in result.outcomes.items():
        say(f"refine {task_id}: {outcome.decision}: {outcome.reason}")
    return result


def _check_served(store: Store, plan: Plan) -> None:
    """Only releases that were derived from the plan's, such as by the steward, keep what it rests on."""
    sha = registry.current_sha(store)
    while sha is not None and sha != plan.release:
        sha = registry.load_release(store, sha).previous
    if sha is None:
        raise InputError(
            f"plan {plan.name}: is about release {plan.release}, which is not served and nothing that is was derived from "
            "it; next: understudy refine plan"
        )


def _prepare(recipe: Recipe, store: Store, plan: Plan, say: Callable[[str], None]) -> _Work:
    """Read what the plan was made of, quarantine what is not to be learned, and settle the calibration calls."""
    gate = recipe.gate.model_copy(update={"delta": plan.delta})
    recipe = recipe.model_copy(update={"gate": gate, "refine": plan.config})
    material = load_material(recipe, store, load_snapshot(store, plan.snapshot))
    release = registry.load_release(store, plan.release)
    if plan.is_refit and not plan.route_model.endswith(material.discovery.route_model.content_sha()):
        raise InputError(f"plan {plan.name}: the store's tasks have changed since; next: understudy refine plan")
    routing = routing_of(store, material, release, is_refit=plan.is_refit)
    known = read_known(store, plan.config)
    by_split = {split: group_by_task(material.served[split], routing.assignment) for split in SPLITS}
    _quarantine(store, plan, material, routing, known, by_split)
    asked = {one.example_id for split in by_split["validation"].values() for one in split}
    redacted = group_by_task([one for one in material.redacted if one.example_id in asked], routing.assignment)
    spent = CalibrationLedger(store).spent_by(plan.spent)
    needed = sessions_needed(gate.epsilon, plan.delta / max(1, len(plan.trained())), 0)
    for task in plan.trained():
        held = by_split["calibration"].get(task.task_id, [])
        fresh = fresh_of(held, spent)
        if len({one.session_id for one in fresh}) >= _ENOUGH_FRESH * needed:
            by_split["calibration"][task.task_id] = fresh
    learned_from: dict[Split, dict[str, list[Example]]] = {"train": by_split["train"], "validation": redacted}
    found = {task.task_id: specialist_of(store, release, task.task_id) for task in plan.tasks}
    old = {task_id: one for task_id, one in found.items() if one is not None}
    return _Work(recipe, store, plan, work_folder(recipe), material, routing, by_split, learned_from, old, say)


def _quarantine(
    store: Store,
    plan: Plan,
    material: Material,
    routing: Routing,
    known: Known,
    by_split: dict[Split, dict[str, list[Example]]],
) -> None:
    """Take out of train what must not be learned, with a row for each in quarantine/; and out of all splits what is no
    longer asked."""
    rows = []
    for task in plan.trained():
        spec = _spec(routing, task)
        checked = check_task(plan.since_ts, plan.config, material, known, spec, routing)
        by_split["train"][task.task_id] = checked.kept
        for split in ("validation", "calibration", "test"):
            by_split[split][task.task_id] = in_use(by_split[split].get(task.task_id, []), material, checked)
        rows += [
            QuarantineRow(source=f"examples/{plan.snapshot}", line=None, reason=reason, detail=f"example {example_id}")
            for example_id, reason in checked.quarantined.items()
        ]
    write_quarantine(store, "refine", rows)


def _spec(routing: Routing, task: TaskPlan) -> TaskSpec:
    if task.task_id not in routing.tasks:
        raise InputError(f"task {task.task_id}: no such task among today's calls; allowed: keep, retire")
    return routing.tasks[task.task_id]


def _train(work: _Work, refused: dict[str, str]) -> list[Candidate]:
    """Fine-tune everything that the plan names, base by base."""
    groups: dict[_Group, list[TaskSpec]] = defaultdict(list)
    cold: list[TaskSpec] = []
    for task in work.plan.trained():
        spec = _spec(work.routing, task)
        if missing := [split for split in SPLITS if not work.by_split[split].get(task.task_id)]:
            refused[task.task_id] = f"no examples in {', '.join(missing)}"
        elif task.decision == "retrain":
            old = work.old[task.task_id]
            rank = training_for(work.recipe, work.store, old.adapter).lora_rank
            groups[_Group(old.base, rank, task.is_warm)].append(spec)
        else:
            cold.append(spec)
    trained = [_train_group(work, group, tasks, refused) for group, tasks in sorted(groups.items())]
    if cold:
        scope = scope_of(work.recipe, cold, work.learned_from)
        stages = (work.folder, work.plan.snapshot, scope, refused)
        trained.append(train(work.recipe, work.store, *stages, lambda name: None, work.say))
    return [candidate for one in trained for candidate in one.candidates]


def _train_group(work: _Work, group: _Group, tasks: list[TaskSpec], refused: dict[str, str]) -> Trained:
    first = work.old[tasks[0].task_id]
    finetune = training_for(work.recipe, work.store, first.adapter)
    if group.is_warm:
        rate = finetune.learning_rate * work.plan.config.learning_rate_factor
        finetune = finetune.model_copy(update={"learning_rate": rate})
    recipe = work.recipe.model_copy(update={"finetune": finetune})
    formats = {task.task_id: PromptFormat.model_validate(work.old[task.task_id].prompt_format) for task in tasks}
    starts, left_out = {}, {}
    for task in tasks if group.is_warm else ():
        starts[task.task_id], left_out[task.task_id] = _start(work, task.task_id)
    onward = Onward(group.base, {name: one.task_number for name, one in formats.items()}, starts, left_out)
    scope = scope_of(recipe, tasks, work.learned_from)
    return train_onward(recipe, work.store, work.folder, work.plan.snapshot, scope, onward, refused, work.say)


def _start(work: _Work, task_id: str) -> tuple[Start, frozenset[str]]:
    """What a specialist goes on from, and which of the examples it has learned it does not learn again; drawn by their ids."""
    adapter, share = work.old[task_id].adapter, work.plan.config.replay_share
    seen = learned_calls(work.store, adapter)
    train = work.by_split["train"][task_id]
    old = [one.example_id for one in train if not seen.isdisjoint(one.source_call_ids)]
    old.sort(key=lambda name: (position_of(name, b"replay"), name))
    num_new = len(train) - len(old)
    num_old = num_replayed(num_new, len(old), share)
    start = Start(
        adapter=adapter,
        sha256=work.store.manifest(adapter)["sha256"],
        num_new=num_new,
        num_replayed=num_old,
        replay_share=share,
    )
    work.say(f"refine {task_id}: on from {adapter}: {num_new} new examples, {num_old} of {len(old)} learned ones again")
    return start, frozenset(old[num_old:])


def _validate(work: _Work, candidates: list[Candidate], engine_of: EngineOf) -> dict[str, tuple[Candidate, Evaluation]]:
    """Certify the candidates, then ask the specialists they would replace the same calls; each model's engine once."""
    new: dict[str, list[Answer]] = {}
    found: dict[str, tuple[Candidate, Evaluation]] = {}
    served = registry.load_release(work.store, registry.current_sha(work.store) or work.plan.release).specialists
    replaced = {task: one for task, one in work.old.items() if served.get(task) == one}
    waiting: dict[str, Specialist] = {}
    rates: dict[str, Rates] = {}

    async def ask(model: str, group: list[Candidate], engine: Engine) -> None:
        rate = AnswerRate()
        stages = (work.recipe, work.store, group, work.by_split, engine, len(work.plan.trained()), rate, work.say)
        done = await ask_held_out(*stages, new.__setitem__) if group else []
        if group:
            rates[model] = rates_of(work.recipe, rate)
        found.update({one.task_id: (candidate, one) for candidate, one in zip(group, done, strict=True)})
        waiting.update(
            {one.task_id: replaced[one.task_id] for one in done if one.gate.is_open and one.task_id in replaced}
        )
        for task in [task for task, one in waiting.items() if one.model == model]:
            found[task] = await _compare(work, engine, waiting.pop(task), *found[task], new[task])

    for model, group in group_by_model(candidates).items():
        with engine_of(model) as engine:
            asyncio.run(ask(model, group, engine))
    for model in sorted({one.model for one in waiting.values()}):
        with engine_of(model) as engine:
            asyncio.run(ask(model, [], engine))
    for model, its in rates.items():
        own = [evaluation for candidate, evaluation in found.values() if candidate.model == model]
        save_agreements(work.recipe, work.store, work.plan.snapshot, own, its)
    return found


async def _compare(
    work: _Work, engine: Engine, old: Specialist, candidate: Candidate, evaluation: Evaluation, new: list[Answer]
) -> tuple[Candidate, Evaluation]:
    """The evaluation with what the test against the served specialist says; as it was where this engine cannot serve that."""
    if await engine.fingerprint() != old.gate.fingerprint:
        work.say(f"regression {old.task_id}: {old.name} was certified on another engine, which serves it no more")
        return candidate, evaluation
    asked = Candidate(
        task=candidate.task,
        base=old.base,
        base_arm="",
        adapter=old.adapter,
        merged=old.merged,
        prompt_format=PromptFormat.model_validate(old.prompt_format),
        max_answer_tokens=old.max_answer_tokens,
        # Both by one measure, also where the recipe's is another than when the old one was certified.
        text_grader=candidate.text_grader,
    )
    calls = work.by_split["calibration"][old.task_id]
    limit = work.recipe.gateway.max_temperature
    async with open_judge(work.recipe, work.store, [asked], work.say) as judge:
        answers = await ask_calibration(
            asked, engine, calls, limit, work.recipe.faces, judge, most_in_flight(work.recipe)
        )
    config, threshold = work.plan.config, evaluation.gate.threshold
    assert threshold is not None and old.gate.threshold is not None, "only open gates are compared"
    found = compare(
        old.name,
        answers,
        old.gate.threshold,
        new,
        threshold,
        epsilon=old.gate.epsilon,
        margin=config.margin,
        level=config.level,
    )
    work.say(f"regression {old.task_id}: {found.failed or f'as good as {old.name}'}")
    return candidate, evaluation.model_copy(update={"regression": found})


def _release(
    work: _Work, failures: Mapping[str, str], evaluations: Mapping[str, tuple[Candidate, Evaluation]]
) -> Result:
    """Publish what is served now with the plan's changes, or nothing where there are none."""
    store, plan = work.store, work.plan
    sha = registry.current_sha(store)
    assert sha is not None, "looked at before anything was trained"
    served = registry.load_release(store, sha)
    specialists, refused = dict(served.specialists), dict(served.refused)
    outcomes = {}
    for task in plan.tasks:
        name, new, reason = task.task_id, None, task.reason
        if task.decision == "retire" and name in specialists:
            del specialists[name]
            refused[name] = f"{RETIRED}{reason}"
        elif task in plan.trained():
            reason = failures.get(name) or _failure(evaluations[name][1])
            if reason is None:
                new = make_specialist(store, *evaluations[name])
                specialists[name], reason = new, "released"
                refused.pop(name, None)
            elif name in specialists and plan.is_refit and task.facts.moved_share > plan.config.max_moved:
                del specialists[name]
                refused[name] = f"its calls are others with the new route model, and training it anew failed: {reason}"
            elif name not in specialists and not task.facts.is_withdrawn:
                refused[name] = reason
        outcomes[name] = Outcome(
            decision=task.decision,
            specialist=task.facts.specialist,
            num_calls=task.facts.num_calls,
            released=new.name if new else None,
            reason=reason,
        )
    route_model = save_discovery(store, plan.snapshot, work.material.discovery) if plan.is_refit else served.route_model
    changed = {"specialists": specialists, "refused": refused, "route_model": route_model}
    if all(getattr(served, field) == value for field, value in changed.items()):
        return Result(plan=plan.name, release=sha, outcomes=outcomes)
    kept = {task: one for task, one in served.rollout.items() if specialists.get(task) == served.specialists.get(task)}
    release = Release(**changed, rollout=kept, snapshot=plan.snapshot, previous=sha, created_ts=time.time())
    return Result(plan=plan.name, release=registry.publish_release(store, release), outcomes=outcomes)


def _failure(evaluation: Evaluation) -> str | None:
    if not evaluation.gate.is_open:
        return evaluation.gate.refused or "no threshold"
    return evaluation.regression.failed if evaluation.regression else None
