"""Whether gates and audits keep what they promise: `understudy bench gate`.

validity: for each set and epsilon, calibration sets are drawn from a pool with replacement and a gate is fitted on each as a
conversion does it (grid on a validation draw, thresholds tested on a calibration draw, one candidate). A gate breaks its
promise where the pool's own risk at its threshold is above epsilon, which may happen with probability delta. coverage:
the pool's share at or above the threshold, 0 where refused, beside the lowest threshold whose true risk is within
epsilon (oracle) and, where tracer-llm is installed somewhere (jobs/bench/gate_tracer.py), TRACER's gate on the same
draws. graders: jobs/bench/gate_graders.py. controls: tasks that nobody can do; each must be refused at every draw. drift: jobs/bench/gate_drift.py. refine:
jobs/bench/gate_refine.py.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cluster.errors import InputError
from jobs.bench.gate_drift import measure_drift
from jobs.bench.gate_graders import measure_graders
from jobs.bench.gate_pools import (
    LabelSet,
    Pool,
    StandIn,
    ask,
    control_pools,
    fit_stand_in,
    load_sets,
    shared_file,
    synthetic_pools,
)
from jobs.bench.gate_refine import measure_refine
from jobs.bench.gate_tracer import NUM_RESAMPLES, find_tracer, measure_tracer
from training.gate import GateConfig, certify, clopper_pearson_interval, plan_grid

EPSILONS = (0.02, 0.05, 0.1)
DELTA = 0.05
_NUM_VALIDATION, _NUM_CALIBRATION = 500, 1_000
_FACTS: dict[str, Any] = {"reference": "gold", "population": "the pool", "fingerprint": "stand-in"}


class Size(NamedTuple):
    """How often each thing is tried."""

    resamples: int
    streams: int
    chains: int
    epsilons: tuple[float, ...]
    """Of the gates beside the peer's, which is a process for each."""


FULL = Size(resamples=500, streams=200, chains=50, epsilons=EPSILONS)
QUICK = Size(resamples=4, streams=2, chains=2, epsilons=EPSILONS[1:2])
"""Shows that it runs; measures nothing."""


class Drawn(NamedTuple):
    """One answer of a draw, as a gate reads it."""

    confidence: float
    agrees: bool
    session_id: str


class Population(NamedTuple):
    """What is true of a pool, by threshold from the highest down."""

    thresholds: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray

    def at(self, threshold: float) -> tuple[float, float]:
        """Coverage and risk of the answers of at least this confidence; (0, 0) where there are none."""
        place = int(np.searchsorted(-self.thresholds, -threshold, side="right")) - 1
        return (float(self.coverage[place]), float(self.risk[place])) if place >= 0 else (0.0, 0.0)

    def oracle(self, epsilon: float) -> float:
        """Largest coverage whose risk is within epsilon."""
        within = self.coverage[self.risk <= epsilon]
        return float(within.max()) if within.size else 0.0


def bench_gate(
    fit: Sequence[pathlib.Path],
    calls: Sequence[pathlib.Path],
    say: Callable[[str], object],
    size: Size = FULL,
) -> dict[str, Any]:
    """Measure everything on these files, or on the shared ones where none are given; at full size some ten minutes of one core.

    Raises:
        InputError: a file cannot be used, or the shared data is not there.
    """
    sets = load_sets(fit, calls)
    stand_ins = {one.name: fit_stand_in(one.fit_texts, one.fit_classes) for one in sets}
    pools = [ask(one.name, stand_ins[one.name], one.pool_texts, one.pool_classes) for one in sets]
    tracer = find_tracer(say)
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    num_drawn, num_resamples = _NUM_VALIDATION + _NUM_CALIBRATION, min(size.resamples, NUM_RESAMPLES)
    for epsilon in size.epsilons:
        for pool in [*pools, *synthetic_pools(epsilon)]:
            cell = measure_gate(pool, epsilon, size.resamples)
            cell["tracer"] = tracer and measure_tracer(tracer, pool, epsilon, num_drawn, num_resamples)
            cells.setdefault(pool.name, {})[str(epsilon)] = cell
            say(f"gate {pool.name} epsilon {epsilon}: {cell}")
    return {
        "delta": DELTA,
        "num_resamples": size.resamples,
        "violation_rate": _column(cells, "violation_rate"),
        "violation_lower": _column(cells, "violation_lower"),
        "coverage": {
            name: {
                epsilon: {
                    "ours": cell["coverage"],
                    "oracle": cell["oracle"],
                    "tracer": cell["tracer"] and cell["tracer"]["coverage"],
                }
                for epsilon, cell in by_epsilon.items()
            }
            for name, by_epsilon in cells.items()
        },
        "refused_rate": _column(cells, "refused_rate"),
        "tracer_violation_rate": {
            name: {epsilon: cell["tracer"] and cell["tracer"]["violation_rate"] for epsilon, cell in one.items()}
            for name, one in cells.items()
        },
        "pools": {pool.name: {"num_calls": len(pool.agrees), "agreement": float(pool.agrees.mean())} for pool in pools},
        **measure_controls(sets, size.resamples, say),
        **measure_drift(_drifting(sets, stand_ins, pools), say, size.streams),
        "graders": _measure_graders(say),
        **measure_refine(sets, say, size.chains),
    }


