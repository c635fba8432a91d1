"""Keys: who may call, what names are hidden with, and what content is encrypted with. Shows none and makes none."""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Iterator

from cluster.access import (
    API_KEY_ENV,
    KEYS_FILE,
    PSEUDONYM_KEY_ENV,
    ApiKeys,
    keys_folder,
    load_pseudonym_key,
    require_role,
)
from cluster.errors import ConfigError, KeyAccessError, StoreError
from cluster.kms import KmsConfig, find_kms, open_kms
from cluster.secret_files import check_private
from cluster.store import KEY_MATERIAL, Store
from jobs.doctor.check import Check, Reporter
from jobs.recipe import Recipe

_say = Reporter("keys")


def check_keys(recipe: Recipe) -> Iterator[Check]:
    """Look at the secrets beside the store, or those that the environment names."""
    folder = keys_folder(recipe.store)
    if folder is not None and folder.exists():
        yield _folder(folder)
    yield _api_keys(recipe, folder)
    if os.environ.get(API_KEY_ENV):
        yield _own_key(recipe)
    yield _pseudonym_key(recipe, folder)
    yield _content_key(recipe, folder)


def _folder(folder: pathlib.Path) -> Check:
    if not os.access(folder, os.R_OK | os.X_OK):
        return _say.warning(
            "folder", f"{folder}: not this user's to read", "ask its owner: without it a person is a viewer"
        )
    mode = folder.stat().st_mode & 0o777
    if mode & 0o077:
        return _say.failed("folder", f"{folder} has mode {mode:o}", f"chmod 700 {folder}")
    return _say.ok("folder", f"{folder}, mode {mode:o}")


def _api_keys(recipe: Recipe, folder: pathlib.Path | None) -> Check:
    if recipe.gateway.auth == "open":
        return _say.warning("API keys", "gateway.auth=open: whoever reaches the port is served", "gateway.auth=keys")
    if folder is None:
        advice = "gateway.auth=open behind a proxy that authenticates, or a local store"
        return _say.failed("API keys", "gateway.auth=keys, and a remote store has no key file", advice)
    path = folder / KEYS_FILE
    advice = f"understudy keys create --role agent --client NAME store={recipe.store}"
    try:
        if not path.exists():
            return _say.warning("API keys", "there are none; nobody can call", advice)
        check_private(path)
        roles = collections.Counter(one.role for one in ApiKeys(path).holders())
    except ConfigError as error:
        return _say.told("API keys", error, f"chmod 600 {path}")
    except PermissionError:
        return _say.warning("API keys", f"{path}: not this user's to read", "ask the owner of the store")
    if not roles:
        return _say.warning("API keys", "all are revoked; nobody can call", advice)
    return _say.ok("API keys", ", ".join(f"{count} {role}" for role, count in sorted(roles.items())))


def _own_key(recipe: Recipe) -> Check:
    try:
        return _say.ok(API_KEY_ENV, f"makes this person {require_role(recipe.store, 'viewer')}")
    except ConfigError as error:
        return _say.told(API_KEY_ENV, error, f"unset {API_KEY_ENV}")


def _pseudonym_key(recipe: Recipe, folder: pathlib.Path | None) -> Check:
    is_given = PSEUDONYM_KEY_ENV in os.environ
    path = folder and folder / "pseudonym.key"
    # Loading makes a local one that is absent.
    if not is_given and path is not None and not path.exists():
        return _say.ok("pseudonym key", "made by the first verb that needs it")
    try:
        load_pseudonym_key(recipe.store)
    except ConfigError as error:
        return _say.told("pseudonym key", error, f"chmod 600 {path}" if path else f"export {PSEUDONYM_KEY_ENV}=...")
    except PermissionError:
        return _say.warning("pseudonym key", f"{path}: not this user's to read", "ask the owner of the store")
    return _say.ok("pseudonym key", f"from {PSEUDONYM_KEY_ENV}" if is_given else f"{path}, mode 600")


def _content_key(recipe: Recipe, folder: pathlib.Path | None) -> Check:
    """Unwrap the key of one stored file: nothing else tells that the master key is this store's."""
    try:
        config = find_kms(recipe.store, folder)
        wrapped = _one_wrapped_key(recipe.store)
        if wrapped is None:
            return _untried(config)
        open_kms(config).unwrap(wrapped)
    except KeyAccessError as error:
        return _say.told("content key", error, "restore the key that belongs to this store")
    except (ConfigError, StoreError) as error:
        return _say.told("content key", error, "restore it, or name the KMS in UNDERSTUDY_KMS")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        advice = "see what is said of the store; a damaged _KEY_MATERIAL_FOR_ file is restored from the store's copy"
        return _say.failed("content key", f"no stored file's key can be read to try it: {type(error).__name__}", advice)
    return _say.ok("content key", f"opens what is stored ({config.kind}: {config.place})")


def _untried(config: KmsConfig) -> Check:
    """Nothing is encrypted yet."""
    path = pathlib.Path(config.place)
    if config.kind == "file" and not path.exists():
        return _say.ok("content key", "made with the first content that is stored")
    if config.kind == "file":
        check_private(path)
    # Wraps a key of zeros, which is kept nowhere.
    open_kms(config).wrap(bytes(32))
    return _say.ok("content key", f"works; nothing is encrypted yet ({config.kind}: {config.place})")


def _one_wrapped_key(uri: str) -> str | None:
    """The newest stored file's own key as it was wrapped; None where nothing is encrypted."""
    if "://" not in uri and not pathlib.Path(uri).is_dir():
        return None
    store = Store(uri, is_made=False)
    names = [path for path in store.list("", ".json") if path.rsplit("/", 1)[-1].startswith(KEY_MATERIAL)]
    for path in reversed(names):
        wrapped = [
            one["wrappedKEK"] for one in map(json.loads, store.read_json(path).values()) if one.get("wrappedKEK")
        ]
        if wrapped:
            return wrapped[-1]
    return None
