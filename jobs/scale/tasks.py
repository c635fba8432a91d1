"""One specialist for each task, one for all, or one for each group, at equal total compute (`understudy scale tasks`).

The paper's Lego claim (arXiv 2506.02153): small expert models are added side by side instead of one that grows. Here K tasks
are learned by K models, by one model, and by models for groups of tasks; every way spends the same steps in all and sees the
same examples, so a shared model has K times the steps of a specialist. Groups join tasks of one kind of answer, and of those
near ones by the words of their prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.scale.cells import Measured
from jobs.scale.charts import Dot, draw_groups
from jobs.scale.data import read_span, span
from jobs.scale.laboratory import Laboratory
from jobs.scale.laws import LEVEL, Interval, joint_mean_interval, mean_interval
from jobs.scale.material import Material, tell_baselines
from jobs.scale.report import Findings
from jobs.scale.trial import wrong_of
from training.usefulness import group_topics

_AND = "+"
"""Between the ways that a model is one of."""
_HEAD = [
    "way",
    "models",
    "task",
    "seeds",
    "agreement",
    f"{LEVEL:.0%} interval",
    "certified coverage",
    f"coverage's {LEVEL:.0%} interval",
]


def run(lab: Laboratory) -> Findings:
    """Train every way and compare on the same test calls."""
    material = list(lab.load())[: lab.pick(quick=3, small=5, full=12)]
    seeds, steps = lab.pick(small=3, full=5), lab.pick(quick=320, small=800, full=3200)
    count = lab.pick(quick=800, small=1600, full=100_000)
    ways = _ways(material)
    # A group of one task is learned apart: one model stands for both ways.
    parameters = [
        {
            "way": _AND.join(way for way, groups in ways.items() if group in groups),
            "tasks": list(group),
            "base": lab.base,
            "examples": count,
            "steps": steps * len(group),
            "seed": seed,
            "batch_size": 16,
        }
        for group in dict.fromkeys(group for groups in ways.values() for group in groups)
        for seed in range(seeds)
    ]
    # The longest first: a shared model that began last would run alone at the end.
    parameters.sort(key=lambda one: -one["steps"])
    measured = lab.train("tasks", material, parameters)
    found = {way: _of_way(measured, way, material, seeds) for way in ways}
    rows = [row for way in ways for row in _rows(way, len(ways[way]), material, found[way])]
    differences = {way: _difference(found["apart"], found[way]) for way in ways if way != "apart"}
    return Findings(
        sentence=_sentence(rows, differences, material),
        head=_HEAD,
        rows=rows,
        laws={f"apart minus {way}": {"mean": mean, **ends.model_dump()} for way, (mean, ends) in differences.items()},
        records=[_record(m, material, task_id) for m in measured for task_id in m.result["tasks"]],
        pictures=[_draw(rows)],
        notes=[
            f"{lab.base}; every way takes {steps * len(material)} steps of 16 examples in all and at most {count} examples of "
            f"each task; {seeds} seeds. Operations differ as far as tasks' prompts differ in length.",
            tell_baselines(material),
            "Differences are between means over tasks, every task counting alike, on the same test calls and seeds.",
            "A shared model of the same size is as cheap to serve as one specialist; what many adapters cost to serve is "
            "`understudy scale serve`.",
        ],
    )


def _ways(material: Sequence[Material]) -> dict[str, list[tuple[str, ...]]]:
    """Way -> groups of task ids, each learned by one model."""
    ids = [one.task.task_id for one in material]
    ways = {"apart": [(task_id,) for task_id in ids], "groups": group_tasks(material), "shared": [tuple(ids)]}
    # Two tasks have no groups between each alone and all together.
    return {way: groups for way, groups in ways.items() if way != "groups" or 1 < len(groups) < len(ids)}


def group_tasks(material: Sequence[Material]) -> list[tuple[str, ...]]:
    """Tasks of one kind of answer, those of like prompts in at most two groups each."""
    from cluster.route_model import NUM_BUCKETS, hashed_features

    groups = []
    by_kind = itertools.groupby(sorted(material, key=lambda one: one.task.kind), key=lambda one: one.task.kind)
    for _, own in by_kind:
        members = list(own)
        if len(members) < 3:
            groups.append(tuple(one.task.task_id for one in members))
            continue
        points = np.zeros((len(members), NUM_BUCKETS), dtype=np.float32)
        for place, one in enumerate(members):
            buckets, values = hashed_features("\n".join([*one.task.static_lines, one.task.name]))
            points[place, buckets] = values / max(float(np.linalg.norm(values)), 1e-6)
        parts = group_topics(points, 2)[0]
        groups += [tuple(m.task.task_id for m, part in zip(members, parts, strict=True) if part == n) for n in (0, 1)]
    return groups


def _of_way(
    measured: Sequence[Measured], way: str, material: Sequence[Material], seeds: int
) -> dict[str, list[dict[str, Any]]]:
    """task_id -> what each seed's model is worth on it."""
    own = [m for m in measured if way in m.cell.parameters["way"].split(_AND)]
    by_seed = {(t, m.cell.parameters["seed"]): facts for m in own for t, facts in m.result["tasks"].items()}
    return {one.task.task_id: [by_seed[one.task.task_id, seed] for seed in range(seeds)] for one in material}


