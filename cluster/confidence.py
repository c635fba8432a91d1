"""Token log-probabilities -> one confidence in [0, 1]: the probability the specialist gave to its whole answer.

Calibration and serving call the same function, because a gate's threshold is a value of this score. The score is
not a probability of being right; the gate alone says how far it may be trusted. No further token can raise it, so an
answer whose first tokens are below a threshold can be given up: `is_lost` says so only where `confidence` of the whole
answer would be below it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_ROUNDING = 1e-9
"""Relative margin under the threshold, far above what sums of thousands of terms differ by and far below what a gate
tells apart: a partial sum that was rounded otherwise than the whole one never loses an answer that would be kept."""


def confidence(logprobs: Sequence[float]) -> float:
    """Probability of the answer's token sequence, end token included where the caller passes it.

    Args:
        logprobs: natural logarithms, one per generated token; one above 0 is rounding and counts as 0.

    Returns:
        exp(sum) in [0, 1]; 0 where there is no token, or where any value is NaN or infinite.
    """
    if not len(logprobs) or not all(math.isfinite(value) for value in logprobs):
        return 0.0
    return math.exp(sum(min(value, 0.0) for value in logprobs))


class ConfidenceBound:
    """The largest confidence that an answer can still reach, as its tokens come."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._is_finite = True

    def add(self, logprob: float) -> None:
        """Take the next token's natural logarithm, as `confidence` takes it."""
        self._is_finite = self._is_finite and math.isfinite(logprob)
        self._sum += min(logprob, 0.0)

    @property
    def value(self) -> float:
        """In [0, 1]; 1 before the first token."""
        return math.exp(self._sum) if self._is_finite else 0.0

    def is_lost(self, threshold: float) -> bool:
        """Whether no continuation reaches `threshold`."""
        return self.value < threshold * (1 - _ROUNDING)
