"""Who may do what, and under which name it is stored: roles, API keys, and keyed pseudonyms.

Keys rest as salted SHA-256 hashes beside the store, never inside it. A fast hash is right here: a key is 256 random
bits, so nobody can guess one, unlike a password. Pseudonyms are keyed BLAKE2b (RFC 7693) with the kind of name in
the hashed text, so that a client and a session of equal spelling get unlike pseudonyms, and nobody without the key
can test a guess. Without a valid key there is no identity: what the caller does then is deny.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import pathlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from cluster.errors import ConfigError
from cluster.records import Record
from cluster.secret_files import check_private, create_once, replace_whole

PSEUDONYM_KEY_ENV = "UNDERSTUDY_PSEUDONYM_KEY"
API_KEY_ENV = "UNDERSTUDY_API_KEY"
KEYS_FILE = "api_keys.json"
"""Below `keys_folder`."""

Role = Literal["agent", "viewer", "curator", "admin"]
Deed = Literal["call_models", "give_feedback", "read_metadata", "read_content", "administer"]

ROLES: dict[Role, frozenset[Deed]] = {
    "agent": frozenset({"call_models", "give_feedback"}),
    "viewer": frozenset({"read_metadata"}),
    "curator": frozenset({"give_feedback", "read_metadata", "read_content"}),
    "admin": frozenset(get_args(Deed)),
}
"""What each role may do; everything else is denied. `administer` is keys, forgetting a client, and what is served."""

_KEY_PREFIX = "us-"
_NUM_ID_CHARS = 12
_MAX_KEY_CHARS = 256
_CLIENT = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


def may(role: Role, deed: Deed) -> bool:
    """Whether a role allows a deed."""
    return deed in ROLES[role]


class Identity(Record):
    """A key's holder; never the key."""

    key_id: str
    client: str
    role: Role
    rate_per_minute: int | None = None
    """Requests a minute at each gateway replica; None is no limit."""
    created_ts: float | None = None
    """Seconds since the epoch; None for keys made before this was kept."""
    expires_ts: float | None = None
    """When the key ends to be valid, in seconds since the epoch; None is never."""


class Pseudonyms:
    """Stable stand-ins for names, equal only for equal kind, name and key."""

    def __init__(self, key: bytes) -> None:
        """Take 32 to 64 secret bytes."""
        assert 32 <= len(key) <= 64, f"pseudonym key has {len(key)} bytes"
        self._key = key

    def of(self, kind: str, value: str) -> str:
        """Stand-in for `value`: 20 hexadecimal characters."""
        text = f"{len(kind)}:{kind}:{value}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, key=self._key, digest_size=10).hexdigest()

    def session_of(self, client: str, session: str) -> str:
        """Stand-in for a conversation: two clients that count theirs from "1" have no conversation in common."""
        return self.of("session", json.dumps([client, session]))


class ApiKeys:
    """API keys in one JSON file: who holds which role. Safe for many writers and readers on one machine."""

    def __init__(self, path: pathlib.Path, clock: Callable[[], float] = time.time) -> None:
        """Use the file at `path`; it need not exist, and then no key is valid."""
        self._path, self._clock = path, clock
        self._stamp: tuple[int, int] | None = None
        self._entries: dict[str, dict[str, Any]] = {}

    def create(
        self, client: str, role: Role, *, rate_per_minute: int | None = None, expires_ts: float | None = None
    ) -> str:
        """Add a key for `client` and return it: the only time it is shown.

        Raises:
            ConfigError: no such role, an unusable client name, a rate below 1, or an end in the past.
        """
        if role not in get_args(Role):
            raise ConfigError(f"role={role!r}: unknown; allowed: {', '.join(get_args(Role))}")
        if not _CLIENT.fullmatch(client):
            raise ConfigError(
                f"client={client!r}: a key needs the name of its holder; allowed: 1 to 200 characters, none a control "
                "character; give a name such as billing-agent"
            )
        if rate_per_minute is not None and rate_per_minute < 1:
            raise ConfigError(f"rate_per_minute={rate_per_minute}: allowed: at least 1, or none for no limit")
        if expires_ts is not None and not expires_ts > self._clock():
            raise ConfigError(
                f"expires_ts={expires_ts}: is past; allowed: a time to come, or none for a key without end"
            )
        key_id, salt = secrets.token_hex(_NUM_ID_CHARS // 2), secrets.token_hex(16)
        key = f"{_KEY_PREFIX}{key_id}{secrets.token_hex(32)}"
        entry = {"client": client, "role": role, "salt": salt, "sha256": _salted(salt, key)}
        facts = {"rate_per_minute": rate_per_minute, "created_ts": self._clock(), "expires_ts": expires_ts}
        with self._changing() as entries:
            entries[key_id] = {**entry, **facts}
        return key

    def revoke(self, name: str) -> int:
        """Remove all keys of a client, or the one of a key id; readers notice at their next `verify`.

        Returns:
            How many there were.
        """
        with self._changing() as entries:
            gone = [key_id for key_id, entry in entries.items() if name in (key_id, entry["client"])]
            for key_id in gone:
                del entries[key_id]
        return len(gone)

    def holders(self) -> list[Identity]:
        """Who holds a key, one entry for each key, by name."""
        found = [_identity(key_id, entry) for key_id, entry in self._read().items()]
        return sorted(found, key=lambda one: (one.client, one.role, one.created_ts or 0.0, one.key_id))

    def verify(self, key: str) -> Identity | None:
        """The holder of `key`, or None. Takes as long for a wrong secret as for a right one.

        Raises:
            ConfigError: the key file is damaged or cannot be read.
        """
        if len(key) > _MAX_KEY_CHARS or not key.startswith(_KEY_PREFIX):
            return None
        begin = len(_KEY_PREFIX)
        key_id = key[begin : begin + _NUM_ID_CHARS]
        entry = self._read().get(key_id)
        expected = entry["sha256"] if entry else "0" * 64
        is_valid = hmac.compare_digest(_salted(entry["salt"] if entry else "", key), expected)
        if not entry or not is_valid:
            return None
        expires_ts = entry.get("expires_ts")
        return _identity(key_id, entry) if expires_ts is None or self._clock() < expires_ts else None

    def _read(self) -> dict[str, dict[str, Any]]:
        """Entries by key id, read again only when the file has changed."""
        try:
            facts = self._path.stat()
            stamp = (facts.st_mtime_ns, facts.st_ino)
            if stamp != self._stamp:
                self._entries = dict(json.loads(self._path.read_text())["keys"])
                self._stamp = stamp
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._path}: not a key file; restore it, or remove it and create keys again") from None
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read ({error.strerror}); give this user the right to") from None
        return self._entries

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The entries, to be changed by this process alone; written back at the end."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            entries = dict(self._read())
            yield entries
            replace_whole(self._path, (json.dumps({"keys": entries}, indent=1, sort_keys=True) + "\n").encode())
        finally:
            os.close(folder)


