"""Probes of the chosen base -> what the full fine-tunes will reach and what calls will cost then, before they are run (S4).

Each task's agreement and coverage are carried on by a law (training/learning_curve.py) to the size of the full training:
over numbers of examples where the base was probed with two or more, else over the steps of its one probe. Steps carry a
bias: a probe's learning rate ends with the probe, so that its early scores are those of a training cut short.

Coverage is what a threshold on the validation sample would keep at the gate's epsilon, with nothing certified: the gate
keeps less where calibration calls are few. Cost counts the LLM's money alone, because what a replica costs a call
depends on how busy it will be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from cluster.records import Example, Record
from training.candidates import ProbeRun, Scope
from training.learning_curve import Point, Prediction, predict_share


class TaskForecast(Record):
    """What one task's specialist will do after the full training."""

    task_id: str
    points: tuple[Point, ...]
    """Agreement as it was probed."""
    size: float
    """Of the full training, in the unit of the points."""
    agreement: Prediction
    coverage: Prediction


class Cost(Record):
    """Of 1,000 calls of these tasks, in US dollars paid to the LLM."""

    before: float
    after: Prediction


class Forecast(Record):
    """Of all tasks; intervals are at level 0.9 for each task, and sums of them are wider than they need be."""

    unit: Literal["examples", "steps"]
    tasks: tuple[TaskForecast, ...]
    agreement: Prediction
    """Mean over tasks by their calls, as are the others."""
    coverage: Prediction
    cost_usd_per_1000: Cost | None
    """None: the captured calls name no cost."""


def forecast(
    probes: Sequence[ProbeRun], scope: Scope, num_scored: Mapping[str, int], full_steps: int
) -> Forecast | None:
    """Foretell the full training from probes of one base and rank.

    Args:
        probes: that reached the last rung; any others are left out.
        full_steps: optimiser steps of the full training in probes' batches; used where only steps were varied.

    Returns:
        None where two sizes were not measured, or where there are no tasks.
    """
    last = max((probe.rungs[-1].num_steps for probe in probes if probe.rungs), default=0)
    finished = [probe for probe in probes if probe.rungs and probe.rungs[-1].num_steps == last]
    by_examples = {probe.num_examples for probe in finished}
    tasks = []
    for task in scope.tasks:
        num_train = len(scope.by_split["train"][task.task_id])
        if len(by_examples) > 1:
            sized = [(min(probe.num_examples, num_train), probe.rungs[-1]) for probe in finished]
            size = float(num_train)
        else:
            sized = [(rung.num_steps, rung) for probe in finished for rung in probe.rungs if rung.num_steps]
            size = float(max(full_steps, last))
        scored = num_scored[task.task_id]
        shares = {
            name: tuple(
                Point(size=at, num_scored=scored, num_right=round(getattr(rung, name)[task.task_id] * scored))
                for at, rung in sorted(sized, key=lambda pair: pair[0])
                if task.task_id in getattr(rung, name)
            )
            for name in ("task_scores", "task_coverage")
        }
        agreement, coverage = (predict_share(points, size) for points in shares.values())
        if agreement is None or coverage is None:
            return None
        fields = {"points": shares["task_scores"], "agreement": agreement, "coverage": coverage}
        tasks.append(TaskForecast(task_id=task.task_id, size=size, **fields))
    if not tasks:
        return None
    shares_of = _weights({task.task_id: task.num_calls for task in scope.tasks})
    return Forecast(
        unit="examples" if len(by_examples) > 1 else "steps",
        tasks=tuple(tasks),
        agreement=_mean([one.agreement for one in tasks], shares_of),
        coverage=_mean([one.coverage for one in tasks], shares_of),
        cost_usd_per_1000=_cost(tasks, scope, shares_of),
    )


def describe(found: Forecast) -> str:
    """One line for the person who is about to spend."""
    text = (
        f"after the full training: agreement {_range(found.agreement, 100, '%')}, coverage {_range(found.coverage, 100, '%')} "
        f"(90% intervals, from {found.unit})"
    )
    if found.cost_usd_per_1000 is None:
        return f"{text}; cost unknown: the captured calls name none"
    cost = found.cost_usd_per_1000
    return f"{text}; LLM cost per 1,000 calls ${cost.before:.3g} -> ${_range(cost.after)}, replica time not counted"


def _range(found: Prediction, factor: float = 1.0, unit: str = "") -> str:
    value, low, high = (f"{factor * share:.3g}" for share in (found.value, found.low, found.high))
    return f"{value}{unit} [{low}, {high}]"


def _weights(counts: Mapping[str, int]) -> list[float]:
    total = sum(counts.values())
    return [count / total if total else 1 / len(counts) for count in counts.values()]


def _mean(found: Sequence[Prediction], weights: Sequence[float]) -> Prediction:
    return Prediction(
        **{
            name: sum(weight * getattr(one, name) for weight, one in zip(weights, found, strict=True))
            for name in ("value", "low", "high")
        }
    )


def _cost(tasks: Sequence[TaskForecast], scope: Scope, weights: Sequence[float]) -> Cost | None:
    usd = [_mean_cost(scope.by_split["train"][task.task_id]) for task in tasks]
    priced = [one for one in usd if one is not None]
    if len(priced) < len(usd):
        return None
    per_1000 = [1000 * weight * one for weight, one in zip(weights, priced, strict=True)]
    left = {
        name: sum(one * (1 - getattr(task.coverage, of)) for one, task in zip(per_1000, tasks, strict=True))
        for name, of in (("value", "value"), ("low", "high"), ("high", "low"))
    }
    return Cost(before=sum(per_1000), after=Prediction(**left))


def _mean_cost(examples: Sequence[Example]) -> float | None:
    known = [example.cost_usd for example in examples if example.cost_usd is not None]
    return sum(known) / len(known) if known else None
