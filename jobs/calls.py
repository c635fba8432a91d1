"""Questions about the stored calls: list, count, price, and SQL, all over their metadata; and one call with its content.

Metadata come through `read_call_columns`, so any store works and nobody needs a content key; they are copied into an
in-memory DuckDB that then loses its ways out: no files, no network, no extensions, no look into this process, and no
way to turn these on again. A call id stored twice counts once, as it was written last. Audits (`audit_of`) are no
client traffic and left out unless asked for. Knows nothing of terminals (jobs/calls_verb.py does).
"""

from __future__ import annotations

import datetime
from typing import Any, Literal, NamedTuple

import duckdb
import pyarrow as pa

from cluster.access import Pseudonyms, load_pseudonym_key, require_role
from cluster.calls import CALL_SCHEMA, CONTENT_COLUMNS, read_call_columns, read_calls
from cluster.errors import InputError
from cluster.records import AgentCall, Record
from cluster.store import Store

COLUMNS = tuple(name for name in CALL_SCHEMA.names if name not in (*CONTENT_COLUMNS, "route"))
"""Stored metadata columns; a RouteDecision's reason is free text and stays out."""
MEMORY_LIMIT = "4GB"
By = Literal["task", "agent", "day", "model", "served_by", "client", "status"]
GROUPS: dict[str, str] = {
    "task": "task_id",
    "agent": "agent",
    "day": "day",
    "model": "model",
    "served_by": "served_by",
    "client": "client_id",
    "status": "status",
}
_LISTED = (
    "call_id", "time", "agent", "task_id", "model", "served_by", "status", "prompt_tokens", "completion_tokens",
    "latency_ms", "cost_usd",
)  # fmt: skip


class Answer(NamedTuple):
    """Rows under their names."""

    head: list[str]
    rows: list[tuple[Any, ...]]
    is_cut: bool = False
    """There were more rows than the limit."""


class Filters(Record):
    """Which calls to look at; None is all."""

    agent: str | None = None
    task: str | None = None
    day: str | None = None
    """YYYY-MM-DD, UTC."""
    since: str | None = None
    """Date or ISO 8601 time, UTC where it names no zone; included."""
    until: str | None = None
    """As `since`; left out itself."""
    status: str | None = None
    """A number, `ok` (below 400) or `failed`."""
    served_by: str | None = None
    client: str | None = None
    """Name, turned into its pseudonym with the store's key."""
    session: str | None = None
    """As the agent or the log names it; of the client named."""
    audits: bool = False


def list_calls(store: Store, filters: Filters, limit: int) -> Answer:
    """Metadata of the latest calls, newest first.

    Raises:
        InputError: a filter that means nothing.
    """
    where, values = _where(store, filters)
    query = f"SELECT {', '.join(_LISTED)} FROM calls WHERE {where} ORDER BY ts DESC, call_id"
    return _run(open_calls(store), query, values, limit)


def count_calls(store: Store, filters: Filters, by: By, limit: int) -> Answer:
    """Calls of all and of each group, most first: those an agent uses, apart from those that face a person.

    Raises:
        InputError: a filter that means nothing.
    """
    where, values = _where(store, filters)
    query = f"""
        SELECT CASE WHEN grouping({GROUPS[by]}) = 1 THEN 'all' ELSE coalesce({GROUPS[by]}::VARCHAR, '-') END AS "{by}",
            count(*) FILTER (NOT faces_person) AS calls,
            count(*) FILTER (faces_person) AS to_a_person,
            count(*) FILTER (status >= 400) AS failed
        FROM calls WHERE {where} GROUP BY GROUPING SETS (({GROUPS[by]}), ())
        ORDER BY grouping({GROUPS[by]}) DESC, count(*) DESC, 1"""
    return _run(open_calls(store), query, values, limit)


def price_calls(store: Store, filters: Filters, by: By, limit: int) -> Answer:
    """Calls, tokens, cost and latency of all and of each group, dearest first.

    `unpriced` counts the calls whose cost nobody recorded; they are not in cost_usd. `of_it_estimated` is the cost of
    calls some of whose tokens no LLM reported.

    Raises:
        InputError: a filter that means nothing.
    """
    where, values = _where(store, filters)
    query = f"""
        SELECT CASE WHEN grouping({GROUPS[by]}) = 1 THEN 'all' ELSE coalesce({GROUPS[by]}::VARCHAR, '-') END AS "{by}",
            count(*) AS calls,
            coalesce(sum(prompt_tokens), 0)::HUGEINT AS tokens_in,
            coalesce(sum(completion_tokens), 0)::HUGEINT AS tokens_out,
            coalesce(sum(cost_usd), 0) AS cost_usd,
            coalesce(sum(cost_usd) FILTER (cost_basis = 'estimated'), 0) AS of_it_estimated,
            count(*) FILTER (cost_usd IS NULL) AS unpriced,
            round(quantile_cont(latency_ms, 0.5), 1) AS p50_ms,
            round(quantile_cont(latency_ms, 0.95), 1) AS p95_ms
        FROM calls WHERE {where} GROUP BY GROUPING SETS (({GROUPS[by]}), ())
        ORDER BY grouping({GROUPS[by]}) DESC, sum(cost_usd) DESC NULLS LAST, count(*) DESC, 1"""
    return _run(open_calls(store), query, values, limit)


