"""serving/cluster_llm.py's client against a scripted handle: replies, streams, and errors in an endpoint's words."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fakes import DEAD, LLM_TEXT, REQUEST, llm_body
from scripted_llm import HELLO, ROLE

from cluster.config import validate
from cluster.errors import ConfigError, UpstreamError
from cluster.sse import SseReader
from cluster.upstream import Upstream, UpstreamConfig
from serving.app import ServeArgs
from serving.cluster_llm import ClusterLLM, ClusterLLMConfig
from serving.fallback import FallbackLLM
from serving.openai_wire import completion_chunks
from serving.reassembly import reassemble

with warnings.catch_warnings():
    # Ray Serve's config classes give pydantic keywords in a way of pydantic 1.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import BackPressureError

Script = list[tuple[int, bytes] | Exception | float]
WHOLE: Script = [(200, json.dumps(llm_body()).encode())]


class FakePieces:
    """What a handle's streaming call gives: pieces, an error to raise, or seconds to wait."""

    def __init__(self, script: Script) -> None:
        self.num_cancelled = 0
        self._pieces = self._play(script)

    def __aiter__(self) -> FakePieces:
        return self

    async def __anext__(self) -> tuple[int, bytes]:
        return await anext(self._pieces)

    def cancel(self) -> None:
        self.num_cancelled += 1

    async def _play(self, script: Script) -> AsyncIterator[tuple[int, bytes]]:
        for step in script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step


class FakeHandle:
    """Stands in for a DeploymentHandle of ClusterLLMServer."""

    def __init__(self, script: Script) -> None:
        self.script, self.asked, self.pieces = script, list[dict[str, Any]](), list[FakePieces]()
        self.complete = self

    def options(self, *, stream: bool) -> FakeHandle:
        assert stream
        return self

    def remote(self, body: dict[str, Any]) -> FakePieces:
        self.asked.append(body)
        self.pieces.append(FakePieces(self.script))
        return self.pieces[-1]


def cluster_llm(script: Script, **config: Any) -> tuple[ClusterLLM, FakeHandle]:
    handle = FakeHandle(script)
    return ClusterLLM(ClusterLLMConfig(cluster_model="/models/tiny/", **config), handle), handle


def test_a_whole_answer_comes_as_from_an_endpoint() -> None:
    llm, handle = cluster_llm(WHOLE)
    reply = asyncio.run(llm.chat(REQUEST))
    assert (reply.status, reply.body) == (200, llm_body())
    assert handle.asked == [{**REQUEST, "model": "tiny", "stream": False}] and handle.pieces[0].num_cancelled == 1


def test_a_stream_passes_through_and_is_cancelled_when_it_is_left() -> None:
    events = completion_chunks(llm_body(), include_usage=True)

    async def scenario() -> None:
        llm, handle = cluster_llm([(200, event) for event in events])
        async with llm.stream(REQUEST) as stream:
            assert (stream.status, stream.content_type) == (200, "text/event-stream")
            assert stream.hides_usage and handle.asked[0]["stream_options"] == {"include_usage": True}
            raw = b"".join([piece async for piece in stream.chunks])
        body = reassemble(SseReader().feed(raw))
        assert body["choices"][0]["message"]["content"] == LLM_TEXT and body["usage"] == llm_body()["usage"]
        async with llm.stream({**REQUEST, "stream_options": {"include_usage": True}}) as stream:
            assert handle.pieces[1].num_cancelled == 0 and not stream.hides_usage
        assert handle.pieces[1].num_cancelled == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ([BackPressureError(num_queued_requests=1, max_queued_requests=1)], 429),
        ([ActorDiedError()], 503),
        ([5.0], 504),
        ([(500, b'{"error": {"message": "engine died"}}')], 500),
        ([], 502),
        ([(200, b"no JSON")], 502),
    ],
)
def test_failures_are_upstream_errors_fit_for_a_client(script: Script, status: int) -> None:
    async def scenario() -> None:
        llm, _ = cluster_llm(script, timeout_s=0.05, first_token_timeout_s=0.05)
        with pytest.raises(UpstreamError) as caught:
            await llm.chat(REQUEST)
        assert caught.value.status == status and "error" in (caught.value.body or {})

    asyncio.run(scenario())


def test_the_clients_own_error_is_passed_on() -> None:
    error = json.dumps({"error": {"message": "too long", "code": 400}}).encode()

    async def scenario() -> None:
        llm, _ = cluster_llm([(400, error)])
        assert (await llm.chat(REQUEST)).status == 400
        async with llm.stream(REQUEST) as stream:
            assert (stream.status, stream.content_type) == (400, "application/json")

    asyncio.run(scenario())


def test_a_stream_that_breaks_off_says_so() -> None:
    async def scenario() -> None:
        llm, _ = cluster_llm([(200, HELLO), ActorDiedError()])
        async with llm.stream(REQUEST) as stream:
            assert await anext(stream.chunks) == HELLO
            with pytest.raises(UpstreamError):
                async for _ in stream.chunks:
                    pass

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("script", "status"),
    [([(200, ROLE), 5.0], 504), ([(200, ROLE)], 502), ([(200, b'data: {"error": {"code": 503}}\n\n')], 503)],
)
def test_a_stream_without_content_is_no_answer(script: Script, status: int) -> None:
    async def scenario() -> None:
        llm, handle = cluster_llm(script, first_token_timeout_s=0.05)
        with pytest.raises(UpstreamError) as caught:
            async with llm.stream(REQUEST):
                pass
        assert caught.value.status == status and handle.pieces[0].num_cancelled == 1

    asyncio.run(scenario())


def test_the_clients_own_error_within_a_stream_gets_its_own_status() -> None:
    async def scenario() -> None:
        llm, _ = cluster_llm([(200, b'data: {"error": {"code": 400}}\n\n')])
        async with llm.stream(REQUEST) as stream:
            assert (stream.status, stream.content_type) == (400, "application/json")

    asyncio.run(scenario())


def test_a_model_that_keeps_failing_is_left_alone() -> None:
    async def scenario() -> None:
        llm, handle = cluster_llm([ActorDiedError()], breaker_failures=2)
        for _ in range(3):
            with pytest.raises(UpstreamError):
                await llm.chat(REQUEST)
        assert len(handle.asked) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("is_cluster_first", [False, True])
def test_llms_are_asked_in_the_order_of_the_config(is_cluster_first: bool) -> None:
    async def scenario() -> None:
        llm, handle = cluster_llm(WHOLE)
        dead = Upstream(UpstreamConfig(base_url=DEAD, max_attempts=1))
        fallback = FallbackLLM([llm, dead] if is_cluster_first else [dead, llm])
        reply, config = await fallback.chat(REQUEST)
        assert reply.body == llm_body() and config is llm.config and len(handle.asked) == 1
        assert [model["id"] for model in await fallback.list_models()] == ["tiny"]
        await fallback.close()

    asyncio.run(scenario())


def test_the_config_says_by_its_fields_which_llm_is_meant() -> None:
    upstream = [{"cluster_model": "org/tiny", "name": "small"}, {"base_url": "http://localhost:1/v1"}]
    args = validate(ServeArgs, {"store": "s", "upstream": upstream})
    assert [type(one) for one in args.upstream] == [ClusterLLMConfig, UpstreamConfig]
    assert args.upstream[0].model_name == "small"
    assert validate(ServeArgs, args.model_dump(mode="json")) == args
    with pytest.raises(ConfigError, match=r"upstream\.0\.cluster_modell: unknown key"):
        validate(ServeArgs, {"store": "s", "upstream": [{"cluster_modell": "x"}]})
