"""What may be asked again, and when: HTTP status and attempt number -> yes or no, and seconds to wait.

Sources: RFC 9110 section 10.2.3 (Retry-After); RFC 6585 (429); M. Brooker, "Exponential Backoff And Jitter", AWS
Architecture Blog, 2015 (full jitter).
"""

from __future__ import annotations

import email.utils
import math
import random
import time

LONGEST_RETRY_AFTER_S = 30.0
"""A call does not wait for longer, however long an endpoint asks it to: it ends, and another endpoint may answer."""
LONGEST_PAUSE_S = 60.0
"""An endpoint that asks to be left alone for longer, as one whose quota is spent, is asked again after this."""
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.25, 8.0
_RETRYABLE_4XX = frozenset({408, 409, 425, 429})


def is_retryable(status: int) -> bool:
    """Whether the same request may fare better: the server's own failures, timeouts, locks and rates, not the client's errors.

    Example:
        >>> [is_retryable(status) for status in (400, 404, 429, 500, 529)]
        [False, False, True, True, True]
    """
    return status >= 500 or status in _RETRYABLE_4XX


def backoff_s(attempt: int) -> float:
    """Seconds to wait after the attempt of this number, from 1: exponential with full jitter, so that callers who failed
    together do not come back together."""
    return random.uniform(0.0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** (attempt - 1)))


def parse_retry_after(value: str | None) -> float | None:
    """Seconds asked for by a Retry-After header, which gives seconds or a date; None where absent or wrong."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
