"""The beginning of a streamed answer, held back until its first content: until then another LLM can still answer.

Comments, keep-alives, role chunks and empty deltas are no content. An answer that ends properly without any (a
finish_reason) is one. A stream that closes, reports an error, or sends what does not parse before its first content
has broken. Source: OpenAI API reference, the chat completion chunk object; litellm issues #40404, #25492 and #36768 for
the shapes in which streams break.
"""

from __future__ import annotations

from typing import Any

from cluster.sse import SseReader

MAX_OPENING_BYTES = 2**20
"""Bytes held back at most; a stream that brings no content within them has broken."""


class Opening:
    """Takes a stream's first pieces. One of `has_content`, `error` and `fault` tells when to stop, and why."""

    def __init__(self) -> None:
        self.has_content = False
        """Whether content has come, so that the stream may go on to the client."""
        self.error: dict[str, Any] | None = None
        """What the LLM reported instead of an answer, as {"error": ...}."""
        self.fault: str | None = None
        """How the stream broke, after "its stream"."""
        self._reader = SseReader()
        self._pieces: list[bytes] = []
        self._num_bytes = 0

    @property
    def is_over(self) -> bool:
        return self.has_content or self.error is not None or self.fault is not None

    @property
    def held(self) -> bytes:
        """All bytes so far, as they came."""
        return b"".join(self._pieces)

    def feed(self, piece: bytes) -> None:
        """Take the next bytes."""
        self._pieces.append(piece)
        self._num_bytes += len(piece)
        # Line by line, so that how the bytes were cut does not decide what came first.
        for line in piece.splitlines(keepends=True):
            self._look(self._reader.feed(line))
            if not self.is_over and self._reader.num_bad:
                self.fault = "does not parse"
            elif not self.is_over and self._reader.is_done:
                self.fault = "ended without content"
            if self.is_over:
                return
        if self._num_bytes > MAX_OPENING_BYTES:
            self.fault = f"sent {MAX_OPENING_BYTES} bytes without content"

    def end(self) -> None:
        """The stream is closed."""
        self._look(self._reader.end())
        if not self.is_over:
            self.fault = "ended before its first content"

    def _look(self, chunks: list[dict[str, Any]]) -> None:
        for chunk in chunks:
            if self.is_over:
                return
            reported = reported_error(chunk)
            if reported is not None:
                self.error = reported
            elif _brings_content(chunk):
                self.has_content = True


def reported_error(body: dict[str, Any]) -> dict[str, Any] | None:
    """The error in a body or chunk that came under status 200, as {"error": ...}; None where there is none."""
    error = body.get("error")
    if isinstance(error, dict | str) and error:
        return {"error": error if isinstance(error, dict) else {"message": error, "type": "upstream_error"}}
    if any(choice.get("finish_reason") == "error" for choice in _choices(body)):
        return {"error": {"message": "the LLM ended its answer with an error", "type": "upstream_error"}}
    return None


def error_status(reported: dict[str, Any]) -> int:
    """The HTTP status that an error names as its code or status, as vLLM, SGLang and OpenRouter do; 502 where it names none.

    Example:
        >>> error_status({"error": {"code": 400}}), error_status({"error": {"code": "overloaded"}})
        (400, 502)
    """
    for name in ("code", "status"):
        value = reported["error"].get(name)
        if isinstance(value, int | str) and str(value).isdecimal() and 400 <= int(value) <= 599:
            return int(value)
    return 502


def _brings_content(chunk: dict[str, Any]) -> bool:
    for choice in _choices(chunk):
        delta = choice.get("delta")
        if choice.get("finish_reason") is not None:
            return True
        if isinstance(delta, dict) and any(value for name, value in delta.items() if name != "role"):
            return True
    return False


def _choices(body: dict[str, Any]) -> list[dict[str, Any]]:
    choices = body.get("choices")
    return [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
