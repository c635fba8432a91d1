"""Measures on Ray whether a task's calls are answered better by one specialist or by several, a part of them each (S3).

For every proposed cut into k parts one joint probe and one probe per part are trained alike, on the same base with the same
tokenizer; the joint one for k times as many steps, so that both ways cost the same and being split is not being trained
more. All answer the same validation calls, one per session, each call by its part's
probe. A call that does not fit a probe's prompt counts as answered wrongly by it. The best cut that is surely better
(training/usefulness.py) is trained and compared once more from another seed, because two trainings differ by chance as
well as by what they are trained on. Knows nothing of how parts are found or what becomes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cluster.records import Example, TaskSpec
from training.dataset import find_written, tokenise_tasks
from training.gate import one_call_per_session
from training.naming import find_static_lines
from training.paired import row_key
from training.probe import Contender, Measuring, ProbePlan, ProbeResult, measure, spread
from training.usefulness import Comparison, choose_split, compare

MAX_VALIDATION = 400
"""Calls that a cut is compared on at most; evenly spread over the validation split."""


class SplitTrial(NamedTuple):
    """One task and the ways to cut it."""

    task: TaskSpec
    train: list[Example]
    validation: list[Example]
    cuts: Sequence[Mapping[str, int]]
    """Each: example_id -> part, of all examples of train and validation."""
    contender: Contender
    """The base that specialists are probed on, as `training.candidates.examine` found it to fit the task."""


class SplitMeasurement(NamedTuple):
    """What came of one trial."""

    joint: float | None
    """Share of the validation calls that the joint specialist of fewest steps answers rightly; None where a probe failed."""
    compared: tuple[Comparison, ...]
    """One for each cut; empty where a probe failed."""
    chosen: int | None = None
    """Number of the cut that is surely better; None keeps the task together."""
    confirmed: Comparison | None = None
    """The best cut once more, from another seed."""
    error: str | None = None


class _Specialist(NamedTuple):
    plan: ProbePlan
    keys: dict[str, tuple[str, str]]
    """example_id -> how its answer is known; of validation calls that it can be asked."""


def measure_splits(
    trials: Sequence[SplitTrial], measuring: Measuring, max_prompt_tokens: int
) -> list[SplitMeasurement]:
    """Train and compare on the connected Ray cluster, all trials side by side; results in their order."""
    trials = [one._replace(validation=validation_sample(one.validation)) for one in trials]
    num_compared = sum(len(trial.cuts) for trial in trials)
    first = _compare_all(trials, measuring, max_prompt_tokens, num_compared)
    best = [choose_split(one.compared) for one in first]
    hopeful = [n for n, cut in enumerate(best) if cut is not None]
    again = [trials[n]._replace(cuts=[trials[n].cuts[best[n] or 0]]) for n in hopeful]
    confirmed = dict(
        zip(hopeful, _compare_all(again, _reseeded(measuring), max_prompt_tokens, len(again)), strict=True)
    )
    found = []
    for number, one in enumerate(first):
        second = confirmed.get(number)
        if second is None:
            found.append(one)
            continue
        comparison = next(iter(second.compared), None)
        is_sure = comparison is not None and comparison.is_better_apart
        found.append(one._replace(chosen=best[number] if is_sure else None, confirmed=comparison, error=second.error))
    return found


def count_probes(trials: Sequence[SplitTrial]) -> int:
    """Probes that the measurement trains, those of a confirmation left out."""
    parts = [[len(set(cut.values())) for cut in trial.cuts] for trial in trials]
    return sum(len(set(own)) + sum(own) for own in parts)


def validation_sample(validation: Sequence[Example]) -> list[Example]:
    """The calls that are compared on: independent of each other, and not too many."""
    return spread(one_call_per_session(validation, seed=0), MAX_VALIDATION)


def _compare_all(
    trials: Sequence[SplitTrial], measuring: Measuring, max_prompt_tokens: int, num_compared: int
) -> list[SplitMeasurement]:
    """Every trial measured once; nothing is chosen."""
    if not trials:
        return []
    joints = [_joint_of(trial, max_prompt_tokens) for trial in trials]
    apart = [[_parts_of(trial, n, max_prompt_tokens) for n in range(len(trial.cuts))] for trial in trials]
    everyone = [
        *(one for own in joints for one in own.values()),
        *(one for cuts in apart for parts in cuts for one in parts.values()),
    ]
    scored = {name: max(1, len(one.keys)) for one in everyone for name in one.plan.contender.data}
    results = measure(
        [one.plan for one in everyone], measuring._replace(num_scored=scored, with_answers=True), halving=False
    )
    by_name = {one.plan.contender.name: result for one, result in zip(everyone, results, strict=True)}
    found = []
    for trial, joint, cuts in zip(trials, joints, apart, strict=True):
        own = [*joint.values(), *(one for parts in cuts for one in parts.values())]
        error = next((e for one in own if (e := by_name[one.plan.contender.name].error)), None)
        if error:
            found.append(SplitMeasurement(None, (), error=error))
            continue
        ids = [example.example_id for example in trial.validation]
        of_joint = {k: [_is_right(one, i, by_name) for i in ids] for k, one in joint.items()}
        compared = []
        for cut, parts in zip(trial.cuts, cuts, strict=True):
            of_parts = [_is_right(parts[cut[i]], i, by_name) for i in ids]
            told = compare(of_joint[len(parts)], of_parts, num_parts=len(parts), num_compared=num_compared)
            compared.append(told)
        found.append(SplitMeasurement(sum(of_joint[min(of_joint)]) / len(ids), tuple(compared)))
    return found


def _joint_of(trial: SplitTrial, max_prompt_tokens: int) -> dict[int, _Specialist]:
    """Number of parts -> the joint specialist that is trained as long as so many parts together."""
    found = {}
    for num_parts in sorted({len(set(cut.values())) for cut in trial.cuts}):
        one = _specialist(trial, f"{trial.task.task_id}-joint{num_parts}", None, 0, max_prompt_tokens)
        found[num_parts] = one._replace(plan=one.plan._replace(times_steps=num_parts))
    return found


def _parts_of(trial: SplitTrial, number: int, max_prompt_tokens: int) -> dict[int, _Specialist]:
    cut = trial.cuts[number]
    name = f"{trial.task.task_id}-cut{number}"
    return {
        part: _specialist(trial, f"{name}-part{part}", cut, part, max_prompt_tokens)
        for part in sorted(set(cut.values()))
    }


def _specialist(
    trial: SplitTrial, name: str, cut: Mapping[str, int] | None, part: int, max_prompt_tokens: int
) -> _Specialist:
    """The probe of one part, or of the whole task."""
    train, validation = (
        [e for e in examples if cut is None or cut[e.example_id] == part]
        for examples in (trial.train, trial.validation)
    )
    lines = trial.task.static_lines if cut is None else find_static_lines(train)
    task = trial.task.model_copy(update={"task_id": name, "static_lines": lines})
    limits = {"is_scratch": trial.contender.is_scratch, "max_prompt_tokens": max_prompt_tokens}
    tokenizer = trial.contender.tokenizer
    data = tokenise_tasks([task], {name: train}, {name: validation}, tokenizer, **limits)
    asked = find_written(validation, data[name].prompt_format, tokenizer)
    keys = {
        example.example_id: (name, row_key(row["input_ids"]))
        for example, row in zip(asked, data[name].validation, strict=True)
    }
    contender = trial.contender._replace(name=name, data=data, few_shot={}, num_shots={})
    return _Specialist(ProbePlan(contender, None, len(data[name].train)), keys)


def _is_right(specialist: _Specialist, example_id: str, results: Mapping[str, ProbeResult]) -> bool:
    key = specialist.keys.get(example_id)
    return key is not None and results[specialist.plan.contender.name].answers[key]


def _reseeded(measuring: Measuring) -> Measuring:
    pretrain, finetune = (
        config.model_copy(update={"seed": config.seed + 1}) for config in (measuring.pretrain, measuring.finetune)
    )
    return measuring._replace(pretrain=pretrain, finetune=finetune, folder=measuring.folder / "again")
