"""Whether one specialist should answer a task's calls, or several a part of them each: the decision, from graded answers.

The same validation calls are answered by a joint specialist and by those of the parts, so answers are compared in pairs.
A task is split only where the lower bound of the difference in agreement is above 0; ties keep it together, because
every further specialist is trained, certified and held in memory. The bound is exact: of the calls that only one side
answers rightly, the parts' share is binomial (the test of McNemar 1947), and so is the share of such calls among all.
Both get Clopper-Pearson intervals, whose levels are divided so that all comparisons of a run hold at once (Bonferroni).
Knows neither how parts are found nor how specialists are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cluster.records import Record
from training.gate import clopper_pearson_interval

_LEVEL = 0.95
"""Of all intervals of a run together."""
_SIGN_SHARE = 0.8
"""Of a comparison's level that is spent on which side is better; the rest on how often the sides differ at all."""


class Comparison(Record):
    """One joint specialist beside the specialists of several parts, on the same validation calls."""

    num_parts: int
    num_examples: int
    joint: float
    """Share of the calls that the joint specialist answers as the reference does."""
    apart: float
    """The same of the parts' specialists, each asked the calls of its part."""
    interval: tuple[float, float]
    """Of apart - joint; all intervals of a run hold at once with probability 95%."""

    @property
    def is_better_apart(self) -> bool:
        return self.interval[0] > 0


class Usefulness(Record):
    """What was measured of one task that might be several, and what follows."""

    task_ids: tuple[str, ...]
    """The task, and where it was split the others that came of it."""
    reason: str
    snapshot: str = ""
    base: str = ""
    """What specialists were probed on; empty where nothing was measured."""
    num_steps: int = 0
    """Optimiser steps of a part's specialist; a joint one beside k parts has k times as many."""
    compared: tuple[Comparison, ...] = ()
    confirmed: Comparison | None = None
    """The best split, trained and compared anew from another seed; None where none was better."""
    chosen: int | None = None
    """Number of the split in `compared`; None keeps the task together."""
    has_failed: bool = False
    """Whether a probe failed, so that nothing is known."""
    key: str = ""
    """Hash of all that the measurement follows from; empty where it failed."""


def compare(joint: Sequence[bool], apart: Sequence[bool], *, num_parts: int, num_compared: int) -> Comparison:
    """Compare graded answers to the same calls, which must be independent of each other: one per session.

    Args:
        num_compared: comparisons of the whole run, which share the level.
    """
    assert len(joint) == len(apart) > 0, (len(joint), len(apart))
    gains = sum(a and not j for j, a in zip(joint, apart, strict=True))
    losses = sum(j and not a for j, a in zip(joint, apart, strict=True))
    num, missed = len(joint), (1 - _LEVEL) / num_compared
    low_odds, high_odds = clopper_pearson_interval(gains, gains + losses, 1 - _SIGN_SHARE * missed)
    rates = clopper_pearson_interval(gains + losses, num, 1 - (1 - _SIGN_SHARE) * missed)
    corners = [[rate * (2 * odds - 1) for rate in rates] for odds in (low_odds, high_odds)]
    return Comparison(
        num_parts=num_parts,
        num_examples=num,
        joint=sum(joint) / num,
        apart=sum(apart) / num,
        interval=(min(corners[0]), max(corners[1])),
    )


def choose_split(compared: Sequence[Comparison]) -> int | None:
    """Number of the comparison whose split helps most for sure, of equals the one of fewest parts; None: keep together."""
    better = [number for number, one in enumerate(compared) if one.is_better_apart]
    return max(better, key=lambda n: (compared[n].interval[0], -compared[n].num_parts, -n), default=None)


def group_topics(centroids: np.ndarray, most: int) -> list[tuple[int, ...]]:
    """Topics joined into 2 to `most` parts by the distance of their unit centroids (Ward 1963: parts of like size).

    Returns:
        For each number of parts that there can be, the part of every topic; parts count from 0 in order of topics.
    """
    from sklearn.cluster import AgglomerativeClustering

    found = []
    for num_parts in range(2, min(most, len(centroids)) + 1):
        model = AgglomerativeClustering(n_clusters=num_parts, linkage="ward")
        labels = model.fit_predict(centroids.astype(np.float64)).tolist()
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        found.append(tuple(numbers[label] for label in labels))
    return found


def describe_comparison(one: Comparison) -> str:
    """Example:
    >>> one = compare([True] * 93 + [False] * 7, [True] * 93 + [False] * 7, num_parts=2, num_compared=1)
    >>> describe_comparison(one)
    'joint 0.93, 2 parts 0.93, difference +0.00 [-0.05, +0.05]'
    """
    low, high = one.interval
    return (
        f"joint {one.joint:.2f}, {one.num_parts} parts {one.apart:.2f}, "
        f"difference {one.apart - one.joint:+.2f} [{low:+.2f}, {high:+.2f}]"
    )


def describe_usefulness(found: Usefulness) -> str:
    """One line for people: the decision and the numbers behind it."""
    verb = "kept together" if found.chosen is None else "split"
    told: Iterable[str] = map(describe_comparison, found.compared)
    again = [f"again from another seed: {describe_comparison(found.confirmed)}"] if found.confirmed else []
    numbers = "; ".join([*told, *again])
    return f"{verb}: {found.reason}" + (f" ({numbers}; {found.num_steps} steps on {found.base})" if numbers else "")
