"""One request to the LLMs -> their answer: whole, or a stream whose first byte is here. Knows nothing of specialists."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from cluster.sse import parse_object
from cluster.upstream import LLMNodeConfig, UpstreamStream
from serving.billing import Bill
from serving.fallback import FallbackLLM
from serving.limits import Limits
from serving.relay import EVENT_STREAM


class WholeAnswer(NamedTuple):
    """A reply in one piece: an answer, or an error that is the client's own."""

    status: int
    raw: bytes
    body: dict[str, Any] | None
    """`raw` as JSON; None where it is no object."""
    endpoint: LLMNodeConfig

    @property
    def is_good(self) -> bool:
        """Whether it is an answer, and no error."""
        return self.status < 400 and self.body is not None

    async def close(self) -> None:
        """Nothing is open."""


class BegunAnswer(NamedTuple):
    """A stream of events that has begun; who takes it closes it."""

    stream: UpstreamStream
    endpoint: LLMNodeConfig
    stack: contextlib.AsyncExitStack
    is_good: bool = True

    async def close(self) -> None:
        await self.stack.aclose()


async def ask_llm(
    fallback: FallbackLLM, request: dict[str, Any], bill: Bill, limits: Limits
) -> WholeAnswer | BegunAnswer:
    """Ask for an answer as the request wants it, streamed or not.

    Args:
        bill: of the call; gets what LLMs cost that were left before they answered.
        limits: of the call.

    Raises:
        UpstreamError: none of the LLMs gave one, or the longest answer could cost more than the call may.
    """
    if not request.get("stream"):
        reply, endpoint = await fallback.chat(request, bill, limits)
        return WholeAnswer(reply.status, reply.raw, reply.body, endpoint)
    async with contextlib.AsyncExitStack() as stack:
        stream, endpoint = await stack.enter_async_context(fallback.stream(request, bill, limits))
        if stream.status == 200 and stream.content_type == EVENT_STREAM:
            return BegunAnswer(stream, endpoint, stack.pop_all())
        raw = b"".join([piece async for piece in stream.chunks])
        return WholeAnswer(stream.status, raw, parse_object(raw), endpoint)
    raise AssertionError("the block returns or raises")
