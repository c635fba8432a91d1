"""Token log-probabilities -> one confidence in [0, 1]: the probability the specialist gave to its whole answer.

Calibration and serving call the same function, because a gate's threshold is a value of this score. The score is
not a probability of being right; the gate alone says how far it may be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


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
