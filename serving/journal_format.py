"""One journal file, written and read: AES-256-GCM records that cannot be exchanged for one another.

File `<created ms>-<file id>.journal`, mode 0600 in a folder of mode 0700, integers little-endian:

    header   magic "USJOURNL" | u16 version = 1 | 16 bytes file id | u32 length | wrapped data key | u32 CRC-32 of these
    record   marker d6 5c 9e 1b | u64 number, from 0 | u32 length | u32 CRC-32 of these | nonce (12) | ciphertext + tag

The plaintext is one call as JSON. File id and record number are authenticated with every record (AAD), so that none
can be changed, reordered, repeated, left out of the middle, or moved to another file without being noticed. Records
cut off the end cannot be told from a crash in the middle of a write. The frame's CRC is no protection, it finds
the next record behind a damaged one. A header is durable before its file has its name, so a named file has a whole
one. Knows nothing of locks, threads or folders. Source: NIST SP 800-38D (random 96-bit nonces, fewer than 2^32 a key).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.errors import StoreError
from cluster.records import AgentCall

MAX_HEADER_BYTES = 2**16
"""Far above a wrapped key of any KMS."""
_MAGIC, _VERSION = b"USJOURNL", 1
_HEADER = struct.Struct("<8sH16sI")
_MARKER = b"\xd6\x5c\x9e\x1b"
_FRAME = struct.Struct("<4sQI")
_CRC = struct.Struct("<I")
_FRAME_BYTES = _FRAME.size + _CRC.size
_FILE_ID_BYTES, _NONCE_BYTES, _TAG_BYTES = 16, 12, 16


class KeyWrapper(Protocol):
    """Gives data keys. Safe to use from several threads."""

    def new_data_key(self) -> tuple[bytes, str]:
        """32 fresh bytes, and the same wrapped by the KMS.

        Raises:
            StoreError: the KMS gives no key.
        """
        ...

    def unwrap(self, wrapped: str) -> bytes:
        """The data key of a wrapped one.

        Raises:
            StoreError: the KMS gives no key, or the text is none of its own.
        """
        ...


class DamagedJournalError(ValueError):
    """A file whose header cannot be read, so that none of its records can."""


class JournalSealer:
    """Makes the bytes of one new journal file; writes nothing."""

    def __init__(self, key: bytes, wrapped_key: str) -> None:
        """Take a data key; it may serve several files."""
        self.file_id = os.urandom(_FILE_ID_BYTES)
        self._cipher = AESGCM(key)
        self._next_number = 0
        wrapped = wrapped_key.encode()
        header = _HEADER.pack(_MAGIC, _VERSION, self.file_id, len(wrapped)) + wrapped
        self.header = header + _CRC.pack(zlib.crc32(header))

    def seal(self, records: list[bytes]) -> bytes:
        """The next records of the file."""
        pieces = []
        for number, record in enumerate(records, self._next_number):
            nonce = os.urandom(_NONCE_BYTES)
            sealed = nonce + self._cipher.encrypt(nonce, record, _aad(self.file_id, number))
            frame = _FRAME.pack(_MARKER, number, len(sealed))
            pieces += [frame, _CRC.pack(zlib.crc32(frame)), sealed]
        self._next_number += len(records)
        return b"".join(pieces)


class JournalReader:
    """Iterates over the plaintexts of a journal's genuine records in order; what is damaged is left out and counted.

    A record whose write was cut off by a crash ends the file and is no damage: nobody was told that it was durable.
    """

    def __init__(self, data: bytes, keys: KeyWrapper) -> None:
        """Read the header of a whole file.

        Raises:
            DamagedJournalError: the header is not one.
            StoreError: the KMS gives no key for it.
        """
        self._data = data
        self._begin, self._id, wrapped = read_header(data)
        self._cipher = AESGCM(keys.unwrap(wrapped))
        self.num_damaged = 0
        """Records missing, altered or out of place among those passed so far; a stretch counts as one where its number
        cannot be told."""

    def __iter__(self) -> Iterator[bytes]:
        at, expected, failed_at = self._begin, 0, None
        while 0 <= at < len(self._data):
            record = self._record_at(at, expected)
            if record is None:
                failed_at = at if failed_at is None else failed_at
                # The frame may lie about its length, so the next one is looked for right behind its marker.
                at = self._data.find(_MARKER, at + 1)
                continue
            number, at, plaintext = record
            self.num_damaged += max(number - expected, int(failed_at is not None))
            expected, failed_at = number + 1, None
            yield plaintext
        if failed_at is not None and not self._is_torn(failed_at):
            self.num_damaged += 1

    def _record_at(self, at: int, expected: int) -> tuple[int, int, bytes] | None:
        """(number, where the next begins, plaintext) of a genuine record, or None."""
        frame = self._frame_at(at)
        if frame is None:
            return None
        number, begin, end = frame
        # Passed already: a record repeated or displaced, and that is damage even where it is authentic.
        plaintext = self._decrypt(number, begin, end) if number >= expected else None
        return None if plaintext is None else (number, end, plaintext)

    def _frame_at(self, at: int) -> tuple[int, int, int] | None:
        """(number, begin, end) of what a well-formed frame frames; `end` may lie beyond the file."""
        begin = at + _FRAME_BYTES
        if begin > len(self._data):
            return None
        marker, number, length = _FRAME.unpack_from(self._data, at)
        (crc,) = _CRC.unpack_from(self._data, at + _FRAME.size)
        is_frame = marker == _MARKER and crc == zlib.crc32(self._data[at : at + _FRAME.size])
        return (number, begin, begin + length) if is_frame else None

    def _decrypt(self, number: int, begin: int, end: int) -> bytes | None:
        sealed = memoryview(self._data)[begin:end]
        if len(sealed) != end - begin or len(sealed) < _NONCE_BYTES + _TAG_BYTES:
            return None
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _aad(self._id, number))
        except InvalidTag:
            return None

    def _is_torn(self, at: int) -> bool:
        """Whether what follows the last good record is what a crash leaves: a part of a record, or blocks never filled."""
        if len(self._data) - at < _FRAME_BYTES or not any(memoryview(self._data)[at:]):
            return True
        frame = self._frame_at(at)
        return frame is not None and frame[2] > len(self._data)


def encode_call(call: AgentCall) -> bytes | StoreError:
    """One call as a record's plaintext; lone surrogates, which JSON may carry, survive. A StoreError, not raised, where
    the call is nothing that JSON has."""
    try:
        text = json.dumps(call.model_dump(), ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        return StoreError(f"call {call.call_id}: cannot be written ({type(error).__name__})")


def decode_call(record: bytes) -> AgentCall:
    """The call that `encode_call` was given.

    Raises:
        ValueError: the record is of another version of this program.
    """
    return AgentCall(**json.loads(record.decode("utf-8", "surrogatepass")))


def read_header(data: bytes) -> tuple[int, bytes, str]:
    """(where records begin, file id, wrapped key) of a file, or of its first bytes.

    Raises:
        DamagedJournalError: they are no whole header.
    """
    if len(data) < _HEADER.size:
        raise DamagedJournalError("cut off in its header")
    magic, version, file_id, length = _HEADER.unpack_from(data)
    end = _HEADER.size + length
    if magic != _MAGIC or end + _CRC.size > len(data) or _CRC.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        raise DamagedJournalError("not a journal, or its header is damaged")
    if version != _VERSION:
        raise DamagedJournalError(f"version {version}; this program reads version {_VERSION}")
    return end + _CRC.size, file_id, data[_HEADER.size : end].decode()


def _aad(file_id: bytes, number: int) -> bytes:
    return _MAGIC + file_id + number.to_bytes(8, "little")
