"""Following CURRENT: what is swapped in, what is left out with its reason, and what leaves the old release serving."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Sequence

import pytest
from fakes import BASE, ROUTES, FakeEngine, make_specialist

from cluster import registry
from cluster.errors import ConfigError
from cluster.records import Release, Specialist
from cluster.route_model import RouteModel
from cluster.store import Store
from serving.app import ServeArgs, build
from serving.specialist import served_adapters
from serving.table import ServingTable, crowded_base


def _specialists(*names: str, base: str = BASE, threshold: float | None = 0.9) -> list[Specialist]:
    made = make_specialist(base=base, threshold=threshold)
    return [made.model_copy(update={"task_id": name, "adapter": f"adapters/{name}"}) for name in names]


def _promote(store: Store, scratch: pathlib.Path, specialists: Sequence[Specialist]) -> str:
    scratch.mkdir(exist_ok=True)
    (scratch / "weights").write_text("none")
    for folder in {path for one in specialists for path in (one.base, one.adapter)}:
        store.publish(folder, scratch, {"kind": "test"})
    RouteModel({}, {}).save(store, ROUTES)
    release = Release(
        specialists={one.task_id: one for one in specialists},
        refused={},
        route_model=ROUTES,
        snapshot="s",
        created_ts=float(len(specialists)),
    )
    sha = registry.publish_release(store, release)
    registry.promote(store, sha)
    return sha


def test_an_engine_that_is_away_leaves_the_old_release_serving(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store, engine = Store(str(tmp_path / "store")), FakeEngine()
        table = ServingTable(store, {BASE: engine}, max_adapters=8)
        await table.refresh()
        assert table.snapshot.release is None
        first = _promote(store, tmp_path / "scratch", _specialists("a"))
        await table.refresh()
        assert table.snapshot.release == first
        engine.is_away = True
        second = _promote(store, tmp_path / "scratch", _specialists("a", "b"))
        await table.refresh()
        assert table.snapshot.release == first and "a" in table.snapshot.specialists
        engine.is_away = False
        await table.refresh()
        assert table.snapshot.release == second

    asyncio.run(scenario())


def test_an_adapter_that_does_not_load_is_left_out_and_the_others_are_served(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store, engine = Store(str(tmp_path / "store")), FakeEngine()
        engine.broken = {"adapters/b"}
        table = ServingTable(store, {BASE: engine}, max_adapters=8)
        release = _promote(store, tmp_path / "scratch", _specialists("a", "b", "c"))
        await table.refresh()
        assert table.snapshot.release == release
        assert sorted(table.snapshot.specialists) == ["a", "c"]
        assert table.snapshot.skipped == {"b": "adapter does not load"} == table.snapshot.refused

    asyncio.run(scenario())


def test_a_release_that_does_not_fit_beside_the_served_one_is_not_swapped_in(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store, engine = Store(str(tmp_path / "store")), FakeEngine()
        table = ServingTable(store, {BASE: engine}, max_adapters=3)
        first = _promote(store, tmp_path / "scratch", _specialists("a", "b"))
        await table.refresh()
        _promote(store, tmp_path / "scratch", _specialists("c", "d"))
        await table.refresh()
        assert table.snapshot.release == first and "adapters/c" not in engine.loaded
        # Adapters that both releases have count once.
        third = _promote(store, tmp_path / "scratch", _specialists("a", "b", "c"))
        await table.refresh()
        assert table.snapshot.release == third

    asyncio.run(scenario())


def test_a_third_release_is_loaded_when_no_request_keeps_the_first(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store, engine = Store(str(tmp_path / "store")), FakeEngine()
        table = ServingTable(store, {BASE: engine}, max_adapters=2)
        _promote(store, tmp_path / "scratch", _specialists("a"))
        await table.refresh()
        kept_by_a_request = table.snapshot
        _promote(store, tmp_path / "scratch", _specialists("b"))
        await table.refresh()
        third = _promote(store, tmp_path / "scratch", _specialists("c"))
        refreshing = asyncio.create_task(table.refresh())
        await asyncio.sleep(0.3)
        assert sorted(kept_by_a_request.specialists) == ["a"] and "adapters/c" not in engine.loaded
        del kept_by_a_request
        await refreshing
        assert table.snapshot.release == third
        # The served adapter is asked for before the new one, so that it is not what the engine lets go of.
        assert engine.loaded[-2:] == ["adapters/b", "adapters/c"]

    asyncio.run(scenario())


def test_only_open_specialists_of_one_base_crowd_each_other() -> None:
    ours, theirs = _specialists("a", "b"), _specialists("c", base="bases/other")
    closed = _specialists("d", threshold=None)
    assert crowded_base([*ours, *theirs, *closed], 2) is None
    assert crowded_base([*ours, *_specialists("e")], 2) == (BASE, 3)


def test_a_merged_specialist_is_served_by_an_engine_of_its_own_that_loads_no_adapter(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store, base, own = Store(str(tmp_path / "store")), FakeEngine(), FakeEngine()
        own.name = "merged"
        lora, merged = _specialists("a", "b")
        merged = merged.model_copy(
            update={"merged": "merged/b/1", "gate": merged.gate.model_copy(update={"fingerprint": "merged"})}
        )
        table = ServingTable(store, {BASE: base, "merged/b/1": own}, max_adapters=1)
        (tmp_path / "scratch").mkdir()
        (tmp_path / "scratch" / "weights").write_text("none")
        store.publish("merged/b/1", tmp_path / "scratch", {})
        release = _promote(store, tmp_path / "scratch", [lora, merged])
        await table.refresh()
        # Of two specialists on one base, one is no adapter of its engine: there is room for it.
        assert (table.snapshot.release, table.snapshot.skipped) == (release, {})
        assert (base.loaded, own.loaded) == (["adapters/a"], [])
        other = ServingTable(store, {BASE: base}, max_adapters=1)
        await other.refresh()
        assert (
            list(other.snapshot.specialists) == ["a"]
            and "no engine serves its model yet" == other.snapshot.skipped["b"]
        )

    asyncio.run(scenario())


def test_a_new_replica_loads_what_the_served_release_asks_its_model_for(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    assert served_adapters(store, BASE) == []
    merged = _specialists("m")[0].model_copy(update={"merged": "merged/m/1"})
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "weights").write_text("none")
    store.publish("merged/m/1", tmp_path / "scratch", {})
    _promote(store, tmp_path / "scratch", [*_specialists("b", "a"), *_specialists("c", base="bases/other"), merged])
    assert served_adapters(store, BASE) == ["adapters/a", "adapters/b"]
    assert served_adapters(store, "bases/other") == ["adapters/c"] and served_adapters(store, "merged/m/1") == []
    store.write_json(registry.CURRENT, {"release": "f" * 64, "history": []})
    assert served_adapters(store, BASE) == [], "a release that cannot be read keeps no replica from starting"


def test_a_release_with_more_adapters_than_an_engine_holds_is_refused_at_build(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    _promote(store, tmp_path / "scratch", _specialists("a", "b", "c"))
    args = {"store": store.uri, "upstream": [{"base_url": "http://127.0.0.1:9/v1"}], "specialists": {"max_adapters": 2}}
    with pytest.raises(ConfigError, match="specialists.max_adapters=2.*3 adapters.*allowed: at least 3.*next"):
        build(ServeArgs.model_validate(args))
