"""Calls that go on after this gateway was told to stop -> ended by itself, while it still can tell and keep them.

Ray Serve waits for the calls in flight and kills the replica some time later, with whatever was in it. So those that are
not over once the recipe's drain time is are ended like calls whose LLM breaks off: the client gets an error, the call is
captured. Belongs to one event loop; `begin` alone may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from cluster.errors import UpstreamError
from serving.openai_wire import error_body

SHUTTING_DOWN = "shutting_down"
"""Code of that error."""
Stop = Callable[[UpstreamError], None]


class Drain:
    """Ends what is registered with it."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` is how long calls may go on after `begin`."""
        self._timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stops: set[Stop] = set()
        self.is_over = False
        """Whether the drain time is over."""

    def attach(self) -> None:
        """Belong to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def begin(self) -> None:
        """The gateway is to stop; a second time changes nothing."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin)

    def close(self) -> None:
        """There is nothing more to end."""
        if self._timer is not None:
            self._timer.cancel()

    @contextlib.contextmanager
    def watch(self, stop: Stop) -> Iterator[None]:
        """Call `stop` with the error for the client once the drain time is over, at the next turn where it is already."""
        self._stops.add(stop)
        if self.is_over:
            asyncio.get_running_loop().call_soon(self._stop, stop)
        try:
            yield
        finally:
            self._stops.discard(stop)

    def _begin(self) -> None:
        if self._timer is None:
            assert self._loop is not None
            self._timer = self._loop.call_later(self._timeout_s, self._end_all)

    def _end_all(self) -> None:
        self.is_over = True
        for stop in list(self._stops):
            self._stop(stop)

    def _stop(self, stop: Stop) -> None:
        if stop in self._stops:
            stop(shutdown_error())


def shutdown_error() -> UpstreamError:
    """The error of a call that the end of this gateway cuts off."""
    message = "This gateway stops, and the answer was not whole within its drain time; send the request again"
    return UpstreamError(message, 503, error_body(message, kind="server_error", code=SHUTTING_DOWN))
