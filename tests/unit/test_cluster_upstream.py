"""The LLM client against a real server on loopback: what is retried, what is not, and what the caller is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import validate
from cluster.errors import ConfigError, UpstreamError
from cluster.upstream import RETRYABLE, Breaker, Upstream, UpstreamConfig

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


def streamed(*pieces: bytes, is_cut: bool = False) -> Reply:
    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if is_cut:
            await asyncio.sleep(0.05)
            _hang_up(request)
        return response

    return reply


async def hung_up(request: web.Request) -> web.StreamResponse:
    _hang_up(request)
    return web.Response()


async def silent(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(5)
    return web.Response()


def _hang_up(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


@contextlib.asynccontextmanager
async def running(script: Script, **config: Any) -> AsyncIterator[tuple[Upstream, Waits]]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", script.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    waits = Waits()
    base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    upstream = Upstream(UpstreamConfig(base_url=base_url, api_key_env=KEY_ENV, **config), sleep=waits)
    try:
        yield upstream, waits
    finally:
        await upstream.close()
        await runner.cleanup()


async def read_stream(upstream: Upstream) -> bytes:
    async with upstream.stream({**BODY, "stream": True}) as stream:
        return b"".join([piece async for piece in stream.chunks])


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)


def test_a_call_goes_out_as_the_client_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-secret")
    script = Script(whole())

    async def main() -> None:
        async with running(script) as (upstream, _):
            reply = await upstream.chat(BODY, {"Authorization": "Bearer of-the-client"})
            assert (reply.status, reply.body, json.loads(reply.raw)) == (200, ANSWER, ANSWER)
            assert reply.latency_ms > 0

    asyncio.run(main())
    assert script.bodies == [BODY]
    assert script.headers[0].getall("Authorization") == ["Bearer sk-secret"]


def test_the_configured_model_replaces_the_clients() -> None:
    script = Script(whole())

    async def main() -> None:
        async with running(script, model="llm-2") as (upstream, _):
            await upstream.chat(BODY)

    asyncio.run(main())
    assert script.bodies == [{**BODY, "model": "llm-2"}]
    assert BODY["model"] == "llm-1"


@pytest.mark.parametrize("first", [*(whole(status) for status in sorted(RETRYABLE)), hung_up])
def test_what_may_pass_is_tried_again(first: Reply) -> None:
    script = Script(first, whole())

    async def main() -> list[float]:
        async with running(script) as (upstream, waits):
            assert (await upstream.chat(BODY)).body == ANSWER
            return waits.seconds

    assert len(asyncio.run(main())) == 1
    assert len(script.bodies) == 2


@pytest.mark.parametrize("status", [400, 404, 422])
def test_the_clients_own_errors_come_back_untouched(status: int) -> None:
    body = {"error": {"message": "no such field", "type": "invalid_request_error"}}
    script = Script(whole(status, body))

    async def main() -> None:
        async with running(script) as (upstream, waits):
            reply = await upstream.chat(BODY)
            assert (reply.status, reply.body, waits.seconds) == (status, body, [])

    asyncio.run(main())
    assert len(script.bodies) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_the_llm_refuses_is_the_gateways_error_not_the_clients(status: int) -> None:
    script = Script(whole(status, {"error": {"message": "bad key sk-secret"}}))

    async def main() -> UpstreamError:
        async with running(script) as (upstream, _):
            with pytest.raises(UpstreamError, match=KEY_ENV) as caught:
                await upstream.chat(BODY)
            return caught.value

    error = asyncio.run(main())
    assert error.status == 502 and "sk-secret" not in str(error.body)
    assert len(script.bodies) == 1


def test_attempts_end_with_the_llms_own_error() -> None:
    body = {"error": {"message": "slow down", "type": "rate_limit"}}
    script = Script(whole(429, body))

    async def main() -> tuple[UpstreamError, list[float]]:
        async with running(script, max_attempts=3) as (upstream, waits):
            with pytest.raises(UpstreamError) as caught:
                await upstream.chat(BODY)
            return caught.value, waits.seconds

    error, waits = asyncio.run(main())
    assert (error.status, error.body) == (429, body)
    assert len(script.bodies) == 3 and len(waits) == 2
    assert 0 < waits[0] <= 0.25 and 0.25 <= waits[1] <= 0.5


def test_retry_after_is_waited_for_or_given_up_on() -> None:
    async def main() -> None:
        async with running(Script(whole(429, Retry_After="7"), whole())) as (upstream, waits):
            await upstream.chat(BODY)
            assert waits.seconds == [7.0]
        script = Script(whole(429, Retry_After="3600"))
        async with running(script) as (upstream, waits):
            with pytest.raises(UpstreamError):
                await upstream.chat(BODY)
            assert waits.seconds == [] and len(script.bodies) == 1

    asyncio.run(main())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_timeout_is_not_sent_twice(is_stream: bool) -> None:
    script = Script(silent)

    async def main() -> UpstreamError:
        async with running(script, timeout_s=0.2, first_byte_timeout_s=0.2) as (upstream, _):
            with pytest.raises(UpstreamError) as caught:
                await (read_stream(upstream) if is_stream else upstream.chat(BODY))
            return caught.value

    assert asyncio.run(main()).status == 504
    assert len(script.bodies) == 1


def test_an_unreachable_llm_is_named_with_the_next_step() -> None:
    async def main() -> UpstreamError:
        url = "http://127.0.0.1:9/v1?key=word"
        upstream = Upstream(UpstreamConfig(base_url=url, api_key_env=KEY_ENV), sleep=Waits())
        with pytest.raises(UpstreamError) as caught:
            await upstream.chat(BODY)
        await upstream.close()
        return caught.value

    error = asyncio.run(main())
    assert error.status == 503 and error.body is not None
    message = error.body["error"]["message"]
    assert "upstream.base_url=http://127.0.0.1:9/v1" in message and "check the address" in message
    assert "word" not in message


def test_a_stream_passes_byte_for_byte() -> None:
    pieces = (b'data: {"a": 1}\n', b"\ndata: [DO", b"NE]\n\n")

    async def main() -> bytes:
        async with running(Script(streamed(*pieces))) as (upstream, _):
            return await read_stream(upstream)

    assert asyncio.run(main()) == b"".join(pieces)


@pytest.mark.parametrize("first", [whole(503), hung_up, streamed(), streamed(is_cut=True)])
def test_a_stream_is_tried_again_before_its_first_byte(first: Reply) -> None:
    script = Script(first, streamed(b"data: [DONE]\n\n"))

    async def main() -> bytes:
        async with running(script) as (upstream, _):
            return await read_stream(upstream)

    assert asyncio.run(main()) == b"data: [DONE]\n\n"
    assert len(script.bodies) == 2


def test_a_stream_that_breaks_off_is_an_error_and_is_not_tried_again() -> None:
    script = Script(streamed(b"data: 1\n\n", is_cut=True))

    async def main() -> None:
        async with running(script) as (upstream, _):
            got = []
            with pytest.raises(UpstreamError, match="broke off") as caught:
                async with upstream.stream(BODY) as stream:
                    async for piece in stream.chunks:
                        got.append(piece)
            assert got == [b"data: 1\n\n"] and caught.value.status == 502

    asyncio.run(main())
    assert len(script.bodies) == 1


def test_a_dead_endpoint_is_left_alone() -> None:
    script = Script(whole(500))

    async def main() -> None:
        async with running(script, max_attempts=1, breaker_failures=2) as (upstream, _):
            for _ in range(4):
                with pytest.raises(UpstreamError):
                    await upstream.chat(BODY)

    asyncio.run(main())
    assert len(script.bodies) == 2


def test_rate_limits_do_not_open_the_breaker() -> None:
    script = Script(whole(429))

    async def main() -> None:
        async with running(script, max_attempts=1, breaker_failures=1) as (upstream, _):
            for _ in range(3):
                with pytest.raises(UpstreamError):
                    await upstream.chat(BODY)

    asyncio.run(main())
    assert len(script.bodies) == 3


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 4))
def test_the_breaker_opens_exactly_after_failures_in_a_row(outcomes: list[bool], limit: int) -> None:
    breaker, in_a_row = Breaker(limit, 10.0, lambda: 0.0), 0
    for is_good in outcomes:
        if not breaker.may_call():
            break
        breaker.succeed() if is_good else breaker.fail()
        in_a_row = 0 if is_good else in_a_row + 1
    assert breaker.may_call() == (in_a_row < limit)


def test_an_open_breaker_lets_one_probe_through() -> None:
    now = [0.0]
    breaker = Breaker(1, 10.0, lambda: now[0])
    breaker.fail()
    now[0] = 9.9
    assert not breaker.may_call()
    now[0] = 10.0
    assert [breaker.may_call(), breaker.may_call()] == [True, False]
    breaker.succeed()
    assert breaker.may_call() and breaker.may_call()


@pytest.mark.parametrize("host", ["https://llm.example", "http://10.0.0.7:8000", "http://localhost.example"])
def test_an_address_elsewhere_needs_its_key(host: str) -> None:
    with pytest.raises(ConfigError, match=f"export {KEY_ENV}"):
        Upstream(UpstreamConfig(base_url=f"{host}/v1", api_key_env=KEY_ENV))


@pytest.mark.parametrize("host", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
def test_a_loopback_address_needs_none(host: str) -> None:
    assert Upstream(UpstreamConfig(base_url=f"{host}/v1", api_key_env=KEY_ENV)).config.api_key_env == KEY_ENV


@pytest.mark.parametrize("wrong", [{"base_url": "llm.example"}, {"max_attempts": 0}, {"timeout_s": 0}, {"url": "x"}])
def test_wrong_configuration_names_its_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        validate(UpstreamConfig, {"base_url": "http://127.0.0.1/v1", **wrong})
