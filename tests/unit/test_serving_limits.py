"""A call's deadline and budget with plain values: headers only tighten, money is held back before it is spent."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fakes import REQUEST
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UpstreamError
from cluster.prices import tokens_cost_usd
from cluster.records import Usage
from cluster.upstream import UpstreamConfig
from serving.draining import Drain
from serving.limits import UNLIMITED_TOKENS, fit_budget, late_error, read_limits, until
from serving.openai_wire import Denied


def _llm(prompt: float, completion: float) -> UpstreamConfig:
    prices = {"prompt_usd_per_million": prompt, "completion_usd_per_million": completion}
    return UpstreamConfig(base_url="http://127.0.0.1:9/v1", **prices)


@given(st.floats(0.001, 1e6), st.floats(0, 1e3) | st.none(), st.floats(0.001, 1e6), st.floats(0, 1e3))
def test_a_client_can_only_tighten(deadline_s: float, budget: float | None, asked_s: float, asked_usd: float) -> None:
    headers = {"x-deadline-s": repr(asked_s), "x-budget-usd": repr(asked_usd)}
    ours = read_limits({}, deadline_s=deadline_s, budget_usd=budget, now=10.0)
    asked = read_limits(headers, deadline_s=deadline_s, budget_usd=budget, now=10.0)
    assert ours == (10.0 + deadline_s, math.inf if budget is None else budget)
    assert asked.deadline_at == 10.0 + min(deadline_s, asked_s) and asked.budget_usd == min(ours.budget_usd, asked_usd)


@pytest.mark.parametrize(
    "headers",
    [{"x-deadline-s": text} for text in ("", "soon", "0", "-1", "nan", "inf")]
    + [{"x-budget-usd": text} for text in ("", "cheap", "-0.1", "nan", "inf")],
    ids=str,
)
def test_a_limit_that_cannot_be_read_is_refused_by_name(headers: dict[str, str]) -> None:
    (name,) = headers
    with pytest.raises(Denied, match=f"{name}: allowed are") as caught:
        read_limits(headers, deadline_s=1.0, budget_usd=None, now=0.0)
    assert caught.value.status == 400 and caught.value.body["error"]["param"] == name


PRICES = st.just(0.0) | st.floats(1e-9, 100)
"""Below that a token costs less than money can tell from nothing."""


def test_a_specialist_leaves_half_of_the_time_to_the_llm() -> None:
    limits = read_limits({}, deadline_s=8.0, budget_usd=None, now=100.0)
    assert limits.specialist_s(100.0, 10.0) == 4.0 and limits.specialist_s(100.0, 3.0) == 3.0
    assert limits.specialist_s(104.0, 10.0) == 2.0 and limits.specialist_s(200.0, 10.0) == 0.0


@given(
    st.floats(0, 0.1),
    st.lists(st.tuples(PRICES, PRICES), min_size=1, max_size=3),
    st.integers(1, 5000) | st.none(),
    st.integers(1, 4) | st.none(),
    st.text(max_size=300),
)
def test_what_an_llm_is_sent_never_costs_more_than_the_budget(
    budget: float, prices: list[tuple[float, float]], limit: int | None, n: int | None, text: str
) -> None:
    asked = {"max_tokens": limit} if limit else {}
    request: dict[str, Any] = {"messages": [{"role": "user", "content": text}], **asked, **({"n": n} if n else {})}
    llms = [_llm(*price) for price in prices]
    num_prompt = len(json.dumps({"messages": request["messages"]}, ensure_ascii=False).encode()) / 3

    def worst(num_completion: int) -> float:
        usage = Usage(prompt_tokens=math.ceil(num_prompt), completion_tokens=num_completion * (n or 1))
        rates = [{"prompt_usd_per_million": a, "completion_usd_per_million": b} for a, b in prices]
        return max(tokens_cost_usd(usage, **rate) or 0.0 for rate in rates)

    try:
        sent = fit_budget(request, budget, llms)
    except UpstreamError as error:
        assert error.status == 400 and error.body is not None and error.body["error"]["code"] == "budget_exceeded"
        assert worst(limit or 1) > budget * (1 - 1e-9)
        return
    if not any(completion for _, completion in prices):
        assert sent == request, "nothing is bounded where nothing costs"
        return
    tokens = sent.get("max_tokens") or sent.get("max_completion_tokens")
    assert {key: value for key, value in sent.items() if key != "max_completion_tokens"} == request
    assert tokens is not None and 1 <= tokens <= (limit or UNLIMITED_TOKENS)
    assert worst(tokens) <= budget * (1 + 1e-9)


def test_without_a_budget_the_request_is_sent_as_it_is() -> None:
    assert fit_budget(REQUEST, math.inf, [_llm(1e9, 1e9)]) is REQUEST


def test_the_error_names_what_would_fit() -> None:
    with pytest.raises(UpstreamError, match="max_completion_tokens up to 49"):
        fit_budget({"messages": [], "max_tokens": 1000}, 50e-6, [_llm(0.0, 1.0), _llm(1.0, 1.0)])


async def _pieces(*pieces: bytes, hangs: bool = False) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if hangs:
        await asyncio.Event().wait()


def test_a_stream_within_its_time_passes_whole() -> None:
    async def scenario() -> list[bytes]:
        return [
            piece async for piece in until(_pieces(b"a", b"", b"c"), asyncio.get_running_loop().time() + 60, Drain(0.0))
        ]

    assert asyncio.run(scenario()) == [b"a", b"", b"c"]


def test_a_stream_that_outlasts_its_time_ends_with_504_and_its_reader_goes_on() -> None:
    async def scenario() -> list[bytes]:
        seen: list[bytes] = []
        with pytest.raises(UpstreamError) as caught:
            async for piece in until(_pieces(b"a", hangs=True), asyncio.get_running_loop().time() + 0.01, Drain(0.0)):
                seen.append(piece)
        assert caught.value.status == 504 and caught.value.body == late_error().body
        task = asyncio.current_task()
        assert task is not None and not task.cancelling(), "nobody cancelled the reader"
        await asyncio.sleep(0)
        return seen

    assert asyncio.run(scenario()) == [b"a"]


def test_a_reader_that_is_slow_at_the_deadline_is_not_cancelled() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        stream = until(_pieces(b"a", b"b"), loop.time() + 0.01, Drain(0.0))
        assert await anext(stream) == b"a"
        await asyncio.sleep(0.05)
        with pytest.raises(UpstreamError):
            await anext(stream)

    asyncio.run(scenario())


def test_a_reader_that_is_cancelled_stays_cancelled() -> None:
    async def scenario() -> None:
        async def read() -> None:
            async for _ in until(_pieces(b"a", hangs=True), asyncio.get_running_loop().time() + 60, Drain(0.0)):
                has_begun.set()

        has_begun = asyncio.Event()
        task = asyncio.ensure_future(read())
        await has_begun.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(scenario())
