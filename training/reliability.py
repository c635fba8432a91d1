"""How far a confidence can be believed: agreement by confidence, and what other promises would keep. For people; decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.records import Record
from training.gate import Outcome, clopper_pearson_interval

EPSILONS = (0.01, 0.02, 0.05, 0.1)
"""Promises that reports show what they would keep."""
_NUM_BINS = 10


class Bin(Record):
    """Answers of like confidence."""

    confidence: float
    """Mean of theirs."""
    num_calls: int
    num_agreements: int
    interval: tuple[float, float]
    """95% of the share that agrees."""


def reliability(outcomes: Sequence[Outcome]) -> tuple[Bin, ...]:
    """At most ten bins of about as many answers each, by confidence upwards; answers of no use (confidence 0) are left out."""
    ranked = sorted((one for one in outcomes if one.confidence > 0), key=lambda one: one.confidence)
    size = max(1, -(-len(ranked) // _NUM_BINS))
    return tuple(_bin(ranked[begin : begin + size]) for begin in range(0, len(ranked), size))


def coverage_by_epsilon(curve: Sequence[Mapping[str, float]]) -> list[tuple[float, float, float]]:
    """For each of EPSILONS: the largest coverage at which disagreement is within it, and at which its interval is."""
    return [
        (
            epsilon,
            *(
                max((point["coverage"] for point in curve if point[end] <= epsilon), default=0.0)
                for end in ("disagreement", "upper")
            ),
        )
        for epsilon in EPSILONS
    ]


def _bin(outcomes: Sequence[Outcome]) -> Bin:
    right = sum(one.agrees for one in outcomes)
    low, high = clopper_pearson_interval(len(outcomes) - right, len(outcomes))
    mean = sum(one.confidence for one in outcomes) / len(outcomes)
    return Bin(confidence=mean, num_calls=len(outcomes), num_agreements=right, interval=(1 - high, 1 - low))
