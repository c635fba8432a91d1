"""S1 for logs from elsewhere: log files -> calls/ in the store, what cannot be used -> quarantine/.

Idempotent: a call id that the store already holds is skipped and counted. Memory is bounded by one part. Knows no
file format (training/formats.py does) and stores client and session only as pseudonyms.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence

from cluster.access import Pseudonyms
from cluster.calls import MAX_CALLS_PER_PART, read_call_ids, write_calls
from cluster.quarantine import QuarantineRow, write_quarantine
from cluster.records import AgentCall, Record
from cluster.store import Store
from training.formats import LogReader, check_path

MAX_PART_CHARS = 256_000_000
"""Prompt characters held before a part is written, so that few huge calls do not fill the memory."""


class FileCounts(Record):
    """What became of the records of one file, or of all files."""

    num_records: int = 0
    ingested: int = 0
    already_present: int = 0
    quarantined: int = 0


class IngestCounts(FileCounts):
    """Totals: num_records = ingested + already_present + quarantined."""

    by_file: dict[str, FileCounts] = {}
    quarantine: str | None = None
    """Store path of the quarantine rows."""


def ingest(
    store: Store,
    paths: Sequence[pathlib.Path | str],
    pseudonyms: Pseudonyms,
    progress: Callable[[str, int], None] | None = None,
    clock: Callable[[], float] = time.time,
) -> IngestCounts:
    """Import log files into the store.

    Args:
        progress: called with the file and its records so far, after each part and at the end of each file.
        clock: time of the import, which calls without a time of their own are numbered from.

    Raises:
        InputError: a path is missing, a folder, or of an unknown kind; raised before anything is written.
    """
    files = [pathlib.Path(path) for path in paths]
    for file in files:
        check_path(file)
    present = read_call_ids(store)
    reader = LogReader(pseudonyms, clock())
    rows: list[QuarantineRow] = []
    by_file: dict[str, FileCounts] = {}
    for file in files:
        counts = _ingest_file(store, reader, file, present, rows, progress)
        by_file[str(file)] = counts
    totals = {name: sum(getattr(counts, name) for counts in by_file.values()) for name in FileCounts.model_fields}
    return IngestCounts(**totals, by_file=by_file, quarantine=write_quarantine(store, "ingest", rows))


def _ingest_file(
    store: Store,
    reader: LogReader,
    file: pathlib.Path,
    present: set[str],
    rows: list[QuarantineRow],
    progress: Callable[[str, int], None] | None,
) -> FileCounts:
    counts = dict.fromkeys(FileCounts.model_fields, 0)
    part: list[AgentCall] = []
    num_chars = 0
    for item in reader.read(file):
        counts["num_records"] += 1
        if isinstance(item, QuarantineRow):
            counts["quarantined"] += 1
            rows.append(item)
        elif item.call_id in present:
            counts["already_present"] += 1
        else:
            counts["ingested"] += 1
            part.append(item)
            num_chars += _size_of(item)
        if len(part) >= MAX_CALLS_PER_PART or num_chars >= MAX_PART_CHARS:
            write_calls(store, part)
            part, num_chars = [], 0
            if progress:
                progress(str(file), counts["num_records"])
    write_calls(store, part)
    if progress:
        progress(str(file), counts["num_records"])
    return FileCounts(**counts)


def _size_of(call: AgentCall) -> int:
    contents = (message.get("content") for message in call.request["messages"])
    return sum(len(content) for content in contents if isinstance(content, str))
