"""Journals that nobody writes any more -> Parquet under calls/, then removed: of a full file, and of a dead process.

A journal is adopted by its flock, so two processes never fold one at the same time, and a living writer's is left
alone. It is removed only once its calls are published and durable; after a crash in between it is folded again, and
readers, who read an id once, see no difference. What cannot be folded is never deleted: a file with damaged records,
or with calls that Parquet does not take, is moved to `aside/` below the journal's folder once its other calls are
published. Until a journal is folded, readers do not see its calls. Knows nothing of who wrote it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from cluster.calls import MAX_CALLS_PER_PART, write_calls
from cluster.errors import StoreError, UnderstudyError
from cluster.records import AgentCall
from cluster.store import Store, sync_path
from cluster.telemetry import log_event
from serving.journal import SUFFIX, prepare_folder
from serving.journal_format import (
    MAX_HEADER_BYTES,
    DamagedJournalError,
    JournalReader,
    KeyWrapper,
    decode_call,
    read_header,
)

ASIDE = "aside"
MAX_BATCH_BYTES = 32 * 2**20
"""Content that is turned into Parquet at once, in bytes of JSON; it bounds the memory this takes."""

_UNNAMED_LIFETIME_S = 600.0


class Published(NamedTuple):
    """What became of some calls."""

    paths: list[str]
    """Store paths of the parts."""
    num_calls: int
    num_unwritable: int
    """Calls that Parquet does not take, whatever the store does."""


class Folded(NamedTuple):
    """What one pass over a journal's folder did."""

    num_files: int = 0
    """Journals folded, those set aside among them."""
    num_calls: int = 0
    """Calls published."""
    num_damaged: int = 0
    """Records that could not be recovered: altered, missing, or of calls that cannot be written."""
    num_aside: int = 0
    """Journals moved to `aside/`."""
    num_left: int = 0
    """Journals that could not be folded now: the store or the KMS failed."""

    def __add__(self, other: Folded) -> Folded:  # type: ignore[override]
        return Folded(*(mine + its for mine, its in zip(self, other, strict=True)))


def fold_orphans(store: Store, keys: KeyWrapper, folder: pathlib.Path) -> Folded:
    """Publish the calls of all journals in `folder` that no living process holds, and remove those journals.

    Blocks for as long as that takes. Errors of store, KMS or disk leave the journal for the next pass.
    """
    total = Folded()
    for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
        try:
            with _adopted(path) as data:
                if data is not None:
                    total += _fold(store, keys, path, data)
        except (OSError, UnderstudyError) as error:
            log_event("journal_not_folded", logging.ERROR, journal=path.name, error=type(error).__name__)
            total += Folded(num_left=1)
    for path in folder.glob(f".*{SUFFIX}"):
        # Never named: its process died before a call could be in it, or is just about to name it.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _UNNAMED_LIFETIME_S:
                path.unlink()
    return total


def wrapped_keys(folder: pathlib.Path) -> list[str]:
    """Wrapped data keys of all journals, living ones and those set aside too: what the KMS must still unwrap."""
    found = set()
    for path in [*folder.glob(f"[!.]*{SUFFIX}"), *(folder / ASIDE).glob(f"[!.]*{SUFFIX}")]:
        # Folded and removed meanwhile, or damaged so that no key opens it.
        with contextlib.suppress(FileNotFoundError, DamagedJournalError), path.open("rb") as file:
            found.add(read_header(file.read(MAX_HEADER_BYTES))[2])
    return sorted(found)


def publish_calls(store: Store, calls: list[AgentCall]) -> Published:
    """Write calls as Parquet; one that cannot be written does not take the others with it.

    Raises:
        StoreError, OSError: the store fails, or gives no key.
    """
    try:
        return Published(write_calls(store, calls), len(calls), 0)
    except UnderstudyError as error:
        # Also where it is a ValueError: of the configuration, not of the calls.
        raise error if isinstance(error, OSError) else StoreError(str(error)) from None
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        if len(calls) == 1:
            log_event("call_unwritable", logging.ERROR, call_id=calls[0].call_id, error=type(error).__name__)
            return Published([], 0, 1)
    parts = [publish_calls(store, half) for half in (calls[: len(calls) // 2], calls[len(calls) // 2 :])]
    return Published(*(one + other for one, other in zip(*parts, strict=True)))


def _fold(store: Store, keys: KeyWrapper, path: pathlib.Path, data: bytes) -> Folded:
    try:
        reader = JournalReader(data, keys)
    except DamagedJournalError as error:
        log_event("journal_damaged", logging.ERROR, journal=path.name, reason=str(error))
        _set_aside(path)
        return Folded(num_files=1, num_damaged=1, num_aside=1)
    num_calls = num_unusable = 0
    paths: list[str] = []
    for calls, num_undecoded in _batches(reader):
        published = publish_calls(store, calls) if calls else Published([], 0, 0)
        paths += published.paths
        num_calls += published.num_calls
        num_unusable += published.num_unwritable + num_undecoded
    store.sync(paths)
    num_damaged = reader.num_damaged + num_unusable
    if num_damaged:
        log_event("journal_damaged", logging.ERROR, journal=path.name, num_damaged=num_damaged, num_calls=num_calls)
        _set_aside(path)
    else:
        path.unlink()
        sync_path(path.parent)
    return Folded(num_files=1, num_calls=num_calls, num_damaged=num_damaged, num_aside=int(num_damaged > 0))


def _batches(reader: JournalReader) -> Iterator[tuple[list[AgentCall], int]]:
    """Calls in bounded portions, each with the number of records that are no call."""
    calls: list[AgentCall] = []
    num_bytes = num_undecoded = 0
    for record in reader:
        try:
            calls.append(decode_call(record))
        except (ValueError, TypeError, RecursionError):
            num_undecoded += 1
        num_bytes += len(record)
        if num_bytes >= MAX_BATCH_BYTES or len(calls) >= MAX_CALLS_PER_PART:
            yield calls, num_undecoded
            calls, num_bytes, num_undecoded = [], 0, 0
    yield calls, num_undecoded


@contextlib.contextmanager
def _adopted(path: pathlib.Path) -> Iterator[bytes | None]:
    """The file's bytes, held locked; None where a living process has it, or another has just removed it."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    with os.fdopen(fd, "rb") as file:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # Removed, or moved aside, between our opening and its unlocking.
        is_there = path.exists() and path.stat().st_ino == os.fstat(fd).st_ino
        yield file.read() if is_there else None


def _set_aside(path: pathlib.Path) -> None:
    folder = path.parent / ASIDE
    prepare_folder(folder)
    os.rename(path, folder / path.name)
    sync_path(folder)
    sync_path(path.parent)
