"""Load on a real Ray Serve: clients that leave, a gateway that is full, a deployment that was scaled to zero."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from aiohttp import web
from background_loop import background_loop
from scripted_llm import ANSWER, KEY_ENV, Script, listening

from cluster.calls import read_calls
from cluster.prompts import PromptFormat
from cluster.store import Store
from serving.app import ServeArgs, build
from serving.presence import ColdStart
from serving.scaling import ScaleConfig, autoscaling_of
from serving.specialist import ServeEngine

pytestmark = pytest.mark.integration

APP, ASLEEP = "test-load", "test-asleep"
MAX_ONGOING, TIMEOUT_S = 3, 60.0
BODY = {"model": "llm-1", "messages": [{"role": "user", "content": "Hello"}]}
PROMPT_FORMAT = PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100)


class Endpoint(NamedTuple):
    """A gateway in front of an LLM that answers when it is told to."""

    url: str
    store: Store
    llm: HeldLLM
    loop: asyncio.AbstractEventLoop


class HeldLLM:
    """Holds its answers back while `may_answer` is unset, and counts who asked and who hung up."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.num_asked = self.num_hung_up = 0

    async def answer(self, _: web.Request) -> web.StreamResponse:
        self.num_asked += 1
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.num_hung_up += 1
            raise
        return web.json_response(ANSWER)


@pytest.fixture(scope="module")
def endpoint(serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from ray import serve

    store, llm = Store(str(tmp_path_factory.mktemp("load") / "store")), HeldLLM()
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(background_loop())
        served = listening(Script(llm.answer))
        base_url = asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result(10)
        stack.callback(lambda: asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop).result(10))
        upstream = [{"base_url": base_url, "api_key_env": KEY_ENV, "max_attempts": 1}]
        args = {"store": store.uri, "upstream": upstream, "gateway": {"auth": "open", "max_ongoing": MAX_ONGOING}}
        serve.run(build(ServeArgs.model_validate(args)), name=APP, route_prefix="/")
        stack.callback(serve.delete, APP)
        yield Endpoint(f"http://127.0.0.1:{serve_port}/v1/chat/completions", store, llm, loop)


def test_a_client_that_leaves_before_its_answer_closes_the_llms_connection(endpoint: Endpoint) -> None:
    endpoint.loop.call_soon_threadsafe(endpoint.llm.may_answer.clear)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(endpoint.url, json=BODY, timeout=httpx.Timeout(TIMEOUT_S, read=2.0))
    _wait(lambda: endpoint.llm.num_hung_up == 1)
    _wait(lambda: [call.status for call in read_calls(endpoint.store)] == [499])


def test_a_full_gateway_turns_calls_away_with_openais_error_and_when_to_come_back(endpoint: Endpoint) -> None:
    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            before = endpoint.llm.num_asked
            held = [asyncio.create_task(client.post(endpoint.url, json=BODY)) for _ in range(MAX_ONGOING)]
            while endpoint.llm.num_asked < before + MAX_ONGOING:
                await asyncio.sleep(0.05)
            refused = await client.post(endpoint.url, json=BODY)
            endpoint.loop.call_soon_threadsafe(endpoint.llm.may_answer.set)
            return [*await asyncio.gather(*held), refused]

    endpoint.loop.call_soon_threadsafe(endpoint.llm.may_answer.clear)
    *answered, refused = asyncio.run(scenario())
    assert [reply.status_code for reply in answered] == [200] * MAX_ONGOING
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"


def test_while_no_replica_is_up_calls_are_sent_on_and_start_one(serve_port: int) -> None:
    from ray import serve

    scale = ScaleConfig(min_replicas=0, downscale_delay_s=1.0, upscale_delay_s=0.0)

    @serve.deployment(autoscaling_config=autoscaling_of(scale, 8), ray_actor_options={"num_cpus": 0})
    class Sleeper:
        async def fingerprint(self) -> str:
            return "awake"

        async def answer(self, *_: Any) -> str:
            return "refund"

    async def scenario(engine: ServeEngine) -> None:
        await asyncio.to_thread(_wait, lambda: not _num_running(ASLEEP))
        with pytest.raises(ColdStart):
            await engine.answer(None, PROMPT_FORMAT, BODY, 16)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            with contextlib.suppress(ColdStart):
                assert await engine.answer(None, PROMPT_FORMAT, BODY, 16) == "refund"
                return
            assert time.monotonic() < deadline, "no replica was started"
            await asyncio.sleep(0.1)

    handle = serve.run(Sleeper.bind(), name=ASLEEP, route_prefix=None)
    try:
        asyncio.run(scenario(ServeEngine(handle, scale.downscale_delay_s)))
    finally:
        serve.delete(ASLEEP)


def _num_running(app: str) -> int:
    from ray import serve

    (deployment,) = serve.status().applications[app].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
