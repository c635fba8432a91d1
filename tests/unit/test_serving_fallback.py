"""LLMs in order over real HTTP: the next one answers as long as nothing was given out; what a day's answers cost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
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
    hung_up,
    running,
    silent,
    streamed,
    whole,
)

from cluster.errors import UpstreamError
from cluster.records import Usage
from cluster.telemetry import Meter
from cluster.upstream import LLMNodeConfig
from serving.billing import Bill
from serving.fallback import FallbackLLM
from serving.limits import UNLIMITED, Limits

PRICED = {"prompt_usd_per_million": 1.0, "completion_usd_per_million": 2.0}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)


@contextlib.asynccontextmanager
async def two(first: Script, second: Script, **config: Any) -> AsyncIterator[tuple[FallbackLLM, Meter]]:
    meter, short = Meter(), {"max_attempts": 1, "first_token_timeout_s": 0.2, "timeout_s": 0.5}
    # The second is to answer on a busy machine too.
    async with running(first, **{**short, **config}) as (one, _), running(second, max_attempts=1) as (other, _):
        yield FallbackLLM([one, other], meter), meter


@pytest.mark.parametrize(
    "first",
    [
        hung_up,
        silent,
        streamed(then="hang"),
        streamed(ROLE, then="hang"),
        streamed(b": ping\n\n", b": ping\n\n", then="hang"),
        streamed(ROLE, then="cut"),
        streamed(ROLE + HELLO[:25], then="cut"),
        streamed(ROLE),
        streamed(b"data: {oh\n\n"),
        streamed(b'data: {"error": {"message": "busy"}}\n\n'),
        whole(429, Retry_After="3600"),
        whole(500),
        streamed(b"<html>", content_type="text/html"),
    ],
    ids=[
        "refuses",
        "hangs before its headers",
        "hangs after its headers",
        "hangs after its role",
        "pings and hangs",
        "cut after its role",
        "cut within its content",
        "closes without content",
        "malformed",
        "error first",
        "429",
        "500",
        "page",
    ],
)
def test_the_next_llm_answers_a_stream_of_which_nothing_was_given_out(first: Reply) -> None:
    broken, good = Script(first), Script(GOOD)

    async def main() -> None:
        async with (
            two(broken, good) as (fallback, meter),
            fallback.stream({**BODY, "stream": True}) as (stream, endpoint),
        ):
            assert b"".join([piece async for piece in stream.chunks]) == ROLE + HELLO + END
            assert endpoint is fallback._llms[1].config
            assert meter.total("understudy_upstream_failures_total") == 1

    asyncio.run(main())
    assert len(broken.bodies) == len(good.bodies) == 1


@pytest.mark.parametrize("then", ["cut", "hang"])
def test_bytes_of_two_llms_never_mix(then: str) -> None:
    broken, good = Script(streamed(ROLE, HELLO, then=then)), Script(GOOD)

    async def main() -> None:
        async with two(broken, good) as (fallback, _), fallback.stream(BODY) as (stream, _):
            assert await anext(stream.chunks) == ROLE + HELLO
            with pytest.raises(UpstreamError):
                await anext(stream.chunks)

    asyncio.run(main())
    assert good.bodies == []


def test_the_next_llm_answers_where_the_first_has_no_place_left() -> None:
    may_answer = asyncio.Event()

    async def held(_: Any) -> Any:
        await may_answer.wait()
        return await whole()(_)

    busy, good = Script(held), Script(whole())

    async def main() -> None:
        async with two(busy, good, max_concurrent=1, max_wait_s=0.0, timeout_s=60.0) as (fallback, _):
            first = asyncio.create_task(fallback.chat(BODY))
            while not busy.bodies:
                await asyncio.sleep(0.01)
            reply, endpoint = await fallback.chat(BODY)
            assert reply.body == ANSWER and endpoint is fallback._llms[1].config
            may_answer.set()
            assert (await first)[1] is fallback._llms[0].config

    asyncio.run(main())


def test_an_llm_that_has_spent_its_day_is_left_out_and_the_last_one_says_until_when() -> None:
    scripts = Script(whole()), Script(whole())

    async def main() -> None:
        async with two(*scripts, **PRICED, max_usd_per_day=0.001) as (fallback, meter):
            _, first = await fallback.chat(BODY)
            fallback.spending.charge_answer(first, BODY, {"usage": {"prompt_tokens": 600, "completion_tokens": 200}})
            assert meter.counts["understudy_llm_spend_usd_total", "0", "reported"] == pytest.approx(0.001)
            _, second = await fallback.chat(BODY)
            assert second is fallback._llms[1].config
            only = FallbackLLM(fallback._llms[:1])
            await only.chat(BODY)
            only.spending.charge(first, Usage(prompt_tokens=10**6, completion_tokens=0), is_estimated=False)
            with pytest.raises(UpstreamError, match="max_usd_per_day") as caught:
                await only.chat(BODY)
            assert caught.value.status == 429 and 0 < (caught.value.retry_after_s or 0) <= 86_400
            assert caught.value.body["error"]["code"] == "insufficient_quota"

    asyncio.run(main())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_left", [False, True], ids=["in time", "left"])
def test_an_llm_that_is_left_at_work_has_read_the_request_and_one_that_fails_has_not(
    is_stream: bool, is_left: bool
) -> None:
    """Ten prompts of 30 KB reach a day's limit of ten cents although no answer ever came."""
    body = {**BODY, "messages": [{"role": "user", "content": "x" * 30_000}]}

    async def ask(fallback: FallbackLLM, bill: Bill) -> None:
        if not is_stream:
            await fallback.chat(body, bill)
            return
        async with fallback.stream({**body, "stream": True}, bill):
            raise AssertionError("nothing was said")

    async def main() -> None:
        slow, failing = Script(silent), Script(whole(500))
        quick = {"timeout_s": 0.1, "first_token_timeout_s": 0.1, "breaker_failures": 1_000}
        async with two(slow, failing, **PRICED, **quick, max_usd_per_day=0.1) as (fallback, meter):
            bill = Bill()
            for number in range(10):
                assert fallback.spending.wait_s(fallback.configs[0]) == 0
                asking = asyncio.create_task(ask(fallback, bill))
                while is_left and len(slow.bodies) == number:
                    await asyncio.sleep(0.001)
                if is_left:
                    asking.cancel()
                await asyncio.wait({asking})
            assert fallback.spending.wait_s(fallback.configs[0]) > 0
            assert bill.cost.is_estimated and bill.cost.usd == pytest.approx(0.1, rel=0.02)
            assert meter.counts["understudy_llm_spend_usd_total", "0", "estimated"] == pytest.approx(bill.cost.usd)
            assert meter.total("understudy_llm_spend_usd_total") == pytest.approx(bill.cost.usd), (
                "a failure costs nothing"
            )

    asyncio.run(main())


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_llm_that_asks_for_more_patience_than_a_call_has_is_not_waited_for(is_stream: bool) -> None:
    body, busy = {**BODY, "stream": is_stream}, Script(whole(429, Retry_After="20"))
    good = Script(GOOD if is_stream else whole())

    async def ask(fallback: FallbackLLM, limits: Limits) -> LLMNodeConfig:
        if not is_stream:
            return (await fallback.chat(body, Bill(), limits))[1]
        async with fallback.stream(body, Bill(), limits) as (_, endpoint):
            return endpoint

    async def main() -> None:
        async with two(busy, good, max_attempts=3) as (fallback, _):
            hasty = Limits(asyncio.get_running_loop().time() + 10.0, UNLIMITED.budget_usd)
            assert await ask(fallback, hasty) is fallback.configs[1]
            only = FallbackLLM(fallback._llms[:1])
            with pytest.raises(UpstreamError) as caught:
                await ask(only, hasty)
            assert caught.value.status == 429 and 0 < (caught.value.retry_after_s or 0) <= 20

    asyncio.run(main())
    assert len(busy.bodies) == len(good.bodies) == 1


