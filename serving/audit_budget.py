"""What the reference stream may cost in a day, and the share of calls that it may take for that, decided a minute ahead.

The share of a minute follows from what was spent before it and from nothing that happens in it: never from a call, its answer
or what the LLM said of it. Each minute's calls are drawn by their ids alone at one share, so the audits of a minute speak for
its calls, and tests that may be looked at any time stay valid (the rate is predictable). Spending is paced over the day (UTC):
a morning does not eat the evening's audits. Where a minute of many calls would overrun what the whole day has left, the
rest of its audits is refused by the money alone. Counted in one gateway replica, from zero when it starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.spend import DAY_S, DailySpend

_PERIOD_S = 60.0
_MEMORY = 0.8
"""Weight of the past in what a minute of full audits is expected to cost; the rest is the last minute's."""


class AuditBudget:
    """Money and share of one gateway's audits. Belongs to one event loop."""

    def __init__(self, max_usd: float | None, clock: Callable[[], float] = time.time) -> None:
        """None bounds nothing. `clock` gives seconds since the epoch."""
        self._max_usd, self._clock = max_usd, clock
        self._day = DailySpend(max_usd, clock)
        self._period, self._factor = int(clock() // _PERIOD_S), 1.0
        self._spent_in_period = 0.0
        self._full_usd: float | None = None
        """What a period's audits are expected to cost at a factor of 1; None before any period cost something."""

    @property
    def factor(self) -> float:
        """What every share is multiplied by in this minute, in [0, 1]; 1 without a bound."""
        self._turn()
        return self._factor

    @property
    def is_spent(self) -> bool:
        """Whether the day's money is gone."""
        return self._day.wait_s > 0

    @property
    def spent_usd(self) -> float:
        """Since midnight UTC or the start."""
        return self._day.spent_usd

    @property
    def max_usd(self) -> float | None:
        """What a day may cost; None without a bound."""
        return self._max_usd

    def add(self, usd: float) -> None:
        """Count what an audit cost; it changes no share before the next minute."""
        self._turn()
        self._day.add(usd)
        self._spent_in_period += usd

    def _turn(self) -> None:
        """Decide the share of a minute that begins, from the minutes before it."""
        now = self._clock()
        period = int(now // _PERIOD_S)
        if self._max_usd is None or period == self._period:
            return
        num_periods = max(1, period - self._period)
        if self._factor > 0:
            full = self._spent_in_period / self._factor / num_periods
            past = full if self._full_usd is None else self._full_usd
            self._full_usd = _MEMORY * past + (1 - _MEMORY) * full
        end_s = (period + 1) * _PERIOD_S % DAY_S or DAY_S
        allowed = self._max_usd * end_s / DAY_S - self._day.spent_usd
        expected = self._full_usd or 0.0
        self._factor = min(1.0, max(0.0, allowed) / expected) if expected else 1.0
        self._period, self._spent_in_period = period, 0.0
