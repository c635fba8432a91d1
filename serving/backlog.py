"""Rows from the request path -> the store, in the background: a bounded queue, written out every second.

For rows that may be refused when there are too many, because their sender is told and can send them again; calls, which
may not, have serving/capture.py. Knows nothing of what a row means.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from cluster.telemetry import log_event

RowT = TypeVar("RowT")

_FLUSH_INTERVAL_S = 1.0
_QUEUE_SIZE = 10_000


class Backlog(Generic[RowT]):
    """Writes rows in batches. Belongs to one event loop.

    Contract:
    - `put` never blocks and never raises; it says whether the row is taken.
    - While the store fails, rows stay queued and are tried again every second.
    - After `close` every row taken is written, or reported as lost.
    """

    def __init__(self, write: Callable[[Sequence[RowT]], Any], name: str) -> None:
        """Take what writes a batch, in a thread; it raises OSError where the store fails. `name` is for the log."""
        self._write, self._name = write, name
        self._queue: collections.deque[RowT] = collections.deque()
        self._lock = asyncio.Lock()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write; needs a running event loop. Starting twice changes nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def put(self, row: RowT) -> bool:
        """Queue one row; False where there is no room for it."""
        if self._closing.is_set() or len(self._queue) >= _QUEUE_SIZE:
            return False
        self._queue.append(row)
        return True

    async def flush(self) -> bool:
        """Write all that is queued now; False where the store failed and the rows stay queued."""
        async with self._lock:
            batch = list(self._queue)
            if not batch:
                return True
            try:
                await asyncio.to_thread(self._write, batch)
            except OSError as error:
                log_event(f"{self._name}_unwritten", logging.ERROR, error=type(error).__name__, num_rows=len(batch))
                return False
            for _ in batch:
                self._queue.popleft()
            return True

    async def close(self) -> None:
        """Stop and write the rest."""
        self._closing.set()
        if self._task is not None:
            await self._task
            self._task = None
        if not await self.flush():
            log_event(f"{self._name}_lost", logging.ERROR, num_rows=len(self._queue))

    async def _run(self) -> None:
        while not self._closing.is_set():
            try:
                async with asyncio.timeout(_FLUSH_INTERVAL_S):
                    await self._closing.wait()
            except TimeoutError:
                await self.flush()
