"""The LLM client against a real server on loopback: what is retried, what is not, and what the caller is told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
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
    Waits,
    hung_up,
    read_stream,
    running,
    silent,
    streamed,
    whole,
)

from cluster.config import validate
from cluster.errors import ConfigError, UpstreamError
from cluster.upstream import Upstream, UpstreamConfig


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)


def test_a_call_goes_out_as_the_client_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-secret")
    script = Script(whole())

    async def main() -> None:
        async with running(script) as (upstream, _):
            reply = await upstream.chat(BODY)
            assert (reply.status, reply.body, json.loads(reply.raw)) == (200, ANSWER, ANSWER)

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


@pytest.mark.parametrize("first", [*map(whole, (408, 429, 500, 502, 503, 504, 529)), hung_up])
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


def test_an_account_without_money_is_the_owners_to_mend() -> None:
    script = Script(whole(402, {"error": {"message": "Insufficient credits"}}))

    async def main() -> UpstreamError:
        async with running(script) as (upstream, _):
            with pytest.raises(UpstreamError, match="pay its account") as caught:
                await upstream.chat(BODY)
            return caught.value

    assert (asyncio.run(main()).status, len(script.bodies)) == (502, 1)


@pytest.mark.parametrize("status", [429, 200])
def test_a_quota_that_is_used_up_is_not_asked_again(status: int) -> None:
    body = {"error": {"message": "no", "type": "insufficient_quota", "code": 429 if status == 200 else None}}
    script = Script(whole(status, body))

    async def main() -> UpstreamError:
        async with running(script) as (upstream, _):
            with pytest.raises(UpstreamError) as caught:
                await upstream.chat(BODY)
            return caught.value

    error = asyncio.run(main())
    assert (error.status, error.body, len(script.bodies)) == (429, body, 1)


def test_no_cookie_of_one_call_comes_with_the_next() -> None:
    script = Script(whole(200, Set_Cookie="session=of-the-first; Path=/"))

    async def main() -> None:
        async with running(script) as (upstream, _):
            # Clients take no cookies of a bare IP address.
            named = upstream.config.base_url.replace("127.0.0.1", "localhost")
            upstream.config = upstream.config.model_copy(update={"base_url": named})
            for _ in range(2):
                await upstream.chat(BODY)

    asyncio.run(main())
    assert not any("Cookie" in headers for headers in script.headers)


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
    assert 0 <= waits[0] <= 0.25 and 0 <= waits[1] <= 0.5


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
        async with running(script, timeout_s=0.2, first_token_timeout_s=0.2) as (upstream, _):
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
    pieces = (b": hello\n\n", ROLE[:20], ROLE[20:] + HELLO, END[:-5], END[-5:])

    async def main() -> bytes:
        async with running(Script(streamed(*pieces))) as (upstream, _):
            return await read_stream(upstream)

    assert asyncio.run(main()) == b"".join(pieces)


@pytest.mark.parametrize("first", [whole(503), hung_up, streamed(), streamed(then="cut")])
def test_a_stream_is_tried_again_before_its_first_byte(first: Reply) -> None:
    script = Script(first, GOOD)

    async def main() -> bytes:
        async with running(script) as (upstream, _):
            return await read_stream(upstream)

    assert asyncio.run(main()) == ROLE + HELLO + END
    assert len(script.bodies) == 2


def test_a_stream_that_breaks_off_is_an_error_and_is_not_tried_again() -> None:
    script = Script(streamed(ROLE, HELLO, then="cut"))

    async def main() -> None:
        async with running(script) as (upstream, _):
            got = []
            with pytest.raises(UpstreamError, match="broke off") as caught:
                async with upstream.stream(BODY) as stream:
                    async for piece in stream.chunks:
                        got.append(piece)
            assert b"".join(got) == ROLE + HELLO and caught.value.status == 502

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


@pytest.mark.parametrize("host", ["https://llm.example", "http://10.0.0.7:8000", "http://localhost.example"])
def test_an_address_elsewhere_needs_its_key(host: str) -> None:
    with pytest.raises(ConfigError, match=f"export {KEY_ENV}"):
        Upstream(UpstreamConfig(base_url=f"{host}/v1", api_key_env=KEY_ENV))


@pytest.mark.parametrize("host", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
def test_a_loopback_address_needs_none(host: str) -> None:
    assert Upstream(UpstreamConfig(base_url=f"{host}/v1", api_key_env=KEY_ENV)).config.api_key_env == KEY_ENV


@pytest.mark.parametrize(
    "wrong",
    [{"base_url": "llm.example"}, {"max_attempts": 0}, {"timeout_s": 0}, {"max_usd_per_day": 5.0}, {"url": "x"}],
)
def test_wrong_configuration_names_its_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        validate(UpstreamConfig, {"base_url": "http://127.0.0.1/v1", **wrong})
