"""Tasks x workers -> makespan, efficiency, lower bound (`understudy scale fleet`): simulated clusters, checked by real ones.

The simulator is the order of training/fleet.py on places with run times. It is checked first: short and long fine-tunes are
timed alone and two at a time, a line through them foretells what a run of any length takes beside so many others, and real
fleets of other mixes are run by `run_fleet` and compared with what was foretold of them. Then clusters of up to 1,000 GPUs
are simulated, a run a GPU, with the seconds that runs took here. What a large cluster adds to a run (a busy head node, a
network, failures) is not simulated.
"""

from __future__ import annotations

import functools
import pathlib
import random
import shutil
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.errors import TrainingError
from cluster.store import content_hash
from jobs.scale.cells import CellBook, Measured, measure_here
from jobs.scale.charts import Axes, Dot, draw_lines
from jobs.scale.laboratory import Laboratory
from jobs.scale.report import Findings
from training.catalog import find_entry
from training.dataset import save_dataset
from training.finetune import FinetuneConfig, finetune
from training.fleet import FleetRun, plan_fleet, run_fleet, start_order
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
_NUM_TIMED = 3
"""How often each of them is timed: starts of processes differ by a second or two."""
_ROUNDING = 1e-9
_BAR = 0.15
_TASKS = (10, 30, 100, 300, 1000, 3000)
_GPUS = (1, 10, 100, 1000)
_DRAWS = 5


class RunTime(NamedTuple):
    """What a fine-tune takes while so many run at a time."""

    start_s: float
    """Before its first step and after its last."""
    s_per_step: float


def run(lab: Laboratory) -> Findings:
    """Time runs, check the simulator on real fleets, simulate large clusters."""
    folder = lab.out / "fleet"
    if not (folder / "rows").exists():
        _write_inputs(folder)
    # The first reads files that no later one waits for.
    warm_up = [{"kind": "warm up", "places": 2, "steps": [_SHORT] * 2}]
    calibration = [
        {"kind": "timed", "places": p, "steps": [steps] * p, "repeat": repeat}
        for repeat in range(1, 1 + lab.pick(quick=1, small=_NUM_TIMED))
        for p in (1, 2)
        for steps in (_SHORT, _LONG)
    ]
    mixes = _MIXES[3:5] if lab.size == "quick" else _MIXES
    scale = lab.pick(quick=4, small=1)
    fleets = [{"kind": "checked", "places": places, "steps": [n // scale for n in steps]} for places, steps in mixes]
    cells = lab.cells("fleet", "made-up rows of one length", [*warm_up, *calibration, *fleets])
    measured = measure_here(cells, functools.partial(_run_real, folder), CellBook(lab.out), lab.say)[1:]
    timed, checked = measured[: len(calibration)], measured[len(calibration) :]
    times = [_run_time(timed, places) for places in (1, 2)]
    rows = [_compare(one, times) for one in checked]
    seconds = [s for one in measured if one.cell.parameters["places"] == 1 for s in one.result["run_s"].values()]
    simulated = [_simulate(seconds, tasks, gpus) for gpus in _GPUS for tasks in _TASKS]
    errors = [abs(row[-1]) for row in rows]
    return Findings(
        sentence=_sentence(errors, simulated),
        head=["places", "steps of the runs", "measured s", "foretold s", "lower bound s", "efficiency", "error"],
        rows=rows,
        laws={
            "run_seconds": {f"{number} at a time": time._asdict() for number, time in enumerate(times, 1)},
            "error": {"median": statistics.median(errors), "largest": max(errors), "bar": _BAR, "fleets": len(errors)},
            "simulated": simulated,
        },
        records=[{**one.cell.parameters, **one.result, "cell": one.cell.key} for one in measured] + simulated,
        pictures=[_draw_check(rows), _draw_efficiency(simulated), _draw_makespan(simulated)],
        notes=[
            "Real fleets are fine-tunes of a 0.2M base by Ray Train, one CPU a run, on this machine; what else it does is in them.",
            f"Simulated: a run a GPU, so that none slows another down, run times drawn with replacement from the {len(seconds)} runs timed alone here "
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
    label = content_hash(dict(parameters))[:8]
    runs = {
        f"{number:02}": FleetRun(size=steps, start=functools.partial(_finetune, folder, f"{label}-{number:02}", steps))
        for number, steps in enumerate(parameters["steps"])
    }
    found = run_fleet(runs, parameters["places"], lambda name, result, error: None)
    if found.errors:
        raise TrainingError(f"fleet of {parameters['steps']} steps: {next(iter(found.errors.values()))}")
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


def _run_time(timed: Sequence[Measured], places: int) -> RunTime:
    own = [one for one in timed if one.cell.parameters["places"] == places]
    medians = {
        length: statistics.median(
            seconds
            for one in own
            if one.cell.parameters["steps"][0] == length
            for seconds in one.result["run_s"].values()
        )
        for length in (_SHORT, _LONG)
    }
    per_step = max(0.0, (medians[_LONG] - medians[_SHORT]) / (_LONG - _SHORT))
    return RunTime(medians[_SHORT] - _SHORT * per_step, per_step)


def foretell(steps: Sequence[int], places: int, times: Sequence[RunTime]) -> float:
    """Makespan of a fleet before it is run.

    Runs that share a machine slow each other down, and the last one has it for itself: each run goes on at the speed of
    as many as run just then.

    Args:
        times: of runs alone, two at a time, and so on, up to `places`.

    Example:
        >>> foretell([100, 50, 50], 2, [RunTime(10, 0.1)] * 2)
        30.0
    """
    # As run_fleet starts them, by their names.
    names = {f"{number:02}": n for number, n in enumerate(steps)}
    waiting = [float(names[name]) for name in start_order(names)]
    running: list[list[float]] = []
    now = 0.0
    while waiting or running:
        # What is left of a run: the share of its start, then its steps.
        running += [[1.0, waiting.pop(0)] for _ in range(min(places - len(running), len(waiting)))]
        costs = times[len(running) - 1]
        elapsed = min(left[part] * costs[part] for left in running for part in (_part(left),))
        now += elapsed
        for left in running:
            part = _part(left)
            left[part] = max(0.0, left[part] - elapsed / costs[part]) if costs[part] else 0.0
        running = [left for left in running if max(left) > _ROUNDING]
    return now


def _part(left: Sequence[float]) -> int:
    """What a run does now: 0, it starts; 1, it takes steps."""
    return 0 if left[0] > _ROUNDING else 1


def _compare(one: Measured, times: Sequence[RunTime]) -> list[Any]:
    places, steps, result = one.cell.parameters["places"], one.cell.parameters["steps"], one.result
    said = foretell(steps, places, times)
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
