"""Examples of a task -> agreement and certified coverage: how many calls a task needs (`understudy scale data`).

Every task is learned from 50, 100, 200 ... of its train examples, with the same number of steps and several seeds; the gate
always has the whole calibration split, so that the curve tells of learning and not of certifying. The paper's rule of thumb
is 10,000 to 100,000 examples a task (arXiv 2506.02153, section 6); the data here ends far below, and what the law says
beyond its last point is said to lie beyond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.scale.cells import Measured
from jobs.scale.charts import Axes, Dot, draw_lines
from jobs.scale.laboratory import Laboratory
from jobs.scale.laws import LEVEL, Fit, Grid, Interval, Need, fit_law, mean_interval
from jobs.scale.material import Material, tell_baselines
from jobs.scale.report import Findings
from jobs.scale.trial import wrong_of

_FIRST = 50
_WANTED = (0.8, 0.9, 0.95)
"""Agreement, and coverage, that a number of calls is asked for."""
_FURTHEST = 1_000
_RULE_OF_THUMB = (10_000, 100_000)
_HEAD = [
    *("task", "examples", "seeds", "agreement", f"{LEVEL:.0%} interval"),
    *("certified coverage", f"coverage's {LEVEL:.0%} interval", "gates open"),
]
WHAT = {"agreement": "right", "coverage": "kept"}


def run(lab: Laboratory) -> Findings:
    """Measure the learning curves and fit their laws."""
    material = list(lab.load())[: lab.pick(quick=2, small=4, full=99)]
    seeds, steps = lab.pick(quick=2, small=3, full=5), lab.pick(quick=480, small=800, full=3200)
    parameters = [
        {
            "task": one.name,
            "tasks": [one.task.task_id],
            "base": lab.base,
            "examples": count,
            "steps": steps,
            "seed": seed,
            "batch_size": 16,
        }
        for one in material
        for count in sizes_of(len(one.splits["train"]), 2)
        for seed in range(seeds)
    ]
    measured = lab.train("data", material, parameters)
    curves = {one.name: _of_task(measured, one.task.task_id) for one in material}
    fits = {name: {what: _fit(own, what) for what in WHAT} for name, own in curves.items()}
    rows = [row for name, own in curves.items() for row in _rows(name, own)]
    return Findings(
        sentence=_sentence(material, rows, fits),
        head=_HEAD,
        rows=rows,
        laws={
            name: {
                what: {"law": fit.law.model_dump(), "needed": [fit.need(1 - share).model_dump() for share in _WANTED]}
                for what, fit in own.items()
                if fit
            }
            for name, own in fits.items()
        },
        records=[
            _record(one, task) for one in measured for task in material if task.task.task_id in one.result["tasks"]
        ],
        pictures=[_draw(rows, fits, what) for what in WHAT],
        notes=_notes(lab, material, fits, steps, seeds),
    )


def sizes_of(most: int, factor: int, first: int = _FIRST) -> list[int]:
    """first, first * factor, ... and all there are; the last one before that is left out where it is nearly all.

    Example:
        >>> sizes_of(850, 2), sizes_of(60, 2)
        ([50, 100, 200, 400, 850], [60])
    """
    counts = [first * factor**k for k in range(1 + max(0, math.floor(math.log(max(1, most / first), factor))))]
    return [*[count for count in counts if count * 1.25 < most], most]


def _of_task(measured: Sequence[Measured], task_id: str) -> dict[int, list[dict[str, Any]]]:
    """Examples -> what the seeds' models are worth."""
    found: dict[int, list[dict[str, Any]]] = {}
    for one in measured:
        if task_id in one.result["tasks"]:
            found.setdefault(one.cell.parameters["examples"], []).append(one.result["tasks"][task_id])
    return dict(sorted(found.items()))


def _fit(curve: Mapping[int, list[dict[str, Any]]], what: str) -> Fit | None:
    points = [(count, seed, facts) for count, own in curve.items() for seed, facts in enumerate(own)]
    if len(curve) < 3:
        return None
    wrong = [wrong_of(facts, WHAT[what]) for _, _, facts in points]
    if np.mean(wrong) in (0, 1):
        return None  # never wrong, or never anything else: no law falls through it
    return fit_law(Grid.of([[n] for n, _, _ in points], [s for _, s, _ in points], wrong), ["examples"])


def _rows(name: str, curve: Mapping[int, list[dict[str, Any]]]) -> list[list[Any]]:
    rows = []
    for count, own in curve.items():
        told: list[Any] = [name, count, len(own)]
        for what in WHAT.values():
            mean, ends = mean_interval(1 - np.array([wrong_of(facts, what) for facts in own], float))
            told += [round(mean, 4), span(ends)]
        rows.append([*told, f"{sum(not facts['refused'] for facts in own)} of {len(own)}"])
    return rows


def span(ends: Interval) -> str:
    return f"{ends.low:.3f} to {ends.high:.3f}"


def read_span(text: str) -> tuple[float, float]:
    low, high = text.split(" to ")
    return float(low), float(high)


def _record(one: Measured, task: Material) -> dict[str, Any]:
    facts = {**one.result["tasks"][task.task.task_id]}
    shared = {k: v for k, v in one.result.items() if k not in ("tasks", "told")}
    return {"task": task.name, "kind": task.task.kind, **one.cell.parameters, **shared, **facts, "cell": one.cell.key}