def query_calls(store: Store, sql: str, limit: int) -> Answer:
    """The first `limit` rows of one SELECT over the table `calls`: COLUMNS, `time` and `day` (both UTC). Holds audits.

    Raises:
        InputError: no single SELECT, or one that DuckDB refuses.
    """
    database = open_calls(store)
    try:
        statements = database.extract_statements(sql)
    except duckdb.Error as error:
        raise _refused(error) from None
    kinds = [statement.type for statement in statements]
    if kinds != [duckdb.StatementType.SELECT]:
        raise InputError(f"--sql: {len(kinds)} statements, or none that reads; {_ALLOWED_SQL}")
    try:
        return _run(database, statements[0], [], limit)
    except duckdb.Error as error:
        raise _refused(error) from None


def show_call(store: Store, call_id: str) -> AgentCall:
    """One call with its content. For curators only.

    Raises:
        InputError: there is no such call.
    """
    require_role(store.uri, "curator")
    found = read_calls(store, {call_id})
    if not found:
        raise InputError(f"CALL_ID={call_id!r}: no such call; allowed: a call_id; next: understudy calls list")
    return found[0]


def open_calls(store: Store) -> duckdb.DuckDBPyConnection:
    """A database with the one table `calls`, cut off from everything else."""
    stored = read_call_columns(store, list(COLUMNS))
    stored = stored.append_column("_row", pa.array(range(stored.num_rows), pa.int64()))
    database = duckdb.connect(":memory:", config={"memory_limit": MEMORY_LIMIT, "temp_directory": ""})
    database.execute("SET TimeZone = 'UTC'")
    # Without this a name in a query that is no table is looked up among the variables of this process.
    database.execute("SET python_enable_replacements = false")
    database.register("stored", stored)
    database.execute(
        f"""CREATE TABLE calls AS
            SELECT {", ".join(COLUMNS)}, make_timestamp((ts * 1000000)::BIGINT) AS time,
                strftime(make_timestamp((ts * 1000000)::BIGINT), '%Y-%m-%d') AS day
            FROM stored QUALIFY row_number() OVER (PARTITION BY call_id ORDER BY _row DESC) = 1"""
    )
    database.unregister("stored")
    for setting in ("enable_external_access", "autoinstall_known_extensions", "autoload_known_extensions"):
        database.execute(f"SET {setting} = false")
    database.execute("SET lock_configuration = true")
    return database


_ALLOWED_SQL = (
    f"allowed: one SELECT over calls({', '.join((*COLUMNS, 'time', 'day'))}); "
    "next: understudy calls --sql 'SELECT agent, count(*) FROM calls GROUP BY agent'"
)


def _refused(error: duckdb.Error) -> InputError:
    return InputError(f"--sql: {str(error).splitlines()[0]}; {_ALLOWED_SQL}")


def _run(database: duckdb.DuckDBPyConnection, query: Any, values: list[Any], limit: int) -> Answer:
    result = database.execute(query, values) if values else database.execute(query)
    head = [column[0] for column in result.description or []]
    rows = result.fetchmany(limit + 1)
    return Answer(head, rows[:limit], is_cut=len(rows) > limit)


def _where(store: Store, filters: Filters) -> tuple[str, list[Any]]:
    """Condition and its values; what a user typed is never part of the query's text."""
    conditions: list[str] = ["true"] if filters.audits else ["audit_of IS NULL"]
    values: list[Any] = []
    given = {"agent": filters.agent, "task_id": filters.task, "day": filters.day, "served_by": filters.served_by}
    if filters.day is not None:
        _seconds("--day", filters.day)
    if filters.client is None and filters.session is not None:
        raise InputError("--session: names a session of one client; allowed: with --client NAME; next: add --client")
    if filters.client is not None:
        pseudonyms = Pseudonyms(load_pseudonym_key(store.uri))
        given["client_id"] = pseudonyms.of("client", filters.client)
        if filters.session is not None:
            given["session_id"] = pseudonyms.session_of(filters.client, filters.session)
    for column, value in given.items():
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    for flag, sign, time in (("--since", ">=", filters.since), ("--until", "<", filters.until)):
        if time is not None:
            conditions.append(f"ts {sign} ?")
            values.append(_seconds(flag, time))
    if filters.status is not None:
        conditions.append(_status(filters.status))
    return " AND ".join(conditions), values


def _status(text: str) -> str:
    named = {"ok": "status < 400", "failed": "status >= 400"}
    if text in named:
        return named[text]
    if text.isascii() and text.isdigit() and len(text) == 3:
        return f"status = {int(text)}"
    raise InputError(f"--status {text!r}: no status; allowed: a number such as 200, ok, failed; next: --status failed")


def _seconds(flag: str, text: str) -> float:
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{flag} {text!r}: no time; allowed: YYYY-MM-DD or ISO 8601; next: {flag} 2026-01-31"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()
