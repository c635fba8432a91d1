"""Calls -> whatever was made of them: snapshots, tasks, adapters, scratch bases, releases and their specialists.

Followed through what the artifacts themselves say: an example names its calls, the assignment of a snapshot names an
example's task, an adapter's and a scratch base's manifest name their snapshot, a release names its own.
"""

from __future__ import annotations

import re
from typing import Any

from cluster.errors import ReleaseError
from cluster.records import Record, Release
from cluster.registry import load_release
from cluster.store import MANIFEST, Store
from training.discover import assignment_path
from training.snapshot import EXAMPLES_FOLDER, part_paths

_RELEASE = re.compile(r"releases/([0-9a-f]{64})\.json")
_LEARNED_FROM = ("train", "validation")
"""Splits that shape weights: validation chooses when to stop."""


class Seen(Record):
    """What had seen some calls; store paths and names, sorted."""

    snapshots: dict[str, dict[str, int]] = {}
    """Snapshot -> split -> examples made of the calls."""
    tasks: tuple[str, ...] = ()
    """Tasks whose train or validation examples they are."""
    adapters: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    """Bases trained from scratch on such examples."""
    merged: tuple[str, ...] = ()
    """Models into which such a base or adapter was merged."""
    releases: tuple[str, ...] = ()
    """Releases with a specialist that had seen them."""
    specialists: tuple[str, ...] = ()
    """Those specialists, TASK_ID@SHA."""


def find_seen(store: Store, call_ids: set[str]) -> Seen:
    """What was made with any of these calls. Reads metadata alone; needs no content key."""
    snapshots: dict[str, dict[str, int]] = {}
    tasks: dict[str, set[str]] = {}
    for snapshot in _snapshots(store):
        counts, tasks[snapshot] = _examples_of(store, snapshot, call_ids)
        if counts:
            snapshots[snapshot] = counts
    made = _trained(store, "adapters")
    made_from = {path: meta["snapshot"] for path, meta in made if "snapshot" in meta}
    adapters = {path for path, meta in made if meta.get("task_id") in tasks.get(meta.get("snapshot", ""), ())}
    adapters |= _started_from(made, adapters)
    bases = {path for path, meta in _trained(store, "bases") if tasks.get(meta.get("snapshot", ""))}
    releases, specialists = set(), set()
    for sha, release in _releases(store):
        for task_id, one in release.specialists.items():
            # A refinement keeps specialists of older snapshots: their own manifests say what they learned from.
            own = made_from.get(one.adapter, release.snapshot)
            is_taught = one.adapter in adapters or task_id in tasks.get(own, ())
            if is_taught or one.base in bases:
                releases.add(sha)
                specialists.add(one.name)
                adapters.add(one.adapter)
    merged = {path for path, meta in _trained(store, "merged") if meta["adapter"] in adapters or meta["base"] in bases}
    return Seen(
        snapshots=snapshots,
        tasks=tuple(sorted(set().union(*tasks.values()))) if tasks else (),
        adapters=tuple(sorted(adapters)),
        bases=tuple(sorted(bases)),
        merged=tuple(sorted(merged)),
        releases=tuple(sorted(releases)),
        specialists=tuple(sorted(specialists)),
    )


def _started_from(made: list[tuple[str, dict[str, Any]]], seen: set[str]) -> set[str]:
    """Adapters whose training went on from the weights of one that had seen the calls, however far back."""
    parents = {path: meta["start"]["adapter"] for path, meta in made if meta.get("start")}
    found: set[str] = set()
    while more := {path for path, parent in parents.items() if parent in seen | found} - found:
        found |= more
    return found


def _snapshots(store: Store) -> list[str]:
    paths = store.list(EXAMPLES_FOLDER, f"/{MANIFEST}")
    return [path.split("/")[1] for path in paths]


def _examples_of(store: Store, snapshot: str, call_ids: set[str]) -> tuple[dict[str, int], set[str]]:
    """Split -> examples made of the calls, and the tasks of those that shape weights."""
    counts: dict[str, int] = {}
    tasks: set[str] = set()
    assignment = _assignment_of(store, snapshot)
    for split, paths in part_paths(store, snapshot).items():
        for path in paths:
            table = store.read_table(path, ["example_id", "source_call_ids"])
            made = zip(table["example_id"].to_pylist(), table["source_call_ids"].to_pylist(), strict=True)
            names = [name for name, sources in made if not call_ids.isdisjoint(sources)]
            if names:
                counts[split] = counts.get(split, 0) + len(names)
            if split in _LEARNED_FROM:
                tasks |= {task for name in names if (task := assignment.get(name))}
    return counts, tasks


def _trained(store: Store, folder: str) -> list[tuple[str, dict[str, Any]]]:
    """Path and manifest of every adapter or base."""
    paths = [path.removesuffix(f"/{MANIFEST}") for path in store.list(folder, f"/{MANIFEST}")]
    return [(path, store.manifest(path)) for path in paths]


def _releases(store: Store) -> list[tuple[str, Release]]:
    found = []
    for match in filter(None, map(_RELEASE.fullmatch, store.list("releases", ".json"))):
        try:
            found.append((match[1], load_release(store, match[1])))
        except ReleaseError:
            # Damaged, and so never served; the others are still told.
            continue
    return found


def _assignment_of(store: Store, snapshot: str) -> dict[str, str | None]:
    """example_id -> task_id; empty where no tasks were ever looked for in the snapshot."""
    if not store.exists(assignment_path(snapshot)):
        return {}
    table = store.read_table(assignment_path(snapshot))
    return dict(zip(table["example_id"].to_pylist(), table["task_id"].to_pylist(), strict=True))
