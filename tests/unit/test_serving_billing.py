"""What is paid where an LLM does not say what it used: streams without counts, calls cut by a client, other paths."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import pytest
from fakes import LLM_TEXT, REQUEST, FakeLLM, Running, gateway
from hypothesis import given
from hypothesis import strategies as st

from cluster.records import Usage
from cluster.telemetry import Meter
from cluster.upstream import UpstreamConfig
from serving.billing import Bill, Cost, Spending, num_answer_tokens, num_prompt_tokens

PROMPT_BYTES = len(json.dumps({"messages": REQUEST["messages"]}))


def _spending(**config: Any) -> tuple[Spending, UpstreamConfig, Meter]:
    prices = {"prompt_usd_per_million": 1.0, "completion_usd_per_million": 2.0, **config}
    endpoint, meter = UpstreamConfig(base_url="http://127.0.0.1:9/v1", **prices), Meter()
    return Spending([endpoint], meter), endpoint, meter


def test_reported_counts_are_taken_and_what_is_missing_is_estimated() -> None:
    spending, endpoint, meter = _spending()
    request = {"messages": [{"role": "user", "content": "x" * 3_000}]}
    said = {"choices": [{"message": {"role": "assistant", "content": "y" * 300}}]}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    assert spending.charge_answer(endpoint, request, {**said, "usage": usage}) == Cost(20e-6, False)
    half = spending.charge_answer(endpoint, request, {**said, "usage": {"prompt_tokens": 10}})
    assert half.is_estimated and half.usd == pytest.approx(210e-6)
    none = spending.charge_answer(endpoint, request, said)
    assert none.is_estimated and none.usd == pytest.approx(1_216e-6, rel=0.02)
    read = spending.charge_answer(endpoint, request, None)
    assert read.is_estimated and read.usd == pytest.approx(1_016e-6, rel=0.02)
    totals = {basis: meter.counts["understudy_llm_spend_usd_total", "0", basis] for basis in ("reported", "estimated")}
    assert totals == {"reported": pytest.approx(20e-6), "estimated": pytest.approx(half.usd + none.usd + read.usd)}


def test_what_has_no_price_costs_nothing_and_is_no_estimate() -> None:
    spending, endpoint, meter = _spending(prompt_usd_per_million=0.0, completion_usd_per_million=0.0)
    assert spending.charge_answer(endpoint, REQUEST, None) == Cost() and not meter.counts


@given(st.text(max_size=50), st.text(max_size=50), st.lists(st.text(max_size=20), max_size=3))
def test_all_that_an_answer_says_counts_and_its_envelope_does_not(
    text: str, thought: str, arguments: list[str]
) -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": one}} for one in arguments]
    message = {"role": "assistant", "content": text, "reasoning_content": thought, "tool_calls": calls}
    said = len("".join([text, thought, *arguments, *("f" for _ in calls)]).encode())
    found = num_answer_tokens({"choices": [{"message": message, "finish_reason": "stop"}], "model": "m"})
    assert found * 3 >= said > (found - 1) * 3 or found == said == 0


@pytest.mark.parametrize("odd", [None, {}, {"choices": None}, {"choices": [1, {"message": 7}, {}]}])
def test_an_odd_answer_says_nothing(odd: Any) -> None:
    assert num_answer_tokens(odd) == 0


def test_a_bill_adds_up() -> None:
    bill = Bill()
    bill.add(Cost(1.0, False))
    assert bill.cost == Cost(1.0, False)
    bill.add(Cost(2.0, True))
    assert bill.cost == Cost(3.0, True)


def _without_counts(llm: FakeLLM) -> None:
    llm.answer_with, llm.gives_counts = lambda _: {"role": "assistant", "content": LLM_TEXT * 100}, False


def test_a_stream_without_counts_is_paid_by_an_estimate_that_says_so(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            _without_counts(run.llm)
            await run.ask(stream=True, n=2)
            run.llm.gives_counts = True
            await run.ask(stream=True, n=2)
            estimated, reported = await run.captured()
            assert estimated.usage == Usage() and estimated.cost_basis == "estimated"
            expected = (PROMPT_BYTES + 2 * 100 * len(LLM_TEXT)) / 3 * 1e-6
            assert estimated.cost_usd == pytest.approx(expected, rel=0.02)
            assert (reported.cost_basis, reported.cost_usd) == ("reported", pytest.approx(120e-6))
            assert _spent(run, "estimated") == pytest.approx(expected, rel=0.02)
            assert _spent(run, "reported") == pytest.approx(120e-6)

    asyncio.run(scenario())


def test_a_days_limit_holds_for_streams_without_counts(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, max_usd_per_day=0.004) as run:
            _without_counts(run.llm)
            statuses = [(await run.ask(stream=True, n=2)).status_code for _ in range(8)]
            assert statuses[0] == 200 and statuses[-1] == 429
            spent = _spent(run, "estimated")
            assert 0.004 <= spent < 0.004 + spent / statuses.count(200) + 1e-9, "only the last call may go beyond it"

    asyncio.run(scenario())


@pytest.mark.parametrize("fate", ["cut", "hang"])
def test_a_stream_that_breaks_off_or_is_left_is_paid_as_far_as_it_came(tmp_path: pathlib.Path, fate: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.llm.fate = fate
            await run.http.post(
                "/v1/chat/completions", json={**REQUEST, "stream": True, "n": 2}, headers={"x-deadline-s": "0.3"}
            )
            (call,) = await run.captured()
            assert call.status >= 500 and call.cost_basis == "estimated"
            assert call.cost_usd == pytest.approx(num_prompt_tokens(REQUEST) * 1e-6 + 2 * 2e-6)

    asyncio.run(scenario())


def test_a_unary_call_that_runs_out_of_time_is_paid_for_what_was_read(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.llm.may_answer.clear()
            reply = await run.http.post(
                "/v1/chat/completions", json={**REQUEST, "n": 2}, headers={"x-deadline-s": "0.1"}
            )
            assert reply.status_code == 504
            (call,) = await run.captured()
            assert (call.cost_basis, call.response) == ("estimated", None)
            assert call.cost_usd == pytest.approx(num_prompt_tokens(REQUEST) * 1e-6) == _spent(run, "estimated")

    asyncio.run(scenario())


def _spent(run: Running, basis: str) -> float:
    return run.core.meter.counts["understudy_llm_spend_usd_total", "0", basis]
