"""Named streams of records in a private folder, encrypted with a key that is never written: content that must leave
the memory for a while and must not rest in the clear.

A stream is a file of chunks, each compressed and sealed by AES-GCM, bound to the stream's name and its place. Whoever
loses the key has lost the records. Knows nothing of what they are.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.errors import StoreError

_NONCE_BYTES = 12
_SIZE_BYTES = 8
_MAX_BUFFERED_BYTES = 8 * 1024 * 1024
"""Held over all streams before they are written."""


class SpillWriter:
    """Appends to any number of streams; `close` writes what is still held."""

    def __init__(self, folder: pathlib.Path, key: bytes) -> None:
        """
        Args:
            folder: exists, and only this user may enter it.
            key: 32 random bytes.
        """
        self._folder, self._cipher = folder, AESGCM(key)
        self._codec = pa.Codec("zstd")
        self._held: dict[str, list[bytes]] = defaultdict(list)
        self._num_held_bytes = 0
        self._num_chunks: Counter[str] = Counter()

    def append(self, stream: str, record: Any) -> None:
        """Add one JSON value."""
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        self._held[stream].append(line)
        self._num_held_bytes += len(line)
        if self._num_held_bytes >= _MAX_BUFFERED_BYTES:
            self.close()

    def close(self) -> None:
        for stream, lines in self._held.items():
            plain = b"\n".join(lines)
            packed = len(plain).to_bytes(_SIZE_BYTES, "big") + self._codec.compress(plain, asbytes=True)
            nonce = os.urandom(_NONCE_BYTES)
            sealed = nonce + self._cipher.encrypt(nonce, packed, _place(stream, self._num_chunks[stream]))
            with (self._folder / stream).open("ab") as file:
                file.write(len(sealed).to_bytes(_SIZE_BYTES, "big") + sealed)
            self._num_chunks[stream] += 1
        self._held.clear()
        self._num_held_bytes = 0


def read_spill(folder: pathlib.Path, key: bytes, stream: str) -> Iterator[Any]:
    """The records of one stream in order, one chunk in memory at a time; none where nothing was appended.

    Raises:
        StoreError: the file was changed, or the key is another.
    """
    path = folder / stream
    if not path.exists():
        return
    cipher, codec = AESGCM(key), pa.Codec("zstd")
    with path.open("rb") as file:
        number = 0
        while size := file.read(_SIZE_BYTES):
            sealed = file.read(int.from_bytes(size, "big"))
            try:
                packed = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _place(stream, number))
            except InvalidTag:
                raise StoreError(f"{path}: cannot be decrypted; it was changed while curation ran") from None
            plain_size = int.from_bytes(packed[:_SIZE_BYTES], "big")
            plain = codec.decompress(packed[_SIZE_BYTES:], plain_size, asbytes=True)
            for line in plain.split(b"\n"):
                yield json.loads(line.decode("utf-8", "surrogatepass"))
            number += 1


def _place(stream: str, number: int) -> bytes:
    return f"{stream}/{number}".encode()
