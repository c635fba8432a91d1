"""AgentCalls from the request path -> Parquet in the store. How much may be lost with the process is a dial.

`async`: a bounded queue in memory, written out every second or every 200 calls by one background task; no request ever
waits for it. `sync`: a request's last byte waits until the call is in a journal on the disk (serving/journal.py), which
is folded into Parquet in the background (serving/folding.py). Knows nothing of HTTP or of what a call means.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pydantic import Field

from cluster.calls import MAX_CALLS_PER_PART, load_writer
from cluster.config import Config
from cluster.errors import ConfigError, StoreError
from cluster.records import AgentCall
from cluster.store import Store
from cluster.telemetry import Meter, log_event
from serving.folding import MAX_BATCH_BYTES, fold_orphans, publish_calls
from serving.journal import Journal, KeyWrapper, prepare_folder

JOURNAL_FOLDER = "journal"
"""Of a local store."""
_CLOSE_TIMEOUT_S = 10.0
"""Within serving.scaling.STOP_MARGIN_S, after which Ray Serve kills a replica that does not end."""
_COMMIT_TIMEOUT_S = 30.0
"""Longest a request waits for a disk that hangs."""
_T = TypeVar("_T")


class CaptureConfig(Config):
    """How much may be lost with the process, and how much memory and disk a slow store may cost."""

    durability: Literal["async", "sync"] = "async"
    """`async`: a process that is killed loses what arrived since its last finished flush began, and a machine that loses
    power what its kernel had not written. `sync`: neither loses what a client saw finished; every call waits for an
    fsync, and its content is read from the store up to fold_interval_s later."""
    flush_interval_s: float = Field(default=1.0, gt=0)
    """Longest time a call waits in memory before it is written, in seconds."""
    flush_calls: int = Field(default=200, ge=1)
    """Number of waiting calls that starts a write at once."""
    queue_size: int = Field(default=10_000, ge=1)
    """Calls held in memory at most; further ones are dropped and counted, or refused where durability is sync."""
    queue_bytes: int = Field(default=256 * 2**20, ge=1)
    """Memory that calls held may take, in bytes; what does not fit is treated like a full queue. Writing takes up to
    another 100 MiB or so."""
    journal: str | None = None
    """Whole path of the journal's folder, on a disk that outlives the process; None takes STORE/journal, which a remote
    store does not have. It belongs to this store and user alone and has mode 700."""
    journal_bytes: int = Field(default=64 * 2**20, ge=1)
    """Size from which a journal file is ended and the next begun."""
    journal_max_bytes: int = Field(default=8 * 2**30, ge=1)
    """Size of all journals in the folder, from which on no new file is begun: a store that is away so long that they wait
    for it fills no disk, and calls whose durability is sync are refused."""
    fold_interval_s: float = Field(default=10.0, gt=0)
    """How often journals become Parquet, in seconds; until then readers do not see their calls."""


class Capture:
    """Writes calls in the background. Belongs to one event loop.

    Contract:
    - `put` never blocks, never awaits and never raises. What does not fit is dropped and counted.
    - A call that was put is written within flush_interval_s, or as soon as flush_calls wait, while the store works;
      killed, the process loses what was put since the last finished flush began.
    - `keep` is `put` where durability is async. Where it is sync it returns once the call is in the journal on the
      disk, and raises StoreError where it cannot be: then the client must not be told that the call is done.
    - While the store fails, calls stay queued and are tried again every flush_interval_s. One that hangs holds up no
      request, and memory stays within queue_size and queue_bytes.
    - A call that cannot be written is dropped and counted, or stays in the journal set aside; the others are written.
    - After `close` every call put before it is written or counted as dropped; later ones are dropped. It ends within
      10 seconds; what the store has not taken until then is counted as dropped, though the store may yet take it.
    - Journals of processes that died are folded from `start` on, also where durability is async.
    - A call may be stored twice under its id after a failure; readers read it once.
    """

    def __init__(
        self, store: Store, config: CaptureConfig, meter: Meter | None = None, keys: KeyWrapper | None = None
    ) -> None:
        """Write to `store`; `keys` encrypt the journal, and without them there is none.

        Raises:
            ConfigError: durability is sync, and there is no folder for the journal, or others can open it.
        """
        self._store, self._config, self._meter = store, config, meter or Meter()
        self._queue: collections.deque[tuple[AgentCall, int]] = collections.deque()
        self._num_held = self._bytes_held = 0
        self._wake, self._closing = asyncio.Event(), asyncio.Event()
        self._flushing, self._folding = asyncio.Lock(), asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._keys = keys
        self._folder = journal_folder(config, store.uri)
        self._journal: Journal | None = None
        if config.durability == "sync":
            assert keys is not None and self._folder is not None, "a journal needs keys"
            prepare_folder(self._folder)
            self._journal = Journal(self._folder, keys, config.journal_bytes, config.journal_max_bytes)

    def start(self) -> None:
        """Begin to write in the background; needs a running event loop. Starting twice changes nothing."""
        if not self._tasks:
            load_writer()
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._run_flushes()), loop.create_task(self._run_folds())]
            for task in self._tasks:
                task.add_done_callback(_note_end)

    def put(self, call: AgentCall) -> None:
        """Queue one call."""
        size = memory_of(call)
        reason = self._refusal(size)
        if reason is not None:
            return self._drop(reason, 1)
        self._hold(size)
        self._queue.append((call, size))
        # Equal, not at least: while the store fails, the queue is longer and new calls must not hurry the next try.
        if len(self._queue) == self._config.flush_calls:
            self._wake.set()

    async def keep(self, call: AgentCall) -> None:
        """Queue one call, or make it durable; cancelled while it waits, the call is written all the same.

        Raises:
            StoreError: durability is sync, and the call is not on the disk.
        """
        if self._journal is None:
            return self.put(call)
        size = memory_of(call)
        reason = self._refusal(size)
        if reason is not None:
            self._drop(reason, 1)
            raise StoreError(f"capture: the journal takes no more calls ({reason})")
        self._hold(size)
        commit = self._journal.submit(call)
        commit.add_done_callback(lambda done: self._note_commit(done, size))
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT_S):
                await asyncio.shield(commit)
        except TimeoutError:
            raise StoreError(f"capture: the journal's disk has not answered for {_COMMIT_TIMEOUT_S:g} s") from None

    async def flush(self) -> bool:
        """Write all that is queued or in a journal now; False where the store failed and the calls wait on."""
        is_written = await self._flush_queue()
        return await self._fold() and is_written

    async def close(self) -> None:
        """Stop and write the rest; what the store refuses now is dropped and counted."""
        self._closing.set()
        self._wake.set()
        work = asyncio.ensure_future(self._finish())
        await asyncio.wait({work}, timeout=_CLOSE_TIMEOUT_S)
        if not work.done():
            log_event("capture_abandoned", logging.ERROR, num_calls=self._num_held)
        for task in (work, *self._tasks):
            task.cancel()
        await asyncio.gather(work, *self._tasks, return_exceptions=True)
        self._tasks = []
        if self._num_held:
            self._drop("store", self._num_held)
            self._num_held = self._bytes_held = 0
            self._queue.clear()

    async def _finish(self) -> None:
        await asyncio.gather(*self._tasks)
        if self._journal is not None:
            await self._journal.close()
        await self.flush()

    async def _run_flushes(self) -> None:
        while not self._closing.is_set():
            await _wait(self._wake, self._config.flush_interval_s)
            if not self._closing.is_set():
                self._wake.clear()
                await self._flush_queue()

    async def _run_folds(self) -> None:
        while not self._closing.is_set():
            await self._fold()
            await _wait(self._closing, self._config.fold_interval_s)

    async def _flush_queue(self) -> bool:
        async with self._flushing:
            remaining = len(self._queue)
            while remaining > 0:
                batch = self._take(remaining)
                remaining -= len(batch)
                if not await self._write(batch):
                    return False
            return True

    def _take(self, max_calls: int) -> list[tuple[AgentCall, int]]:
        """The oldest queued calls, as many as are written at once."""
        batch: list[tuple[AgentCall, int]] = []
        num_bytes = 0
        while self._queue and len(batch) < min(max_calls, MAX_CALLS_PER_PART) and num_bytes < MAX_BATCH_BYTES:
            batch.append(self._queue.popleft())
            num_bytes += batch[-1][1]
        return batch

    async def _write(self, batch: list[tuple[AgentCall, int]]) -> bool:
        try:
            published = await _in_thread(lambda: publish_calls(self._store, [call for call, _ in batch]))
        except (OSError, MemoryError, RuntimeError) as error:
            self._queue.extendleft(reversed(batch))
            log_event("capture_failed", logging.ERROR, error=type(error).__name__, num_calls=len(self._queue))
            return False
        for _, size in batch:
            self._release(size)
        self._count("understudy_calls_captured_total", published.num_calls)
        self._drop("unwritable", published.num_unwritable)
        return True

    async def _fold(self) -> bool:
        folder, keys = self._folder, self._keys
        if folder is None or keys is None:
            return True
        async with self._folding:
            if self._journal is not None:
                await self._journal.rotate()
            try:
                folded = await _in_thread(lambda: fold_orphans(self._store, keys, folder))
            except (OSError, MemoryError, RuntimeError) as error:
                log_event("fold_failed", logging.ERROR, error=type(error).__name__)
                return False
        self._count("understudy_calls_captured_total", folded.num_calls)
        self._count("understudy_journal_damaged_total", folded.num_damaged)
        return folded.num_left == 0

    def _refusal(self, size: int) -> str | None:
        if self._closing.is_set():
            return "closed"
        if self._num_held >= self._config.queue_size:
            return "queue_full"
        return "queue_bytes" if self._bytes_held + size > self._config.queue_bytes else None

    def _hold(self, size: int) -> None:
        self._num_held += 1
        self._bytes_held += size

    def _release(self, size: int) -> None:
        self._num_held -= 1
        self._bytes_held -= size

    def _note_commit(self, commit: asyncio.Future[None], size: int) -> None:
        self._release(size)
        if commit.exception() is None:
            self._count("understudy_calls_journaled_total", 1)
        else:
            self._drop("journal", 1)

    def _drop(self, reason: str, num_calls: int) -> None:
        self._count("understudy_calls_dropped_total", num_calls, reason=reason)

    def _count(self, name: str, num: int, **tags: str) -> None:
        # An exported counter refuses 0.
        if num:
            self._meter.count(name, num, **tags)


def journal_folder(config: CaptureConfig, store_uri: str) -> pathlib.Path | None:
    """Where the journals of a store are; None for a remote store whose config names no folder.

    Raises:
        ConfigError: durability is sync and there is no folder, or the folder is not named by its whole path.
    """
    local = store_uri.removeprefix("file://")
    if config.journal is None:
        if "://" not in local:
            return pathlib.Path(local).expanduser().resolve() / JOURNAL_FOLDER
        if config.durability == "async":
            return None
        raise ConfigError(
            f"capture.journal: not given, and store={store_uri!r} is remote, where a journal cannot be; allowed with "
            "capture.durability=sync: the whole path of a folder on a disk that outlives the process; "
            "next: capture.journal=/var/lib/understudy/journal"
        )
    if not config.journal.startswith("/"):
        raise ConfigError(
            f"capture.journal={config.journal!r}: allowed: the whole path of a folder, because replicas run in others; "
            "next: capture.journal=/var/lib/understudy/journal"
        )
    return pathlib.Path(config.journal)


def memory_of(call: AgentCall) -> int:
    """Bytes that a call's content takes in memory; what is shared between calls counts for each."""
    size, stack = 0, [call.request, call.response, call.outcome]
    while stack:
        value: Any = stack.pop()
        size += sys.getsizeof(value)
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    return size


def _note_end(task: asyncio.Task[None]) -> None:
    """Calls pile up from here on until the queue is full, so somebody must hear of it."""
    if not task.cancelled() and task.exception() is not None:
        log_event("capture_ended", logging.CRITICAL, error=type(task.exception()).__name__)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


async def _in_thread(function: Callable[[], _T]) -> _T:
    """Like asyncio.to_thread, in a daemon: one that hangs neither keeps the process from ending nor fills a pool."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = function(), None
        except BaseException as error:  # Raised again where it is awaited.
            outcome = None, error
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="capture", daemon=True).start()
    return await done
