"""S1 for logs from elsewhere: log files -> calls/ in the store, what cannot be used -> quarantine/.

Idempotent and resumable: parts are written as the reading goes, ids are the same in every run, and a call id that the
store already holds is skipped and counted; so a run that was interrupted is simply run again. Memory is bounded by one
part, beside the ids. Knows no file format (training/formats.py does) and stores client and session only as pseudonyms.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster.access import Pseudonyms
from cluster.calls import MAX_CALLS_PER_PART, read_call_ids, write_calls
from cluster.forgotten import read_forgotten
from cluster.quarantine import QuarantineRow, write_quarantine
from cluster.records import AgentCall, Record
from cluster.store import Store
from training.formats import AUTO, NO_RULES, LogReader, find_files
from training.log_records import ReadRules, Skipped

MAX_PART_CHARS = 256_000_000
"""Characters of requests and responses held before a part is written, so that few huge calls do not fill the memory."""
MAX_ROWS_PER_FILE = 5_000
"""Quarantine rows held before they are written."""
PROGRESS_EVERY = 200
"""Records between two words of progress."""

Progress = Callable[[str, int, int], None]
"""Takes the file, its records so far, and how many of its bytes on disk have been read."""
FORGOTTEN = "client is forgotten"


class FileCounts(Record):
    """What became of the records of one file, or of all files."""

    num_records: int = 0
    ingested: int = 0
    already_present: int = 0
    quarantined: int = 0
    skipped: int = 0
    """Sound records that are no chat call, such as embeddings."""


class SourceCounts(FileCounts):
    """Of one file."""

    format: str


class IngestCounts(FileCounts):
    """Totals: num_records = ingested + already_present + quarantined + skipped."""

    by_file: dict[str, SourceCounts] = {}
    failed: int = 0
    """Ingested calls that the source says have failed."""
    faces_person: int = 0
    """Ingested calls whose answer went straight to a person."""
    untimed: int = 0
    """Calls without a time of their own, which get that of the import."""
    client_fallbacks: int = 0
    """Calls without the field that names the client; their source's own client is taken."""
    quarantine_reasons: dict[str, int] = {}
    skip_reasons: dict[str, int] = {}
    agents: dict[str, int] = {}
    """Ingested calls by agent."""
    num_clients: int = 0
    num_sessions: int = 0
    first_ts: float | None = None
    """Seconds since the epoch of the earliest ingested call; None where there is none."""
    last_ts: float | None = None
    quarantine: tuple[str, ...] = ()
    """Store paths of the quarantine rows."""


def ingest(
    store: Store | None,
    paths: Sequence[pathlib.Path | str],
    pseudonyms: Pseudonyms,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.time,
    *,
    format: str = AUTO,
    rules: ReadRules = NO_RULES,
    dry_run: bool = False,
) -> IngestCounts:
    """Import log files, and those of folders, into the store.

    Args:
        store: None only in a dry run whose store does not exist yet.
        progress: called every PROGRESS_EVERY records, after each part and at the end of each file.
        clock: time of the import, which calls without a time of their own are numbered from.
        format: one of training.formats.FORMATS for all files, or AUTO.
        dry_run: count only; nothing is written.

    Raises:
        InputError: a path is missing or no log of a known format; raised before anything is written.
    """
    assert store is not None or dry_run
    begin = clock()
    reader = LogReader(pseudonyms, begin, format, rules)
    files = reader.prepare(find_files([pathlib.Path(path) for path in paths]))
    present, forgotten = (read_call_ids(store), read_forgotten(store)) if store else (set(), {})
    # A call without a time of its own has one from the import on, and is as old as a log can be.
    run = _Run(None if dry_run else store, present, _Forgotten(forgotten, begin), reader, progress)
    by_file = {str(file): run.ingest_file(file) for file in files}
    totals = {name: sum(getattr(counts, name) for counts in by_file.values()) for name in FileCounts.model_fields}
    return IngestCounts(
        **totals,
        by_file=by_file,
        failed=run.num_failed,
        faces_person=run.num_faces_person,
        untimed=reader.num_untimed,
        client_fallbacks=reader.num_client_fallbacks,
        quarantine_reasons=dict(run.reasons.most_common()),
        skip_reasons=dict(run.skips.most_common()),
        agents=dict(run.agents.most_common()),
        num_clients=len(run.clients),
        num_sessions=len(run.sessions),
        first_ts=run.first_ts,
        last_ts=run.last_ts,
        quarantine=tuple(run.quarantine),
    )


