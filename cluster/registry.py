"""Releases: what may be served, and which one is.

A release is immutable and named by the hash of its content, the time of its making left out (releases/SHA.json): the
same conversion run twice is one release. CURRENT, one small object replaced whole, names the one that is served and the
ones before it. Every write of it is an event with its cause (cluster/events.py). Writers wait for each other where the
store is a folder; an object store has no lock or compare-and-swap that works everywhere, so there a writer that says what
it expects to find compares, writes and looks again, which leaves open the moment between. Knows nothing of Ray or of who serves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cluster.errors import ReleaseError, StoreError
from cluster.events import Cause, write_event
from cluster.records import Release, Rollout
from cluster.store import Store, content_hash

CURRENT = "CURRENT"
FROZEN = "FROZEN"
"""While it exists, nothing but a person writes CURRENT."""
_RELEASE = re.compile(r"releases/([0-9a-f]{64})\.json")


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


def promote(store: Store, sha: str, *, expected: str | None = None, cause: Cause = Cause()) -> None:  # noqa: B008 (frozen)
    """Make a release the served one. Promoting the served one again changes nothing.

    Args:
        expected: name of the release that must be the served one until now; None takes any.

    Raises:
        ReleaseError: no such release, one that names an unpublished artifact or a refused specialist, or another one is
            served than `expected`, or the store is frozen and the cause no person.
    """
    check_release(store, sha, load_release(store, sha))
    with store.exclusive(CURRENT):
        pointer = _pointer(store)
        before = None if pointer is None else pointer["release"]
        if expected is not None and before != expected:
            raise ReleaseError(f"release {sha}: {CURRENT} is {before}, not {expected}; look at it and decide again")
        if cause.by != "person" and is_frozen(store):
            raise ReleaseError(f"release {sha}: the store is frozen; next: understudy release unfreeze")
        if before != sha:
            history = [] if pointer is None or before is None else [*pointer["history"], before]
            _point_to(store, sha, history, before, cause)
    if expected is not None and current_sha(store) != sha:
        raise ReleaseError(f"release {sha}: another writer replaced it at once; look at {CURRENT} and decide again")


def promote_at(store: Store, sha: str, rollout: Rollout | None, *, expected: str | None = None) -> str:
    """Serve a release whose new specialists, those that the served one has not, begin at a stage; None is live.

    A specialist that is served already keeps the stage that it has reached. Without anything new the release itself is
    served, under its own name.

    Args:
        expected: as in `promote`.

    Returns:
        Name of the release that is served.

    Raises:
        ReleaseError: it cannot be served, or another one is served than `expected`.
    """
    release, served = load_release(store, sha), current(store)
    before = served[1] if served else None
    stages: dict[str, Rollout | None] = {}
    for task, one in release.specialists.items():
        is_served = before is not None and before.specialists.get(task) == one
        stages[task] = before.rollout.get(task) if before is not None and is_served and rollout else rollout
    kept = {task: stage for task, stage in stages.items() if stage is not None}
    if kept != release.rollout:
        sha = publish_release(store, derive(sha, release, rollout=stages))
    # Stages were copied from the release that was served: where another one is by now, they are another one's.
    promote(store, sha, expected=expected or (served[0] if served else None))
    return sha


def roll_back(store: Store, *, expected: str | None = None) -> str:
    """Serve the release that was served before, and return its name.

    Args:
        expected: name of the release that must be the served one until now, so that a word said twice goes back once;
            None takes any.

    Raises:
        ReleaseError: there is no earlier release, or it can no longer be served, or another one is served than `expected`.
    """
    with store.exclusive(CURRENT):
        pointer = _pointer(store)
        if pointer is None or not pointer["history"]:
            raise ReleaseError(f"no earlier release in store {store.uri}; promote one by its name instead")
        if expected is not None and pointer["release"] != expected:
            raise ReleaseError(f"{CURRENT} is {pointer['release']}, not {expected}; look at it and decide again")
        *history, sha = pointer["history"]
        check_release(store, sha, load_release(store, sha))
        _point_to(store, sha, history, pointer["release"], Cause(kind="roll_back"))
    return sha


def derive(
    sha: str,
    release: Release,
    *,
    refuse: Mapping[str, str] = {},  # noqa: B006 (never written)
    rollout: Mapping[str, Rollout | None] = {},  # noqa: B006 (never written)
) -> Release:
    """The release named `sha` with some tasks refused, or at another stage; publishes nothing.

    Args:
        refuse: task_id -> reason.
        rollout: task_id -> its stage from now on; None is live.
    """
    stages = {**release.rollout, **rollout}
    changed = {
        "specialists": {task: one for task, one in release.specialists.items() if task not in refuse},
        "refused": {**release.refused, **refuse},
        "rollout": {task: stage for task, stage in stages.items() if stage is not None and task not in refuse},
        "previous": sha,
        "created_ts": time.time(),
    }
    return release.model_copy(update=changed)


def freeze(store: Store, reason: str) -> None:
    """Keep everything but a person from writing CURRENT, until `unfreeze`. Repeating it changes nothing."""
    with store.exclusive(CURRENT):
        if not is_frozen(store):
            served = current_sha(store)
            write_event(store, Cause(kind="freeze", evidence={"reason": reason}), release=served, before=served)
            store.write_json(FROZEN, {"reason": reason, "ts": time.time()})


def unfreeze(store: Store) -> None:
    """Let the steward write CURRENT again. Repeating it changes nothing."""
    with store.exclusive(CURRENT):
        if is_frozen(store):
            served = current_sha(store)
            write_event(store, Cause(kind="unfreeze"), release=served, before=served)
            store.delete(FROZEN)


def is_frozen(store: Store) -> bool:
    """Whether only a person may write CURRENT."""
    return store.exists(FROZEN)


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


def previous_sha(store: Store) -> str | None:
    """Name of the release that `roll_back` would serve, or None where there is none."""
    pointer = _pointer(store)
    return pointer["history"][-1] if pointer and pointer["history"] else None


def release_names(store: Store) -> list[str]:
    """Names of all published releases, in no order of time."""
    return [match[1] for match in map(_RELEASE.fullmatch, store.list("releases", ".json")) if match]


def check_release(store: Store, sha: str, release: Release) -> None:
    """See that a release may be served.

    Raises:
        ReleaseError: a gate is refused, a task has a stage and no specialist, or an artifact is not published.
    """
    needed = {release.route_model: "route model"}
    for task_id, specialist in release.specialists.items():
        if specialist.task_id != task_id:
            raise ReleaseError(f"release {sha}: task {task_id} maps to a specialist of task {specialist.task_id}")
        if not specialist.gate.is_open:
            raise ReleaseError(f"release {sha}: {specialist.name} has a refused gate ({specialist.gate.refused})")
        needed |= {specialist.adapter: f"adapter of {task_id}", specialist.base: f"base model of {task_id}"}
        needed |= {specialist.merged: f"merged model of {task_id}"} if specialist.merged else {}
    if idle := sorted(release.rollout.keys() - release.specialists.keys()):
        raise ReleaseError(f"release {sha}: task {idle[0]} has a stage and no specialist; publish it without")
    missing = [f"{what} {path}" for path, what in needed.items() if not store.is_published(path)]
    if missing:
        raise ReleaseError(
            f"release {sha}: not published in store {store.uri}: {'; '.join(missing)}; publish them, then promote again"
        )


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


def _point_to(store: Store, sha: str, history: list[str], before: str | None, cause: Cause) -> None:
    write_event(store, cause, release=sha, before=before)
    store.write_json(CURRENT, {"release": sha, "history": history})
