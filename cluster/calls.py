"""AgentCall <-> Parquet under calls/date=YYYY-MM-DD/: what capture and ingest write and every later stage reads.

Metadata are plain columns, so that calls can be counted and priced without reading a word of them; everything that
can carry content (CONTENT_COLUMNS) is a JSON string, encrypted. A part is immutable once written, under a name that no
other part ever has; it may be replaced by others with the same calls (cluster/compaction.py), which are there before it
goes. A call id stored twice is read once; calls of a forgotten client are not read. Knows nothing of who reads or writes.
"""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import StoreError
from cluster.feedback import read_outcomes
from cluster.forgotten import read_forgotten, without_forgotten
from cluster.json_text import write_json
from cluster.records import AgentCall, RouteDecision, Usage
from cluster.store import Store

CALLS_FOLDER = "calls"
MAX_CALLS_PER_PART = 5_000


class _Column(NamedTuple):
    name: str
    type: pa.DataType
    read: Callable[[AgentCall], Any]
    """Cell of one call."""
    is_derived: bool = False
    """Copied out of another column for those who count; ignored when calls are read back."""


def _field(name: str, kind: pa.DataType) -> _Column:
    return _Column(name, kind, lambda call: getattr(call, name))


def _json(name: str) -> _Column:
    return _Column(name, pa.string(), lambda call: _dump(getattr(call, name)))


def _dump(value: Any) -> str | None:
    if value is None:
        return None
    value = value.model_dump(mode="json") if isinstance(value, RouteDecision) else value
    return write_json(value).decode()


_COLUMNS = (
    _field("call_id", pa.string()),
    _field("ts", pa.float64()),
    _field("client_id", pa.string()),
    _field("agent", pa.string()),
    _field("session_id", pa.string()),
    _field("step", pa.int64()),
    _Column("model", pa.string(), lambda call: _model_of(call), is_derived=True),
    _Column("prompt_tokens", pa.int64(), lambda call: call.usage.prompt_tokens),
    _Column("completion_tokens", pa.int64(), lambda call: call.usage.completion_tokens),
    _field("latency_ms", pa.float64()),
    _field("cost_usd", pa.float64()),
    _field("cost_basis", pa.string()),
    _field("served_by", pa.string()),
    _Column("action", pa.string(), lambda call: call.route and call.route.action, is_derived=True),
    _Column("task_id", pa.string(), lambda call: call.route and call.route.task_id, is_derived=True),
    _field("status", pa.int32()),
    _field("error", pa.string()),
    _field("label_kind", pa.string()),
    _field("faces_person", pa.bool_()),
    _field("is_reference", pa.bool_()),
    _field("audit_of", pa.string()),
    _json("request"),
    _json("response"),
    _json("route"),
    _json("outcome"),
    _json("label"),
)
CALL_SCHEMA = pa.schema([pa.field(column.name, column.type) for column in _COLUMNS])
CONTENT_COLUMNS = ("request", "response", "outcome", "label")
"""Columns that can carry what an agent or a person said."""

_DERIVED = frozenset(column.name for column in _COLUMNS if column.is_derived)
_JSON_COLUMNS = (*CONTENT_COLUMNS, "route")


def write_calls(store: Store, calls: Sequence[AgentCall]) -> list[str]:
    """Write `calls` as new parts of at most MAX_CALLS_PER_PART, one date (UTC) each.

    Returns:
        Store paths of the parts. A write that fails may leave some of them; the same calls written again are stored
        twice, which readers tolerate.

    Raises:
        KeyAccessError: the KMS gives no key to this process.
    """
    by_date: dict[str, list[AgentCall]] = {}
    for call in calls:
        date = datetime.datetime.fromtimestamp(call.ts, datetime.UTC).date().isoformat()
        by_date.setdefault(date, []).append(call)
    paths = []
    for date, day in sorted(by_date.items()):
        for start in range(0, len(day), MAX_CALLS_PER_PART):
            part = day[start : start + MAX_CALLS_PER_PART]
            paths.append(write_part(store, f"{CALLS_FOLDER}/date={date}", _to_table(part)))
    return paths


def write_part(store: Store, folder: str, table: pa.Table) -> str:
    """Write rows of one day as a part of its own; returns its store path."""
    path = f"{folder}/part-{int(table['ts'][0].as_py() * 1000):013d}-{uuid.uuid4().hex[:12]}.parquet"
    store.write_table(path, table, encrypted=CONTENT_COLUMNS)
    return path


def load_writer() -> None:
    """Load what the first write would load (0.3 s), so that it takes no longer than the others."""
    nothing = AgentCall(
        call_id="", ts=0.0, client_id="", agent="", session_id="", step=0, request={"messages": []}, response=None
    )
    pq.write_table(_to_table([nothing]), pa.BufferOutputStream(), compression="zstd")


def read_calls(store: Store, call_ids: set[str] | None = None) -> list[AgentCall]:
    """All calls, or those in `call_ids` (unknown ids are ignored), in order of time. Holds them in memory."""
    calls: dict[str, AgentCall] = {}
    for call in iterate_calls(store, call_ids):
        calls[call.call_id] = call
    return sorted(calls.values(), key=lambda call: call.ts)


