"""AgentCalls -> an append-only file of AES-256-GCM records that survives `kill -9` and power loss once `submit` is done.

One writer thread encodes, encrypts, writes and fsyncs; all calls that wait while one fsync runs share the next (group
commit). A file belongs to the process that holds its flock, which ends with that process however it dies: an unlocked
file is anybody's to fold (serving/folding.py). The folder has mode 0700, its files 0600; what is in one stands in
serving/journal_format.py. Knows nothing of HTTP or of Parquet. Sources: fsync(2), flock(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import threading
import time
from typing import NamedTuple

from cluster.content_keys import CACHE_LIFETIME_S
from cluster.errors import ConfigError, StoreError
from cluster.records import AgentCall
from cluster.store import sync_path
from cluster.telemetry import log_event
from serving.journal_format import JournalSealer, KeyWrapper, encode_call

SUFFIX = ".journal"
_KEY_LIFETIME_S = float(CACHE_LIFETIME_S)
"""Age from which a data key serves no new file, unless the KMS is away: that stops nobody."""


class _Item(NamedTuple):
    """A call that waits; without one, a request to end the file."""

    call: AgentCall | None
    done: asyncio.Future[None]


class Journal:
    """Writes one process's journal. Belongs to one event loop; encoding, encryption and IO happen in a thread.

    Contract:
    - The future of `submit` is done once the call is on the disk: written, fsynced, in a file whose name is durable.
    - Calls are written in the order of `submit`; a cancelled future's call is written all the same.
    - After a failed write or fsync every call of that commit fails with StoreError and the file is given up for a new
      one. What it held before stays in it and counts.
    - A file that is given up, full or ended by `rotate` is unlocked, and then anybody's to fold.
    """

    def __init__(self, folder: pathlib.Path, keys: KeyWrapper, max_file_bytes: int, max_bytes: int) -> None:
        """Prepare to write below `folder`; it and the first file are made with the first call.

        Args:
            max_bytes: of all journals in the folder, from which on no new file is begun until some are folded.
        """
        self._folder, self._keys, self._max_file_bytes, self._max_bytes = folder, keys, max_file_bytes, max_bytes
        self._file: _File | None = None
        self._key: tuple[bytes, str] = (b"", "")
        self._key_expiry = 0.0
        self._waiting: list[_Item] = []
        self._condition = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self.num_commits = 0
        """Writes with their fsync so far; fewer than calls where they were shared."""

    def submit(self, call: AgentCall) -> asyncio.Future[None]:
        """Hand over one call; the future raises StoreError where it could not be made durable."""
        return self._hand_over(call)

    async def rotate(self) -> None:
        """End the file that is being written, if there is one; what was submitted before is in it."""
        if self._thread is not None:
            await self._hand_over(None)

    async def close(self) -> None:
        """Write what was submitted, and end the file. A later `submit` fails."""
        await self.rotate()
        with self._condition:
            self._is_closed = True
            self._condition.notify()

    def _hand_over(self, call: AgentCall | None) -> asyncio.Future[None]:
        item = _Item(call, asyncio.get_running_loop().create_future())
        with self._condition:
            if self._is_closed:
                _end(item.done, StoreError("journal: closed; this process is stopping") if call else None)
                return item.done
            self._waiting.append(item)
            self._condition.notify()
        if self._thread is None:
            # A daemon: a disk that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()
        return item.done

    def _run(self) -> None:
        try:
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._waiting or self._is_closed)
                    batch, self._waiting = self._waiting, []
                if not batch:
                    break
                errors = self._commit([item.call for item in batch if item.call is not None])
                if any(item.call is None for item in batch):
                    self._end_file()
                _tell(batch, errors)
        finally:
            # However this thread ends, nobody waits for it in vain.
            with self._condition:
                self._is_closed = True
            self._end_file()

    def _commit(self, calls: list[AgentCall]) -> list[StoreError | None]:
        """One write and one fsync for all; what became of each call, in order."""
        encoded = [encode_call(call) for call in calls]
        records = [one for one in encoded if isinstance(one, bytes)]
        failure = None
        if records:
            try:
                if self._file is None or self._file.num_bytes >= self._max_file_bytes:
                    self._end_file()
                    self._check_room()
                    self._file = _File(self._folder, *self._data_key())
                self._file.append(records)
                self.num_commits += 1
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                # After a failed fsync a second one may succeed without having written anything: never this file again.
                self._end_file()
                log_event("journal_failed", logging.ERROR, error=type(error).__name__, num_calls=len(records))
                failure = f"journal {self._folder}: not written ({error})"
        # One error each: they are raised in as many tasks.
        return [one if isinstance(one, StoreError) else StoreError(failure) if failure else None for one in encoded]

    def _check_room(self) -> None:
        """Raises OSError where what waits to be folded has the journal's whole room; of other processes too."""
        waiting = 0
        for path in self._folder.glob(f"[!.]*{SUFFIX}"):
            # One that is gone has just been folded.
            with contextlib.suppress(FileNotFoundError):
                waiting += path.stat().st_size
        if waiting >= self._max_bytes:
            raise OSError(errno.ENOSPC, f"{waiting} bytes wait for a store that does not take them")

    def _data_key(self) -> tuple[bytes, str]:
        if time.monotonic() >= self._key_expiry:
            try:
                self._key = self._keys.new_data_key()
            except OSError as error:
                if not self._key[0]:
                    raise
                log_event("journal_key_kept", logging.WARNING, error=type(error).__name__)
            else:
                self._key_expiry = time.monotonic() + _KEY_LIFETIME_S
        return self._key

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _File:
    """One journal file being written; locked until it is closed."""

    def __init__(self, folder: pathlib.Path, key: bytes, wrapped_key: str) -> None:
        """Create it.

        Raises:
            OSError: the disk does not take it.
            ConfigError: others can open the folder.
        """
        self._sealer = JournalSealer(key, wrapped_key)
        prepare_folder(folder)
        path = folder / f"{time.time_ns() // 1_000_000:013d}-{self._sealer.file_id.hex()}{SUFFIX}"
        # Locked and whole before it has a name that anybody looks for.
        unfinished = path.with_name(f".{path.name}")
        self._fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        with contextlib.ExitStack() as undo:
            undo.callback(path.unlink, missing_ok=True)
            undo.callback(unfinished.unlink, missing_ok=True)
            undo.callback(os.close, self._fd)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(self._sealer.header)
            os.rename(unfinished, path)
            sync_path(folder)
            undo.pop_all()
        self.num_bytes = len(self._sealer.header)

    def append(self, records: list[bytes]) -> None:
        """Make all of `records` durable with one write and one fsync."""
        data = self._sealer.seal(records)
        self._write(data)
        self.num_bytes += len(data)

    def close(self) -> None:
        """Unlock; everything acknowledged was fsynced when it was."""
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        os.fsync(self._fd)


def prepare_folder(folder: pathlib.Path) -> None:
    """Make the journal's folder, durably.

    Raises:
        ConfigError: it exists and others can open it.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_path(folder.parent)
    if folder.stat().st_mode & 0o077:
        raise ConfigError(
            f"capture.journal={folder}: others can open the folder; allowed: a folder of its own with mode 700; "
            f"next: chmod 700 {folder}"
        )


def _tell(batch: list[_Item], errors: list[StoreError | None]) -> None:
    """Wake all who wait for a commit, with one call into their loop."""
    loop = batch[0].done.get_loop()
    by_call = iter(errors)
    outcomes = [(item.done, None if item.call is None else next(by_call)) for item in batch]

    def settle() -> None:
        for done, error in outcomes:
            _end(done, error)

    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        # The loop is gone and with it everybody who waited; the calls are on the disk.
        log_event("journal_unheard", logging.WARNING, num_calls=len(errors))


def _end(done: asyncio.Future[None], error: StoreError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
