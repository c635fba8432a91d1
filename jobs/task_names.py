"""Tasks named by the LLM node: `discover.llm_naming=true` of a conversion (S3).

A task that has such a name keeps it and is not asked about again, unless it was split or merged; tasks/names.json
remembers. Where the LLM does not answer, or what it proposes may not stand (training/llm_naming.py), the name made of
the task's own words stays, and the reason is told. At most MAX_ASKED questions a run, the largest tasks first,
and no more once the LLM was silent three times in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.records import Example, TaskSpec
from cluster.store import Store
from jobs.llm_node import LLMNode, llm_node_of
from jobs.recipe import Recipe
from training.discover import TASKS_FOLDER, Discovery
from training.llm_naming import INSTRUCTION, MAX_ANSWER_TOKENS, TaskName, describe_for_naming, read_proposal
from training.probe import spread

NAMES_FILE = f"{TASKS_FOLDER}/names.json"
MAX_ASKED = 200
_MAX_SILENCES = 3
_NUM_EXAMPLES = 4


def namer_of(recipe: Recipe) -> LLMNode | None:
    """The LLM that names tasks, or None where the recipe asks for none.

    Raises:
        ConfigError: it is asked for, and the first LLM is no endpoint that names a model.
    """
    return llm_node_of(recipe, "discover.llm_naming", "name tasks") if recipe.discover.llm_naming else None


def name_by_llm(
    store: Store, discovery: Discovery, train: Sequence[Example], node: LLMNode, say: Callable[[str], object]
) -> tuple[Discovery, dict[str, str]]:
    """Ask for names and descriptions, and remember the good ones.

    Args:
        train: the redacted split.

    Returns:
        The discovery with them, and why each task that was asked about in vain keeps the name of its own words.
    """
    known = _load_names(store)
    changed = {event.task_id for event in discovery.events if event.kind in ("split", "merge")}
    names = {t.task_id: known[t.task_id] for t in discovery.tasks if t.task_id in known.keys() - changed}
    examples: dict[str, list[Example]] = {}
    for example in train:
        examples.setdefault(str(discovery.assignment.get(example.example_id)), []).append(example)
    kept: dict[str, str] = {}
    num_silent = 0
    for task in [task for task in discovery.tasks if task.task_id not in names][:MAX_ASKED]:
        if num_silent == _MAX_SILENCES:
            break
        others = {t.name for t in discovery.tasks if t is not task} | {name.name for name in names.values()}
        found = _propose(task, discovery, spread(examples.get(task.task_id, []), _NUM_EXAMPLES), others, node)
        num_silent = num_silent + 1 if found is None else 0
        if isinstance(found, TaskName):
            names[task.task_id] = found
        else:
            kept[task.task_id] = found or "the LLM gave no answer"
    # Names of tasks that are away may be wanted again when they come back.
    saved = {**{key: name for key, name in known.items() if key not in changed}, **names}
    store.write_json(NAMES_FILE, {key: name.model_dump() for key, name in saved.items()})
    for task_id, reason in kept.items():
        say(f"discover {task_id}: keeps the name of its own words: {reason}")
    num_asked_not = len(discovery.tasks) - len(names) - len(kept)
    say(f"discover: {len(names)} tasks named by the LLM, {len(kept)} not" + _rest(num_asked_not))
    tasks = tuple(
        t.model_copy(update=names[t.task_id].model_dump()) if t.task_id in names else t for t in discovery.tasks
    )
    return replace(discovery, tasks=tasks), kept


def _propose(
    task: TaskSpec, discovery: Discovery, examples: list[Example], taken: set[str], node: LLMNode
) -> TaskName | str | None:
    """The name, why it may not stand, or None where the LLM is silent."""
    shown = describe_for_naming(discovery.identities[task.task_id].template, examples, task.static_lines)
    answer = node.ask(INSTRUCTION, shown, max_tokens=MAX_ANSWER_TOKENS)
    return read_proposal(answer, taken, examples, task.static_lines) if answer else None


def _load_names(store: Store) -> dict[str, TaskName]:
    saved = store.read_json(NAMES_FILE) if store.exists(NAMES_FILE) else {}
    return {task_id: TaskName.model_validate(value) for task_id, value in saved.items()}


def _rest(num: int) -> str:
    return f", {num} not asked about" if num else ""
