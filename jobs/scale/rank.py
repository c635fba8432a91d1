"""LoRA rank, targets, DoRA and full fine-tuning at equal compute (`understudy scale rank`).

One base, trained from scratch on all tasks for a short time unless the recipe's select.base names another, is fine-tuned on
each task in every way. A LoRA needs no gradient of the frozen weights, 4 operations a weight and token where full training
takes 6 (Kaplan et al. 2020, arXiv 2001.08361), so full training gets two thirds of the steps. What an adapter's own matrices
cost is left out of the plan and stands in the table as CPU seconds.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.errors import ConfigError
from jobs.scale.cells import CellBook, Measured, measure_here
from jobs.scale.charts import Axes, Dot, draw_groups, draw_lines
from jobs.scale.data import read_span, span
from jobs.scale.laboratory import Laboratory
from jobs.scale.laws import LEVEL, Interval, mean_interval
from jobs.scale.material import Material, tell_baselines
from jobs.scale.report import Findings
from jobs.scale.trial import pretrain_base, wrong_of
from training.catalog import ScratchModel, find_entry
from training.methods import SERVABLE
from training.probe import at_rank

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_RANKS = (1, 2, 4, 8, 16, 32)
_FIRST = "lora, rank 1"
"""The way that others are compared with."""
_OTHER_RANK = 8
"""Of targets and methods that are compared at one rank."""
_HEAD = [
    "way",
    "servable",
    "task",
    "steps",
    "seeds",
    "agreement",
    f"{LEVEL:.0%} interval",
    "certified coverage",
    "CPU s a run",
]


def run(lab: Laboratory) -> Findings:
    """Fine-tune in every way and compare on the same test calls."""
    material = list(lab.load())[: lab.pick(quick=1, small=3, full=6)]
    seeds, steps = lab.pick(quick=2, small=3, full=5), lab.pick(quick=120, small=240, full=1200)
    base = lab.base if lab.recipe.select.base else lab.pick(quick="scratch-micro", small="scratch-tiny")
    entry = find_entry(base)
    start = _start(lab, material, entry) if isinstance(entry, ScratchModel) else None
    ways = _ways(lab)
    parameters = [
        {
            "way": way,
            "task": one.name,
            "tasks": [one.task.task_id],
            "base": base,
            "examples": 100_000,
            "steps": max(4, int(steps * share) // 4 * 4),
            "seed": seed,
            "finetune": changes,
            **({"start": str(start)} if start else {}),
        }
        for one in material
        for way, (changes, share) in ways.items()
        for seed in range(seeds)
    ]
    measured = lab.train("rank", material, parameters)
    rows = [row for one in material for way in ways for row in _rows(one, way, ways[way][0]["method"], measured)]
    best = {one.name: _best(one, ways, measured) for one in material}
    return Findings(
        sentence=_sentence(rows, best, material),
        head=_HEAD,
        rows=rows,
        laws={
            "best minus rank 1": {name: {"way": way, "mean": m, **e.model_dump()} for name, (way, m, e) in best.items()}
        },
        records=[
            {"task": one.name, **_flat(m), **m.result["tasks"][one.task.task_id], "cell": m.cell.key}
            for m in measured
            for one in material
            if one.task.task_id in m.result["tasks"]
        ],
        pictures=[_draw_ranks(rows), _draw_ways(rows)],
        notes=[
            f"{base}"
            + (
                ", trained from scratch on all tasks for a short time first: it has seen their examples; "
                if start
                else "; "
            )
            + f"{steps} steps of LoRA, two thirds of that with all weights; {seeds} seeds; the scale alpha / rank is the same at all ranks.",
            tell_baselines(material),
            "DoRA and full fine-tunes cannot be served as adapters over one base; they are here to compare with.",
        ],
    )


def _ways(lab: Laboratory) -> dict[str, tuple[dict[str, Any], float]]:
    """Name -> changes of the fine-tune, and steps as a share of a LoRA's."""
    ranks = lab.pick(quick=(1, 8), small=_RANKS)
    lora = lab.recipe.finetune.model_copy(update={"method": "lora"})

    def at(rank: int, **changes: Any) -> dict[str, Any]:
        scaled = at_rank(lora, rank)
        return {"method": "lora", "lora_rank": rank, "lora_alpha": scaled.lora_alpha, **changes}

    ways = {f"lora, rank {rank}": (at(rank), 1.0) for rank in ranks}
    if lab.size != "quick":
        ways["attention alone"] = (at(_OTHER_RANK, lora_targets=list(_ATTENTION)), 1.0)
        ways["MLP alone"] = (at(_OTHER_RANK, lora_targets=list(_MLP)), 1.0)
    ways[f"dora, rank {_OTHER_RANK}"] = (at(_OTHER_RANK, method="dora"), 1.0)
    ways["full"] = ({"method": "full"}, 2 / 3)
    return ways


