"""AgentCalls from the request path -> Parquet in the store, without the request path ever waiting.

A bounded queue in memory, written out every second or every 200 calls by one background task. Knows nothing of HTTP
or of what a call means.
"""

from __future__ import annotations

import asyncio
import collections
import logging

from pydantic import Field

from cluster.calls import write_calls
from cluster.config import Config
from cluster.records import AgentCall
from cluster.store import Store
from cluster.telemetry import Meter, log_event


class CaptureConfig(Config):
    """How much may be lost with the process, and how much memory a slow store may cost."""

    flush_interval_s: float = Field(default=1.0, gt=0)
    """Longest time a call waits before it is written, in seconds."""
    flush_calls: int = Field(default=200, ge=1)
    """Number of waiting calls that starts a write at once."""
    queue_size: int = Field(default=10_000, ge=1)
    """Calls held in memory at most; further ones are dropped and counted."""


class Capture:
    """Writes calls in the background. Belongs to one event loop.

    Contract:
    - `put` never blocks, never awaits and never raises. What does not fit is dropped and counted.
    - A call is written within flush_interval_s, or as soon as flush_calls wait, while the store works.
    - While the store fails, calls stay queued and are tried again every flush_interval_s.
    - A call that cannot be written (text that is no Unicode) is dropped and counted, and the others are written.
    - After `close` every call put before it is written or counted as dropped; later ones are dropped.
    - A call may be stored twice under its id after a failure; readers read it once.
    """

    def __init__(self, store: Store, config: CaptureConfig, meter: Meter | None = None) -> None:
        self._store, self._config, self._meter = store, config, meter or Meter()
        self._queue: collections.deque[AgentCall] = collections.deque()
        self._num_writing = 0
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write in the background; needs a running event loop. Starting twice changes nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def put(self, call: AgentCall) -> None:
        """Queue one call."""
        if self._is_closed:
            return self._drop("closed", 1)
        if len(self._queue) + self._num_writing >= self._config.queue_size:
            return self._drop("queue_full", 1)
        self._queue.append(call)
        # Equal, not at least: while the store fails, the queue is longer and new calls must not hurry the next try.
        if len(self._queue) == self._config.flush_calls:
            self._wake.set()

    async def keep(self, call: AgentCall) -> None:
        """Return once the call is as durable as the dial promises.

        The call is taken at once, before anything is awaited: a caller that is cancelled while it waits has handed it
        over.
        """
        self.put(call)

    async def flush(self) -> bool:
        """Write all that is queued now; False where the store failed and the calls stay queued."""
        async with self._lock:
            if not self._queue:
                return True
            batch = list(self._queue)
            self._queue.clear()
            self._num_writing = len(batch)
            try:
                num_written = await asyncio.to_thread(self._write, batch)
            except OSError as error:
                self._queue.extendleft(reversed(batch))
                log_event("capture_failed", logging.ERROR, error=type(error).__name__, num_calls=len(self._queue))
                return False
            finally:
                self._num_writing = 0
            if num_written:
                self._meter.count("understudy_calls_captured_total", num_written)
            if num_written < len(batch):
                self._drop("unwritable", len(batch) - num_written)
            return True

    async def close(self) -> None:
        """Stop and write the rest; what the store refuses now is dropped and counted."""
        self._is_closed = True
        self._wake.set()
        if self._task is not None:
            await self._task
            self._task = None
        if not await self.flush():
            self._drop("store", len(self._queue))
            self._queue.clear()

    async def _run(self) -> None:
        while not self._is_closed:
            try:
                async with asyncio.timeout(self._config.flush_interval_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            if not self._is_closed:
                self._wake.clear()
                await self.flush()

    def _write(self, batch: list[AgentCall]) -> int:
        """Write in a thread; returns how many could be written. Raises OSError where the store fails."""
        try:
            write_calls(self._store, batch)
        except (ValueError, TypeError, OverflowError):
            return sum(self._write_one(call) for call in batch)
        return len(batch)

    def _write_one(self, call: AgentCall) -> bool:
        try:
            write_calls(self._store, [call])
        except (ValueError, TypeError, OverflowError) as error:
            log_event("call_unwritable", logging.ERROR, call_id=call.call_id, error=type(error).__name__)
            return False
        return True

    def _drop(self, reason: str, num_calls: int) -> None:
        self._meter.count("understudy_calls_dropped_total", num_calls, reason=reason)
