"""Releases are immutable and named by content; CURRENT behaves as a stack whatever is promoted and rolled back."""

import concurrent.futures
import itertools
import json
import pathlib
import tempfile

import pytest
from fakes import make_specialist
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import events, registry
from cluster.errors import ReleaseError
from cluster.events import Cause, read_events
from cluster.records import Release, Rollout, Specialist
from cluster.store import Store

ROUTES = "route_model/one"


def make_release(snapshot: str = "one", specialist: Specialist | None = None) -> Release:
    specialists = {specialist.task_id: specialist} if specialist else {}
    return Release(specialists=specialists, refused={}, route_model=ROUTES, snapshot=snapshot, created_ts=1.0)


def open_store(folder: pathlib.Path, *published: str) -> Store:
    """A store in which the route model and the folders of `published` exist."""
    store, scratch = Store(str(folder / "store")), folder / "scratch"
    scratch.mkdir()
    (scratch / "weights").write_text("none")
    for name in (ROUTES, *published):
        store.publish(name, scratch, {"kind": "test"})
    return store


def test_publishing_serves_nothing_and_repeats_without_change(tmp_path: pathlib.Path) -> None:
    store = open_store(tmp_path)
    sha = registry.publish_release(store, make_release())
    assert registry.publish_release(store, make_release()) == sha
    assert store.list("releases") == [f"releases/{sha}.json"]
    assert registry.current(store) is None and registry.current_sha(store) is None


def test_a_release_reads_back_as_it_was(tmp_path: pathlib.Path) -> None:
    specialist = make_specialist()
    store = open_store(tmp_path, specialist.base, specialist.adapter)
    release = make_release(specialist=specialist)
    sha = registry.publish_release(store, release)
    registry.promote(store, sha)
    assert registry.load_release(store, sha) == release
    assert registry.current(store) == (sha, release)


def test_absent_altered_and_unreadable_releases_are_refused(tmp_path: pathlib.Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ReleaseError, match="not in the store"):
        registry.promote(store, "0" * 64)
    sha = registry.publish_release(store, make_release())
    value = store.read_json(f"releases/{sha}.json")
    store.write_json(f"releases/{sha}.json", {**value, "snapshot": "other"})
    with pytest.raises(ReleaseError, match="altered"):
        registry.promote(store, sha)
    store.write_json(f"releases/{sha}.json", {"snapshot": "other"})
    with pytest.raises(ReleaseError, match="not readable"):
        registry.promote(store, sha)
    assert registry.current(store) is None


@pytest.mark.parametrize("missing", ["base", "adapter", "merged"])
def test_promoting_needs_every_artifact_and_changes_nothing_without(tmp_path: pathlib.Path, missing: str) -> None:
    specialist = make_specialist().model_copy(update={"merged": "merged/triage/1"})
    published = {"base": specialist.base, "adapter": specialist.adapter, "merged": "merged/triage/1"}
    absent = published.pop(missing)
    store = open_store(tmp_path, *published.values())
    good = registry.publish_release(store, make_release())
    registry.promote(store, good)
    bad = registry.publish_release(store, make_release(specialist=specialist))
    with pytest.raises(ReleaseError, match=absent):
        registry.promote(store, bad)
    assert registry.current_sha(store) == good