def _start(lab: Laboratory, material: Sequence[Material], entry: ScratchModel) -> pathlib.Path:
    """The scratch base, trained once; a killed experiment finds it again.

    Raises:
        ConfigError: what an earlier run of OUT trained is gone.
    """
    _, data = lab.save(material)
    steps = lab.pick(quick=160, small=400, full=2000)
    cells = lab.cells("rank base", data, [{"base": entry.name, "steps": steps}])
    work = lab.out / f"base-{cells[0].key}"

    def measure(parameters: dict[str, Any]) -> dict[str, Any]:
        return {"folder": str(pretrain_base(lab.recipe, material, entry, parameters["steps"], work))}

    folder = pathlib.Path(measure_here(cells, measure, CellBook(lab.out), lab.say)[0].result["folder"])
    if not folder.is_dir():
        raise ConfigError(
            f"--out {lab.out}: the base {folder} that its cells were trained on is gone; next: another --out"
        )
    return folder


def _of(one: Material, way: str, measured: Sequence[Measured]) -> list[Measured]:
    own = [m for m in measured if m.cell.parameters["way"] == way and one.task.task_id in m.result["tasks"]]
    return sorted(own, key=lambda m: m.cell.parameters["seed"])


def _right(one: Material, own: Sequence[Measured], what: str = "right") -> np.ndarray:
    return 1 - np.array([wrong_of(m.result["tasks"][one.task.task_id], what) for m in own], float)


def _rows(one: Material, way: str, method: str, measured: Sequence[Measured]) -> list[list[Any]]:
    own = _of(one, way, measured)
    mean, ends = mean_interval(_right(one, own))
    kept = float(_right(one, own, "kept").mean())
    cpu = statistics.median(m.result["cpu_seconds"] for m in own)
    is_servable = "yes" if method in SERVABLE else "no"
    told = [way, is_servable, one.name, own[0].result["steps"], len(own), round(mean, 4), span(ends)]
    return [[*told, round(kept, 4), cpu]]


def _best(one: Material, ways: Mapping[str, Any], measured: Sequence[Measured]) -> tuple[str, float, Interval]:
    """The best way, and how much better than rank 1 it is. It was picked on the calls it is told on: the mean flatters."""
    right = {way: _right(one, _of(one, way, measured)) for way in ways}
    best = max(right, key=lambda way: float(right[way].mean()))
    mean, ends = mean_interval(right[best] - right[_FIRST], lowest=-1.0)
    return best, mean, ends


def _flat(m: Measured) -> dict[str, Any]:
    shared = {k: v for k, v in m.result.items() if k not in ("tasks", "told")}
    return {**{k: v for k, v in m.cell.parameters.items() if k != "start"}, **shared}


def _draw_ranks(rows: Sequence[Sequence[Any]]) -> str:
    series: dict[str, list[Dot]] = {}
    for row in rows:
        if row[0].startswith("lora, rank "):
            series.setdefault(row[2], []).append(Dot(int(row[0].rsplit(" ", 1)[1]), row[5], *read_span(row[6])))
    caption = f"Agreement on test calls by LoRA rank at equal compute; bars are {LEVEL:.0%} intervals."
    return draw_lines(series, Axes("rank", "agreement on test calls", is_x_log=True, y_limits=(0, 1.02)), caption)


def _draw_ways(rows: Sequence[Sequence[Any]]) -> str:
    series: dict[str, dict[str, Dot]] = {}
    for row in rows:
        series.setdefault(row[2], {})[row[0]] = Dot(0, row[5], *read_span(row[6]))
    caption = f"Agreement on test calls by way of fine-tuning at equal compute; bars are {LEVEL:.0%} intervals."
    return draw_groups(series, "agreement on test calls", caption, limits=(0, 1.02))


def _sentence(
    rows: Sequence[Sequence[Any]], best: Mapping[str, tuple[str, float, Interval]], material: Sequence[Material]
) -> str:
    told = []
    of_name = {one.name: one for one in material}
    for name, (way, mean, ends) in best.items():
        full = next(row[5] for row in rows if row[2] == name and row[0] == "full")
        top = next(row[5] for row in rows if row[2] == name and row[0] == way)
        if not of_name[name].is_learned(top):
            told.append(f"{name} is not learned in any way at this budget: the best agrees on {top:.1%}")
            continue
        over = (
            f", {100 * mean:+.1f} points ({LEVEL:.0%} interval {100 * ends.low:+.1f} to {100 * ends.high:+.1f}) over rank 1"
            if way != _FIRST
            else ""
        )
        others = f", full fine-tuning {full:.1%}" if way != "full" else ""
        told.append(f"{name}: {way} is best at {top:.1%} agreement{over}{others}")
    return f"At equal compute {'; '.join(told)}."
