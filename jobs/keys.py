"""API keys of one store: `understudy keys create NAME role=agent`, `keys list`, `keys revoke NAME`.

They rest as salted hashes in <store>.keys/ beside a local store; a key is shown once, when it is made. A running
gateway notices new and revoked keys at its next call.
"""

from __future__ import annotations

from cluster.access import ApiKeys, keys_folder
from cluster.errors import ConfigError
from jobs.recipe import load_recipe
from serving.app import KEYS_FILE

DEFAULT_ROLE = "agent"


def create_key(name: str, words: list[str]) -> str:
    """Make a key for `name`; `words` may hold role=ROLE beside the recipe's.

    Raises:
        ConfigError: unknown role, or a remote store, which has no key file.
    """
    roles = [word.removeprefix("role=") for word in words if word.startswith("role=")]
    others = [word for word in words if not word.startswith("role=")]
    return _keys(others).create(name, [DEFAULT_ROLE, *roles][-1])  # type: ignore[arg-type]


def list_keys(words: list[str]) -> list[str]:
    """One line for each key: whose it is and its role; never the key."""
    return [f"{holder.client}\t{holder.role}" for holder in _keys(words).holders()]


def revoke_keys(name: str, words: list[str]) -> int:
    """Remove all keys of `name`; returns how many there were.

    Raises:
        ConfigError: there was none.
    """
    keys = _keys(words)
    count = keys.revoke(name)
    if not count:
        known = ", ".join(sorted({holder.client for holder in keys.holders()})) or "none"
        raise ConfigError(f"NAME={name!r}: holds no key; allowed: {known}; next: understudy keys list")
    return count


def _keys(words: list[str]) -> ApiKeys:
    store = load_recipe(words).store
    folder = keys_folder(store)
    if folder is None:
        raise ConfigError(
            f"store={store!r}: a remote store has no key file; allowed with it: gateway.auth=open, behind a proxy "
            "that authenticates"
        )
    return ApiKeys(folder / KEYS_FILE)
