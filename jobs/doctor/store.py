"""The store: whether it can be reached, read and written, and whether what it serves is whole.

Writes nothing unless it is told to; then one hidden file, which it removes again. Of artifacts it looks at names, not
at content: `promote` and serving check hashes where they read.
"""

from __future__ import annotations

import os
import pathlib
import secrets
from collections.abc import Iterator

from cluster import registry
from cluster.errors import ConfigError, ReleaseError, StoreError
from cluster.store import MANIFEST, Store
from jobs.doctor.check import Check, Reporter
from jobs.recipe import Recipe

_MAX_NAMED = 3
_PUBLISHED = ("adapters", "bases", "merged", "route_model")
_say = Reporter("store")


def check_store(recipe: Recipe, *, may_write: bool) -> Iterator[Check]:
    """Look at the recipe's store.

    Args:
        may_write: try to write, read back and remove one small file.
    """
    is_local = "://" not in recipe.store
    if is_local and not pathlib.Path(recipe.store).exists():
        yield _place_of_new(pathlib.Path(recipe.store))
        return
    try:
        store = Store(recipe.store, is_made=False)
        names = set(store.list(""))
    except ConfigError as error:
        yield _say.told("read", error, "store=/PATH, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
        return
    except OSError as error:
        advice = "check the address, the network and the credentials in the environment (AWS_..., GOOGLE_...)"
        yield _say.failed(
            "read", f"{recipe.store}: {error}", "give this user the right to read it" if is_local else advice
        )
        return
    yield _say.ok("read", f"{recipe.store}: {len(names)} files")
    yield _try_to_write(store) if may_write else _may_write(recipe.store, is_local)
    yield _served(store)
    yield _manifests(store, names)


def _place_of_new(folder: pathlib.Path) -> Check:
    above = next(one for one in folder.parents if one.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        return _say.failed(
            "place", f"{above} cannot be written to", f"give this user the right to make {folder}, or store=..."
        )
    return _say.ok("place", f"{folder} is not there yet; the first verb that writes makes it")


def _may_write(uri: str, is_local: bool) -> Check:
    if not is_local:
        return _say.ok("write", "not tried; `understudy doctor --write` writes and removes one small file")
    if not os.access(uri, os.W_OK | os.X_OK):
        return _say.warning("write", f"this user may not write to {uri}", "give it the right to, or only read with it")
    return _say.ok("write", "allowed by the folder's rights; --write tries it")


def _try_to_write(store: Store) -> Check:
    path, said = f".doctor-{secrets.token_hex(8)}", secrets.token_bytes(32)
    try:
        store.write_bytes(path, said)
        back = store.read_bytes(path)
        store.delete(path)
    except OSError as error:
        return _say.failed("write", str(error), f"give this user the right to write to {store.uri}, or make room")
    if back != said:
        return _say.failed(
            "write", "what was written is not what was read back", "look at the disk or the bucket's rules"
        )
    return _say.ok("write", "a small file was written, read back and removed")


def _served(store: Store) -> Check:
    list_releases = f"understudy release list store={store.uri}"
    try:
        found = registry.current(store)
        if found is None:
            return _say.ok("served release", "none: the LLM answers every call")
        registry.check_release(store, *found)
    except ReleaseError as error:
        return _say.failed("served release", str(error), f"understudy rollback store={store.uri}, or {list_releases}")
    except (StoreError, OSError, ValueError) as error:
        return _say.failed("served release", f"{registry.CURRENT} cannot be read: {error}", list_releases)
    sha, release = found
    frozen = "; frozen" if registry.is_frozen(store) else ""
    return _say.ok("served release", f"{sha[:12]}, {len(release.specialists)} specialists, all published{frozen}")


def _manifests(store: Store, names: set[str]) -> Check:
    """Files that manifests name and that are not there."""
    found = sorted(one for one in names if one.endswith(f"/{MANIFEST}") and one.startswith(_PUBLISHED))
    broken = []
    for path in found:
        folder = path.removesuffix(f"/{MANIFEST}")
        try:
            files = dict(store.read_json(path)["files"])
        except (OSError, ValueError, KeyError, TypeError):
            broken.append(f"{path} is damaged")
            continue
        broken += [f"{folder}/{name} is missing" for name in files if f"{folder}/{name}" not in names]
    if broken:
        rest = f" and {len(broken) - _MAX_NAMED} more" if len(broken) > _MAX_NAMED else ""
        advice = "restore the store from its copy, or convert again: what is published is not trained again"
        return _say.failed("manifests", ", ".join(broken[:_MAX_NAMED]) + rest, advice)
    return _say.ok("manifests", f"{len(found)} artifacts, all of their files there")
