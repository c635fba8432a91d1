"""Compaction and forgetting: every call once, none of a forgotten client, whatever else goes on."""

from __future__ import annotations

import os
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.calls import iterate_calls, read_call_columns, read_call_ids, read_calls, write_calls
from cluster.compaction import compact_calls
from cluster.forgotten import mark_forgotten
from cluster.records import AgentCall
from cluster.store import Store

DAY_S = 86_400.0
START = 1_700_000_000.0
BATCH = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from("ab")), min_size=1, max_size=5, unique_by=lambda one: one[0]
)


def _call(number: int, client: str = "kept", ts: float | None = None) -> AgentCall:
    return AgentCall(
        call_id=f"c{number}", ts=START + number if ts is None else ts, client_id=client, agent="a",
        session_id=f"s{number}", step=0, request={"messages": [{"role": "user", "content": f"q{number}"}]}, response=None,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    return Store(str(tmp_path / "store"))


def _parts(store: Store) -> list[str]:
    return store.list("calls", ".parquet")


def test_small_parts_become_one_and_every_call_stays(store):
    calls = [_call(number) for number in range(20)]
    for call in reversed(calls):
        write_calls(store, [call])
    counts = compact_calls(store)
    assert (counts.parts_before, counts.parts_after, counts.calls, counts.duplicates) == (20, 1, 20, 0)
    assert len(_parts(store)) == 1 and read_calls(store) == calls
    assert len(list(pathlib.Path(store.uri).rglob("_KEY_MATERIAL*"))) == 1


def test_a_compacted_store_is_left_as_it_is(store):
    write_calls(store, [_call(0)])
    write_calls(store, [_call(1)])
    compact_calls(store)
    before = _parts(store)
    counts = compact_calls(store)
    assert _parts(store) == before and counts.calls == 0


def test_days_stay_apart_and_large_parts_are_not_touched(store, monkeypatch):
    monkeypatch.setattr("cluster.compaction.MAX_CALLS_PER_PART", 4)
    (large,) = write_calls(store, [_call(number) for number in range(3)])
    for number in (10, 11, 12, 13, 14):
        write_calls(store, [_call(number)])
    write_calls(store, [_call(20, ts=START + DAY_S)])
    compact_calls(store)
    assert large in _parts(store) and len(_parts(store)) == 4
    assert len({path.split("/")[1] for path in _parts(store)}) == 2
    assert len(read_calls(store)) == 9


def test_duplicates_are_removed(store):
    for _ in range(3):
        write_calls(store, [_call(0), _call(1)])
    assert compact_calls(store).duplicates == 4
    assert sorted(call.call_id for call in iterate_calls(store)) == ["c0", "c1"]


def test_a_reader_that_met_the_old_parts_misses_nothing(store):
    for number in range(6):
        write_calls(store, [_call(number)])
    reading = iterate_calls(store)
    first = next(reading)
    compact_calls(store)
    assert {first.call_id, *(call.call_id for call in reading)} == {f"c{number}" for number in range(6)}


def test_a_compaction_killed_before_it_deletes_is_made_good_by_the_next(store, monkeypatch):
    for number in range(3):
        write_calls(store, [_call(number)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        compact_calls(store)
    assert len(read_calls(store)) == 3
    compact_calls(store)
    assert len(_parts(store)) == 1 and len(list(iterate_calls(store))) == 3


def test_a_damaged_part_stops_compaction_and_nothing_is_lost(store):
    (bad,) = write_calls(store, [_call(0)])
    write_calls(store, [_call(1)])
    (pathlib.Path(store.uri) / bad).write_bytes(b"PAR1")
    with pytest.raises(OSError, match="cannot be read as Parquet"):
        compact_calls(store)
    assert len(_parts(store)) == 2


def test_forgotten_calls_are_not_read_even_before_they_are_removed(store):
    write_calls(store, [_call(0, "gone"), _call(1), _call(2, "gone")])
    mark_forgotten(store, "gone", START + 1, {})
    assert read_call_ids(store) == {"c1", "c2"}
    assert read_call_columns(store, ["step"]).num_rows == 2
    assert [call.call_id for call in read_calls(store)] == ["c1", "c2"]


def test_compaction_removes_forgotten_calls_from_the_files(store):
    write_calls(store, [_call(0, "gone"), _call(1)])
    write_calls(store, [_call(2, "gone")])
    mark_forgotten(store, "gone", START + 10, {})
    counts = compact_calls(store)
    assert (counts.forgotten, counts.calls) == (2, 1)
    (part,) = _parts(store)
    assert store.read_table(part)["client_id"].to_pylist() == ["kept"]


def test_what_died_halfway_is_swept_when_it_is_old(store):
    write_calls(store, [_call(0)])
    folder = pathlib.Path(store.uri) / _parts(store)[0].rsplit("/", 1)[0]
    left = [folder / ".part-1.parquet.0123", folder / "_KEY_MATERIAL_FOR_part-1.parquet.json"]
    for path in left:
        path.write_bytes(b"{}")
    assert compact_calls(store).swept == 0
    for path in left:
        os.utime(path, (time.time() - DAY_S,) * 2)
    assert compact_calls(store).swept == 2
    assert not any(path.exists() for path in left) and read_calls(store) == [_call(0)]


@settings(max_examples=15)
@given(st.lists(BATCH, max_size=6))
def test_any_traffic_is_the_same_after_compaction(tmp_path_factory, batches):
    store = Store(str(tmp_path_factory.mktemp("store") / "s"))
    for batch in batches:
        write_calls(store, [_call(number, client, START + DAY_S * (number % 3)) for number, client in batch])
    mark_forgotten(store, "b", START + DAY_S, {})
    expected = read_call_ids(store)
    compact_calls(store)
    assert read_call_ids(store) == expected
    ids = [call.call_id for call in iterate_calls(store)]
    assert len(_parts(store)) <= 3 and len(ids) == len(set(ids))