def require_role(store_uri: str, role_needed: Role) -> Role:
    """The role that the person at this terminal has in the store, if it may do all that `role_needed` may.

    With UNDERSTUDY_API_KEY set, that key's role decides. Without it, who holds the store's keys (can read the key folder
    beside a local store or would create it; has the pseudonym key of a remote one) acts as admin, and everybody else as
    viewer. A guard against mistakes, not against who holds the keys: those open the content without this program too.

    Raises:
        ConfigError: the role may not, or UNDERSTUDY_API_KEY is no valid key of the store.
    """
    role = _role_here(store_uri)
    if ROLES[role_needed] <= ROLES[role]:
        return role
    able = [name for name, deeds in ROLES.items() if ROLES[role_needed] <= deeds]
    raise ConfigError(
        f"role={role}: this needs role {role_needed}; allowed: {', '.join(able)}; next: ask the owner of the store for a "
        f"key (understudy keys create --role {role_needed} --client NAME store={store_uri}) and export {API_KEY_ENV}=us-..."
    )


def _role_here(store_uri: str) -> Role:
    folder, key = keys_folder(store_uri), os.environ.get(API_KEY_ENV)
    if folder is None:
        if key:
            raise ConfigError(
                f"{API_KEY_ENV}: store={store_uri!r} is remote and has no keys beside it; unset {API_KEY_ENV}"
            )
        return "admin" if os.environ.get(PSEUDONYM_KEY_ENV) else "viewer"
    place = next(one for one in (folder, *folder.parents) if os.path.exists(one))
    # A folder that is not there yet holds no secret: who may create it will own it.
    is_holder = os.access(place, os.R_OK | os.X_OK if place == folder else os.W_OK | os.X_OK)
    if not key:
        return "admin" if is_holder else "viewer"
    if not is_holder:
        # Nobody else can tell what the key is good for; what a viewer may see needs no key.
        return "viewer"
    identity = ApiKeys(folder / KEYS_FILE).verify(key)
    if identity is None:
        raise ConfigError(
            f"{API_KEY_ENV}: is no valid key of store={store_uri!r}; allowed: a key of `understudy keys create` that is "
            f"neither revoked nor expired; next: unset {API_KEY_ENV}, or understudy keys list store={store_uri}"
        )
    return identity.role


def load_pseudonym_key(store_uri: str) -> bytes:
    """The secret behind all pseudonyms of a store.

    Taken from the environment (UNDERSTUDY_PSEUDONYM_KEY, hexadecimal), else from `<store>.keys/pseudonym.key` beside
    a local store, created there with mode 0600 if absent.

    Raises:
        ConfigError: a remote store without the variable, a key that is no key, or a key file others can read.
    """
    text = os.environ.get(PSEUDONYM_KEY_ENV)
    if text is not None:
        return _parse_key(text, PSEUDONYM_KEY_ENV)
    folder = keys_folder(store_uri)
    if folder is None:
        raise ConfigError(
            f"store={store_uri!r}: a remote store needs its pseudonym key in the environment; "
            f"set {PSEUDONYM_KEY_ENV} to the output of `openssl rand -hex 32`"
        )
    path = folder / "pseudonym.key"
    if not path.exists():
        create_once(path, secrets.token_hex(32).encode())
    check_private(path)
    return _parse_key(path.read_text(), str(path))


def keys_folder(store_uri: str) -> pathlib.Path | None:
    """`<store>.keys` beside a local store; None for a remote one."""
    local = store_uri.removeprefix("file://")
    if "://" in local:
        return None
    root = pathlib.Path(local).expanduser().resolve()
    return root.with_name(root.name + ".keys")


def _parse_key(text: str, where: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if not 32 <= len(key) <= 64:
        raise ConfigError(
            f"{where}: not a key; allowed: 64 to 128 hexadecimal digits, as `openssl rand -hex 32` prints"
        )
    return key


def _identity(key_id: str, entry: dict[str, Any]) -> Identity:
    facts = {name: entry.get(name) for name in ("rate_per_minute", "created_ts", "expires_ts")}
    return Identity(key_id=key_id, client=entry["client"], role=entry["role"], **facts)


def _salted(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}{key}".encode(errors="surrogatepass")).hexdigest()