def _draw(rows: Sequence[Sequence[Any]], fits: Mapping[str, Mapping[str, Fit | None]], what: str) -> str:
    place = 3 if what == "agreement" else 5
    if what == "coverage" and not any(row[place] for row in rows):
        return "<p>No gate opened at any number of examples: certified coverage is 0 everywhere.</p>"
    series: dict[str, list[Dot]] = {}
    for row in rows:
        series.setdefault(row[0], []).append(Dot(row[1], row[place], *read_span(row[place + 1])))
    laws = {}
    for name, own in fits.items():
        if (fit := own[what]) and fit.law.is_fitting:
            xs = np.geomspace(_FIRST, 4 * series[name][-1].x, 40)
            laws[name] = [(float(x), 1 - fit.law.error_at([float(x)])) for x in xs]
    label = {"agreement": "agreement on test calls", "coverage": "certified coverage of test calls"}[what]
    caption = (
        f"{label.capitalize()} by train examples; bars are {LEVEL:.0%} intervals over seeds and calls, curves the laws that "
        "fit, drawn on to four times the data; lines from point to point are no law."
    )
    return draw_lines(
        series, Axes("train examples of the task", label, is_x_log=True, y_limits=(0, 1.02)), caption, laws=laws
    )


def _sentence(
    material: Sequence[Material],
    rows: Sequence[Sequence[Any]],
    fits: Mapping[str, Mapping[str, Fit | None]],
) -> str:
    last = {row[0]: row for row in rows}
    most = max(row[1] for row in last.values())
    # As measured, and not by the law: a task that is always answered rightly has none.
    reached = {name: [row[1] for row in rows if row[0] == name and row[3] >= _WANTED[1]] for name in last}
    within = sorted(min(counts) for counts in reached.values() if counts)
    told = f"{len(within)} of {len(material)} tasks reach {_WANTED[1]:.0%} agreement within the data" + (
        f" (from {within[0]:,.0f} examples on)" if within else ""
    )
    learned = [one.name for one in material if one.is_learned(last[one.name][3])]
    of_each = " of each task" if len(last) > 1 else ""
    return (
        f"With all {_range([row[1] for row in last.values()], ',')} train examples{of_each} agreement is "
        f"{_range([row[3] for row in last.values()], '.0%')}; {told}{_rates(learned, fits)}; the data stops at {most:,} examples, "
        f"below the rule of thumb's {_RULE_OF_THUMB[0]:,}."
    )


def _rates(learned: Sequence[str], fits: Mapping[str, Mapping[str, Fit | None]]) -> str:
    """What the laws say of those tasks that were learned at all."""
    laws = [fit.law for name in learned if (fit := fits[name]["agreement"])]
    fitting = [law for law in laws if law.is_fitting]
    if not fitting:
        return f"; no power law fits any of {len(laws)} learned tasks" if laws else ""
    told = f"; error above its floor goes with examples to the power of {_range([-law.rates[0] for law in fitting], '+.2f')}"
    if len(fitting) == 1:
        ends = fitting[0].rate_intervals[0]
        told += f" ({LEVEL:.0%} interval {-ends.high:+.2f} to {-ends.low:+.2f})"
    if len(fitting) < len(fits):
        told += f" in the {len(fitting)} of {len(fits)} tasks that were learned and that a power law fits"
    return told


def _range(values: Sequence[float], form: str) -> str:
    """From the smallest to the largest, or the one value that all are told as."""
    low, high = (f"{pick(values):{form}}" for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _notes(
    lab: Laboratory,
    material: Sequence[Material],
    fits: Mapping[str, Mapping[str, Fit | None]],
    steps: int,
    seeds: int,
) -> list[str]:
    told = [
        f"{lab.base}, {steps} steps of 16 examples at every size, {seeds} seeds; a scratch base has seen the task's examples "
        "and nothing else, so a pretrained base may need fewer calls.",
        "An answer is right if it is the reference's token for token; certified coverage is the share of test calls that a gate "
        f"with epsilon {lab.recipe.gate.epsilon:g} and delta {lab.recipe.gate.delta:g} keeps, 0 where it is refused.",
        tell_baselines(material),
    ]
    for one in material:
        for what, fit in fits[one.name].items():
            if not fit:
                continue
            if fit.law.is_fitting:
                needs = [fit.need(1 - share) for share in _WANTED]
                told += [f"{one.name}: {what} of {1 - need.error:.0%} {_tell(need, one)}" for need in needs]
            else:
                told.append(
                    f"{one.name}: no power law fits {what}: the likeliest lies outside the intervals of {fit.law.num_missed} of "
                    f"{fit.law.num_points} sizes, so nothing is said of what more examples would do"
                )
    return told


def _tell(need: Need, one: Material) -> str:
    most = len(one.splits["train"])
    if need.size is None:
        return "is reached by the fitted law at no number of examples"
    low, high = (_count(end, most) if end is not None else "no end" for end in (need.low, need.high))
    ends = f"{LEVEL:.0%} interval {low} to {high}"
    if need.is_measured:
        where = "within the data"
    elif need.size > most:
        where = f"beyond the {most:,} that there are: the law carried on, not seen"
    else:
        where = "fewer than were tried: the law carried back, not seen"
    return f"takes {_count(need.size, most)} examples ({ends}), {where}"


def _count(size: float, most: int) -> str:
    """So many examples; where a law was followed a thousand times beyond its data, no more than that is said."""
    return f"{size:,.0f}" if size <= _FURTHEST * most else f"more than {_FURTHEST * most:,}"
