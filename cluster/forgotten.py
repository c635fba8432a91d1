"""Clients whose calls are to be as if they had never been: one small file each, and no reader gives their calls from then on.

The file is written before anything is removed, so that a call which another process still holds (a journal that is not
folded yet, a compaction under way) is not seen again either: readers leave out, and compaction removes, every call of
the client up to the moment of forgetting. Later calls of the same client are new ones. Knows pseudonyms alone.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.store import Store

FORGOTTEN_FOLDER = "forgotten"


def mark_forgotten(store: Store, client_id: str, ts: float, record: dict[str, Any]) -> str:
    """Forget the client's calls up to `ts` (seconds since the epoch); returns the store path of the audit record.

    Args:
        record: what was removed and who had seen it; written whole, and again when it is known better.
    """
    path = f"{FORGOTTEN_FOLDER}/{client_id}.json"
    store.write_json(path, {"client_id": client_id, "before_ts": ts, **record})
    return path


def read_forgotten(store: Store) -> dict[str, float]:
    """client_id -> seconds since the epoch up to which its calls are forgotten."""
    records = (store.read_json(path) for path in store.list(FORGOTTEN_FOLDER, ".json"))
    return {record["client_id"]: record["before_ts"] for record in records}


def without_forgotten(table: pa.Table, forgotten: dict[str, float]) -> pa.Table:
    """Rows that are not forgotten; the table has columns client_id and ts."""
    gone = None
    for client_id, before_ts in forgotten.items():
        mask = pc.and_(pc.equal(table["client_id"], client_id), pc.less_equal(table["ts"], before_ts))
        gone = mask if gone is None else pc.or_(gone, mask)
    return table if gone is None else table.filter(pc.invert(gone))
