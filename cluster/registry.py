"""Releases: what may be served, and which one is.

A release is immutable and named by the hash of its content, the time of its making left out (releases/SHA.json): the
same conversion run twice is one release. CURRENT, one small object replaced
whole, names the one that is served and the ones before it. One writer of CURRENT at a time: an object store has
no compare-and-swap that works everywhere. Knows nothing of Ray or of who serves.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from cluster.errors import ReleaseError, StoreError
from cluster.records import Release
from cluster.store import Store, content_hash

CURRENT = "CURRENT"


def publish_release(store: Store, release: Release) -> str:
    """Write the release under its content hash and return that hash. Serves nothing yet; repeating it changes nothing."""
    value = release.model_dump(mode="json")
    sha = _name_of(value)
    if not store.exists(_path(sha)):
        store.write_json(_path(sha), value)
    return sha


def load_release(store: Store, sha: str) -> Release:
    """Read one release.

    Raises:
        ReleaseError: there is none of that name, or its content is not what its name says.
    """
    try:
        value = store.read_json(_path(sha))
        release = Release.model_validate(value)
    except (StoreError, ValidationError, ValueError) as error:
        kind = "not in the store" if isinstance(error, StoreError) else "not readable as a release"
        raise ReleaseError(f"release {sha}: {kind} {store.uri}; publish it, or promote another one") from None
    if _name_of(value) != sha:
        raise ReleaseError(f"release {sha}: its content has been altered; publish it again")
    return release


def promote(store: Store, sha: str) -> None:
    """Make a release the served one. Promoting the served one again changes nothing.

    Raises:
        ReleaseError: no such release, or one that names an unpublished artifact or a refused specialist.
    """
    _check(store, sha, load_release(store, sha))
    pointer = _pointer(store)
    if pointer is None:
        _point_to(store, sha, [])
    elif pointer["release"] != sha:
        _point_to(store, sha, [*pointer["history"], pointer["release"]])


def roll_back(store: Store) -> str:
    """Serve the release that was served before, and return its name.

    Raises:
        ReleaseError: there is no earlier release, or it can no longer be served.
    """
    pointer = _pointer(store)
    if pointer is None or not pointer["history"]:
        raise ReleaseError(f"no earlier release in store {store.uri}; promote one by its name instead")
    *history, sha = pointer["history"]
    _check(store, sha, load_release(store, sha))
    _point_to(store, sha, history)
    return sha


def current(store: Store) -> tuple[str, Release] | None:
    """The served release with its name, or None where nothing was ever promoted.

    Raises:
        ReleaseError: CURRENT names a release that cannot be read.
    """
    sha = current_sha(store)
    return None if sha is None else (sha, load_release(store, sha))


def current_sha(store: Store) -> str | None:
    """Name of the served release, without reading it: cheap enough to ask every second."""
    pointer = _pointer(store)
    return None if pointer is None else pointer["release"]


def _name_of(value: dict[str, Any]) -> str:
    return content_hash({key: inner for key, inner in value.items() if key != "created_ts"})


def _path(sha: str) -> str:
    return f"releases/{sha}.json"


def _pointer(store: Store) -> dict[str, Any] | None:
    """CURRENT as a dict; None where absent.

    Raises:
        ReleaseError: CURRENT is not what this module wrote.
    """
    if not store.exists(CURRENT):
        return None
    try:
        pointer = store.read_json(CURRENT)
        return {"release": str(pointer["release"]), "history": [str(sha) for sha in pointer["history"]]}
    except (ValueError, KeyError, TypeError):
        raise ReleaseError(
            f"{CURRENT} in store {store.uri} is damaged; write it again by promoting a release"
        ) from None


def _point_to(store: Store, sha: str, history: list[str]) -> None:
    store.write_json(CURRENT, {"release": sha, "history": history})


def _check(store: Store, sha: str, release: Release) -> None:
    needed = {release.route_model: "route model"}
    for task_id, specialist in release.specialists.items():
        if specialist.task_id != task_id:
            raise ReleaseError(f"release {sha}: task {task_id} maps to a specialist of task {specialist.task_id}")
        if not specialist.gate.is_open:
            raise ReleaseError(f"release {sha}: {specialist.name} has a refused gate ({specialist.gate.refused})")
        needed |= {specialist.adapter: f"adapter of {task_id}", specialist.base: f"base model of {task_id}"}
    missing = [f"{what} {path}" for path, what in needed.items() if not store.is_published(path)]
    if missing:
        raise ReleaseError(
            f"release {sha}: not published in store {store.uri}: {'; '.join(missing)}; publish them, then promote again"
        )