def population_of(pool: Pool) -> Population:
    """Risk and coverage at every distinct confidence of the pool."""
    order = np.argsort(-pool.confidences, kind="stable")
    confidences = pool.confidences[order]
    last = np.flatnonzero(np.append(confidences[:-1] != confidences[1:], True))
    wrong = np.cumsum(~pool.agrees[order])[last]
    return Population(confidences[last], (last + 1) / len(order), wrong / (last + 1))


def measure_gate(pool: Pool, epsilon: float, num_resamples: int) -> dict[str, Any]:
    """Fit a gate on each of many draws from the pool.

    Returns:
        violation_rate, its exact one-sided 95% violation_lower, refused_rate, mean coverage, and the oracle's.
    """
    truth = population_of(pool)
    drawn = [
        Drawn(float(confidence), bool(agrees), "")
        for confidence, agrees in zip(pool.confidences, pool.agrees, strict=True)
    ]
    config = GateConfig(epsilon=epsilon, delta=DELTA)
    coverages, num_violations, num_refused = [], 0, 0
    for seed in range(num_resamples):
        generator = np.random.default_rng([seed, round(1 / epsilon)])
        validation, calibration = (
            [
                drawn[place]._replace(session_id=str(k))
                for k, place in enumerate(generator.integers(0, len(drawn), size))
            ]
            for size in (_NUM_VALIDATION, _NUM_CALIBRATION)
        )
        grid = plan_grid(validation, _NUM_CALIBRATION, config, DELTA)  # type: ignore[arg-type]
        gate = None if isinstance(grid, str) else certify(grid, calibration, epsilon=epsilon, delta=DELTA, **_FACTS)  # type: ignore[arg-type]
        if gate is None or gate.threshold is None:
            num_refused += 1
            coverages.append(0.0)
            continue
        coverage, risk = truth.at(gate.threshold)
        coverages.append(coverage)
        num_violations += risk > epsilon
    return {
        "violation_rate": num_violations / num_resamples,
        "violation_lower": clopper_pearson_interval(num_violations, num_resamples, level=0.9)[0],
        "refused_rate": num_refused / num_resamples,
        "coverage": float(np.mean(coverages)),
        "oracle": truth.oracle(epsilon),
    }


def measure_controls(sets: Sequence[LabelSet], num_resamples: int, say: Callable[[str], object]) -> dict[str, Any]:
    """How many gates of tasks that cannot be done were refused, of how many."""
    refused = total = 0
    by_name: dict[str, Any] = {}
    for pool in control_pools(sets):
        for epsilon in EPSILONS:
            found = measure_gate(pool, epsilon, num_resamples)
            refused += round(found["refused_rate"] * num_resamples)
            total += num_resamples
            by_name.setdefault(pool.name, {"agreement": float(pool.agrees.mean())})[str(epsilon)] = found[
                "refused_rate"
            ]
        say(f"control {pool.name}: {by_name[pool.name]}")
    return {"refused_controls": refused, "controls": total, "controls_by_name": by_name}


def _measure_graders(say: Callable[[str], object]) -> dict[str, Any] | None:
    """None where the shared data is not there."""
    try:
        path = shared_file("fc/bfcl.calls.jsonl.gz")
    except InputError as error:
        say(f"gate: graders are left out: {error}")
        return None
    return measure_graders(path)


def _drifting(
    sets: Sequence[LabelSet], stand_ins: dict[str, StandIn], pools: Sequence[Pool]
) -> list[tuple[LabelSet, StandIn, Pool, float]]:
    """Sets that a gate of 5% keeps something of, with the threshold it should have."""
    found = []
    for one, pool in zip(sets, pools, strict=True):
        truth = population_of(pool)
        within = np.flatnonzero(truth.risk <= EPSILONS[1])
        if within.size:
            found.append((one, stand_ins[one.name], pool, float(truth.thresholds[within.max()])))
    return found


def _column(cells: dict[str, dict[str, dict[str, Any]]], key: str) -> dict[str, dict[str, float]]:
    return {name: {epsilon: cell[key] for epsilon, cell in one.items()} for name, one in cells.items()}
