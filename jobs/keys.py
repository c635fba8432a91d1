"""API keys of one store: `understudy keys create --role ROLE --client NAME`, `keys list`, `keys revoke NAME|KEY_ID`.

They rest as salted hashes in <store>.keys/ beside a local store; a key is shown once, when it is made. A running
gateway notices new and revoked keys at its next call. Only who holds the store's keys, or an admin's key, may do this.
"""

from __future__ import annotations

import datetime
import time

from cluster.access import KEYS_FILE, ApiKeys, Identity, Role, keys_folder, require_role
from cluster.errors import ConfigError
from jobs.recipe import load_recipe

DEFAULT_ROLE: Role = "agent"
_DAY_S = 86_400


def create_key(
    client: str | None,
    words: list[str],
    *,
    role: str | None = None,
    rate_per_minute: int | None = None,
    days: int | None = None,
) -> str:
    """Make a key; `words` may hold NAME and role=ROLE in the place of `client` and `role`, beside the recipe's.

    Args:
        days: how long it is valid; None is for ever.

    Raises:
        ConfigError: no client or two, unknown role, a rate or a time that is none, or a remote store, which has no key
            file.
    """
    names = [word for word in words if "=" not in word] + ([client] if client else [])
    if len(names) != 1:
        raise ConfigError(
            f"client={', '.join(names) or None}: a key has one holder; "
            "next: understudy keys create --role agent --client NAME"
        )
    roles = [word.removeprefix("role=") for word in words if word.startswith("role=")] + ([role] if role else [])
    if days is not None and days < 1:
        raise ConfigError(f"--days {days}: allowed: at least 1, or left out for a key without end")
    others = [word for word in words if "=" in word and not word.startswith("role=")]
    expires_ts = None if days is None else time.time() + days * _DAY_S
    return _keys(others).create(
        names[0],
        [DEFAULT_ROLE, *roles][-1],  # type: ignore[arg-type]
        rate_per_minute=rate_per_minute,
        expires_ts=expires_ts,
    )


def read_holders(words: list[str]) -> list[Identity]:
    """Who holds which key; never the key."""
    return _keys(words).holders()


def list_keys(words: list[str]) -> list[str]:
    """One line for each key: its id, whose it is, role, rate and end; never the key."""
    return ["\t".join(("key", "client", "role", "per minute", "until"))] + [
        "\t".join((one.key_id, one.client, one.role, str(one.rate_per_minute or "-"), _date(one.expires_ts)))
        for one in read_holders(words)
    ]


def revoke_keys(name: str, words: list[str]) -> int:
    """Remove all keys of client `name`, or the key of id `name`; returns how many there were.

    Raises:
        ConfigError: there was none.
    """
    keys = _keys(words)
    count = keys.revoke(name)
    if not count:
        known = ", ".join(sorted({holder.client for holder in keys.holders()})) or "none"
        raise ConfigError(
            f"NAME={name!r}: holds no key and is the id of none; allowed: {known}; next: understudy keys list"
        )
    return count


def _keys(words: list[str]) -> ApiKeys:
    store = load_recipe(words).store
    folder = keys_folder(store)
    if folder is None:
        raise ConfigError(
            f"store={store!r}: a remote store has no key file; allowed with it: gateway.auth=open, behind a proxy "
            "that authenticates"
        )
    require_role(store, "admin")
    return ApiKeys(folder / KEYS_FILE)


def _date(ts: float | None) -> str:
    return "-" if ts is None else datetime.datetime.fromtimestamp(ts, datetime.UTC).strftime("%Y-%m-%dT%H:%MZ")
