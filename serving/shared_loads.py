"""One load of an adapter for all who ask for it at once, and how many there were."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any


class SharedLoads:
    """Loads adapters; whoever asks for one that is being loaded waits for that load instead of beginning another.

    - Concurrent first requests for an adapter never race in the engine.
    - A caller that gives up ends nobody's load: the next one finds it further on, or done.
    - A load that fails raises in all that wait for it, and the next caller begins anew.
    """

    def __init__(self, load: Callable[[str], Awaitable[Any]]) -> None:
        """`load` must be quick for an adapter that is loaded."""
        self._load = load
        self._running: dict[str, asyncio.Task[Any]] = {}

    async def get(self, adapter: str) -> Any:
        """What `load` gives for the adapter."""
        task = self._running.get(adapter)
        if task is None:
            task = asyncio.ensure_future(self._load(adapter))
            self._running[adapter] = task
            task.add_done_callback(lambda done: self._end(adapter, done))
        return await asyncio.shield(task)

    def _end(self, adapter: str, done: asyncio.Task[Any]) -> None:
        del self._running[adapter]
        # Looked at, so that asyncio does not complain where everybody who waited has left.
        _ = done.cancelled() or done.exception()


class CountedLoads:
    """What a replica says of the adapters that it has loaded."""

    num_loads = 0
    """Adapters given to the engine so far; one that was given up for another and asked for again counts again."""

    async def facts(self) -> dict[str, int]:
        """Loads so far, and this replica's process."""
        return {"num_loads": self.num_loads, "pid": os.getpid()}
