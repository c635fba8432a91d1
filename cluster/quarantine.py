"""What could not be used, kept with its reason under quarantine/: one row per bad record, without its content.

A row names where the record stood, so that a person can look it up in the source; only a curator can read that, and
everybody can count the reasons. Knows nothing of what is bad.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from cluster.records import Record
from cluster.store import Store, content_hash

QUARANTINE_FOLDER = "quarantine"
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("line", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
ENCRYPTED_COLUMNS = ("source", "detail")
"""A path or an id may name a person; reasons are counted without a key."""


class QuarantineRow(Record):
    """One record that was left out."""

    source: str
    """File the record was read from, or `calls/` for a stored call."""
    line: int | None
    """Line in the file, from 1; None for a stored call."""
    reason: str
    """Few fixed words, so that rows can be counted by it."""
    detail: str
    """Field, position, size or id; never what the record says."""


def write_quarantine(store: Store, stage: str, rows: Sequence[QuarantineRow]) -> str | None:
    """Write `quarantine/STAGE-HASH.parquet`; the same rows give the same file.

    Returns:
        The store path, or None where there is nothing to write.
    """
    if not rows:
        return None
    values = [row.model_dump() for row in rows]
    path = f"{QUARANTINE_FOLDER}/{stage}-{content_hash(values)[:16]}.parquet"
    if not store.exists(path):
        store.write_table(path, pa.Table.from_pylist(values, QUARANTINE_SCHEMA), encrypted=ENCRYPTED_COLUMNS)
    return path


def read_quarantine(store: Store) -> list[QuarantineRow]:
    """All rows of all stages."""
    paths = store.list(QUARANTINE_FOLDER, ".parquet")
    return [QuarantineRow(**row) for path in paths for row in store.read_table(path).to_pylist()]