@pytest.mark.parametrize(("is_stream", "can_pay_both"), [(False, False), (False, True), (True, False), (True, True)])
def test_an_llm_that_was_paid_for_nothing_leaves_less_to_the_next(is_stream: bool, can_pay_both: bool) -> None:
    """A prompt of about 10,000 tokens costs 0.01 dollars, an answer of 100 tokens 0.0002, at the dearest's prices."""
    said = {"messages": [{"role": "user", "content": "x" * 30_000}], "max_completion_tokens": 100}
    body = {**BODY, **said, "stream": is_stream}
    scripts = Script(silent), Script(GOOD if is_stream else whole())
    limits = Limits(UNLIMITED.deadline_at, 0.0205 if can_pay_both else 0.02)

    async def ask(fallback: FallbackLLM) -> None:
        if not is_stream:
            await fallback.chat(body, Bill(), limits)
            return
        async with fallback.stream(body, Bill(), limits):
            pass

    async def main() -> None:
        async with two(*scripts, **PRICED, timeout_s=0.2) as (fallback, _):
            if can_pay_both:
                return await ask(fallback)
            with pytest.raises(UpstreamError) as caught:
                await ask(fallback)
            assert caught.value.body["error"]["code"] == "upstream_timeout"

    asyncio.run(main())
    assert [len(script.bodies) for script in scripts] == [1, int(can_pay_both)]
