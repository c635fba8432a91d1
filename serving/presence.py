"""Whether a deployment has a replica that answers, told by calls alone: while it has none, callers go elsewhere at once.

Ray Serve holds a call until a replica is up, which after a scale to zero, or when all replicas died, takes as long as an
engine takes to start. A probe waits in the call's place: it is what makes Serve start a replica, and its answer says that
there is one. Knows nothing of engines. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator

from cluster.errors import EngineError

_GRACE_S = 0.25
"""How long calls wait for a probe that has begun: a replica that is up answers it in milliseconds."""
_SLOW_S = 2.0
"""A call that was given up after less says nothing: its client left, or its answer was not wanted any more."""


class ColdStart(EngineError):
    """No replica is up; one is being started."""


class Presence:
    """What is known of one deployment's replicas."""

    def __init__(
        self,
        probe: Callable[[], Awaitable[object]],
        idle_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            probe: returns once a replica is up and ready.
            idle_s: after how long without a call the last replica may go; None where one is always kept.
        """
        self._probe, self._idle_s, self._clock = probe, idle_s, clock
        self._seen_at: float | None = None
        """When a call last succeeded; None where nothing is known."""
        self._probing: asyncio.Task[None] | None = None
        self._grace_until = 0.0

    async def check(self) -> None:
        """Return where a replica is up, as far as is known.

        Raises:
            ColdStart: none is; one is being started.
        """
        if self._is_up():
            return
        loop = asyncio.get_running_loop()
        if self._probing is None:
            self._probing, self._grace_until = loop.create_task(self._run_probe()), loop.time() + _GRACE_S
            # Looked at, so that asyncio does not complain: the next call probes again.
            self._probing.add_done_callback(lambda done: done.cancelled() or done.exception())
        if loop.time() < self._grace_until:
            await asyncio.wait({self._probing}, timeout=self._grace_until - loop.time())
        if not self._is_up():
            raise ColdStart("no replica is up; one is being started")

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around one call: learns from how it ends."""
        begin, has_answered = self._clock(), False
        try:
            yield
            has_answered = True
        finally:
            if has_answered:
                self._seen_at = self._clock()
            elif self._clock() - begin > _SLOW_S:
                self._seen_at = None

    def _is_up(self) -> bool:
        if self._seen_at is None:
            return False
        return self._idle_s is None or self._clock() - self._seen_at < self._idle_s

    async def _run_probe(self) -> None:
        try:
            await self._probe()
            self._seen_at = self._clock()
        finally:
            self._probing = None
