"""The least that a Python gateway can do: FastAPI takes a request, aiohttp sends it on, bytes come back as they are.

python -m jobs.bench.floor_proxy http://127.0.0.1:PORT      # prints its address; ends with SIGTERM
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from jobs.bench.http_load import PATH


def build_floor(llm: str) -> FastAPI:
    """The proxy before the LLM at `llm`."""
    sessions: list[aiohttp.ClientSession] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        yield
        await sessions[0].close()

    api = FastAPI(lifespan=lifespan, openapi_url=None)

    async def complete(request: Request) -> Response:
        headers = {"content-type": "application/json"}
        reply = await sessions[0].post(f"{llm}{PATH}", data=await request.body(), headers=headers)
        if reply.content_type == "text/event-stream":
            return StreamingResponse(_pieces(reply), media_type="text/event-stream")
        async with reply:
            return Response(await reply.read(), reply.status, media_type="application/json")

    api.router.add_route(PATH, complete, methods=["POST"])
    return api


async def _pieces(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with reply:
        async for piece in reply.content.iter_any():
            yield piece


def serve_on_loopback(app: Any) -> None:
    """Answer on a free loopback port until SIGTERM; prints the address first."""
    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    # From here on clients wait instead of being refused.
    listener.listen(1_024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    serve_on_loopback(build_floor(sys.argv[1]))
