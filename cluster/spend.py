"""What one endpoint's tokens cost today, against what they may cost. Counted in this process, from zero when it starts."""

from __future__ import annotations

import time
from collections.abc import Callable

DAY_S = 86_400


class DailySpend:
    """US dollars spent since midnight UTC. Belongs to one event loop."""

    def __init__(self, max_usd: float | None, clock: Callable[[], float] = time.time) -> None:
        """None bounds nothing. `clock` gives seconds since the epoch."""
        self._max_usd, self._clock = max_usd, clock
        self._day, self._spent_usd = 0, 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until more may be spent: 0, or until midnight."""
        self._turn()
        if self._max_usd is None or self._spent_usd < self._max_usd:
            return 0.0
        return (self._day + 1) * DAY_S - self._clock()

    @property
    def spent_usd(self) -> float:
        """Since midnight, or since this began to count."""
        self._turn()
        return self._spent_usd

    def add(self, usd: float) -> None:
        """Count what a call cost; it is past being refused."""
        self._turn()
        self._spent_usd += usd

    def _turn(self) -> None:
        """Begin a new day where the old one is over."""
        today = int(self._clock() // DAY_S)
        if today != self._day:
            self._day, self._spent_usd = today, 0.0
