"""Parameters x examples at equal compute -> agreement (`understudy scale model`).

Bases of 0.3 to 10 million parameters are trained from scratch, each with the same floating point operations: a model of
ten times the parameters takes a tenth of the steps. So the law says what a given budget is best spent on, not what size
is worth when training is free. A recipe that names select.candidates has those as bases instead, such as models of the
catalog or local folders.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.scale.cells import Measured
from jobs.scale.charts import Axes, Dot, draw_lines, plain
from jobs.scale.data import read_span, sizes_of, span
from jobs.scale.laboratory import Laboratory
from jobs.scale.laws import LEVEL, Fit, Grid, fit_law, mean_interval
from jobs.scale.material import Material, tell_baselines
from jobs.scale.report import Findings
from jobs.scale.trial import mean_tokens, wrong_of
from training.bases import describe_base, open_base
from training.catalog import ScratchModel, find_entry, num_parameters

_BATCH = 16
_SHAPES = {
    "scratch-0.3M": (2, 72, 2, 216),
    "scratch-0.7M": (2, 128, 4, 384),
    "scratch-2M": (4, 192, 3, 448),
    "scratch-5M": (6, 256, 4, 640),
    "scratch-10M": (8, 320, 5, 832),
    "scratch-30M": (10, 512, 8, 1344),
}
"""Name -> layers, hidden size, heads, intermediate size."""
_HEAD = [
    "task",
    "base",
    "parameters",
    "examples",
    "steps",
    "seeds",
    "agreement",
    f"{LEVEL:.0%} interval",
    "seconds a run",
]


def run(lab: Laboratory) -> Findings:
    """Measure the grid and fit the law of each task."""
    material = list(lab.load())[: lab.pick(quick=1, small=2, full=4)]
    bases, seeds = _bases(lab), lab.pick(quick=2, small=3)
    flops = lab.pick(quick=4e11, small=1.5e12, full=1.5e13)
    parameters = []
    for one in material:
        counts = sizes_of(len(one.splits["train"]), lab.pick(quick=3, small=4), first=lab.pick(quick=100, small=200))
        for base, size in bases:
            steps = _steps(lab, one, base, size, flops)
            common = {
                "task": one.name,
                "tasks": [one.task.task_id],
                "base": base,
                "steps": steps,
                "batch_size": _BATCH,
                "flops": flops,
            }
            parameters += [{**common, "examples": n, "seed": s} for n in counts for s in range(seeds)]
    measured = lab.train("model", material, parameters)
    grids = {one.name: [m for m in measured if one.task.task_id in m.result["tasks"]] for one in material}
    fits = {one.name: _fit(grids[one.name], one.task.task_id) for one in material}
    rows = [row for one in material for row in _rows(one, grids[one.name])]
    return Findings(
        sentence=_sentence(grids, material, fits),
        head=_HEAD,
        rows=rows,
        laws={name: fit.law.model_dump() for name, fit in fits.items() if fit},
        records=[_record(m, one) for one in material for m in grids[one.name]],
        pictures=[_draw(one.name, rows) for one in material],
        notes=[*_notes(lab, rows, flops, seeds), tell_baselines(material)],
    )


def _bases(lab: Laboratory) -> list[tuple[Any, int]]:
    """(name or shape, parameters), smallest first."""
    if names := lab.recipe.select.candidates:
        found: list[tuple[Any, int]] = [(name, _size_of(name)) for name in names]
        return sorted(found, key=lambda pair: pair[1])
    wanted = lab.pick(quick=3, small=5, full=6)
    return [(entry.model_dump(), num_parameters(entry) or 0) for entry in map(_entry, list(_SHAPES)[:wanted])]


def _size_of(name: str) -> int:
    """Parameters as the catalog says, else as its files do: without them no budget could be kept.

    Raises:
        ConfigError: an unknown name.
        BaseUnavailableError: its files are needed, and not to be had.
    """
    entry = find_entry(name)
    return (entry and num_parameters(entry)) or describe_base(open_base(name)).parameters


def _entry(name: str) -> ScratchModel:
    layers, hidden, heads, intermediate = _SHAPES[name]
    shape = {"layers": layers, "hidden_size": hidden, "heads": heads, "intermediate_size": intermediate}
    return ScratchModel(kind="scratch", name=name, vocab_size=2048, context_window_tokens=1024, **shape)


def _steps(lab: Laboratory, one: Material, base: Any, size: int, flops: float) -> int:
    """Steps that the budget pays for, a multiple of four; at least four.

    A LoRA on a pretrained base needs no gradient of the frozen weights: 4 operations a weight and token instead of 6.
    """
    a_token = (6 if isinstance(base, dict) or str(base).startswith("scratch-") else 4) * size
    steps = flops / (a_token * _BATCH * mean_tokens(lab.recipe, one, base))
    return max(4, int(steps) // 4 * 4)


def _fit(measured: Sequence[Measured], task_id: str) -> Fit | None:
    points = [(m.result["parameters"], m.cell.parameters["examples"], m.cell.parameters["seed"], m) for m in measured]
    wrong = [wrong_of(m.result["tasks"][task_id]) for *_, m in points]
    if np.mean(wrong) in (0, 1):
        return None
    grid = Grid.of([(size, count) for size, count, *_ in points], [seed for _, _, seed, _ in points], wrong)
    return fit_law(grid, ["parameters", "examples"])


def _rows(one: Material, measured: Sequence[Measured]) -> list[list[Any]]:
    groups: dict[tuple[int, int], list[Measured]] = {}
    for m in measured:
        groups.setdefault((m.result["parameters"], m.cell.parameters["examples"]), []).append(m)
    rows = []
    for (size, count), own in sorted(groups.items()):
        wrong = np.array([wrong_of(m.result["tasks"][one.task.task_id]) for m in own], float)
        mean, ends = mean_interval(1 - wrong)
        base = own[0].cell.parameters["base"]
        name = base["name"] if isinstance(base, dict) else base
        seconds = statistics.median(m.result["seconds"] for m in own)
        rows.append(
            [one.name, name, size, count, own[0].result["steps"], len(own), round(mean, 4), span(ends), seconds]
        )
    return rows


def _record(m: Measured, one: Material) -> dict[str, Any]:
    shared = {k: v for k, v in m.result.items() if k not in ("tasks", "told")}
    return {"task": one.name, **m.cell.parameters, **shared, **m.result["tasks"][one.task.task_id], "cell": m.cell.key}


def _draw(name: str, rows: Sequence[Sequence[Any]]) -> str:
    series: dict[str, list[Dot]] = {}
    for row in rows:
        if row[0] == name:
            series.setdefault(f"{row[3]:,} examples", []).append(Dot(row[2] / 1e6, row[6], *read_span(row[7])))
    caption = f"{name}: agreement on test calls by parameters, every training at the same compute; bars are {LEVEL:.0%} intervals."
    axes = Axes("million parameters", "agreement on test calls", is_x_log=True, y_limits=(0, 1.02))
    return draw_lines(series, axes, caption)


def _sentence(
    grids: Mapping[str, Sequence[Measured]], material: Sequence[Material], fits: Mapping[str, Fit | None]
) -> str:
    told = [_tell(one, _right_by_size(grids[one.name], one.task.task_id), fits[one.name]) for one in material]
    return f"At equal compute {'; '.join(told)}."


def _right_by_size(measured: Sequence[Measured], task_id: str) -> dict[int, np.ndarray]:
    """Parameters -> graded test calls of each seed, at the most examples."""
    most = max(m.cell.parameters["examples"] for m in measured)
    found: dict[int, list[list[bool]]] = {}
    for m in sorted(measured, key=lambda m: (m.result["parameters"], m.cell.parameters["seed"])):
        if m.cell.parameters["examples"] == most:
            found.setdefault(m.result["parameters"], []).append(wrong_of(m.result["tasks"][task_id]))
    return {size: 1 - np.array(own, float) for size, own in found.items()}


def _tell(one: Material, right: Mapping[int, np.ndarray], fit: Fit | None) -> str:
    """Which base is best, which of the others may be as good, and how the error goes by the law, if it fits."""
    name, means = one.name, {size: float(own.mean()) for size, own in right.items()}
    best = max(means, key=lambda size: means[size])
    if not one.is_learned(means[best]):
        return f"{name} is not learned by any base at this budget: the best agrees on {means[best]:.0%}"
    alike = [size for size in right if size != best and not _is_better(right[best], right[size])]
    others = f", from which {' and '.join(map(_millions, alike))} cannot be told" if alike else ""
    told = f"{name} does best on {_millions(best)} parameters, agreement {means[best]:.0%}{others}"
    if not fit:
        return told
    if not fit.law.is_fitting:
        return f"{told}, and no power law fits"
    powers = [
        f"{variable} to the power of {-rate:+.2f} [{-ends.high:+.2f}, {-ends.low:+.2f}]"
        for variable, rate, ends in zip(fit.law.variables, fit.law.rates, fit.law.rate_intervals, strict=True)
    ]
    return f"{told} (error above its floor goes with {', with '.join(powers)})"


def _millions(size: int) -> str:
    return f"{plain(size / 1e6)}M"


def _is_better(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the interval of the difference lies above 0."""
    return mean_interval(one - other, lowest=-1.0)[1].low > 0


def _notes(lab: Laboratory, rows: Sequence[Sequence[Any]], flops: float, seeds: int) -> list[str]:
    told = [
        f"Every training spends about {flops:.2g} floating point operations (6 a weight and token, 4 with LoRA), padding "
        f"left out of the plan; {seeds} seeds. A larger base sees fewer tokens: at a larger budget the best size may be larger.",
        "A law's power of parameters above 0 says that a larger base is worse at this budget; the law has one power, "
        "and where the best size lies inside the range its residual tells that it does not fit.",
        "Scratch bases have seen the task's own examples and nothing else.",
        "The best base is told on the test calls that it was picked on, which flatters it.",
    ]
    if lab.size != "full":
        told.append("30M parameters and a larger budget: --full.")
    return told