def iterate_calls(store: Store, call_ids: set[str] | None = None) -> Iterator[AgentCall]:
    """Calls part by part, one part in memory at a time; a call id stored twice comes twice.

    Their outcome is what they were stored with and what feedback has said since.

    Raises:
        KeyAccessError: the content key is not to be had.
    """
    outcomes = read_outcomes(store)
    wanted = None if call_ids is None else pa.array(sorted(call_ids), pa.string())
    for table in _read_parts(store, None):
        for call in _from_table(
            table if wanted is None else table.filter(pc.is_in(table["call_id"], value_set=wanted))
        ):
            outcome = outcomes.of(call)
            yield call if outcome == call.outcome else call.model_copy(update={"outcome": outcome})


def read_call_columns(store: Store, columns: list[str]) -> pa.Table:
    """Some columns of every stored row; without CONTENT_COLUMNS among them no key is needed."""
    schema = pa.schema([CALL_SCHEMA.field(name) for name in columns])
    return pa.concat_tables([schema.empty_table(), *_read_parts(store, columns)], promote_options="permissive")


def read_recent_columns(store: Store, columns: list[str], max_parts: int) -> pa.Table:
    """Some columns of the newest parts, without forgotten clients; see `read_call_columns`. Parts that go meanwhile are
    left out: for who wants a picture of late, not every call."""
    forgotten = read_forgotten(store)
    wanted = columns if not forgotten else sorted({*columns, "client_id", "ts"})
    tables = [pa.schema([CALL_SCHEMA.field(name) for name in columns]).empty_table()]
    for path in store.list(CALLS_FOLDER, ".parquet")[-max_parts:]:
        try:
            tables.append(_selected(without_forgotten(store.read_table(path, wanted), forgotten), columns))
        except StoreError:
            if store.exists(path):
                raise
    return pa.concat_tables(tables, promote_options="permissive")


def _read_parts(store: Store, columns: list[str] | None) -> Iterator[pa.Table]:
    """Every part's table. Parts that replaced one that is gone are read as well, and then some calls come twice."""
    done: set[str] = set()
    forgotten = read_forgotten(store)
    # One that every part has: a table without columns has no rows either.
    wanted = columns and sorted({*columns, "call_id", *(("client_id", "ts") if forgotten else ())})
    while True:
        is_complete = True
        for path in store.list(CALLS_FOLDER, ".parquet"):
            if path in done:
                continue
            done.add(path)
            try:
                table = without_forgotten(store.read_table(path, wanted), forgotten)
            except StoreError:
                if store.exists(path):
                    raise
                is_complete = False
                continue
            yield table if columns is None else _selected(table, columns)
        if is_complete:
            return


def read_new_columns(
    store: Store, columns: list[str], known: Collection[str], since_ts: float, actions: Collection[str]
) -> tuple[pa.Table, list[str]]:
    """Some columns of the parts that are not `known`, of the day of `since_ts` and later ones, without forgotten clients.

    Args:
        columns: see `read_call_columns`; `action` among them.
        actions: only calls with one of these; the others of a part are let go before the next is read.

    Returns:
        The rows, and the store paths of all those days' parts, to be known the next time. A part that is replaced while
        this reads is left out: its calls come again in another one, as do all calls that a compaction has moved.
    """
    first = f"{CALLS_FOLDER}/date={datetime.datetime.fromtimestamp(since_ts, datetime.UTC).date().isoformat()}"
    forgotten = read_forgotten(store)
    wanted = columns if not forgotten else sorted({*columns, "client_id", "ts"})
    tables, paths = [pa.schema([CALL_SCHEMA.field(name) for name in columns]).empty_table()], []
    for path in store.list(CALLS_FOLDER, ".parquet"):
        if path.rsplit("/", 1)[0] < first:
            continue
        if path not in known:
            try:
                table = _selected(without_forgotten(store.read_table(path, wanted), forgotten), columns)
                tables.append(table.filter(pc.is_in(table["action"], value_set=pa.array(sorted(actions), pa.string()))))
            except StoreError:
                if store.exists(path):
                    raise
                continue
        paths.append(path)
    return pa.concat_tables(tables, promote_options="permissive"), paths


def _selected(table: pa.Table, columns: list[str]) -> pa.Table:
    """These columns; null where a part was written before there was one."""
    for name in set(columns) - set(table.column_names):
        table = table.append_column(CALL_SCHEMA.field(name), pa.nulls(table.num_rows, CALL_SCHEMA.field(name).type))
    return table.select(columns)


def read_call_ids(store: Store) -> set[str]:
    """Ids of all stored calls."""
    return set(read_call_columns(store, ["call_id"])["call_id"].to_pylist())


def _model_of(call: AgentCall) -> str | None:
    """The model that answered, else the one that was asked for."""
    model = (call.response or {}).get("model") or call.request.get("model")
    return model if isinstance(model, str) else None


def _to_table(calls: Iterable[AgentCall]) -> pa.Table:
    calls = list(calls)
    arrays = [pa.array([column.read(call) for call in calls], column.type) for column in _COLUMNS]
    return pa.Table.from_arrays(arrays, schema=CALL_SCHEMA)


def _from_table(table: pa.Table) -> Iterator[AgentCall]:
    names = [name for name in table.column_names if name not in _DERIVED]
    columns = [table[name].to_pylist() for name in names]
    for cells in zip(*columns, strict=True):
        yield _to_call(dict(zip(names, cells, strict=True)))


def _to_call(row: dict[str, Any]) -> AgentCall:
    for name in _JSON_COLUMNS:
        if row[name] is not None:
            row[name] = json.loads(row[name])
    usage = {"prompt_tokens": row.pop("prompt_tokens"), "completion_tokens": row.pop("completion_tokens")}
    return AgentCall(**row, usage=Usage(**usage))
