"""Bytes of one request that passes through and of its reply -> the tokens that it cost, off the bytes' way.

The counts that the reply reports are taken where it does: a `usage` object near its end, whole or in the last events of a
stream, packed with gzip or deflate or not at all. Else they are an estimate: a token for every three bytes of the
request, for every three bytes of a JSON reply, and for every event of a stream, which carries about one. Other replies
(sound, pictures) count nothing; what is asked for them is counted. Knows nothing of prices or of HTTP but these headers.
Source: OpenAI API reference, the usage objects of completions, embeddings and responses.
"""

from __future__ import annotations

import collections
import json
import math
import re
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from cluster.records import Usage
from serving.billing import BYTES_PER_TOKEN

_TAIL_BYTES = 2**16
"""Of a reply's end, what is searched for its counts."""
_MAX_UNPACKED_BYTES = 2**20
"""Of one piece; what unpacks to more is a bomb and is not read."""
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_NAMES = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))


class TokensUsed(NamedTuple):
    """What one exchange used; both counts are known."""

    usage: Usage
    is_estimated: bool


class Tally:
    """Counts one exchange as it goes by."""

    def __init__(self) -> None:
        """Nothing has been sent yet."""
        self._num_sent = self._num_got = self._num_events = 0
        self._is_text = self._is_stream = False
        self._unpacker: Any = None
        self._is_readable = False
        self._tail: collections.deque[bytes] = collections.deque()
        self._num_tail = 0

    def add_sent(self, piece: bytes) -> None:
        """Take the next bytes of the request."""
        self._num_sent += len(piece)

    def begin_reply(self, headers: Iterable[tuple[str, str]]) -> None:
        """Take the reply's headers, by lower-case name."""
        known = dict(headers)
        kind = known.get("content-type", "").partition(";")[0].strip().lower()
        coding = known.get("content-encoding", "identity").strip().lower()
        self._is_stream = kind == "text/event-stream"
        self._is_text = self._is_stream or kind == "application/json"
        self._is_readable = self._is_text and coding in ("identity", "gzip", "deflate")
        if self._is_readable and coding != "identity":
            self._unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def add_got(self, piece: bytes) -> None:
        """Take the next bytes of the reply, as they come."""
        text = self._unpacked(piece)
        self._num_got += len(text)
        self._num_events += text.count(b"data:")
        if not self._is_readable:
            return
        self._tail.append(text)
        self._num_tail += len(text)
        while self._num_tail - len(self._tail[0]) >= _TAIL_BYTES:
            self._num_tail -= len(self._tail.popleft())

    def used(self) -> TokensUsed:
        """What was used up to now."""
        reported = _last_usage(b"".join(self._tail)) if self._is_readable else None
        if reported is not None:
            return TokensUsed(reported, is_estimated=False)
        answered = 0
        if self._is_stream and self._is_readable:
            answered = self._num_events
        elif self._is_text:
            answered = math.ceil(self._num_got / BYTES_PER_TOKEN)
        read = math.ceil(self._num_sent / BYTES_PER_TOKEN)
        return TokensUsed(Usage(prompt_tokens=read, completion_tokens=answered), is_estimated=True)

    def _unpacked(self, piece: bytes) -> bytes:
        if self._unpacker is None or not self._is_readable:
            return piece
        try:
            text = self._unpacker.decompress(piece, _MAX_UNPACKED_BYTES)
        except zlib.error:
            self._is_readable = False
            return piece
        self._is_readable = not self._unpacker.unconsumed_tail
        return text


def _last_usage(tail: bytes) -> Usage | None:
    """The last usage object in the end of a reply. Within what a model wrote its quotes would be escaped."""
    for found in reversed(list(_USAGE.finditer(tail))):
        try:
            value, _ = json.JSONDecoder().raw_decode(tail[found.end() :].decode(errors="replace"))
        except (ValueError, RecursionError):
            continue
        prompt, completion = (
            next((value[one] for one in names if _is_count(value.get(one))), None) for names in _NAMES
        )
        if prompt is not None:
            # Embeddings have no completion.
            return Usage(prompt_tokens=prompt, completion_tokens=completion or 0)
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53
