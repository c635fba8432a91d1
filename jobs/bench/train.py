"""What training costs, saves and survives: `understudy bench train`, the parts of it one after another into one JSON.

multi_lora: adapters per hour of solo runs and of many adapters in one run, and whether they are equal; packing: tokens per
second of packed and bucketed batches; memory: predicted against measured peaks; scaling: one and two workers, ZeRO stages;
makespan: a fleet against its lower bound; trainer: the same adapters by PEFT with transformers.Trainer; faults: workers, nodes and drivers killed. Each part is a file beside this one
that says how it measures. Speeds are compared within a part alone, so parts may be run at different times.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster.errors import ConfigError, TrainingError
from cluster.session import check_alone
from jobs.bench.processes import module

PARTS = ("multi_lora", "packing", "memory", "scaling", "makespan", "trainer", "faults")
_NUM_TRIALS = 20
_NUM_PLACES = 4
"""Runs at a time in the simulated fleets."""
_QUICK_TRIALS = 3
"""One of each kind."""


def bench_train(
    say: Callable[[str], object],
    parts: Sequence[str] = PARTS,
    quick: bool = False,
    keep: Callable[[dict[str, Any]], object] = lambda numbers: None,
) -> dict[str, Any]:
    """Measure the parts named, in the order of `PARTS`. Starts and ends a local Ray cluster.

    Args:
        parts: of `PARTS`; makespan takes the times of the runs that multi_lora measured.
        keep: given everything so far after each part, so that a later one that fails loses nothing.
        quick: few steps and trials: shows that it runs, and measures nothing.

    Returns:
        The numbers of all parts, and under `parts` everything that was measured.

    Raises:
        ConfigError: a part that is none, makespan without multi_lora, or RAY_ADDRESS names a cluster.
        InputError: the shared data is not there.
        TrainingError: a run that nothing disturbed failed.
    """
    if wrong := sorted(set(parts) - set(PARTS)):
        raise ConfigError(f"--part {wrong[0]}: no such part; allowed: {', '.join(PARTS)}")
    check_alone("bench train")
    if "makespan" in parts and "multi_lora" not in parts:
        raise ConfigError("--part makespan: it takes measured run times; next: name --part multi_lora makespan")
    found: dict[str, Any] = {}
    for name, measure in _measures(say, quick, found):
        if name in parts:
            say(f"-- {name}")
            found[name] = measure()
            keep(gather_numbers(found) | {"quick": quick, "parts": found})
    return gather_numbers(found) | {"quick": quick, "parts": found}


def _measures(
    say: Callable[[str], object], quick: bool, found: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The parts; those on one cluster first, as faults brings one of its own."""
    from cluster.session import connect
    from jobs.bench.faults import measure_faults
    from jobs.bench.makespan import measure_makespan
    from jobs.bench.memory import measure_memory
    from jobs.bench.multi_lora import measure_multi_lora
    from jobs.bench.packing import measure_packing
    from jobs.bench.scaling import measure_scaling

    def multi_lora() -> dict[str, Any]:
        connect()
        return measure_multi_lora(say, ("2M",) if quick else ("2M", "20M"), quick=quick)

    def scaling() -> dict[str, Any]:
        connect()
        return measure_scaling(say, quick)

    def faults() -> dict[str, Any]:
        _leave_ray()
        return measure_faults(say, _QUICK_TRIALS if quick else _NUM_TRIALS)

    yield "multi_lora", multi_lora
    yield "packing", lambda: measure_packing(say, quick=quick)
    yield "memory", lambda: measure_memory(say, quick)
    yield "scaling", scaling
    yield "makespan", lambda: measure_makespan(*_measured_runs(found))
    yield "trainer", lambda: _measure_trainer(say, quick)
    yield "faults", faults
    _leave_ray()


def _measure_trainer(say: Callable[[str], object], quick: bool) -> dict[str, Any]:
    """Beside HF's Trainer, in a process of its own: its process group and its threads are not ours."""
    import torch

    sizes = ["0.5B", "1.5B"] if torch.cuda.is_available() and not quick else ["tiny"]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trainer.json"
        words = [
            "--size",
            *sizes,
            "--steps",
            "5" if quick else "50",
            "--tasks",
            "2" if quick else "8",
            "--json",
            str(path),
        ]
        done = subprocess.run(module("jobs.bench.gpu_training", *words), capture_output=True, text=True)
        say(done.stderr)
        if done.returncode:
            raise TrainingError(f"bench train, part trainer: ended with status {done.returncode}: {done.stderr[-500:]}")
        return json.loads(path.read_text())


def _leave_ray() -> None:
    # Not at the top: Ray reads at its import what `connect` sets for a cluster on this machine.
    import ray

    ray.shutdown()


def _measured_runs(found: Mapping[str, Any]) -> tuple[dict[str, float], int, dict[str, float]]:
    """Seconds of the solo runs that multi_lora timed at its longest length, places to simulate, and what fleets order by."""
    runs = found["multi_lora"]["2M"]["runs"]
    longest = runs[max(runs)]
    return longest["run_seconds"], _NUM_PLACES, longest["run_tokens"]


def gather_numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that stand for each part: bases of 2M parameters where nothing else is said."""
    numbers: dict[str, Any] = {}
    if many := found.get("multi_lora"):
        small = many["2M"]
        longest = small["runs"][max(small["runs"])]
        per_hour = longest["adapters_per_hour"]
        compared = [run for size in many.values() for run in size["runs"].values()]
        numbers |= {
            "adapters_per_hour": {
                "sequential": per_hour.get("sequential"),
                "parallel": per_hour["parallel"],
                "multi_lora": per_hour["one_run"],
                "multi_lora_in_two_runs": per_hour["two_runs"],
            },
            "ratio_to_parallel": {size: one["ratio_to_parallel"] for size, one in many.items()},
            "loop_only": {size: one["loop_only"] for size, one in many.items()},
            "max_loss_diff": max(run["max_loss_diff"] for run in compared),
            "loss_diff_growth": {size: one["growth"] for size, one in many.items()},
            "max_weight_diff": max(run["max_weight_diff"] for run in compared),
            "negative_control_fails": all(one["negative_control_fails"] for one in many.values()),
        }
    if trainer := found.get("trainer"):
        ways = {size: one["ways"] for size, one in trainer["sizes"].items()}
        numbers["trainer_tokens_per_s"] = {
            size: {"multi_lora": one["multi_lora"]["tokens_per_s"], "trainer": one["trainer"]["tokens_per_s"]}
            for size, one in ways.items()
        }
        numbers["trainer_adapters_per_hour"] = {
            size: {"multi_lora": one["multi_lora"]["adapters_per_hour"], "trainer": one["trainer"]["adapters_per_hour"]}
            for size, one in ways.items()
        }
    if packing := found.get("packing"):
        numbers["packing_ratio"] = packing["packing_ratio"]
    if memory := found.get("memory"):
        numbers["memory_prediction_error"] = memory["memory_prediction_error"]
    for name in ("scaling", "makespan"):
        numbers |= found.get(name, {})
    if faults := found.get("faults"):
        numbers |= {key: value for key, value in faults.items() if key.startswith("kill_")}
        elastic = faults["elastic"]
        numbers["elastic_loss_diff"] = elastic and elastic["max_loss_diff"]
    return numbers
