"""Releases are immutable and named by content; CURRENT behaves as a stack whatever is promoted and rolled back."""

import json
import pathlib
import tempfile

import pytest
from fakes import make_specialist
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import registry
from cluster.errors import ReleaseError
from cluster.records import Release, Specialist
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


@pytest.mark.parametrize("missing", ["base", "adapter"])
def test_promoting_needs_every_artifact_and_changes_nothing_without(tmp_path: pathlib.Path, missing: str) -> None:
    specialist = make_specialist()
    published = {"base": specialist.base, "adapter": specialist.adapter}
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
                assert registry.roll_back(store) == stack[-1]
            else:
                with pytest.raises(ReleaseError):
                    registry.roll_back(store)
            assert registry.current_sha(store) == (stack[-1] if stack else None)
        if stack:
            assert json.loads(store.read_bytes(registry.CURRENT)) == {"release": stack[-1], "history": stack[:-1]}
