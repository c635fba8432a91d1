"""Feedback <-> Parquet under feedback/date=YYYY-MM-DD/, and the outcomes that it gives to calls stored long before.

A part is immutable once written; an id stored twice is read once. Who gave it stays in the row, because a client may
judge its own calls alone, and whether a call is its own is known where both are read. Knows nothing of who writes.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from cluster.forgotten import read_forgotten, without_forgotten
from cluster.records import AgentCall, Record
from cluster.store import Store

FEEDBACK_FOLDER = "feedback"
CONTENT_COLUMNS = ("label", "text")
"""Columns that can carry what an agent or a person said."""
OUTCOME_FIELDS = ("score", "label", "text")
_SCHEMA = pa.schema(
    [
        ("feedback_id", pa.string()),
        ("ts", pa.float64()),
        ("client_id", pa.string()),
        ("call_id", pa.string()),
        ("session_id", pa.string()),
        ("is_curated", pa.bool_()),
        ("score", pa.float64()),
        ("label", pa.string()),
        ("text", pa.string()),
    ]
)


class Feedback(Record):
    """What somebody thought of one call or of one conversation, afterwards."""

    feedback_id: str
    ts: float
    """Seconds since the epoch, UTC, when it arrived."""
    client_id: str
    """Pseudonym of who gave it."""
    call_id: str | None = None
    session_id: str | None = None
    """Pseudonym of the conversation; exactly one of call and session is named."""
    is_curated: bool = False
    """Given by a curator or an admin, who may judge any client's calls."""
    score: float | None = None
    label: str | None = None
    text: str | None = None


class Outcomes:
    """All feedback of a store, joined to calls. Holds it in memory."""

    def __init__(self, rows: Iterable[Feedback]) -> None:
        self._by_call: dict[str, list[Feedback]] = {}
        self._by_session: dict[str, list[Feedback]] = {}
        for row in sorted({row.feedback_id: row for row in rows}.values(), key=lambda row: (row.ts, row.feedback_id)):
            if row.call_id is not None:
                self._by_call.setdefault(row.call_id, []).append(row)
            elif row.session_id is not None:
                self._by_session.setdefault(row.session_id, []).append(row)

    def of(self, call: AgentCall) -> dict[str, Any] | None:
        """The call's outcome: what it was stored with, overlaid by its session's feedback and that by its own.

        Of several, the latest word on each of score, label and text counts. Feedback on a call of another client's
        counts only where a curator gave it. None where nothing is known.
        """
        outcome = call.outcome
        for row in (*self._by_session.get(call.session_id, ()), *self._by_call.get(call.call_id, ())):
            if row.is_curated or row.client_id == call.client_id:
                given = ((name, getattr(row, name)) for name in OUTCOME_FIELDS)
                outcome = {**(outcome or {}), **{name: value for name, value in given if value is not None}}
        return outcome


def read_outcomes(store: Store) -> Outcomes:
    """The outcomes that the store's feedback gives."""
    return Outcomes(read_feedback(store))


def write_feedback(store: Store, rows: Sequence[Feedback]) -> list[str]:
    """Write `rows` as new parts, one date (UTC) each.

    Returns:
        Store paths of the parts; rows written again are stored twice, which readers tolerate.
    """
    by_date: dict[str, list[Feedback]] = {}
    for row in rows:
        date = datetime.datetime.fromtimestamp(row.ts, datetime.UTC).date().isoformat()
        by_date.setdefault(date, []).append(row)
    paths = []
    for date, part in sorted(by_date.items()):
        paths.append(
            f"{FEEDBACK_FOLDER}/date={date}/part-{int(part[0].ts * 1000):013d}-{uuid.uuid4().hex[:12]}.parquet"
        )
        table = pa.Table.from_pylist([row.model_dump() for row in part], schema=_SCHEMA)
        store.write_table(paths[-1], table, encrypted=CONTENT_COLUMNS)
    return paths


def read_feedback(store: Store) -> list[Feedback]:
    """All feedback in order of time, each id once; that of forgotten clients is left out.

    Raises:
        KeyAccessError: there is feedback, and the content key is not to be had.
    """
    forgotten = read_forgotten(store)
    rows = {}
    for path in store.list(FEEDBACK_FOLDER, ".parquet"):
        for row in without_forgotten(store.read_table(path), forgotten).to_pylist():
            rows[row["feedback_id"]] = Feedback(**row)
    return sorted(rows.values(), key=lambda row: (row.ts, row.feedback_id))


def remove_forgotten_feedback(store: Store) -> int:
    """Write the files with feedback of forgotten clients anew without it; returns how many rows went."""
    forgotten, count = read_forgotten(store), 0
    for path in store.list(FEEDBACK_FOLDER, ".parquet"):
        table = store.read_table(path)
        kept = without_forgotten(table, forgotten)
        if kept.num_rows == table.num_rows:
            continue
        if kept.num_rows:
            renamed = f"{path.rpartition('-')[0]}-{uuid.uuid4().hex[:12]}.parquet"
            store.write_table(renamed, kept, encrypted=CONTENT_COLUMNS)
        store.delete(path)
        count += table.num_rows - kept.num_rows
    return count