class _Forgotten(NamedTuple):
    """Clients whose logs bring back nothing."""

    before_ts: dict[str, float]
    import_ts: float

    def covers(self, call: AgentCall) -> bool:
        bound = self.before_ts.get(call.client_id)
        return bound is not None and (call.ts <= bound or call.ts >= self.import_ts)


class _Run:
    """What one import holds: the part at hand, and counts over all files."""

    def __init__(
        self,
        store: Store | None,
        present: set[str],
        forgotten: _Forgotten,
        reader: LogReader,
        progress: Progress | None,
    ) -> None:
        """`store` None writes nothing."""
        self._store, self._present, self._reader, self._progress = store, present, reader, progress
        self._forgotten = forgotten
        self._part: list[AgentCall] = []
        self._num_chars = 0
        self._rows: list[QuarantineRow] = []
        self.quarantine: list[str] = []
        self.reasons: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()
        self.agents: Counter[str] = Counter()
        self.clients: set[str] = set()
        self.sessions: set[str] = set()
        self.num_failed = self.num_faces_person = 0
        self.first_ts: float | None = None
        self.last_ts: float | None = None

    def ingest_file(self, file: pathlib.Path) -> SourceCounts:
        counts = dict.fromkeys(FileCounts.model_fields, 0)
        for item in self._reader.read(file):
            counts["num_records"] += 1
            counts[self._take(item)] += 1
            is_full = len(self._part) >= MAX_CALLS_PER_PART or self._num_chars >= MAX_PART_CHARS
            if is_full:
                self._write_part()
            if is_full or counts["num_records"] % PROGRESS_EVERY == 0:
                self._tell(file, counts["num_records"])
        self._write_part()
        self._write_rows()
        self._tell(file, counts["num_records"])
        return SourceCounts(**counts, format=self._reader.format_of(file))

    def _take(self, item: AgentCall | QuarantineRow | Skipped) -> str:
        """Count and keep one record; the name of its counter."""
        if isinstance(item, Skipped):
            self.skips[item.reason] += 1
            return "skipped"
        if isinstance(item, QuarantineRow):
            self.reasons[item.reason] += 1
            self._rows.append(item)
            if len(self._rows) >= MAX_ROWS_PER_FILE:
                self._write_rows()
            return "quarantined"
        if item.call_id in self._present:
            return "already_present"
        if self._forgotten.covers(item):
            self.skips[FORGOTTEN] += 1
            return "skipped"
        self.agents[item.agent] += 1
        self.clients.add(item.client_id)
        self.sessions.add(item.session_id)
        self.num_failed += item.status >= 400
        self.num_faces_person += item.faces_person
        self.first_ts = item.ts if self.first_ts is None else min(self.first_ts, item.ts)
        self.last_ts = item.ts if self.last_ts is None else max(self.last_ts, item.ts)
        if self._store:
            self._part.append(item)
            self._num_chars += _size_of(item)
        return "ingested"

    def _write_part(self) -> None:
        if self._store:
            write_calls(self._store, self._part)
        self._part, self._num_chars = [], 0

    def _write_rows(self) -> None:
        path = write_quarantine(self._store, "ingest", self._rows) if self._store else None
        self.quarantine += [path] if path else []
        self._rows = []

    def _tell(self, file: pathlib.Path, num_records: int) -> None:
        if self._progress:
            self._progress(str(file), num_records, self._reader.num_bytes)


def _size_of(call: AgentCall) -> int:
    """Characters of what a call holds, tools and parts of messages included."""
    return len(json.dumps(call.request)) + len(json.dumps(call.response))
