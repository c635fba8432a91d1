"""cluster/calls.py, cluster/quarantine.py: what is written is read back; metadata can be read without content."""

import time

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import calls as calls_module
from cluster.calls import (
    CALL_SCHEMA,
    CONTENT_COLUMNS,
    MAX_CALLS_PER_PART,
    read_call_columns,
    read_call_ids,
    read_calls,
    write_calls,
)
from cluster.quarantine import QuarantineRow, read_quarantine, write_quarantine
from cluster.records import AgentCall, RouteDecision, Usage
from cluster.store import Store

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=6,
)


def make_call(index: int = 0, **fields) -> AgentCall:
    values = {
        "call_id": f"call-{index}",
        "ts": 1_700_000_000.0 + index,
        "client_id": "client",
        "agent": "desk",
        "session_id": f"session-{index}",
        "step": 0,
        "request": {"model": "big", "messages": [{"role": "user", "content": f"question {index}"}]},
        "response": {"model": "big-2", "choices": [{"message": {"role": "assistant", "content": "yes"}}]},
    }
    return AgentCall(**{**values, **fields})


def test_parts_that_were_written_before_a_column_existed_read_as_having_none_there(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "store"))
    with monkeypatch.context() as older:
        older.setattr(calls_module, "_COLUMNS", tuple(one for one in calls_module._COLUMNS if one.name != "cost_basis"))
        older.setattr(calls_module, "CALL_SCHEMA", pa.schema([one for one in CALL_SCHEMA if one.name != "cost_basis"]))
        write_calls(store, [make_call(0, cost_usd=0.5)])
    write_calls(store, [make_call(1, cost_usd=0.5, cost_basis="estimated")])
    assert sorted(read_call_columns(store, ["cost_basis"])["cost_basis"].to_pylist(), key=str) == [None, "estimated"]
    assert [call.cost_basis for call in read_calls(store)] == [None, "estimated"]


@pytest.mark.parametrize(
    "response",
    [
        None,
        {},
        {"choices": None},
        {"choices": []},
        {"choices": {"message": {}}},
        {"choices": ["yes"]},
        {"choices": [{}]},
        {"choices": [{"message": "yes", "finish_reason": ["stop"]}]},
    ],
)
def test_a_body_that_is_no_completion_has_no_message(response):
    call = make_call(response=response)
    assert call.message is None and call.finish_reason is None


def test_every_field_survives_the_store(tmp_path):
    route = RouteDecision(action="escalate", reason="low confidence", task_id="t1", specialist="t1@abc", confidence=0.4)
    call = make_call(
        usage=Usage(prompt_tokens=7),
        latency_ms=1.5,
        cost_usd=0.01,
        served_by="gold",
        route=route,
        status=500,
        error="upstream",
        outcome={"reward": 0.0},
        label="a\nb",
        label_kind="gold",
        faces_person=True,
        is_reference=True,
        audit_of="call-9",
    )
    store = Store(str(tmp_path))
    write_calls(store, [call, make_call(1, response=None)])
    assert read_calls(store) == [call, make_call(1, response=None)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(st.dictionaries(st.text("xyz", min_size=1, max_size=3), JSON, max_size=3), max_size=4))
def test_any_json_survives_the_store(tmp_path_factory, requests):
    store = Store(str(tmp_path_factory.mktemp("store")))
    calls = [make_call(index, request=request) for index, request in enumerate(requests)]
    write_calls(store, calls)
    assert read_calls(store) == calls
    assert len(read_call_ids(store)) == len(calls)


def test_calls_are_parted_by_date_and_size_and_come_back_in_order_of_time(tmp_path):
    store = Store(str(tmp_path))
    calls = [make_call(index, ts=1_700_000_000.0 + index / 1000) for index in range(MAX_CALLS_PER_PART + 1)]
    paths = write_calls(store, [*reversed(calls), make_call(-1, ts=0.0)])
    assert [path.split("/")[1] for path in paths] == ["date=1970-01-01", "date=2023-11-14", "date=2023-11-14"]
    assert [call.call_id for call in read_calls(store)] == ["call--1", *(call.call_id for call in calls)]


def test_read_calls_returns_only_the_wanted_ones_and_ignores_unknown_ids(tmp_path):
    store = Store(str(tmp_path))
    write_calls(store, [make_call(index) for index in range(5)])
    assert [call.call_id for call in read_calls(store, {"call-3", "call-1", "nothing"})] == ["call-1", "call-3"]
    assert read_calls(store, set()) == []


def test_a_call_stored_twice_is_read_once(tmp_path):
    store = Store(str(tmp_path))
    write_calls(store, [make_call(1)])
    write_calls(store, [make_call(1), make_call(2)])
    assert [call.call_id for call in read_calls(store)] == ["call-1", "call-2"]
    assert len(read_call_ids(store)) == 2


def test_empty_store_has_no_calls(tmp_path):
    store = Store(str(tmp_path))
    assert write_calls(store, []) == []
    assert (read_calls(store), read_call_ids(store)) == ([], set())


def test_metadata_columns_hold_no_content(tmp_path):
    store = Store(str(tmp_path))
    secret = "do not tell"
    request = {"model": "big", "messages": [{"role": "user", "content": secret}]}
    response = {"model": "big-2", "choices": [{"message": {"role": "assistant", "content": secret}}]}
    write_calls(store, [make_call(request=request, response=response, label=secret, outcome={"text": secret})])
    plain = [name for name in CALL_SCHEMA.names if name not in CONTENT_COLUMNS]
    rows = read_call_columns(store, plain).to_pylist()
    assert secret not in repr(rows)
    assert rows[0]["model"] == "big-2"


def test_sixteen_thousand_small_calls_are_read_in_seconds(tmp_path):
    store = Store(str(tmp_path))
    write_calls(store, [make_call(index) for index in range(16_000)])
    start = time.process_time()
    assert len(read_calls(store)) == 16_000
    assert time.process_time() - start < 5


def test_quarantine_rows_come_back_and_equal_rows_share_a_file(tmp_path):
    store = Store(str(tmp_path))
    rows = [QuarantineRow(source="f", line=3, reason="not JSON", detail="column 4")]
    first = write_quarantine(store, "ingest", rows)
    assert write_quarantine(store, "ingest", rows) == first
    assert write_quarantine(store, "ingest", []) is None
    assert read_quarantine(store) == rows


@pytest.mark.parametrize("name", ["usage", "route"])
def test_missing_nested_records_stay_missing(tmp_path, name):
    store = Store(str(tmp_path))
    write_calls(store, [make_call()])
    assert getattr(read_calls(store)[0], name) == getattr(make_call(), name)