def _right(facts: Sequence[Mapping[str, Any]], what: str = "right") -> np.ndarray:
    return 1 - np.array([wrong_of(one, what) for one in facts], float)


def _difference(
    apart: Mapping[str, list[dict[str, Any]]], other: Mapping[str, list[dict[str, Any]]]
) -> tuple[float, Interval]:
    """Mean over tasks of the agreement apart minus the other way's, with an interval over seeds and calls.

    Calls are drawn for each task, seeds for all tasks together: a shared model's seed is that of all its tasks.
    """
    pairs = [_right(apart[task_id]) - _right(other[task_id]) for task_id in apart]
    return joint_mean_interval(pairs)


def _rows(
    way: str, num_models: int, material: Sequence[Material], found: Mapping[str, list[dict[str, Any]]]
) -> list[list[Any]]:
    rows = []
    for one in material:
        facts = found[one.task.task_id]
        told: list[Any] = [way, num_models, one.name, len(facts)]
        for what in ("right", "kept"):
            mean, ends = mean_interval(_right(facts, what))
            told += [round(mean, 4), span(ends)]
        rows.append(told)
    return rows


def _record(m: Measured, material: Sequence[Material], task_id: str) -> dict[str, Any]:
    name = next(one.name for one in material if one.task.task_id == task_id)
    shared = {k: v for k, v in m.result.items() if k not in ("tasks", "told")}
    return {"task": name, **m.cell.parameters, **shared, **m.result["tasks"][task_id], "cell": m.cell.key}


def _draw(rows: Sequence[Sequence[Any]]) -> str:
    series: dict[str, dict[str, Dot]] = {}
    for row in rows:
        series.setdefault(row[0], {})[row[2]] = Dot(0, row[4], *read_span(row[5]))
    caption = f"Agreement on test calls at equal total compute; bars are {LEVEL:.0%} intervals."
    return draw_groups(series, "agreement on test calls", caption, limits=(0, 1.02))


def _sentence(
    rows: Sequence[Sequence[Any]], differences: Mapping[str, tuple[float, Interval]], material: Sequence[Material]
) -> str:
    means = {
        way: float(np.mean([row[4] for row in rows if row[0] == way])) for way in dict.fromkeys(row[0] for row in rows)
    }
    told = ", ".join(f"{way} {mean:.1%}" for way, mean in means.items())
    num_tasks, of_name = len(material), {one.name: one for one in material}
    if not any(of_name[row[2]].is_learned(row[4]) for row in rows):
        return f"At this compute no way learns the {num_tasks} tasks, so that none can be compared: agreement {told}."
    mean, ends = differences["shared"]
    verdict = "are better than" if ends.low > 0 else "are worse than" if ends.high < 0 else "cannot be told from"
    return (
        f"At equal total compute specialists for each of {num_tasks} tasks {verdict} one shared model: agreement {told}; "
        f"apart minus shared {100 * mean:+.1f} points ({LEVEL:.0%} interval {100 * ends.low:+.1f} to {100 * ends.high:+.1f})."
    )
