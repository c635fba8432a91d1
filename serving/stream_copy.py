"""A copy of a stream on its way, read no sooner than something depends on what it says.

What matters while a stream runs is whether an answer ends and whether counts come, which few of its pieces bring. Those
that bring neither wait as bytes and are read together: a piece then costs a third of what reading it at once does.
"""

from __future__ import annotations

from typing import Any

from cluster.sse import SseReader
from serving.reassembly import Reassembler

_MOST_UNREAD = 2**16
"""Bytes that wait at most: what the reader says of a stream's length is true up to these."""


class StreamCopy:
    """Pieces, cut anywhere -> the completion so far."""

    def __init__(self, num_choices: int) -> None:
        """Take how many choices the request asks for."""
        self._reader, self._parts = SseReader(), Reassembler(num_choices)
        self._unread: list[bytes] = []
        self._num_unread = 0

    def take(self, piece: bytes) -> list[dict[str, Any]]:
        """Take the next piece; the chunks read with it, which are none where it waits."""
        if self._num_unread < _MOST_UNREAD and self._reader.is_between_events and _goes_on(piece):
            self._unread.append(piece)
            self._num_unread += len(piece)
            return []
        return self._read(piece)

    def end(self) -> None:
        """Take the end of the stream."""
        self._read(b"")
        for chunk in self._reader.end():
            self._parts.add(chunk)

    def body(self) -> dict[str, Any] | None:
        """The completion so far; None where nothing has come."""
        self._read(b"")
        return self._parts.body()

    @property
    def has_end(self) -> bool:
        """Whether some choice has its end. True of what has been read, as all of these."""
        return self._parts.has_end

    @property
    def has_error(self) -> bool:
        """Whether the LLM reported an error within the stream."""
        return self._parts.has_error

    @property
    def is_done(self) -> bool:
        """Whether `[DONE]` has come."""
        return self._reader.is_done

    @property
    def is_ending(self) -> bool:
        """Whether `[DONE]` or the end of every choice has come."""
        return self._reader.is_done or self._parts.is_finished

    @property
    def is_full(self) -> bool:
        """Whether more has come than is read of a stream."""
        return self._reader.is_full

    @property
    def is_whole(self) -> bool:
        """Whether all events were JSON objects."""
        return not self._reader.num_bad

    def _read(self, piece: bytes) -> list[dict[str, Any]]:
        if self._unread:
            piece = b"".join([*self._unread, piece])
            self._unread, self._num_unread = [], 0
        chunks = self._reader.feed(piece)
        for chunk in chunks:
            self._parts.add(chunk)
        return chunks


def _goes_on(piece: bytes) -> bool:
    """Whether it is of whole events, each of which says of its one choice that it has not ended; so no counts come alone.

    Written as servers write it, or it counts as saying something else: a name in another spelling, an event without it, and
    a text that quotes an event are all read at once. Quotes within a JSON text are escaped, so no text says it itself.
    """
    if not piece.startswith(b"data: {") or not piece.endswith(b"}\n\n") or b"[DONE]" in piece:
        return False
    num_said = piece.count(b'"finish_reason"')
    num_open = piece.count(b'"finish_reason":null') + piece.count(b'"finish_reason": null')
    return num_said == num_open == piece.count(b"data: {")
