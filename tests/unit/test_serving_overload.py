"""A full gateway, and what clients are told about when to come back; a client that leaves, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import PATH, Running, gateway
from scripted_llm import HELLO, KEY_ENV, Script, running, streamed, whole

from serving.fallback import FallbackLLM

UNKNOWN: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "nobody knows this"}]}


def test_beyond_the_limit_requests_are_turned_away_at_once_and_health_still_answers(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, max_ongoing=2) as run:
            run.llm.may_answer.clear()
            held = [asyncio.create_task(run.http.post(PATH, json=UNKNOWN)) for _ in range(2)]
            while len(run.llm.requests) < 2:
                await asyncio.sleep(0.01)
            reply = await run.http.post(PATH, json=UNKNOWN)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
            assert reply.headers["retry-after"] == "1"
            assert (await run.http.get("/healthz")).status_code == 200
            run.llm.may_answer.set()
            assert [one.status_code for one in await asyncio.gather(*held)] == [200, 200]
            assert (await run.http.post(PATH, json=UNKNOWN)).status_code == 200
            assert len(await run.captured()) == 3

    asyncio.run(scenario())


def test_what_the_llm_asked_for_reaches_the_client(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)

    async def scenario() -> None:
        async with gateway(tmp_path) as run, _upstream_of(run, Script(whole(429, Retry_After="6.2"))):
            for _ in range(2):
                reply = await run.http.post(PATH, json=UNKNOWN)
                assert reply.status_code == 429 and 0 < int(reply.headers["retry-after"]) <= 7
                assert reply.json()["error"]["message"]

    asyncio.run(scenario())


def test_a_client_that_leaves_its_stream_closes_the_llms_connection(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    gone = asyncio.Event()

    async def endless(request: Any) -> Any:
        try:
            return await streamed(HELLO, then="hang")(request)
        finally:
            gone.set()

    async def scenario() -> None:
        async with gateway(tmp_path) as run, _upstream_of(run, Script(endless)), _listening(run.api) as url:
            headers = {"Authorization": f"Bearer {run.key}"}
            async with httpx.AsyncClient() as client:
                body = {**UNKNOWN, "stream": True}
                async with client.stream("POST", url + PATH, json=body, headers=headers) as reply:
                    assert HELLO in await anext(reply.aiter_bytes())
            await asyncio.wait_for(gone.wait(), 10)
            (call,) = await run.captured()
            assert call.status == 499

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def _upstream_of(run: Running, script: Script) -> AsyncIterator[None]:
    """Put a scripted endpoint in the LLM's place."""
    own = run.core.fallback
    async with running(script, max_attempts=1) as (upstream, _):
        run.core.fallback = FallbackLLM([upstream], run.core.meter)
        try:
            yield
        finally:
            run.core.fallback = own


@contextlib.asynccontextmanager
async def _listening(api: Any) -> AsyncIterator[str]:
    """The API on a loopback port; its lifespan runs already."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
