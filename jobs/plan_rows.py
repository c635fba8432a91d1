"""A store's calls -> how long the rows are that a conversion of them will learn from, before anything is curated.

Some calls are read, sorted into tasks and written in the base's tokens as a conversion would, in memory alone; a scratch
base's tokenizer is trained on them for that. What comes out are counts and lengths. Redaction and cleaning are left out:
they change a row by a word, and leave out calls. Where more calls are stored than are read, rows are counted up by the
calls, and one longer than any of those read may come.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.errors import BaseUnavailableError
from cluster.records import AgentCall, Example, Record, Split, TaskSpec
from cluster.store import Store

if TYPE_CHECKING:
    from jobs.recipe import Recipe
    from training.dataset import TaskData

_MAX_READ = 2_000
"""Calls: a second or two of work."""


class TaskRows(Record):
    """What one task of a conversion would learn from, in a base's tokens."""

    num_train: int
    """Rows; of all stored calls."""
    num_validation: int
    num_held_out: int
    """Calls that validation asks."""
    mean_tokens: float
    mean_answer_tokens: float
    longest_tokens: int
    longest_answer_tokens: int


class Sample(NamedTuple):
    """Calls of a store, sorted."""

    tasks: tuple[TaskSpec, ...]
    """Those that could be certified."""
    by_split: dict[Split, dict[str, list[Example]]]
    num_read: int
    num_stored: int
    """Calls of agents; what the cluster asks in the background is none."""

    @property
    def factor(self) -> float:
        """Stored calls for each that was read."""
        return self.num_stored / max(1, self.num_read)


def read_sample(recipe: Recipe) -> Sample | None:
    """None where the store has no calls. Creates no store and writes nothing.

    Raises:
        StoreError: the calls cannot be read, or not without a key that this process lacks.
    """
    from cluster.calls import iterate_calls, read_call_columns
    from jobs.validate import calls_to_certify
    from training.discover import discover
    from training.selection import group_by_task
    from training.splits import SPLITS

    if "://" not in recipe.store and not pathlib.Path(recipe.store).is_dir():
        return None
    store = Store(recipe.store, is_made=False)
    stored = read_call_columns(store, ["audit_of", "action"]).to_pylist()
    num_stored = sum(not row["audit_of"] and row["action"] != "shadow" for row in stored)
    if not num_stored:
        return None
    examples: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    num_read = 0
    for example in _examples(iterate_calls(store), recipe):
        num_read += 1
        if example is not None:
            examples[example.split].append(example)
        if num_read == _MAX_READ:
            break
    if not any(examples.values()):
        return Sample((), {}, num_read, num_stored)
    found = discover(examples, recipe.discover)
    by_split = {split: group_by_task(examples[split], found.assignment) for split in SPLITS}
    needed = calls_to_certify(recipe, len(found.tasks))
    sample = Sample(found.tasks, by_split, num_read, num_stored)

    def is_enough(task: TaskSpec) -> bool:
        held_out = by_split["calibration"].get(task.task_id, ())
        return len({one.session_id for one in held_out}) * sample.factor >= needed

    return sample._replace(tasks=tuple(task for task in found.tasks if is_enough(task)))


def rows_of(sample: Sample, recipe: Recipe, name: str, section: str) -> list[TaskRows]:
    """What the base called `name` would be trained on.

    Args:
        section: pretrain leaves out answers that are longer than its own bound.

    Returns:
        Of every task that has rows; none where the base's tokenizer is not on this machine.
    """
    try:
        data = _tokenise(sample, recipe, name) if sample.tasks else {}
    except BaseUnavailableError:
        return []
    most = recipe.pretrain.max_answer_tokens if section == "pretrain" else None
    found = [_measure(sample, task_id, its, most) for task_id, its in data.items()]
    # As training/scratch.py has it: where no answer is short enough, all are learned.
    whole = [_measure(sample, task_id, its, None) for task_id, its in data.items()] if not any(found) else []
    return [rows for rows in (*found, *whole) if rows is not None]


def _examples(calls: Iterable[AgentCall], recipe: Recipe) -> Iterable[Example | None]:
    """One for each of the agents' calls; None for what no split takes."""
    from training.splits import split_of
    from training.validity import find_problem

    limits = {
        "keep_faces_person": recipe.curate.keep_faces_person,
        "max_prompt_chars": recipe.curate.max_prompt_chars,
    }
    for call in calls:
        if call.audit_of or (call.route and call.route.action == "shadow"):
            continue
        message = call.message
        if message is None or find_problem(call, **limits):
            yield None
            continue
        yield Example(
            example_id=call.call_id,
            split=split_of(call.session_id, recipe.curate.split),
            session_id=call.session_id,
            ts=call.ts,
            request=call.request,
            target=message,
            reference="gold" if call.served_by == "gold" else "llm",
            source_call_ids=(call.call_id,),
            client_ids=(call.client_id,),
        )


def _tokenise(sample: Sample, recipe: Recipe, name: str) -> dict[str, TaskData]:
    from training.bases import open_base
    from training.bounding import keep_fitting
    from training.catalog import ScratchModel, find_entry
    from training.dataset import tokenise_tasks
    from training.scratch import texts_of, train_tokenizer

    entry = find_entry(name)
    train, validation = (
        {task.task_id: sample.by_split[split].get(task.task_id, []) for task in sample.tasks}
        for split in ("train", "validation")
    )
    is_scratch = isinstance(entry, ScratchModel)
    if isinstance(entry, ScratchModel):
        texts = [text for task in sample.tasks for text in texts_of(train[task.task_id], task.static_lines)]
        tokenizer: Any = train_tokenizer(texts, entry.vocab_size)
    else:
        tokenizer = open_base(name).tokenizer
    window = recipe.specialists.max_model_tokens
    limits = {"is_scratch": is_scratch, "max_prompt_tokens": window * 3 // 4}
    data = tokenise_tasks(sample.tasks, train, validation, tokenizer, **limits)
    return {task_id: keep_fitting(its, window) for task_id, its in data.items()}


def _measure(sample: Sample, task_id: str, data: TaskData, most: int | None) -> TaskRows | None:
    """None where the task has no rows.

    Args:
        most: tokens of an answer that is learned; None takes all.
    """
    from training.dataset import num_answer_tokens

    rows = [row for row in data.train if most is None or num_answer_tokens(row) <= most]
    if not rows:
        return None
    lengths, answers = [len(row["input_ids"]) for row in rows], [num_answer_tokens(row) for row in rows]
    held_out = sum(len(groups.get(task_id, ())) for split, groups in sample.by_split.items() if split != "train")
    return TaskRows(
        num_train=round(len(rows) * sample.factor),
        num_validation=round(len(data.validation) * sample.factor),
        num_held_out=round(held_out * sample.factor),
        mean_tokens=sum(lengths) / len(lengths),
        mean_answer_tokens=sum(answers) / len(answers),
        longest_tokens=max(lengths),
        longest_answer_tokens=max(answers),
    )
