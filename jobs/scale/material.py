"""What experiments are trained and asked on: tasks with their examples, from call logs or from a store's calls.

Logs go the way of `ingest` and `discover`, a file at a time; a store's calls that of a conversion: curated, redacted,
discovered. Every split holds one call a session at most, because gates and intervals assume independent calls.
"""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.access import Pseudonyms
from cluster.errors import InputError
from cluster.records import AgentCall, Example, Split, TaskSpec
from cluster.store import Store, content_hash
from jobs.bench.selection import answering
from jobs.bench.usefulness import shared_sets
from jobs.recipe import Recipe, work_folder
from training.curate import curate
from training.discover import Discovery, discover
from training.formats import LogReader, find_files
from training.gate import minimum_calls, one_call_per_session
from training.leakage import ANSWER_FIELDS
from training.probe import spread
from training.selection import group_by_task
from training.snapshot import load_split
from training.splits import SPLITS, split_of

_SHARED = ("snips intents", "clinc150", "banking77", "nlupp", "snips")
_PUBLIC_KEY = b"scaling laboratory: logs as they are"
_MOST: Mapping[Split, int] = {"validation": 300, "calibration": 600, "test": 400}
"""Calls asked of each split at most: a cell must not spend its time on being scored."""
_MOST_QUICK: Mapping[Split, int] = {"train": 800, "validation": 100, "calibration": 200, "test": 150}
MOST_ANSWERS_QUICK = 10
"""Answers of a task that a model trained for seconds can learn: of 77 or 151 it learns none."""
LEAST_TRAIN = 50
_LEAST_LEARNED = 0.1
"""Agreement up to which nothing is called learned."""


class Material(NamedTuple):
    """One task and its examples."""

    task: TaskSpec
    source: str
    """File, or store, that it was found in."""
    splits: Mapping[Split, list[Example]]
    num_answers: int = 0
    """How many answers, the most frequent ones, its calls were cut to; 0: to none."""

    @property
    def name(self) -> str:
        """For pictures and tables."""
        cut = f" ({self.num_answers} answers)" if self.num_answers else ""
        return f"{self.source}: {self.task.name}{cut}" if self.source else f"{self.task.name}{cut}"

    @property
    def baseline(self) -> float:
        """Agreement on test calls of whoever always gives the answer that is most frequent in train."""
        counts = Counter(_answered(one) for one in self.splits["train"])
        asked = [_answered(one) for one in self.splits["test"]]
        return asked.count(counts.most_common(1)[0][0]) / len(asked)

    def is_learned(self, agreement: float) -> bool:
        """Whether a model of this agreement learned anything: laws and comparisons of those that did not are of chance."""
        return agreement > max(_LEAST_LEARNED, self.baseline)


def tell_baselines(material: Sequence[Material]) -> str:
    """A note for the reader of agreements."""
    told = ", ".join(f"{one.baseline:.0%} of {one.name}" for one in material)
    return f"Always the answer that is most frequent in train is right for {told}; a task counts as learned above that and above {_LEAST_LEARNED:.0%}."


def load_logs(paths: Sequence[pathlib.Path], recipe: Recipe, *, is_quick: bool = False) -> list[Material]:
    """Tasks of call logs, most train examples first.

    Args:
        paths: files or folders.
        is_quick: tasks small and easy enough to be learned in seconds, see `shorten`.

    Raises:
        InputError: a file is missing, or none has a task with enough examples.
    """
    found: list[Material] = []
    for path in find_files(paths):
        found += _discovered(path.name.split(".")[0], _read(path), recipe, is_quick)
    kept = _enough(found, recipe, ", ".join(map(str, paths)))
    return sorted(kept, key=lambda one: (-len(one.splits["train"]), one.task.task_id))


def load_shared(recipe: Recipe, *, is_quick: bool = False) -> list[Material]:
    """Tasks of the labelled sets that the benchmarks find (UNDERSTUDY_DATA): those first that a small base learns soonest.

    The intents of snips are a task beside its tool calls: the same utterances, answered by their label.

    Raises:
        InputError: a set is missing.
    """
    paths = {path.name.split(".")[0]: path for path in shared_sets()}
    calls = {name: _read(path) for name, path in paths.items()}
    calls["snips intents"] = [answering(call, call.label or "") for call in calls["snips"]]
    found = [one for name in _SHARED for one in _discovered(name, calls[name], recipe, is_quick)]
    return _enough(found, recipe, "the shared sets")


def load_store(recipe: Recipe, *, is_quick: bool = False) -> list[Material]:
    """Tasks of a store's calls, redacted as for training.

    Raises:
        InputError: it has no task with enough examples.
    """
    store = Store(recipe.store)
    snapshot = curate(store, recipe.curate, work=work_folder(recipe))
    by_split = {split: load_split(store, snapshot.id, split, as_served=False) for split in SPLITS}
    found = _by_task("", by_split, discover(by_split, recipe.discover), recipe, is_quick)
    kept = _enough(found, recipe, f"store {recipe.store}")
    return sorted(kept, key=lambda one: (-len(one.splits["train"]), one.task.task_id))


