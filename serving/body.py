"""A request's body: no larger than its path takes, and not waited for without end. Knows nothing of what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request

from serving.openai_wire import CLIENT_GONE, Denied

STALL_S = 30.0
"""Longest wait for the next bytes: who sends none holds one of the places of a gateway."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read it.

    Raises:
        Denied: 413, it is larger; 408, it stalls; 499, the client left before its end.
    """
    pieces, size = [], 0
    clock = asyncio.get_running_loop().time
    try:
        # One timer for the body, moved on: nothing is done with a piece that takes time of its own.
        async with asyncio.timeout(STALL_S) as limit:
            async for piece in request.stream():
                size += len(piece)
                if size > max_bytes:
                    raise too_large(max_bytes)
                pieces.append(piece)
                limit.reschedule(clock() + STALL_S)
    except ClientDisconnect:
        raise Denied(CLIENT_GONE, "The client left before its request was whole") from None
    except TimeoutError:
        raise stalled() from None
    return b"".join(pieces)


async def pieces_of(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes.

    Raises:
        ClientDisconnect: the client left before its end.
        TimeoutError: nothing came of it for STALL_S.
    """
    stream = request.stream()
    while True:
        # Not around the loop: what is done with a piece takes its own time.
        async with asyncio.timeout(STALL_S):
            piece = await anext(stream, None)
        if piece is None:
            return
        yield piece


def too_large(max_bytes: int) -> Denied:
    """The error of a request whose body is larger than its path takes."""
    return Denied(413, f"body: more than {max_bytes} bytes", code="too_large")


def stalled() -> Denied:
    """The error of a request whose body stalls."""
    return Denied(408, f"body: nothing came for {STALL_S:g} s; send the request again", code="request_timeout")
