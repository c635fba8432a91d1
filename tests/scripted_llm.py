"""An endpoint on loopback that gives one scripted reply after another, and an Upstream that asks it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from cluster.upstream import Upstream, UpstreamConfig

KEY_ENV = "UNDERSTUDY_TEST_UPSTREAM_KEY"
BODY: dict[str, Any] = {"model": "llm-1", "messages": [{"role": "user", "content": "caf\u00e9"}]}
ANSWER = {"id": "1", "choices": []}
Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Script:
    """A server that gives one scripted reply after another, the last one for ever."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(request.headers.copy())
        return await (self.replies.pop(0) if len(self.replies) > 1 else self.replies[0])(request)


class Waits:
    """Takes the place of sleeping."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def whole(status: int = 200, body: Any = ANSWER, **headers: str) -> Reply:
    async def reply(_: web.Request) -> web.StreamResponse:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(text=json.dumps(body), status=status, content_type="application/json", headers=fields)

    return reply


def streamed(*pieces: bytes, then: str = "end", content_type: str = "text/event-stream") -> Reply:
    """Gives the pieces, then does: end, cut (break the connection off), hang (say nothing more)."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if then == "hang":
            await silent(request)
        if then == "cut":
            # So that what was written leaves before the connection breaks.
            await asyncio.sleep(0.05)
            _hang_up(request)
        return response

    return reply


async def hung_up(request: web.Request) -> web.StreamResponse:
    _hang_up(request)
    return web.Response()


async def silent(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("the client leaves first")


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    """One event of a stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'id': '1', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n".encode()


def _hang_up(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


@contextlib.asynccontextmanager
async def listening(script: Script) -> AsyncIterator[str]:
    """The endpoint's base_url."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", script.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def running(script: Script, **config: Any) -> AsyncIterator[tuple[Upstream, Waits]]:
    """An Upstream of the endpoint, and what it would have slept."""
    waits = Waits()
    async with listening(script) as base_url:
        upstream = Upstream(UpstreamConfig(base_url=base_url, api_key_env=KEY_ENV, **config), sleep=waits)
        try:
            yield upstream, waits
        finally:
            await upstream.close()


async def read_stream(upstream: Upstream) -> bytes:
    async with upstream.stream({**BODY, "stream": True}) as stream:
        return b"".join([piece async for piece in stream.chunks])


ROLE = chunk({"role": "assistant", "content": ""})
HELLO = chunk({"content": "hello"})
END = chunk({}, "stop") + b"data: [DONE]\n\n"
GOOD = streamed(ROLE, HELLO, END)
