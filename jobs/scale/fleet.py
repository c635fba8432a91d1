"""Tasks x workers -> makespan, efficiency, lower bound (`understudy scale fleet`): simulated clusters, checked by real ones.

The simulator is the order of training/fleet.py on places with run times. It is checked first: short and long fine-tunes are
timed alone and two at a time, a line through them foretells what a run of any length takes, and real fleets of other mixes
are run by `run_fleet` and compared with what was foretold of them. Then clusters of up to 1,000 GPUs are simulated, a run a
GPU, with the seconds that runs took here. What a large cluster adds to a run (a busy head node, a network, failures) is not
simulated.
"""

from __future__ import annotations

import functools
import pathlib
import random
import shutil
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import TrainingError
from jobs.scale.cells import CellBook, Measured, measure_here
from jobs.scale.charts import Axes, Dot, draw_lines
from jobs.scale.laboratory import Laboratory
from jobs.scale.report import Findings
from training.catalog import find_entry
from training.dataset import save_dataset
from training.finetune import FinetuneConfig, finetune
from training.fleet import FleetRun, plan_fleet, run_fleet
from training.scratch import init_model, train_tokenizer

_BASE = "scratch-micro"
_ROW_TOKENS, _ANSWER_TOKENS, _BATCH = 64, 16, 8
_SHORT, _LONG = 20, 400
"""Steps of the runs that the run-time model is fitted to."""
_MIXES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (60, 120)),
    (1, (200, 40)),
    (1, (30, 90, 150)),
    (2, (80, 240)),
    (2, (50, 50, 50)),
    (2, (300, 100, 100)),
    (2, (350, 30, 30)),
    (2, (60, 120, 180, 240)),
    (2, (150, 150, 150, 150)),
    (2, (280, 200, 120, 40)),
    (2, (100, 90, 80, 70, 60)),
    (2, (320, 160, 80, 40, 20)),
)
"""Places, and steps of the runs, of the real fleets; none is of the calibration's."""
_BAR = 0.15
_TASKS = (10, 30, 100, 300, 1000, 3000)
_GPUS = (1, 10, 100, 1000)
_DRAWS = 5


