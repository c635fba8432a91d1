"""An ASGI app behind a real HTTP server on loopback, for tests with clients that take an address."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn


@contextlib.asynccontextmanager
async def served(api: Any) -> AsyncIterator[str]:
    """The address of `api` while it is served in this event loop; its lifespan is the caller's."""
    server = uvicorn.Server(uvicorn.Config(api, lifespan="off", log_level="error", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
