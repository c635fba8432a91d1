"""A candidate beside the specialist it would replace, on the same held-out calls: replaced only where it is shown to be no worse.

Two questions, each a one-sided test of non-inferiority for paired shares. Wrong: the share of all calls that are answered
and answered otherwise than the reference may grow by less than the margin; that is the quality of what is served, since
the LLM answers the others. Right: the share that is kept and right may fall by less than the margin; that is what the
specialist is there for. The second is not asked where the old one breaks its own promise on these calls: what it kept
beyond its promise is no loss.

The calls are those the gate was certified on. An additional test of a candidate that passed can only keep it from being
released, so the gate's own promise stands. Source: Tango 1998, "Equivalence test and confidence interval for the difference in
proportions for the paired-sample design", Statistics in Medicine 17 (score statistic with the restricted estimate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Protocol

from cluster.errors import InputError
from cluster.records import Record
from training.gate import clopper_pearson_interval


class Answered(Protocol):
    """A graded answer: `training.gate.Outcome`, or a benchmark's."""

    @property
    def confidence(self) -> float: ...

    @property
    def agrees(self) -> bool: ...

    @property
    def session_id(self) -> str: ...


class Difference(Record):
    """How often two specialists differ in one respect on the same calls."""

    old_share: float
    new_share: float
    only_old: int
    """Calls of which it is true of the old one alone."""
    only_new: int
    p_value: float
    """Of "the new one is worse by the margin or more"; small where it is shown to be no worse."""


class Regression(Record):
    """What the test said."""

    replaced: str
    """Name of the old specialist."""
    num_calls: int
    margin: float
    level: float
    wrong: Difference
    right: Difference | None
    """None where the old specialist breaks its own promise on these calls."""
    failed: str | None = None
    """Why the old one stays; None where the new one may replace it."""


def compare(
    replaced: str,
    old: Sequence[Answered],
    old_threshold: float,
    new: Sequence[Answered],
    new_threshold: float,
    *,
    epsilon: float,
    margin: float,
    level: float,
) -> Regression:
    """Test a candidate against the specialist it would replace.

    Args:
        old, new: their answers to the same calls, one a session, in one order; a confidence of 0 is never kept.
        epsilon: the old gate's.
        level: chance that one which is worse by exactly the margin passes one of the two tests.

    Raises:
        InputError: the answers are not to the same calls, or there are none.
    """
    if not old or [one.session_id for one in old] != [one.session_id for one in new]:
        raise InputError(f"{replaced}: {len(old)} answers beside {len(new)}; allowed: answers to the same calls, some")
    kept = [
        (one.confidence >= old_threshold, other.confidence >= new_threshold)
        for one, other in zip(old, new, strict=True)
    ]
    pairs = list(zip(kept, old, new, strict=True))
    wrong = _difference(
        [is_kept and not one.agrees for (is_kept, _), one, _ in pairs],
        [is_kept and not one.agrees for (_, is_kept), _, one in pairs],
        margin,
        is_good=False,
    )
    right = _difference(
        [is_kept and one.agrees for (is_kept, _), one, _ in pairs],
        [is_kept and one.agrees for (_, is_kept), _, one in pairs],
        margin,
        is_good=True,
    )
    num_kept = sum(is_kept for is_kept, _ in kept)
    num_wrong = sum(is_kept and not one.agrees for (is_kept, _), one, _ in pairs)
    keeps_promise = not num_kept or clopper_pearson_interval(num_wrong, num_kept, 0.9)[0] <= epsilon
    found = Regression(
        replaced=replaced,
        num_calls=len(old),
        margin=margin,
        level=level,
        wrong=wrong,
        right=right if keeps_promise else None,
    )
    return found.model_copy(update={"failed": _failure(found)})


def noninferiority_p(num_better: int, num_worse: int, num_calls: int, margin: float) -> float:
    """p-value of "the new one's share is lower by the margin or more", for paired calls.

    Args:
        num_better: calls of which it is true of the new one alone; num_worse of the old one alone.
        margin: above 0.
    """
    observed = (num_better - num_worse) / num_calls + margin
    # Restricted estimate of the share that is worse: the larger root of Tango's quadratic.
    linear = num_better + num_worse + margin * (2 * num_calls + num_worse - num_better)
    constant = num_worse * margin * (1 + margin)
    worse = (linear + math.sqrt(max(linear * linear - 8 * num_calls * constant, 0.0))) / (4 * num_calls)
    variance = (2 * worse - margin - margin * margin) / num_calls
    if variance <= 0:
        return 0.0 if observed > 0 else 1.0
    return 1 - NormalDist().cdf(observed / math.sqrt(variance))


def _difference(old: Sequence[bool], new: Sequence[bool], margin: float, *, is_good: bool) -> Difference:
    only_old = sum(one and not other for one, other in zip(old, new, strict=True))
    only_new = sum(other and not one for one, other in zip(old, new, strict=True))
    better, worse = (only_new, only_old) if is_good else (only_old, only_new)
    return Difference(
        old_share=sum(old) / len(old),
        new_share=sum(new) / len(new),
        only_old=only_old,
        only_new=only_new,
        p_value=noninferiority_p(better, worse, len(old), margin),
    )


def _failure(found: Regression) -> str | None:
    for name, one in (("answered wrongly", found.wrong), ("kept and right", found.right)):
        if one is not None and one.p_value > found.level:
            return (
                f"not shown to be as good as {found.replaced}: {name} {one.new_share:.1%} of {found.num_calls} calls beside "
                f"{one.old_share:.1%} (p {one.p_value:.2g}, needs {found.level:g} at a margin of {found.margin:g})"
            )
    return None