def run(lab: Laboratory) -> Findings:
    """Time runs, check the simulator on real fleets, simulate large clusters."""
    folder = lab.out / "fleet"
    if not (folder / "rows").exists():
        _write_inputs(folder)
    calibration = [{"places": p, "steps": [steps] * p, "repeat": 0} for p in (1, 2) for steps in (_SHORT, _LONG)]
    mixes = _MIXES[3:5] if lab.size == "quick" else _MIXES
    scale = lab.pick(quick=4, small=1)
    fleets = [{"places": places, "steps": [n // scale for n in steps], "repeat": 1} for places, steps in mixes]
    cells = lab.cells("fleet", "made-up rows of one length", [*calibration, *fleets])
    measured = measure_here(cells, functools.partial(_run_real, folder), CellBook(lab.out), lab.say)
    timed, checked = measured[: len(calibration)], measured[len(calibration) :]
    models = {p: _run_time(timed, p) for p in (1, 2)}
    rows = [_compare(one, models[one.cell.parameters["places"]]) for one in checked]
    seconds = [s for one in measured if one.cell.parameters["places"] == 1 for s in one.result["run_s"].values()]
    simulated = [_simulate(seconds, tasks, gpus) for gpus in _GPUS for tasks in _TASKS]
    errors = [abs(row[-1]) for row in rows]
    return Findings(
        sentence=_sentence(errors, simulated),
        head=["places", "steps of the runs", "measured s", "foretold s", "lower bound s", "efficiency", "error"],
        rows=rows,
        laws={
            "run_seconds": {f"{p} at a time": {"start_s": s, "s_per_step": per} for p, (s, per) in models.items()},
            "error": {"median": statistics.median(errors), "largest": max(errors), "bar": _BAR, "fleets": len(errors)},
            "simulated": simulated,
        },
        records=[{**one.cell.parameters, **one.result, "cell": one.cell.key} for one in measured] + simulated,
        pictures=[_draw_check(rows), _draw_efficiency(simulated), _draw_makespan(simulated)],
        notes=[
            "Real fleets are fine-tunes of a 0.2M base by Ray Train, one CPU a run, on this machine; what else it does is in them.",
            f"Simulated: a run a GPU, run times drawn with replacement from the {len(seconds)} runs timed alone here "
            f"({min(seconds):.0f} to {max(seconds):.0f} s), {_DRAWS} draws, ordered by their true length. Real tasks differ more in "
            "length, which costs efficiency where there are few tasks for each GPU.",
            "Not simulated: a head node that starts 1,000 runs at once, data over a network, failures.",
        ],
        is_simulated=True,
    )


def _write_inputs(folder: pathlib.Path) -> None:
    entry = find_entry(_BASE)
    init_model(entry, train_tokenizer(["a"], entry.vocab_size), folder / "base", 0)  # type: ignore[arg-type, union-attr]
    ids = [5 + k % 2000 for k in range(_ROW_TOKENS)]
    save_dataset([{"input_ids": ids, "num_prompt": _ROW_TOKENS - _ANSWER_TOKENS}] * 256, folder / "rows")


def _run_real(folder: pathlib.Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """One real fleet.

    Raises:
        TrainingError: a run failed, so that the makespan is none.
    """
    label = f"{parameters['places']}-{'-'.join(map(str, parameters['steps']))}-{parameters['repeat']}"
    runs = {
        f"{number:02}": FleetRun(size=steps, start=functools.partial(_finetune, folder, f"{label}-{number:02}", steps))
        for number, steps in enumerate(parameters["steps"])
    }
    found = run_fleet(runs, parameters["places"], lambda name, result, error: None)
    if found.errors:
        raise TrainingError(f"fleet {label}: {next(iter(found.errors.values()))}")
    report = found.report
    return {
        "makespan_s": report.makespan_s,
        "lower_bound_s": report.lower_bound_s,
        "run_s": report.run_s,
        "told": f"makespan {report.makespan_s:.1f} s, lower bound {report.lower_bound_s:.1f} s",
    }


def _finetune(folder: pathlib.Path, name: str, steps: int) -> None:
    # What a killed experiment left of this run would be gone on from, and the run be shorter than it is.
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    config = FinetuneConfig(
        num_steps=steps, batch_size=_BATCH, warmup_steps=1, checkpoint_every=steps, zero_stage=0, max_failures=0
    )
    paths = {"base_path": folder / "base", "train_path": folder / "rows", "validation_path": None}
    finetune(name, config, **paths, pad_token_id=0, storage=folder / "runs" / name)


def _run_time(timed: Sequence[Measured], places: int) -> tuple[float, float]:
    """(seconds before the first step, seconds a step) of runs of which so many run at a time."""
    own = [one for one in timed if one.cell.parameters["places"] == places]
    means = {one.cell.parameters["steps"][0]: statistics.mean(one.result["run_s"].values()) for one in own}
    per_step = max(0.0, (means[_LONG] - means[_SHORT]) / (_LONG - _SHORT))
    return means[_SHORT] - _SHORT * per_step, per_step


def foretell(steps: Sequence[int], places: int, start_s: float, s_per_step: float) -> float:
    """Makespan of a fleet before it is run.

    Example:
        >>> foretell([100, 50, 50], 2, start_s=10, s_per_step=0.1)
        30.0
    """
    seconds = {f"{number:02}": start_s + n * s_per_step for number, n in enumerate(steps)}
    return plan_fleet(seconds, places).makespan_s


def _compare(one: Measured, model: tuple[float, float]) -> list[Any]:
    places, steps, result = one.cell.parameters["places"], one.cell.parameters["steps"], one.result
    said = foretell(steps, places, *model)
    measured = result["makespan_s"]
    efficiency = sum(result["run_s"].values()) / (places * measured)
    bound = round(result["lower_bound_s"], 2)
    error = round(said / measured - 1, 4)
    return [places, "+".join(map(str, steps)), round(measured, 2), round(said, 2), bound, round(efficiency, 3), error]


def _simulate(seconds: Sequence[float], tasks: int, gpus: int) -> dict[str, Any]:
    """Means over draws of run times."""
    rng = random.Random(f"{tasks}:{gpus}")
    plans, work = [], []
    for _ in range(_DRAWS):
        drawn = dict(enumerate(rng.choices(seconds, k=tasks)))
        own = {f"{number:05}": value for number, value in drawn.items()}
        plans.append(plan_fleet(own, gpus))
        work.append(sum(own.values()))
    makespan = statistics.mean(plan.makespan_s for plan in plans)
    bound = statistics.mean(plan.lower_bound_s for plan in plans)
    efficiency = statistics.mean(w / (gpus * plan.makespan_s) for w, plan in zip(work, plans, strict=True))
    return {
        "tasks": tasks,
        "gpus": gpus,
        "simulated_makespan_s": round(makespan, 2),
        "simulated_lower_bound_s": round(bound, 2),
        "efficiency": round(efficiency, 4),
        "over_bound": round(makespan / bound, 4),
    }


def _draw_check(rows: Sequence[Sequence[Any]]) -> str:
    series = {
        f"{p} at a time": [Dot(row[2], row[3]) for row in sorted(rows, key=lambda row: row[2]) if row[0] == p]
        for p in sorted({row[0] for row in rows})
    }
    most = max(row[2] for row in rows)
    line = [(0.0, 0.0), (most, most)]
    caption = "Makespan of real fleets: foretold against measured; on the line they agree."
    axes = Axes("measured, s", "foretold, s")
    return draw_lines(series, axes, caption, laws=dict.fromkeys(series, line))


def _draw_efficiency(simulated: Sequence[Mapping[str, Any]]) -> str:
    series = {f"{g} GPUs": [Dot(s["tasks"], s["efficiency"]) for s in simulated if s["gpus"] == g] for g in _GPUS}
    caption = "Simulated: share of the GPUs' time that trains, by the number of tasks."
    return draw_lines(series, Axes("tasks", "efficiency", is_x_log=True, y_limits=(0, 1.02)), caption)


def _draw_makespan(simulated: Sequence[Mapping[str, Any]]) -> str:
    series = {
        f"{t} tasks": [Dot(s["gpus"], s["simulated_makespan_s"]) for s in simulated if s["tasks"] == t] for t in _TASKS
    }
    axes = Axes("GPUs", "makespan, s", is_x_log=True, is_y_log=True)
    return draw_lines(series, axes, "Simulated: makespan by the number of GPUs.")


def _sentence(errors: Sequence[float], simulated: Sequence[Mapping[str, Any]]) -> str:
    within = sum(error <= _BAR for error in errors)
    large = next(s for s in simulated if (s["tasks"], s["gpus"]) == (1000, 100))
    return (
        f"The simulator foretells {within} of {len(errors)} real fleets within {_BAR:.0%} (median error "
        f"{statistics.median(errors):.1%}, largest {max(errors):.1%}); 1,000 tasks on 100 simulated GPUs take "
        f"{large['simulated_makespan_s']:,.0f} s at {large['efficiency']:.0%} efficiency, {large['over_bound']:.3f} of the lower bound."
    )