def shorten(splits: Mapping[Split, list[Example]], needed: int) -> tuple[dict[Split, list[Example]], int]:
    """Few enough examples and answers for a model of seconds to learn something.

    Args:
        needed: calibration calls below which a gate cannot open.

    Returns:
        The examples, and to how many answers they were cut: 0 where the task has no more, or where those that are most
        frequent leave too few calls, such as of tasks that answer everybody differently.
    """
    counts = Counter(_answered(one) for one in splits["train"])
    common = {answer for answer, _ in counts.most_common(MOST_ANSWERS_QUICK)}
    cut = {split: [one for one in own if _answered(one) in common] for split, own in splits.items()}
    is_cut = len(counts) > MOST_ANSWERS_QUICK and _is_enough(cut, needed)
    kept = cut if is_cut else splits
    few = {split: spread(own, _MOST_QUICK[split]) for split, own in kept.items()}
    return few, MOST_ANSWERS_QUICK if is_cut else 0


def save_material(material: Sequence[Material], folder: pathlib.Path) -> str:
    """Write tasks to where the trials of all nodes read them. Returns the hash of all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {one.task.task_id: json.dumps(_dump(one)) for one in material}
    for task_id, text in texts.items():
        (folder / f"{task_id}.json").write_text(text)
    return content_hash(texts)


def read_material(folder: pathlib.Path, task_id: str) -> Material:
    """A task as `save_material` wrote it."""
    loaded = json.loads((folder / f"{task_id}.json").read_text())
    splits = {split: [Example.model_validate(row) for row in rows] for split, rows in loaded["splits"].items()}
    return Material(TaskSpec.model_validate(loaded["task"]), loaded["source"], splits)


def _dump(one: Material) -> dict[str, Any]:
    splits = {split: [example.model_dump(mode="json") for example in own] for split, own in one.splits.items()}
    return {"task": one.task.model_dump(mode="json"), "source": one.source, "splits": splits}


def _by_task(
    source: str, by_split: dict[Split, list[Example]], discovery: Discovery, recipe: Recipe, is_quick: bool
) -> list[Material]:
    grouped = {split: group_by_task(by_split[split], discovery.assignment) for split in SPLITS}
    found = []
    for task in discovery.tasks:
        own = {split: one_call_per_session(grouped[split].get(task.task_id, []), seed=0) for split in SPLITS}
        if is_quick:
            found.append(Material(task, source, *shorten(own, _needed(recipe))))
        else:
            found.append(Material(task, source, {s: spread(one, _MOST.get(s, len(one))) for s, one in own.items()}))
    return found


def _needed(recipe: Recipe) -> int:
    return minimum_calls(recipe.gate.epsilon, recipe.gate.delta)


def _is_enough(splits: Mapping[Split, Sequence[Example]], needed: int) -> bool:
    """Whether a task's gate could open at all."""
    has_most = len(splits["train"]) >= LEAST_TRAIN and len(splits["calibration"]) >= needed
    return has_most and bool(splits["validation"]) and bool(splits["test"])


def _enough(found: Sequence[Material], recipe: Recipe, where: str) -> list[Material]:
    """Those tasks whose gate could open at all."""
    needed = _needed(recipe)
    kept = [one for one in found if _is_enough(one.splits, needed)]
    if not kept:
        raise InputError(
            f"{where}: {len(found)} tasks, none with {LEAST_TRAIN} train and {needed} calibration sessions and some of "
            "validation and test; next: --calls PATH... of more calls, or store=PATH of a store that has them"
        )
    return kept


def _read(path: pathlib.Path) -> list[AgentCall]:
    calls = LogReader(Pseudonyms(_PUBLIC_KEY), 0.0).read(path)
    return [call for call in calls if isinstance(call, AgentCall) and call.message]


def _discovered(source: str, calls: Sequence[AgentCall], recipe: Recipe, is_quick: bool) -> list[Material]:
    examples = [_example(call, recipe) for call in calls]
    by_split = drop_repeats({s: [e for e in examples if e.split == s] for s in SPLITS})
    return _by_task(source, by_split, discover(by_split, recipe.discover), recipe, is_quick)


def drop_repeats(by_split: Mapping[Split, list[Example]]) -> dict[Split, list[Example]]:
    """Train without requests that a later split asks too, as curation has it: no score rewards remembering."""
    held_out = {_asked(one) for split, own in by_split.items() if split != "train" for one in own}
    return {s: [e for e in own if s != "train" or _asked(e) not in held_out] for s, own in by_split.items()}


def _answered(example: Example) -> str:
    return content_hash({field: example.target.get(field) for field in ("content", "tool_calls")})


def _asked(example: Example) -> str:
    return content_hash({field: example.request[field] for field in ANSWER_FIELDS if example.request.get(field)})


def _example(call: AgentCall, recipe: Recipe) -> Example:
    return Example(
        example_id=call.call_id,
        split=split_of(call.session_id, recipe.curate.split),
        session_id=call.session_id,
        ts=call.ts,
        request=call.request,
        target=call.message or {},
        reference="gold" if call.label is not None else "llm",
        source_call_ids=(call.call_id,),
    )
