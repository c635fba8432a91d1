"""An LLM's stream -> the client, byte for byte, while a copy is put together for capture.

The call is kept however it ends: whole, broken off or abandoned. Bytes flow as they come until the answer ends; its
end (the piece with the last finish_reason, counts, [DONE]) leaves once the call is as durable as the capture promises,
so that no client has seen an answer finished which a crash could still lose. Counts that its client did not ask for
stay here. A stream that outlasts the call's deadline is broken off like one that its LLM breaks off. Knows nothing of
specialists.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.errors import UpstreamError
from cluster.sse import MAX_STREAM_BYTES
from cluster.stream_usage import WithoutUsage, is_usage_alone
from cluster.upstream import LLMNodeConfig, UpstreamStream
from serving.limits import until
from serving.openai_wire import Denied, error_body, error_code, sse_event
from serving.pending import PendingCall
from serving.stream_copy import StreamCopy

if TYPE_CHECKING:
    from serving.gateway import GatewayCore

EVENT_STREAM = "text/event-stream"


class LLMRelay(StreamingResponse):
    """One streamed answer on its way."""

    def __init__(
        self,
        core: GatewayCore,
        call: PendingCall,
        stream: UpstreamStream,
        endpoint: LLMNodeConfig,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        """Take what answers the call; `stack` closes it."""
        super().__init__(self._pieces(stream), media_type=EVENT_STREAM, headers=call.response_headers())
        self._core, self._call, self._endpoint, self._stack = core, call, endpoint, stack
        self._copy = StreamCopy(_num_choices(call.request))
        self._filter = WithoutUsage() if stream.hides_usage else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Before anything is awaited: a cancelled request may not get another turn.
            if not self._call.is_finished:
                self._core.abandon(self._call, response=self._copy.body(), endpoint=self._endpoint)
            await self._stack.aclose()

    async def _pieces(self, stream: UpstreamStream) -> AsyncIterator[bytes]:
        held: list[bytes] = []
        try:
            async for got in until(stream.chunks, self._call.limits.deadline_at, self._core.drain):
                piece = self._read(got)
                if self._copy.is_full:
                    raise _too_long()
                if not self._copy.is_ending:
                    if piece:
                        yield piece
                    continue
                held.append(piece)
                if self._copy.is_done:
                    if not self._call.is_finished:
                        await self._finish(*self._fate())
                    yield b"".join(held)
                    held.clear()
            held.append(self._read_end())
            if not self._call.is_finished:
                await self._finish(*self._fate())
            if any(held):
                yield b"".join(held)
            if self._is_cut_short():
                # Clients take the end of the bytes for the end of the answer.
                message = "The LLM's stream ended before its answer did; send the request again"
                yield _error_event(error_body(message, kind="upstream_error", code="upstream_error"))
        except UpstreamError as error:
            if self._call.is_finished:
                return
            yield b"".join([*held, self._read_end()]) + await self._broken_off(error)
        except Denied as denied:
            yield self._denied(denied)

    def _read(self, piece: bytes) -> bytes:
        """Take the next piece; what of it is for the client."""
        chunks = self._copy.take(piece)
        return self._filter.feed(piece, has_usage=any(map(is_usage_alone, chunks))) if self._filter else piece

    def _read_end(self) -> bytes:
        """Take the end of the stream; what is left for the client."""
        self._copy.end()
        return self._filter.end() if self._filter else b""

    def _fate(self) -> tuple[int, str | None]:
        """Status and error of a stream that came to its end."""
        if not self._copy.is_whole:
            return 502, "the LLM's stream does not parse"
        if self._copy.has_error:
            code = error_code(self._copy.body())
            return 502, f"the LLM reported an error in its stream{f': {code}' if code else ''}"
        if self._is_cut_short():
            return 502, "the LLM's stream ended early"
        return 200, None

    def _is_cut_short(self) -> bool:
        return not (self._copy.is_done or self._copy.has_end or self._copy.has_error)

    async def _broken_off(self, error: UpstreamError) -> bytes:
        """The event that says so, or that not even this could be kept."""
        body = error.body or error_body(error.message, kind="upstream_error")
        code = error_code(body)
        try:
            await self._finish(error.status, f"the LLM broke off its answer{f': {code}' if code else ''}")
        except Denied as denied:
            return self._denied(denied)
        return _error_event(body)

    def _denied(self, denied: Denied) -> bytes:
        """The event that says so; counted, as the HTTP side counts what it denies."""
        self._core.count_failure(denied.status)
        return _error_event(denied.body)

    async def _finish(self, status: int, error: str | None) -> None:
        """Raises Denied where the call cannot be kept."""
        await self._core.finish(
            self._call, response=self._copy.body(), endpoint=self._endpoint, status=status, error=error
        )


def _too_long() -> UpstreamError:
    message = f"The LLM's stream is longer than {MAX_STREAM_BYTES} bytes; ask for a shorter answer"
    return UpstreamError(message, 502, error_body(message, kind="upstream_error", code="upstream_error"))


def _error_event(body: dict[str, Any]) -> bytes:
    # The blank line ends an event that was cut in its middle.
    return b"\n\n" + sse_event(body)


def _num_choices(request: dict[str, Any]) -> int:
    number = request.get("n")
    return number if type(number) is int and number > 0 else 1
