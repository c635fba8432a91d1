"""Key management: who wraps the keys that content is encrypted with, a local key file or a Vault server.

A KMS never sees content. It wraps short random keys, and each wrapped key names the version of the master key that
wrapped it, so that a master key is rotated by wrapping again and no file of content is rewritten. Which KMS a store
uses stands in the environment (UNDERSTUDY_KMS), because it belongs to a deployment as its other secrets do; without it
a local store has its key file beside it. A config holds no secret and pickles; a client is built in every process.
Sources: HashiCorp Vault, transit secrets engine HTTP API; NIST SP 800-38D (AES-GCM).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import pathlib
import re
import secrets
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Literal, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.errors import ConfigError, KeyAccessError
from cluster.records import Record
from cluster.secret_files import check_private, create_once, replace_whole

KMS_ENV = "UNDERSTUDY_KMS"
CONTENT_KEY_FILE = "content.keys"
"""Below `cluster.access.keys_folder`."""
_ALLOWED = f"allowed in {KMS_ENV}: file:/PATH/content.keys, or vault:KEY_NAME with VAULT_ADDR and VAULT_TOKEN set"
_VAULT_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_VERSION = re.compile(r"(?:vault:)?v(\d{1,9}):")
_TIMEOUT_S = 10.0
_NONCE_BYTES = 12


class KmsConfig(Record):
    """Where the master key is; no secret, so that it may travel to workers and be shown."""

    kind: Literal["file", "vault"]
    place: str
    """Path of the key file, or the server's address."""
    key_name: str = "content"
    """Name of the key in Vault's transit engine."""


class Kms(Protocol):
    """Wraps data keys. Safe to use from several threads."""

    def wrap(self, key: bytes) -> str:
        """The key under the newest version of the master key: printable text with that version in front.

        Raises:
            KeyAccessError: no master key, or none that this process may use.
        """
        ...

    def unwrap(self, wrapped: str) -> bytes:
        """The key that `wrap` gave, at any version that is still kept.

        Raises:
            KeyAccessError: no master key, none that this process may use, or a text that was not wrapped by it.
        """
        ...

    def rotate(self) -> int:
        """Make a new version of the master key and wrap with it from now on; returns its number."""
        ...

    def retire(self, before: int) -> None:
        """Forget versions below `before`: what is wrapped by them can never be read again."""
        ...


def find_kms(store_uri: str, keys_folder: pathlib.Path | None) -> KmsConfig:
    """The KMS of a store.

    Args:
        keys_folder: the folder of secrets beside a local store; None for a remote one.

    Raises:
        ConfigError: a value of UNDERSTUDY_KMS that names none, or a remote store without it.
    """
    text = os.environ.get(KMS_ENV)
    if text is None:
        if keys_folder is None:
            raise ConfigError(
                f"store={store_uri!r}: a remote store holds content only encrypted, and {KMS_ENV} is not set; {_ALLOWED}"
            )
        return KmsConfig(kind="file", place=str(keys_folder / CONTENT_KEY_FILE))
    kind, _, rest = text.partition(":")
    if kind == "file" and rest.startswith("/"):
        return KmsConfig(kind="file", place=rest)
    if kind == "vault" and _VAULT_NAME.fullmatch(rest):
        address = os.environ.get("VAULT_ADDR", "")
        _check_address(address)
        return KmsConfig(kind="vault", place=address.rstrip("/"), key_name=rest)
    raise ConfigError(f"{KMS_ENV}={text!r}: names no KMS; {_ALLOWED}")


def open_kms(config: KmsConfig) -> Kms:
    """Build the client; touches neither file nor network yet."""
    return FileKms(pathlib.Path(config.place)) if config.kind == "file" else VaultKms(config)


def version_of(wrapped: str) -> int:
    """Version of the master key that a key was wrapped with.

    Raises:
        KeyAccessError: the text was wrapped by no KMS of ours.
    """
    match = _VERSION.match(wrapped)
    if match is None:
        raise KeyAccessError("a wrapped key names no version of its master key; the file is damaged, or not ours")
    return int(match[1])


