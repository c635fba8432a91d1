"""A specialist's trouble on a real Ray Serve: whatever happens to it, clients get whole answers, each kept once.

Its engine is the benchmarks' stub, so that an answer tells who gave it; the whole matrix is `understudy bench serve`'s.
"""

from __future__ import annotations

import asyncio
import collections
import os
import pathlib
import signal
import time
from typing import Any

import httpx
import pytest
from fakes import LLM_TEXT, FakeLLM

from cluster.calls import read_calls
from cluster.sse import SseReader
from cluster.store import Store
from jobs.bench.stage import make_key, publish_stage, task_request
from jobs.bench.stub_graph import APP, BROKEN, SLOW, bind_stub_graph, stub_facts, stub_text
from serving.app import ServeArgs
from serving.openai_wire import CLIENT_GONE
from serving.reassembly import reassemble

pytestmark = pytest.mark.integration

TIMEOUT_S = 60.0
ADAPTERS = {task: f"adapters/t50-{task}" for task in ("good", SLOW, BROKEN)}
SURE = 1
"""A number whose answer the stub is sure of."""


def test_no_client_notices_what_happens_to_a_specialist(serve_port: int, tmp_path: pathlib.Path) -> None:
    from ray import serve

    store = Store(str(tmp_path / "store"))
    key = make_key(store)
    served = {task: (adapter, 0.5, task_request(task, 0)) for task, adapter in ADAPTERS.items()}
    release = publish_stage(store, "first", served)

    async def scenario() -> list[str]:
        llm = FakeLLM()
        args = {
            "store": store.uri,
            "upstream": [{"base_url": await llm.start(), "api_key_env": "UNDERSTUDY_TEST_UPSTREAM_KEY"}],
        }
        graph = bind_stub_graph(ServeArgs.model_validate(args))
        try:
            await asyncio.to_thread(serve.run, graph, name=APP, route_prefix="/")
            client = Client(f"http://127.0.0.1:{serve_port}/v1/chat/completions", key)
            async with client.http:
                await client.until_accepted()
                await leave(client)
                await lose_the_engine(client)
                await lose_the_routes(client, release)
            return client.call_ids
        finally:
            await asyncio.to_thread(serve.delete, APP)
            await llm.close()

    async def leave(client: Client) -> None:
        """Its work ends in the engine, and the call is kept as left."""
        before = await asyncio.to_thread(stub_facts)
        asking = asyncio.create_task(client.ask(SLOW))
        await until("num_asked", before["num_asked"] + 1)
        asking.cancel()
        await until("num_left", 1)

    async def lose_the_engine(client: Client) -> None:
        """Its only replica dies while it answers; an adapter that does not load is left out from the start."""
        before = await asyncio.to_thread(stub_facts)
        asking = [asyncio.create_task(client.ask(SLOW, stream=bool(number % 2))) for number in range(4)]
        await until("num_asked", before["num_asked"] + len(asking))
        os.kill(before["pid"], signal.SIGKILL)
        asking += [asyncio.create_task(client.ask(task)) for task in (BROKEN, "good", "good")]
        replies = await asyncio.gather(*asking)
        assert [said for _, said in replies[:5]] == [LLM_TEXT] * 5, "nothing of the specialist's"
        told = [(headers["x-understudy-route"], headers["x-understudy-reason"]) for headers, _ in replies]
        assert all(route == "fall_back" and reason.startswith("error: ") for route, reason in told[:4]), told
        assert told[4] == ("llm", "adapter does not load"), told
        await client.until_accepted()

    async def lose_the_routes(client: Client, release: str) -> None:
        """A release is promoted whose route model cannot be read."""
        publish_stage(store, "second", {"good": served["good"]}, has_routes=False)
        await asyncio.sleep(2.0)
        headers, said = await client.ask("good")
        assert (headers["x-understudy-release"], said) == (release, stub_text(ADAPTERS["good"], SURE))

    call_ids = asyncio.run(scenario())
    # Now and then an accepted call is asked again of the LLM, which is a call of its own.
    calls = [call for call in read_calls(store) if not call.audit_of]
    kept = collections.Counter(call.call_id for call in calls if call.status != CLIENT_GONE)
    assert kept == dict.fromkeys(call_ids, 1) and len(calls) == len(call_ids) + 1


async def until(fact: str, number: int) -> None:
    """Wait until the engine has done something so many times."""
    async with asyncio.timeout(TIMEOUT_S):
        while (await asyncio.to_thread(stub_facts))[fact] < number:
            await asyncio.sleep(0.05)


class Client:
    """Takes nothing but whole answers, of the specialist or of the LLM."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT_S)
        self.call_ids: list[str] = []
        self._url = url

    async def ask(self, task: str, **extra: Any) -> tuple[httpx.Headers, str]:
        """Headers of the answer, and what it says."""
        reply = await self.http.post(self._url, json=task_request(task, SURE, **extra))
        assert reply.status_code == 200, reply.text
        self.call_ids.append(reply.headers["x-understudy-call-id"])
        reader = SseReader()
        body = reassemble(reader.feed(reply.content)) if extra.get("stream") else reply.json()
        said = body["choices"][0]["message"]["content"]
        assert said in (LLM_TEXT, stub_text(ADAPTERS[task], SURE)), said
        return reply.headers, said

    async def until_accepted(self) -> None:
        """Ask, streamed and not, until a specialist answers."""
        deadline = time.monotonic() + TIMEOUT_S
        while (await self.ask("good", stream=True))[0]["x-understudy-route"] != "accept":
            assert time.monotonic() < deadline, "no specialist answers"
            await asyncio.sleep(0.2)
