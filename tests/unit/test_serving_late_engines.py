"""Engines of models that came after the graph: which are started and ended, and when a gateway asks them."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import tempfile
import threading
import weakref
from collections.abc import Sequence

import pytest
from fakes import BASE, ROUTES, FakeApps, FakeEngine, make_specialist
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import registry
from cluster.engine import Engine
from cluster.errors import EngineError
from cluster.records import Release
from cluster.route_model import RouteModel
from cluster.store import Store
from serving.engine_search import EngineSearch
from serving.late_engines import EngineKeeper, apps_prefix, engine_app
from serving.table import ServingTable

MODELS = ("bases/one", "bases/two", "bases/three")


def promote(store: Store, models: Sequence[str], *, number: int = 0) -> str:
    """Serve one specialist on each of the models; releases of different numbers differ."""
    made = make_specialist()
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "weights").write_text("none")
        for path in {*models, made.adapter}:
            store.publish(path, pathlib.Path(folder), {"kind": "test"})
    RouteModel({}, {}).save(store, ROUTES)
    specialists = {model: made.model_copy(update={"task_id": model, "base": model}) for model in models}
    release = Release(specialists=specialists, refused={}, route_model=ROUTES, snapshot=f"s-{number}", created_ts=0.0)
    sha = registry.publish_release(store, release)
    registry.promote(store, sha)
    return sha


@settings(max_examples=20)
@given(st.lists(st.one_of(st.none(), st.sets(st.sampled_from((*MODELS, BASE)))), max_size=8))
def test_there_are_engines_for_the_served_release_and_for_the_one_that_a_rollback_would_serve(
    wanted: list[set[str] | None],
) -> None:
    """Whatever is promoted, and rolled back where it is None; those of the graph itself are left alone."""
    with tempfile.TemporaryDirectory() as folder:
        now, store, apps = 0.0, Store(folder), FakeApps()
        keeper = EngineKeeper(store, frozenset({BASE}), apps, clock=lambda: now)
        for number, models in enumerate(wanted):
            if models is None:
                if registry.previous_sha(store) is None:
                    continue
                registry.roll_back(store)
            else:
                promote(store, sorted(models), number=number)
            before = registry.previous_sha(store)
            (_, release) = registry.current(store) or pytest.fail("nothing is served")
            needed, there = release.models() - {BASE}, set(apps.models.values())
            keeper.step()
            assert there | needed == set(apps.models.values()), "gateways may still ask those of a moment ago"
            for _ in range(3):
                now += 61.0
                keeper.step()
                apps.finish()
            allowed = (needed | (registry.load_release(store, before).models() if before else set())) - {BASE}
            assert needed <= set(apps.models.values()) <= allowed
            assert apps.models == {engine_app(store.uri, model): model for model in apps.models.values()}


def test_a_look_at_what_is_as_it_was_asks_nobody(tmp_path: pathlib.Path) -> None:
    store, apps = Store(str(tmp_path / "store")), FakeApps()
    keeper = EngineKeeper(store, frozenset(), apps)
    keeper.step()
    promote(store, MODELS[:1])
    keeper.step()
    keeper.step()
    apps.models.clear()
    keeper.step()
    assert apps.num_tries == 1, "Ray Serve itself keeps what it runs"


def test_a_release_before_that_cannot_be_read_keeps_no_engine_from_starting(tmp_path: pathlib.Path) -> None:
    store, apps = Store(str(tmp_path / "store")), FakeApps()
    first = promote(store, MODELS[:1])
    promote(store, MODELS[1:2])
    store.delete(f"releases/{first}.json")
    EngineKeeper(store, frozenset(), apps).step()
    assert list(apps.models.values()) == [MODELS[1]]


def test_a_start_that_fails_is_told_once_tried_again_and_keeps_no_other_from_starting(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    now, stop, store, apps = 0.0, threading.Event(), Store(str(tmp_path / "store")), FakeApps()
    keeper = EngineKeeper(store, frozenset(), apps, clock=lambda: now)
    stop.wait = lambda timeout=None: stop.set() or True  # type: ignore[method-assign]

    def look() -> None:
        stop.clear()
        keeper.run(stop)

    promote(store, MODELS[:2])
    apps.down = {MODELS[0]}
    look()
    look()
    assert apps.num_tries == 2 and list(apps.models.values()) == [MODELS[1]]
    now = 31.0
    look()
    assert apps.num_tries == 3
    told = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "engine_not_started"]
    assert told == [{"error": "OSError: the last line"}]
    apps.down, now = set(), 62.0
    look()
    assert set(apps.models.values()) == set(MODELS[:2])


def test_what_serve_gave_up_is_told_and_started_again(tmp_path: pathlib.Path) -> None:
    store, apps = Store(str(tmp_path / "store")), FakeApps()
    keeper = EngineKeeper(store, frozenset(), apps)
    promote(store, MODELS[:1])
    keeper.step()
    apps.failed = set(apps.models)
    with pytest.raises(EngineError, match="could not start it"):
        keeper.step()
    keeper.step()
    assert apps.num_tries == 2 and not apps.failed


def test_an_engine_that_is_ending_is_started_again_once_it_is_gone(tmp_path: pathlib.Path) -> None:
    now, store, apps = 0.0, Store(str(tmp_path / "store")), FakeApps()
    keeper = EngineKeeper(store, frozenset(), apps, clock=lambda: now)
    for number, models in enumerate((MODELS[:1], (), ())):
        promote(store, models, number=number)
        keeper.step()
    now = 61.0
    keeper.step()
    assert len(apps.ended) == 1
    promote(store, MODELS[:1], number=3)
    keeper.step()
    assert apps.num_tries == 1, "Serve still ends it"
    apps.finish()
    keeper.step()
    assert apps.num_tries == 2 and list(apps.models.values()) == [MODELS[0]]


def test_once_a_model_is_part_of_the_graph_its_late_engine_ends(tmp_path: pathlib.Path) -> None:
    now, store, apps = 0.0, Store(str(tmp_path / "store")), FakeApps()
    for number in (0, 1):
        promote(store, MODELS[:1], number=number)
        EngineKeeper(store, frozenset(), apps).step()
    built = EngineKeeper(store, frozenset(MODELS[:1]), apps, clock=lambda: now)
    built.step()
    now = 61.0
    built.step()
    assert len(apps.ended) == 1


def test_two_stores_of_one_cluster_keep_their_engines_apart() -> None:
    one, two = engine_app("stores/one", BASE), engine_app("stores/two", BASE)
    assert one != two and one.startswith(apps_prefix("stores/one")) and not two.startswith(apps_prefix("stores/one"))


def test_a_gateway_asks_an_engine_once_it_answers_and_forgets_it_once_no_release_needs_it(
    tmp_path: pathlib.Path,
) -> None:
    async def scenario() -> None:
        store, late = Store(str(tmp_path / "store")), SlowEngine()
        engines: dict[str, Engine] = {BASE: FakeEngine()}
        begun: set[str] = set()

        def find(model: str) -> Engine:
            if model not in begun:
                raise LookupError(model)
            return late

        table = ServingTable(store, engines, 8, EngineSearch(engines, find))
        first = promote(store, [BASE, MODELS[0]])
        await refresh(table)
        assert table.snapshot.release == first and list(table.snapshot.specialists) == [BASE]
        assert table.snapshot.skipped == {MODELS[0]: "no engine serves its model yet"}
        begun.add(MODELS[0])
        await refresh(table)
        assert list(table.snapshot.specialists) == [BASE], "it was started and does not answer yet"
        late.is_up.set()
        await refresh(table)
        assert sorted(table.snapshot.specialists) == [MODELS[0], BASE] and not table.snapshot.skipped
        assert (late.loaded, table.snapshot.release) == (["adapters/triage"], first)
        before = weakref.ref(table.snapshot)
        await refresh(table)
        assert table.snapshot is before(), "nothing is loaded again"
        promote(store, [BASE], number=1)
        await refresh(table)
        assert set(engines) == {BASE, MODELS[0]}, "calls that began before may ask it"
        promote(store, [BASE], number=2)
        await refresh(table)
        assert set(engines) == {BASE}

    asyncio.run(scenario())


def test_a_search_for_a_model_that_is_not_wanted_any_more_ends(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store, late = Store(str(tmp_path / "store")), SlowEngine()
        engines: dict[str, Engine] = {BASE: FakeEngine()}
        table = ServingTable(store, engines, 8, EngineSearch(engines, lambda model: late))
        promote(store, [MODELS[0]])
        await refresh(table)
        promote(store, [BASE], number=1)
        await refresh(table)
        late.is_up.set()
        await refresh(table)
        assert set(engines) == {BASE} and late.num_left == 1

    asyncio.run(scenario())


def test_neither_a_stale_engine_nor_a_load_that_failed_half_way_keeps_a_release_from_being_served(
    tmp_path: pathlib.Path,
) -> None:
    async def scenario() -> None:
        store, late = Store(str(tmp_path / "store")), SlowEngine()
        engines: dict[str, Engine] = {BASE: FakeEngine()}
        table = ServingTable(store, engines, 8, EngineSearch(engines, lambda model: late))
        first = promote(store, [BASE])
        await refresh(table)
        late.is_up.set()
        second = promote(store, [BASE, MODELS[0]], number=1)
        await refresh(table)
        assert MODELS[0] in table.snapshot.specialists
        registry.roll_back(store)
        await refresh(table)
        assert table.snapshot.release == first
        # Its engine has ended, as the keeper would have it, and is started anew.
        late.is_up.clear()
        registry.promote(store, second)
        await refresh(table)
        assert (table.snapshot.release, list(table.snapshot.specialists)) == (second, [BASE])
        late.is_up.set()
        late.fault = RuntimeError("it dies as it is loaded")
        with pytest.raises(RuntimeError):
            await refresh(table)
        late.fault = None
        await refresh(table)
        assert set(table.snapshot.specialists) == {BASE, MODELS[0]}

    asyncio.run(scenario())


class SlowEngine(FakeEngine):
    """Answers nothing before it is up."""

    def __init__(self) -> None:
        super().__init__()
        self.is_up = asyncio.Event()
        self.num_left = 0
        self.fault: Exception | None = None

    async def load(self, adapter: str) -> None:
        if self.fault:
            raise self.fault
        await super().load(adapter)

    async def fingerprint(self) -> str:
        try:
            await self.is_up.wait()
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        return await super().fingerprint()


async def refresh(table: ServingTable) -> None:
    """Poll, let searches get as far as they can, and poll again."""
    for _ in range(2):
        await table.refresh()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.Event().wait()