class FileKms:
    """Master keys in a file of mode 0600, made with the first key that is wrapped. Another process may rotate it."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._versions: dict[int, bytes] = {}

    def wrap(self, key: bytes) -> str:
        if not self._path.exists():
            create_once(self._path, _dump({1: secrets.token_bytes(32)}))
        versions = self._read()
        newest = max(versions)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = nonce + AESGCM(versions[newest]).encrypt(nonce, key, _aad(newest))
        return f"v{newest}:{base64.b64encode(sealed).decode()}"

    def unwrap(self, wrapped: str) -> bytes:
        version = version_of(wrapped)
        key = self._read().get(version)
        if key is None:
            raise KeyAccessError(
                f"{self._path}: has no version {version} of the master key, which this content was encrypted under; "
                "restore the key file that belongs to this store"
            )
        try:
            sealed = base64.b64decode(wrapped.partition(":")[2], validate=True)
            return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _aad(version))
        except (InvalidTag, ValueError, binascii.Error):
            raise KeyAccessError(
                f"{self._path}: is not the key file that this content was encrypted under; restore that one"
            ) from None

    def rotate(self) -> int:
        versions = self._read() if self._path.exists() else {}
        newest = max(versions, default=0) + 1
        replace_whole(self._path, _dump({**versions, newest: secrets.token_bytes(32)}))
        return newest

    def retire(self, before: int) -> None:
        versions = self._read()
        kept = {version: key for version, key in versions.items() if version >= before}
        if kept:
            replace_whole(self._path, _dump(kept))

    def _read(self) -> dict[int, bytes]:
        try:
            facts = self._path.stat()
            stamp = (facts.st_mtime_ns, facts.st_ino)
            if stamp != self._stamp:
                check_private(self._path)
                self._versions, self._stamp = _parse(self._path), stamp
        except FileNotFoundError:
            raise KeyAccessError(
                f"{self._path}: no such key file, and without it content cannot be read; restore it, or set {KMS_ENV}"
            ) from None
        except PermissionError:
            raise KeyAccessError(f"{self._path}: this user may not read the content key; ask a curator") from None
        return self._versions


class VaultKms:
    """Vault's transit engine, or a server that speaks its API. The token is read from VAULT_TOKEN at every request."""

    def __init__(self, config: KmsConfig) -> None:
        self._config = config

    def wrap(self, key: bytes) -> str:
        reply = self._post("encrypt", {"plaintext": base64.b64encode(key).decode()})
        return str(reply["ciphertext"])

    def unwrap(self, wrapped: str) -> bytes:
        return base64.b64decode(self._post("decrypt", {"ciphertext": wrapped})["plaintext"])

    def rotate(self) -> int:
        self._post("keys", {}, action="/rotate")
        # What the server wraps with now: the answer of a rotation differs between its versions.
        return version_of(self.wrap(secrets.token_bytes(32)))

    def retire(self, before: int) -> None:
        self._post("keys", {"min_decryption_version": before}, action="/config")

    def _post(self, what: str, body: dict[str, Any], action: str = "") -> dict[str, Any]:
        config = self._config
        token = os.environ.get("VAULT_TOKEN")
        if not token:
            raise KeyAccessError(f"VAULT_TOKEN: not set, and {config.place} holds the content key; set it to a token")
        headers = {"X-Vault-Token": token, "Content-Type": "application/json"}
        if os.environ.get("VAULT_NAMESPACE"):
            headers["X-Vault-Namespace"] = os.environ["VAULT_NAMESPACE"]
        url = f"{config.place}/v1/transit/{what}/{config.key_name}{action}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_S) as reply:
                text = reply.read()
            return json.loads(text)["data"] if text else {}
        except urllib.error.HTTPError as error:
            raise KeyAccessError(
                f"{config.place}: refused to {what} with key {config.key_name!r}: HTTP {error.code}; its policy must "
                f"allow this token {what} on transit/{what}/{config.key_name}{action}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KeyAccessError(f"{config.place}: gave no answer to {what}: {type(error).__name__}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _check_address(address: str) -> None:
    parts = urllib.parse.urlsplit(address)
    is_local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and is_local)):
        raise ConfigError(
            f"VAULT_ADDR={address!r}: allowed: https://HOST[:PORT], or http:// on this machine alone; keys would travel "
            "in the clear otherwise"
        )


def _aad(version: int) -> bytes:
    return f"understudy content key v{version}".encode()


def _dump(versions: dict[int, bytes]) -> bytes:
    keys = {str(version): key.hex() for version, key in sorted(versions.items())}
    return (json.dumps({"content_keys": keys}, indent=1) + "\n").encode()


def _parse(path: pathlib.Path) -> dict[int, bytes]:
    try:
        versions = {int(name): bytes.fromhex(key) for name, key in json.loads(path.read_text())["content_keys"].items()}
        is_valid = bool(versions) and all(len(key) == 32 for key in versions.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise ConfigError(f"{path}: not a file of content keys; restore it: without it stored content cannot be read")
    return versions
