"""Whether refinement on ever noisier traces makes what serves worse: seven rounds, each with new calls and more wrong answers.

Each round a candidate, a stand-in for a specialist (jobs/bench/gate_pools.py), is fitted on that round's calls and as many
older ones as a refinement replays; of the new ones a growing share has a random answer. It is decided on as a refinement does it: grid and gate on fresh draws from
the pool, then the test against what serves (training/regression.py); else what serves stays. train: only what is learned is
noisy. traces: the answers that gate and test compare with are as noisy. What is true is known: the pool's own answers are
clean. A regression is a round after which what clients get is worse: the share of the pool that is kept and wrong is larger by
more than the margin than before it (the LLM answers the rest). A fall is a round after which the share kept and right is
smaller by more than that; with a noisy LLM it may be due, as a specialist that answers what the LLM should have said breaks a
promise to say what the LLM says. Beside both stands what happens to one who takes every candidate, at the threshold of the
first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jobs.bench.gate_pools import LabelSet, Pool, ask, fit_stand_in
from training.gate import GateConfig, Outcome, certify, plan_grid
from training.refine import RefineConfig, num_replayed
from training.regression import compare

NOISE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Share of random answers among the new calls of each round."""
EPSILON = DELTA = 0.05
KINDS = ("train", "traces")
_NUM_VALIDATION, _NUM_CALIBRATION = 500, 1_000
_FACTS: dict[str, Any] = {"reference": "gold", "population": "the pool", "fingerprint": "stand-in"}


class Serving(NamedTuple):
    """What serves: the round it was fitted in, and the confidence from which its answers are kept."""

    round: int
    threshold: float


class Quality(NamedTuple):
    """Shares of the whole pool."""

    wrong: float
    right: float


class Worse(NamedTuple):
    """Rounds of a chain."""

    regressions: int
    falls: int


def measure_refine(sets: Sequence[LabelSet], say: Callable[[str], object], num_chains: int) -> dict[str, Any]:
    """Regressions and falls over all sets, kinds of noise, chains of seven rounds and rounds after the first."""
    by_name: dict[str, dict[str, int]] = {}
    for one in sets:
        pools = fit_rounds(one)
        for kind in KINDS:
            chains = [run_chain(pools, kind, seed) for seed in range(num_chains)]
            guarded = [count_worse(pools, chain) for chain in chains]
            unguarded = [count_worse(pools, _take_all(chain)) for chain in chains]
            by_name[f"{one.name}, {kind}"] = found = {
                "regressions": sum(one.regressions for one in guarded),
                "falls": sum(one.falls for one in guarded),
                "steps": num_chains * (len(NOISE) - 1),
                "released": sum(len(set(chain) - {None}) for chain in chains),
                "regressions_unguarded": sum(one.regressions for one in unguarded),
                "falls_unguarded": sum(one.falls for one in unguarded),
            }
            say(f"refine {one.name}, {kind}: {found}")
    totals = {f"refine_{key}": sum(found[key] for found in by_name.values()) for key in next(iter(by_name.values()))}
    return {**totals, "refine_by_name": by_name}


def fit_rounds(one: LabelSet) -> list[Pool]:
    """The pool as the stand-in of each round answers it."""
    generator = np.random.default_rng(3)
    order = generator.permutation(len(one.fit_texts))
    classes = one.fit_classes.copy()
    pools = []
    old = order[:0]
    for part, noise in zip(np.array_split(order, len(NOISE)), NOISE, strict=True):
        is_noisy = generator.random(len(part)) < noise
        classes[part[is_noisy]] = generator.choice(one.fit_classes, int(is_noisy.sum()))
        num_old = num_replayed(len(part), len(old), RefineConfig().replay_share)
        learned = np.concatenate([part, generator.permutation(old)[:num_old]])
        old = np.concatenate([old, part])
        stand_in = fit_stand_in([one.fit_texts[place] for place in learned], classes[learned])
        pools.append(ask(one.name, stand_in, one.pool_texts, one.pool_classes))
    return pools


def run_chain(pools: Sequence[Pool], kind: str, seed: int) -> list[Serving | None]:
    """What serves after each round; None while every gate was refused."""
    serving: Serving | None = None
    chain = []
    for number, pool in enumerate(pools):
        generator = np.random.default_rng([seed, number, KINDS.index(kind)])
        reference = _reference(pool, NOISE[number] if kind == "traces" else 0.0, generator)
        drawn = [generator.integers(0, len(reference), size) for size in (_NUM_VALIDATION, _NUM_CALIBRATION)]
        validation, calibration = (_outcomes(pool, reference, places) for places in drawn)
        grid = plan_grid(validation, _NUM_CALIBRATION, GateConfig(epsilon=EPSILON, delta=DELTA), DELTA)
        gate = None if isinstance(grid, str) else certify(grid, calibration, epsilon=EPSILON, delta=DELTA, **_FACTS)
        if gate is not None and gate.threshold is not None:
            candidate = Serving(number, gate.threshold)
            if serving is None or _replaces(serving, candidate, pools, reference, drawn[1]):
                serving = candidate
        chain.append(serving)
    return chain


def count_worse(pools: Sequence[Pool], chain: Sequence[Serving | None]) -> Worse:
    """Rounds after which what serves is truly worse than before by more than the margin."""
    margin, regressions, falls = RefineConfig().margin, 0, 0
    for before, after in zip(chain, chain[1:], strict=False):
        if before is None or after is None:
            # A release that is never taken back has no round without a specialist after one with it.
            continue
        old, new = (quality_of(pools[one.round], one.threshold) for one in (before, after))
        regressions += new.wrong > old.wrong + margin
        falls += new.right < old.right - margin
    return Worse(regressions, falls)


def quality_of(pool: Pool, threshold: float) -> Quality:
    """What is true of a pool's answers of at least this confidence."""
    kept = pool.confidences >= threshold
    return Quality(float((kept & ~pool.agrees).mean()), float((kept & pool.agrees).mean()))


def _replaces(old: Serving, new: Serving, pools: Sequence[Pool], reference: np.ndarray, places: np.ndarray) -> bool:
    config = RefineConfig()
    answers = [_outcomes(pools[one.round], reference, places) for one in (old, new)]
    limits = {"epsilon": EPSILON, "margin": config.margin, "level": config.level}
    return compare("what serves", answers[0], old.threshold, answers[1], new.threshold, **limits).failed is None


def _take_all(chain: Sequence[Serving | None]) -> list[Serving | None]:
    first = next((one for one in chain if one is not None), None)
    return [Serving(number, first.threshold) if first else None for number in range(len(chain))]


def _reference(pool: Pool, noise: float, generator: np.random.Generator) -> np.ndarray:
    """What the LLM says to each call of the pool in this round: the clean answer, or a random one."""
    is_noisy = generator.random(len(pool.classes)) < noise
    return np.where(is_noisy, generator.choice(pool.classes, len(pool.classes)), pool.classes)


def _outcomes(pool: Pool, reference: np.ndarray, places: np.ndarray) -> list[Outcome]:
    """Answers to drawn calls, each of a session of its own."""
    return [
        Outcome(confidence=float(pool.confidences[p]), agrees=bool(pool.answers[p] == reference[p]), session_id=str(k))
        for k, p in enumerate(places)
    ]
