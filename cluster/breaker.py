"""Whether an endpoint may be called: closed, open for a while after failures in a row, then half open for one probe.

Beside it stands what the endpoint itself asked for: to be left alone until a moment (Retry-After), with one of its models
alone, because providers limit each for itself. Knows nothing of what is called. Belongs to one event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_MAX_MODELS = 1_000
"""Models that a pause is remembered of; clients name them, so there is no end to them."""


class Permit:
    """Leave for one call to go out. The first of `succeed`, `fail` and `leave` ends it; later ones change nothing."""

    def __init__(self, end: Callable[[Permit, bool | None], None]) -> None:
        self._end: Callable[[Permit, bool | None], None] | None = end

    def succeed(self) -> None:
        """The endpoint works."""
        self._finish(True)

    def fail(self) -> None:
        """The endpoint failed."""
        self._finish(False)

    def leave(self) -> None:
        """The call ended without a word on the endpoint's health: its client left, or its rate was used up."""
        self._finish(None)

    def _finish(self, is_good: bool | None) -> None:
        if self._end is not None:
            end, self._end = self._end, None
            end(self, is_good)


class Breaker:
    """Closed until `failures` calls in a row failed; open for `reset_s`; then one call probes while all others wait."""

    def __init__(self, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._reset_s, self._clock = failures, reset_s, clock
        self._num_failures = 0
        self._open_until = 0.0
        self._probe: Permit | None = None

    @property
    def wait_s(self) -> float:
        """Seconds until a call may go out; 0 where one may, or where only a probe in flight is waited for."""
        return max(0.0, self._open_until - self._clock()) if self._num_failures >= self._limit else 0.0

    def begin(self) -> Permit | None:
        """Leave for one call, or None. While half open the first one gets it, and no other until that one has ended."""
        if self.wait_s > 0:
            return None
        permit = Permit(self._end)
        if self._num_failures >= self._limit:
            if self._probe is not None:
                return None
            self._probe = permit
        return permit

    def _end(self, permit: Permit, is_good: bool | None) -> None:
        if permit is self._probe:
            self._probe = None
        if is_good:
            self._num_failures = 0
        elif is_good is not None:
            self._num_failures += 1
            self._open_until = self._clock() + self._reset_s


class Pauses:
    """Which models an endpoint asked to be left alone with, and until when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def add(self, model: str, seconds: float) -> None:
        """Let no call of the model out for so long."""
        now = self._clock()
        if len(self._until) >= _MAX_MODELS:
            self._until = {name: until for name, until in self._until.items() if until > now}
        if model in self._until or len(self._until) < _MAX_MODELS:
            self._until[model] = max(self._until.get(model, 0.0), now + seconds)

    def wait_s(self, model: str) -> float:
        """Seconds until a call of the model may go out; 0 where one may."""
        return max(0.0, self._until.get(model, 0.0) - self._clock())
