"""Token counts of streams whose client does not ask for them: asked for here, and kept from what the client sees.

An endpoint reports what a stream used only where `stream_options.include_usage` asks for it; without it what is spent is
an estimate. So every stream asks. Some endpoints refuse requests with the option: which, and for which of their models,
is learnt from a request that they refuse with it and answer without, and forgotten after a while: they are upgraded, and
what was refused may have been another thing of that one request. The extra event is cut out of the bytes; no other is
written anew. Endpoints that are asked may add `"usage": null` to their other chunks, and that stays, as in OpenAI's own.
Source: OpenAI API reference, chat completions, stream_options.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from cluster.errors import UpstreamError
from cluster.sse import SseReader

FORGOTTEN_AFTER_S = 3_600.0
"""How long a refusal is believed; then a stream asks again, which costs a model that still refuses one request more."""
_MAX_MODELS = 1_000
"""Models that something is remembered of; clients name them, so there is no end to them."""
_REFUSALS = (400, 422)
_NAMES = (b"stream_options", b"include_usage")
_MOST_OF_AN_END = 3
"""Bytes of an event's end without its last."""
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n|\Z)){2,}")
"""A carriage return that comes last may be half of a line end."""


class Begun(Protocol):
    """An endpoint's reply to a streamed request, as far as it must be known here."""

    @property
    def status(self) -> int: ...

    @property
    def first(self) -> bytes: ...


BegunT = TypeVar("BegunT", bound=Begun)


class StreamUsage:
    """What one endpoint makes of the option."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is known yet: every model is asked."""
        self._clock = clock
        self._refuses_until: dict[str, float] = {}
        """Of a model that took the option, always over."""

    async def ask(
        self, body: dict[str, Any], send: Callable[[dict[str, Any]], Awaitable[BegunT]]
    ) -> tuple[BegunT, bool]:
        """The reply to a streamed request, asked for its counts where that may be; and whether they were asked for here.

        A request that is refused with the option is sent as its client wrote it. Where that gives no reply, and the refusal
        does not speak of the option, the client gets the refusal: it would take its own mistake for the endpoint's trouble
        and send it again.

        Args:
            send: raises UpstreamError where the endpoint gives no reply.
        """
        counted = with_usage(body) if self._asks(body) else None
        if counted is None:
            return await send(body), False
        begun = await send(counted)
        if begun.status == 200:
            self._learn(body, takes_it=True)
            return begun, True
        is_named = any(name in begun.first for name in _NAMES)
        # Once a model has taken it, only an error that names it is about it: clients' own mistakes are not sent twice.
        if begun.status not in _REFUSALS or (self._takes_it(body) and not is_named):
            return begun, False
        try:
            plain = await send(body)
        except UpstreamError:
            if is_named:
                raise
            return begun, False
        if plain.status == 200:
            self._learn(body, takes_it=False)
        return plain, False

    def _asks(self, body: dict[str, Any]) -> bool:
        return self._clock() >= self._refuses_until.get(model_of(body), 0.0)

    def _takes_it(self, body: dict[str, Any]) -> bool:
        return self._refuses_until.get(model_of(body)) == 0.0

    def _learn(self, body: dict[str, Any], *, takes_it: bool) -> None:
        if len(self._refuses_until) >= _MAX_MODELS:
            self._refuses_until.clear()
        self._refuses_until[model_of(body)] = 0.0 if takes_it else self._clock() + FORGOTTEN_AFTER_S


def with_usage(body: dict[str, Any]) -> dict[str, Any] | None:
    """The request with the option; None where it streams nothing, or asks for its counts itself.

    Example:
        >>> with_usage({"stream": True})["stream_options"], with_usage({"stream": False})
        ({'include_usage': True}, None)
    """
    options = body.get("stream_options")
    if not body.get("stream") or not isinstance(options, dict | None) or (options and options.get("include_usage")):
        return None
    return {**body, "stream_options": {**(options or {}), "include_usage": True}}


def is_usage_alone(chunk: dict[str, Any]) -> bool:
    """Whether a chunk brings counts and nothing of an answer."""
    return not chunk.get("choices") and isinstance(chunk.get("usage"), dict) and "error" not in chunk


class WithoutUsage:
    """Pieces of a stream, cut anywhere -> the same bytes without its events that bring counts alone.

    An event goes on once it is whole; pieces of whole events, as servers send them, are not copied.
    """

    def __init__(self) -> None:
        self._begun: list[bytes] = []
        """An event whose end has not come, as it came."""

    def feed(self, piece: bytes, *, has_usage: bool) -> bytes:
        """What goes on of the stream with this piece.

        Args:
            has_usage: whether the end of an event that brings counts alone is in it.
        """
        if not piece or (not self._begun and not has_usage and piece.endswith(b"\n\n")):
            return piece
        # An event's end may be cut as well, into as many pieces as it has bytes.
        last = b"".join(one[-_MOST_OF_AN_END:] for one in self._begun[-_MOST_OF_AN_END:])
        end = max((found.end() - len(last) for found in _EVENT_END.finditer(last + piece)), default=-1)
        if end < 0:
            self._begun.append(piece)
            return b""
        text = b"".join([*self._begun, piece[:end]])
        self._begun = [piece[end:]] if end < len(piece) else []
        return without_usage(text) if has_usage else text

    def end(self) -> bytes:
        """The rest of a stream that is over."""
        text, self._begun = b"".join(self._begun), []
        return without_usage(text)


def without_usage(text: bytes) -> bytes:
    """Events of a stream without those that bring counts alone."""
    ends = [found.end() for found in _EVENT_END.finditer(text)]
    events = [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return b"".join(event for event in events if not _brings_usage_alone(event))


def _brings_usage_alone(event: bytes) -> bool:
    reader = SseReader()
    chunks = [*reader.feed(event), *reader.end()]
    return bool(chunks) and all(map(is_usage_alone, chunks))


def model_of(body: dict[str, Any]) -> str:
    """The model that a request names; "" where it names none."""
    model = body.get("model")
    return model if isinstance(model, str) else ""
