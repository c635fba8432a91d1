"""Who may call, and under which name it is stored: API keys with roles, and keyed pseudonyms.

Keys rest as salted SHA-256 hashes beside the store, never inside it. A fast hash is right here: a key is 256 random
bits, so nobody can guess one, unlike a password. Pseudonyms are keyed BLAKE2b (RFC 7693) with the kind of name in
the hashed text, so that a client and a session of equal spelling get unlike pseudonyms, and nobody without the key
can test a guess. Without a valid key there is no identity: what the caller does then is deny.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pathlib
import secrets
from typing import Literal, get_args

from cluster.errors import ConfigError
from cluster.records import Record
from cluster.secret_files import check_private, create_once, replace_whole

PSEUDONYM_KEY_ENV = "UNDERSTUDY_PSEUDONYM_KEY"

Role = Literal["agent", "viewer", "curator", "admin"]

_KEY_PREFIX = "us-"
_NUM_ID_CHARS = 12
_MAX_KEY_CHARS = 256


class Identity(Record):
    """Whom a valid API key belongs to."""

    client: str
    role: Role


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
    """API keys in one JSON file: who holds which role. Safe for one writer and many readers."""

    def __init__(self, path: pathlib.Path) -> None:
        """Use the file at `path`; it need not exist, and then no key is valid."""
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._entries: dict[str, dict[str, str]] = {}

    def create(self, client: str, role: Role) -> str:
        """Add a key for `client` and return it: the only time it is shown.

        Raises:
            ConfigError: no such role, or an empty client name.
        """
        if role not in get_args(Role):
            raise ConfigError(f"role={role!r}: unknown; allowed: {', '.join(get_args(Role))}")
        if not client:
            raise ConfigError("client='': a key needs the name of its holder; give a name such as billing-agent")
        key_id, salt = secrets.token_hex(_NUM_ID_CHARS // 2), secrets.token_hex(16)
        key = f"{_KEY_PREFIX}{key_id}{secrets.token_hex(32)}"
        entry = {"client": client, "role": role, "salt": salt, "sha256": _salted(salt, key)}
        self._save({**self._read(), key_id: entry})
        return key

    def revoke(self, client: str) -> int:
        """Remove all keys of `client`; readers notice at their next `verify`. Returns how many there were."""
        entries = self._read()
        kept = {key_id: entry for key_id, entry in entries.items() if entry["client"] != client}
        self._save(kept)
        return len(entries) - len(kept)

    def holders(self) -> list[Identity]:
        """Who holds a key, one entry for each key, by name."""
        entries = sorted(self._read().values(), key=lambda entry: (entry["client"], entry["role"]))
        return [Identity(client=entry["client"], role=entry["role"]) for entry in entries]

    def verify(self, key: str) -> Identity | None:
        """The holder of `key`, or None. Takes as long for a wrong secret as for a right one.

        Raises:
            ConfigError: the key file is damaged.
        """
        if len(key) > _MAX_KEY_CHARS or not key.startswith(_KEY_PREFIX):
            return None
        begin = len(_KEY_PREFIX)
        entry = self._read().get(key[begin : begin + _NUM_ID_CHARS])
        expected = entry["sha256"] if entry else "0" * 64
        is_valid = hmac.compare_digest(_salted(entry["salt"] if entry else "", key), expected)
        return Identity(client=entry["client"], role=entry["role"]) if entry and is_valid else None

    def _read(self) -> dict[str, dict[str, str]]:
        """Entries by key id, read again only when the file has changed."""
        try:
            facts = self._path.stat()
        except FileNotFoundError:
            return {}
        stamp = (facts.st_mtime_ns, facts.st_ino)
        if stamp != self._stamp:
            try:
                self._entries = dict(json.loads(self._path.read_text())["keys"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{self._path}: not a key file; restore it, or remove it and create keys again"
                ) from None
            self._stamp = stamp
        return self._entries

    def _save(self, entries: dict[str, dict[str, str]]) -> None:
        replace_whole(self._path, (json.dumps({"keys": entries}, indent=1, sort_keys=True) + "\n").encode())


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


def _salted(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}{key}".encode(errors="surrogatepass")).hexdigest()
