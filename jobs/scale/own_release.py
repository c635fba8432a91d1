"""A store's released specialists in a store of their own, with the calls that its agents have made, to be asked again.

An experiment asks a copy: what its gateway captures, and whatever its steward would decide, never reaches the user's
store. The copy holds content where the calls do, and goes with its folder. Calls go where the release's own route model
sends them; those of no specialist are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster import registry
from cluster.calls import iterate_calls
from cluster.errors import InputError, ReleaseError
from cluster.faces import FacesConfig, Facing
from cluster.records import Release
from cluster.route_model import RouteModel
from cluster.servable import unservable_reason
from cluster.store import MANIFEST, Store

MOST_PROMPTS = 64
"""Of each task, those found first."""
_MOST_CALLS = 50_000


class OwnRelease(NamedTuple):
    """What a store serves, and what it was asked."""

    sha: str
    release: Release
    prompts: Mapping[str, list[dict[str, Any]]]
    """Requests by task, of those tasks that have a specialist and were asked; the most asked one first."""


def read_own(store: Store, max_temperature: float) -> OwnRelease:
    """The served release and recorded requests that its specialists take.

    Args:
        max_temperature: the gateway's; a request above it goes to the LLM.

    Raises:
        ReleaseError: nothing is released.
        InputError: no recorded call is for one of its specialists.
    """
    found = registry.current(store)
    if found is None:
        raise ReleaseError(f"store {store.uri}: no release is served; next: understudy promote SHA store={store.uri}")
    sha, release = found
    routes = RouteModel.load(store, release.route_model)
    counts: dict[str, int] = {}
    prompts: dict[str, list[dict[str, Any]]] = {}
    for call in itertools.islice(iterate_calls(store), _MOST_CALLS):
        task = routes.task_of(call.request).task_id
        if task not in release.specialists or unservable_reason(
            call.request, max_temperature, Facing(FacesConfig(), None)
        ):
            continue
        counts[task] = counts.get(task, 0) + 1
        own = prompts.setdefault(task, [])
        if len(own) < MOST_PROMPTS:
            # In one piece: times to the first byte are not what is measured.
            own.append(
                {name: value for name, value in call.request.items() if name not in ("stream", "stream_options")}
            )
    if not prompts:
        raise InputError(
            f"store {store.uri}: none of its calls is for a specialist of release {sha[:12]}; next: leave store= out, and an "
            "untrained base is asked"
        )
    return OwnRelease(
        sha, release, {task: prompts[task] for task in sorted(prompts, key=lambda one: (-counts[one], one))}
    )


def copy_release(source: Store, own: OwnRelease, target: Store) -> None:
    """Publish the release with all that it names in `target` and serve it there, every specialist to all of its calls."""
    weights = {path for one in own.release.specialists.values() for path in (one.base, one.adapter, one.merged) if path}
    for path in sorted({own.release.route_model, *weights}):
        manifest, folder = source.manifest(path), source.fetch(path)
        for name in manifest["files"]:
            target.write_bytes(f"{path}/{name}", (folder / name).read_bytes())
        # As it was, so that it is the same artifact: gates hold for the base of one hash.
        target.write_json(f"{path}/{MANIFEST}", manifest)
    registry.promote(target, registry.publish_release(target, own.release.model_copy(update={"rollout": {}})))