def test_promoting_needs_the_route_model(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    sha = registry.publish_release(store, make_release())
    with pytest.raises(ReleaseError, match=f"route model {ROUTES}"):
        registry.promote(store, sha)


def test_refused_and_misplaced_specialists_are_not_promoted(tmp_path: pathlib.Path) -> None:
    refused, specialist = make_specialist(threshold=None), make_specialist()
    store = open_store(tmp_path, specialist.base, specialist.adapter)
    with pytest.raises(ReleaseError, match="refused gate"):
        registry.promote(store, registry.publish_release(store, make_release(specialist=refused)))
    misplaced = make_release().model_copy(update={"specialists": {"other": specialist}})
    with pytest.raises(ReleaseError, match="other"):
        registry.promote(store, registry.publish_release(store, misplaced))


def test_a_damaged_pointer_is_an_error_not_an_empty_store(tmp_path: pathlib.Path) -> None:
    store = open_store(tmp_path)
    store.write_bytes(registry.CURRENT, b"{}")
    with pytest.raises(ReleaseError, match="damaged"):
        registry.current(store)


def test_rolling_back_needs_an_earlier_release(tmp_path: pathlib.Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ReleaseError, match="no earlier release"):
        registry.roll_back(store)
    sha = registry.publish_release(store, make_release())
    registry.promote(store, sha)
    registry.promote(store, sha)
    with pytest.raises(ReleaseError, match="no earlier release"):
        registry.roll_back(store)
    assert registry.current_sha(store) == sha


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["a", "b", "c", "back"]), max_size=12))
def test_current_is_a_stack_of_what_was_promoted(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(pathlib.Path(folder))
        shas = {name: registry.publish_release(store, make_release(name)) for name in "abc"}
        stack: list[str] = []
        for step in steps:
            if step != "back":
                registry.promote(store, shas[step])
                stack += [shas[step]] if stack[-1:] != [shas[step]] else []
            elif len(stack) > 1:
                stack.pop()
                assert registry.previous_sha(store) == registry.roll_back(store) == stack[-1]
            else:
                with pytest.raises(ReleaseError):
                    registry.roll_back(store)
            assert registry.current_sha(store) == (stack[-1] if stack else None)
        if stack:
            assert json.loads(store.read_bytes(registry.CURRENT)) == {"release": stack[-1], "history": stack[:-1]}


def test_every_change_of_what_is_served_is_an_event_and_nothing_else_is(tmp_path: pathlib.Path) -> None:
    store = open_store(tmp_path)
    first, second = (registry.publish_release(store, make_release(name)) for name in ("one", "two"))
    registry.promote(store, first)
    registry.promote(store, first)
    registry.promote(store, second, cause=Cause(kind="advance", by="steward", evidence={"triage": {"n": 3}}))
    registry.roll_back(store)
    events = read_events(store)
    assert [(e.kind, e.by, e.before, e.release) for e in events] == [
        ("promote", "person", None, first),
        ("advance", "steward", first, second),
        ("roll_back", "person", second, first),
    ]
    assert events[1].evidence == {"triage": {"n": 3}} and [e.ts for e in events] == sorted(e.ts for e in events)


def test_a_writer_that_expects_another_release_changes_nothing(tmp_path: pathlib.Path) -> None:
    store = open_store(tmp_path)
    first, second, third = (registry.publish_release(store, make_release(name)) for name in ("one", "two", "three"))
    registry.promote(store, first)
    registry.promote(store, second, expected=first)
    with pytest.raises(ReleaseError, match=f"CURRENT is {second}, not {first}; look at it and decide again"):
        registry.promote(store, third, expected=first)
    assert registry.current_sha(store) == second and len(read_events(store)) == 2


def test_writers_wait_for_each_other_so_that_no_promotion_is_lost(tmp_path: pathlib.Path) -> None:
    store = open_store(tmp_path)
    shas = [registry.publish_release(store, make_release(str(number))) for number in range(16)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda sha: registry.promote(store, sha), shas))
    pointer = store.read_json(registry.CURRENT)
    assert sorted([*pointer["history"], pointer["release"]]) == sorted(shas)


def test_a_frozen_store_takes_changes_from_a_person_alone(tmp_path: pathlib.Path) -> None:
    store = open_store(tmp_path)
    first, second = (registry.publish_release(store, make_release(name)) for name in ("one", "two"))
    registry.freeze(store, "audit")
    registry.freeze(store, "again")
    with pytest.raises(ReleaseError, match="the store is frozen; next: understudy release unfreeze"):
        registry.promote(store, first, cause=Cause(by="steward"))
    registry.promote(store, second)
    registry.unfreeze(store)
    registry.unfreeze(store)
    registry.promote(store, first, cause=Cause(by="steward"))
    assert [event.kind for event in read_events(store)] == ["freeze", "promote", "unfreeze", "promote"]
    assert read_events(store)[0].evidence == {"reason": "audit"}


def test_changes_within_one_millisecond_are_told_in_their_order(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, clock = open_store(tmp_path), itertools.count(1_700_000_000_000_000_000, 1_000)
    monkeypatch.setattr(events.time, "time_ns", lambda: next(clock))
    monkeypatch.setattr(events.time, "time", lambda: 1_700_000_000.0)
    registry.freeze(store, "audit")
    registry.promote(store, registry.publish_release(store, make_release()))
    registry.unfreeze(store)
    registry.freeze(store, "again")
    assert [event.kind for event in read_events(store)] == ["freeze", "promote", "unfreeze", "freeze"]


def test_a_derived_release_refuses_tasks_and_moves_stages_and_leaves_the_rest(tmp_path: pathlib.Path) -> None:
    one, other = make_specialist(), make_specialist().model_copy(update={"task_id": "other"})
    release = make_release().model_copy(update={"specialists": {"triage": one, "other": other}})
    store = open_store(tmp_path, one.base, one.adapter)
    sha = registry.publish_release(store, release)
    shadow = Rollout(stage="shadow")
    staged = registry.derive(sha, release, rollout={"triage": shadow, "other": shadow})
    assert (staged.stage_of("triage"), staged.previous, staged.specialists) == ("shadow", sha, release.specialists)
    moved = registry.derive("next", staged, rollout={"triage": None}, refuse={"other": "demoted"})
    assert (moved.rollout, moved.refused, list(moved.specialists)) == ({}, {"other": "demoted"}, ["triage"])
    registry.promote(store, registry.publish_release(store, moved))
    stray = moved.model_copy(update={"rollout": {"other": shadow}})
    with pytest.raises(ReleaseError, match="task other has a stage and no specialist"):
        registry.promote(store, registry.publish_release(store, stray))
