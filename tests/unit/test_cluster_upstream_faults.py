"""Every way in which an endpoint breaks, over real HTTP: what is tried again, what the caller is told, what is spared."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from scripted_llm import (
    ANSWER,
    BODY,
    END,
    GOOD,
    HELLO,
    KEY_ENV,
    ROLE,
    Reply,
    Script,
    hung_up,
    read_stream,
    running,
    silent,
    streamed,
    whole,
)

from cluster.errors import UpstreamError
from cluster.upstream import Upstream

CLIENTS = b'data: {"error": {"message": "too long", "code": 400}}\n\ndata: [DONE]\n\n'
BUSY = b'data: {"error": {"message": "busy", "code": "overloaded"}}\n\n'
QUICK = {"first_token_timeout_s": 0.2}


async def html(_: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>Welcome</html>", content_type="text/html")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)


def _fail(script: Script, is_stream: bool = True, **config: object) -> UpstreamError:
    async def main() -> UpstreamError:
        async with running(script, **config) as (upstream, _):
            with pytest.raises(UpstreamError) as caught:
                await (read_stream(upstream) if is_stream else upstream.chat(BODY))
            return caught.value

    return asyncio.run(main())


@pytest.mark.parametrize(
    "first",
    [
        streamed(ROLE),
        streamed(ROLE, b"data: [DONE]\n\n"),
        streamed(ROLE, then="cut"),
        streamed(ROLE + HELLO[:30], then="cut"),
        streamed(b"data: {oh\n\n", HELLO, END),
        streamed(BUSY),
        streamed(ROLE, BUSY),
        whole(200, {"error": {"message": "busy", "code": 503}}),
    ],
    ids=["closed", "done", "cut", "cut inside content", "malformed", "error first", "error after role", "error body"],
)
def test_a_stream_that_breaks_before_its_content_is_replaced_and_none_of_it_is_seen(first: Reply) -> None:
    script = Script(first, GOOD)

    async def main() -> bytes:
        async with running(script) as (upstream, _):
            return await read_stream(upstream)

    assert asyncio.run(main()) == ROLE + HELLO + END
    assert len(script.bodies) == 2


@pytest.mark.parametrize(
    "first", [silent, streamed(then="hang"), streamed(ROLE, then="hang"), streamed(b": ping\n\n", then="hang")]
)
def test_a_stream_that_hangs_before_its_content_is_given_up_and_not_asked_for_twice(first: Reply) -> None:
    script = Script(first)
    error = _fail(script, **QUICK)
    assert error.status == 504 and len(script.bodies) == 1


def test_keep_alives_do_not_keep_a_stream_without_content_alive() -> None:
    async def pinging(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(b": ping\n\n")
            await asyncio.sleep(0.01)

    assert _fail(Script(pinging), **QUICK).status == 504


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_page_instead_of_an_answer_asks_for_the_right_address(is_stream: bool) -> None:
    script = Script(html)
    error = _fail(script, is_stream)
    assert error.status == 502 and "is this the API's address?" in error.message and len(script.bodies) == 1


@pytest.mark.parametrize("reply", [streamed(CLIENTS), whole(200, {"error": {"message": "too long", "code": 400}})])
def test_the_clients_own_error_under_status_200_gets_its_own_status(reply: Reply) -> None:
    script = Script(reply)

    async def main() -> None:
        async with running(script) as (upstream, _):
            async with upstream.stream(BODY) as stream:
                raw = b"".join([piece async for piece in stream.chunks])
            assert (stream.status, stream.content_type) == (400, "application/json")
            assert json.loads(raw)["error"]["message"] == "too long"

    asyncio.run(main())
    assert len(script.bodies) == 1


@pytest.mark.parametrize("first", [whole(200, {"error": {"code": 500}}), hung_up, whole(500)])
def test_a_whole_answer_that_is_none_is_asked_for_again(first: Reply) -> None:
    script = Script(first, whole())

    async def main() -> None:
        async with running(script) as (upstream, _):
            assert (await upstream.chat(BODY)).body == ANSWER

    asyncio.run(main())
    assert len(script.bodies) == 2


def test_a_whole_answer_that_is_cut_is_asked_for_again() -> None:
    script = Script(streamed(b'{"id": "1", ', then="cut", content_type="application/json"), whole())

    async def main() -> None:
        async with running(script) as (upstream, _):
            assert (await upstream.chat(BODY)).body == ANSWER

    asyncio.run(main())
    assert len(script.bodies) == 2


@pytest.mark.parametrize("then", ["hang", "cut"])
def test_a_stream_that_breaks_after_its_content_is_an_error_in_its_middle(then: str) -> None:
    script = Script(streamed(ROLE, HELLO, then=then))

    async def main() -> None:
        async with running(script, timeout_s=0.2) as (upstream, _):
            async with upstream.stream(BODY) as stream:
                assert await anext(stream.chunks) == ROLE + HELLO
                with pytest.raises(UpstreamError, match="broke off"):
                    await anext(stream.chunks)

    asyncio.run(main())
    assert len(script.bodies) == 1


def test_the_total_time_ends_a_stream_that_would_go_on_for_ever() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(HELLO)
        while True:
            await response.write(b": ping\n\n")
            await asyncio.sleep(0.01)

    error = _fail(Script(endless), total_timeout_s=0.3)
    assert error.status == 504 and "total_timeout_s" in error.message


def test_no_attempt_begins_that_the_total_time_leaves_no_room_for() -> None:
    script = Script(whole(503, Retry_After="20"))
    error = _fail(script, is_stream=False, total_timeout_s=10.0)
    assert (error.status, error.retry_after_s) == (503, 20.0) and len(script.bodies) == 1


def test_what_the_endpoint_asked_for_is_told_and_kept_to() -> None:
    script = Script(whole(429, Retry_After="7"))

    async def main() -> None:
        async with running(script, max_attempts=1) as (upstream, _):
            with pytest.raises(UpstreamError) as caught:
                await upstream.chat(BODY)
            assert (caught.value.status, caught.value.retry_after_s) == (429, 7.0)
            with pytest.raises(UpstreamError, match="asked to be left alone") as caught:
                await upstream.chat(BODY)
            assert caught.value.status == 429 and 0 < (caught.value.retry_after_s or 0) <= 7

    asyncio.run(main())
    assert len(script.bodies) == 1


@pytest.mark.parametrize(("first_token_timeout_s", "is_stream"), [(0.2, True), (60.0, True), (0.2, False)])
def test_a_stream_that_hangs_opens_the_breaker_though_its_callers_are_less_patient(
    first_token_timeout_s: float, is_stream: bool
) -> None:
    """A whole answer, or one that might still begin, says nothing when it is left."""
    script, body = Script(silent), {**BODY, "stream": is_stream}
    hangs = is_stream and first_token_timeout_s < 1

    async def ask(upstream: Upstream) -> None:
        async with upstream.stream(body):
            raise AssertionError("nothing was said")

    async def main() -> None:
        patience = {"first_token_timeout_s": first_token_timeout_s, "timeout_s": 60.0}
        async with running(script, breaker_failures=1, **patience) as (upstream, _):
            for number in range(2):
                asking = asyncio.create_task(ask(upstream) if is_stream else upstream.chat(body))
                while len(script.bodies) == number and not asking.done():
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.12)
                asking.cancel()
                (outcome,) = await asyncio.gather(asking, return_exceptions=True)
            assert isinstance(outcome, UpstreamError) == hangs

    asyncio.run(main())
    assert len(script.bodies) == 1 + (not hangs)


def test_a_rate_that_is_used_up_for_one_model_is_none_of_anothers() -> None:
    script = Script(whole(429, Retry_After="7"), whole())

    async def main() -> None:
        async with running(script, max_attempts=1) as (upstream, _):
            with pytest.raises(UpstreamError):
                await upstream.chat(BODY)
            assert (await upstream.chat({**BODY, "model": "llm-2"})).status == 200
            with pytest.raises(UpstreamError, match="asked to be left alone"):
                await upstream.chat(BODY)

    asyncio.run(main())
    assert [body["model"] for body in script.bodies] == ["llm-1", "llm-2"]


def test_an_open_breaker_says_when_to_come_back() -> None:
    script = Script(whole(500))

    async def main() -> None:
        async with running(script, max_attempts=1, breaker_failures=1, breaker_reset_s=30.0) as (upstream, _):
            for _ in range(2):
                with pytest.raises(UpstreamError) as caught:
                    await upstream.chat(BODY)
            assert caught.value.status == 503 and 0 < (caught.value.retry_after_s or 0) <= 30

    asyncio.run(main())
    assert len(script.bodies) == 1


def test_calls_beyond_the_limit_wait_a_little_and_are_turned_away() -> None:
    may_answer = asyncio.Event()

    async def held(_: web.Request) -> web.StreamResponse:
        await may_answer.wait()
        return web.json_response(ANSWER)

    script = Script(held)

    async def main() -> None:
        async with running(script, max_concurrent=1, max_wait_s=0.05) as (upstream, _):
            first = asyncio.create_task(upstream.chat(BODY))
            while not script.bodies:
                await asyncio.sleep(0.01)
            with pytest.raises(UpstreamError, match="max_concurrent") as caught:
                await upstream.chat(BODY)
            assert caught.value.status == 429 and caught.value.retry_after_s
            waiting = asyncio.create_task(upstream.chat(BODY))
            await asyncio.sleep(0)
            may_answer.set()
            assert (await first).body == (await waiting).body == ANSWER

    asyncio.run(main())
    assert len(script.bodies) == 2


def test_a_client_that_leaves_gives_its_place_back_and_hangs_up() -> None:
    gone = asyncio.Event()

    async def held(_: web.Request) -> web.StreamResponse:
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        raise AssertionError("the client leaves first")

    script = Script(held, whole())

    async def main() -> None:
        async with running(script, max_concurrent=1, max_wait_s=0.0) as (upstream, _):
            call = asyncio.create_task(upstream.chat(BODY))
            while not script.bodies:
                await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await asyncio.wait_for(gone.wait(), 10)
            assert (await upstream.chat(BODY)).body == ANSWER

    asyncio.run(main())
