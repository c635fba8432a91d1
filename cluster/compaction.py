"""Many small parts of calls/ -> few large ones, without duplicates and without forgotten clients; nothing else changes.

Captured calls come as two small files a second and gateway, and each file costs a reader a look-up of its keys. New
parts are published before old ones go, so a reader at any moment finds every call once or twice, never none; two
compactions at once, or one that is killed, leave duplicates at most, which the next one removes. Knows no field of a call
but its id, its client and its time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from cluster.calls import CALLS_FOLDER, MAX_CALLS_PER_PART, write_part
from cluster.errors import StoreError
from cluster.forgotten import read_forgotten, without_forgotten
from cluster.records import Record
from cluster.store import Store

UNFINISHED_AGE_S = 3600.0
"""Age from which an unfinished file is one that no process is still writing."""


class CompactionCounts(Record):
    """What a compaction did."""

    parts_before: int = 0
    parts_after: int = 0
    calls: int = 0
    """Calls in the parts that were rewritten, as they are now."""
    duplicates: int = 0
    """Rows removed because their call stands in another row."""
    forgotten: int = 0
    """Rows removed because their client is forgotten."""
    swept: int = 0
    """Unfinished files of processes that died, removed."""


def compact_calls(store: Store, progress: Callable[[int, int], None] | None = None) -> CompactionCounts:
    """Merge the small parts of every day. Holds one part of rows, and the ids of one day.

    Args:
        progress: called with the number of days done and of all days.

    Raises:
        KeyAccessError: the content key is not to be had.
    """
    forgotten = read_forgotten(store)
    days: dict[str, list[str]] = defaultdict(list)
    for path in store.list(CALLS_FOLDER, ".parquet"):
        days[path.rsplit("/", 1)[0]].append(path)
    totals = dict.fromkeys(CompactionCounts.model_fields, 0)
    for number, (folder, paths) in enumerate(sorted(days.items()), 1):
        for name, count in _compact_day(store, folder, paths, forgotten).items():
            totals[name] += count
        if progress:
            progress(number, len(days))
    totals["swept"] = store.sweep(CALLS_FOLDER, UNFINISHED_AGE_S)
    return CompactionCounts(**totals)


def _compact_day(store: Store, folder: str, paths: list[str], forgotten: dict[str, float]) -> dict[str, int]:
    stale = [path for path in paths if _is_stale(store, path, forgotten)]
    counts = {"parts_before": len(paths), "parts_after": len(paths)}
    if not stale or (len(stale) == 1 and not _holds_forgotten(store, stale[0], forgotten)):
        return counts
    seen: set[str] = set()
    counts |= {"calls": 0, "duplicates": 0, "forgotten": 0}
    num_new = 0
    for table in _in_parts(_cleaned(store, stale, forgotten, seen, counts)):
        write_part(store, folder, table)
        counts["calls"] += table.num_rows
        num_new += 1
    for path in stale:
        store.delete(path)
    counts["parts_after"] += num_new - len(stale)
    return counts


def _is_stale(store: Store, path: str, forgotten: dict[str, float]) -> bool:
    return _num_rows(store, path) < MAX_CALLS_PER_PART // 2 or _holds_forgotten(store, path, forgotten)


def _holds_forgotten(store: Store, path: str, forgotten: dict[str, float]) -> bool:
    table = _read(store, path, ["client_id", "ts"])
    return table is not None and without_forgotten(table, forgotten).num_rows < table.num_rows


def _num_rows(store: Store, path: str) -> int:
    table = _read(store, path, ["ts"])
    # One that another compaction has just replaced is left alone.
    return MAX_CALLS_PER_PART if table is None else table.num_rows


def _cleaned(
    store: Store, paths: list[str], forgotten: dict[str, float], seen: set[str], counts: dict[str, int]
) -> Iterator[pa.Table]:
    """The parts' rows, each call once, in order of time within a part."""
    for path in paths:
        table = _read(store, path, None)
        if table is None:
            continue
        kept = without_forgotten(table, forgotten)
        counts["forgotten"] += table.num_rows - kept.num_rows
        ids = kept["call_id"].to_pylist()
        rows = [row for row, call_id in enumerate(ids) if call_id not in seen and not seen.add(call_id)]
        counts["duplicates"] += len(ids) - len(rows)
        yield kept.take(pa.array(rows, pa.int64())) if len(rows) < len(ids) else kept


def _in_parts(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of MAX_CALLS_PER_PART, the last one shorter."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(one.num_rows for one in held) >= MAX_CALLS_PER_PART:
            joined = pa.concat_tables(held, promote_options="default")
            yield _sorted(joined.slice(0, MAX_CALLS_PER_PART))
            held = [joined.slice(MAX_CALLS_PER_PART)]
    rest = pa.concat_tables(held, promote_options="default") if held else None
    if rest is not None and rest.num_rows:
        yield _sorted(rest)


def _sorted(table: pa.Table) -> pa.Table:
    return table.take(pc.sort_indices(table, [("ts", "ascending")]))


def _read(store: Store, path: str, columns: list[str] | None) -> pa.Table | None:
    """None where another compaction has replaced the part meanwhile."""
    try:
        return store.read_table(path, columns)
    except StoreError:
        if store.exists(path):
            raise
        return None
