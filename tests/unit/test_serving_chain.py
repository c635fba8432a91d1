"""The chain of specialist and LLM over HTTP: given up early, hedged, within one deadline and one budget, cancelled."""

from __future__ import annotations

import asyncio
import json
import pathlib
import tempfile
from typing import Any

import httpx
import pytest
from fakes import LLM_TEXT, PATH, REQUEST, Running, engine_answer, gateway
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.config import validate
from cluster.engine import EngineAnswer
from cluster.errors import ConfigError
from cluster.prices import PriceConfig
from cluster.sse import SseReader
from serving.gateway_config import GatewayConfig
from serving.openai_wire import CLIENT_GONE
from serving.reassembly import reassemble

SPECIALIST_TEXT = "refund"
BOTH = pytest.mark.parametrize("is_stream", [False, True])
LONG = 60.0


def _said(reply: httpx.Response) -> str:
    """All text that reached the client as an answer."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        body = reply.json()
        return body["choices"][0]["message"]["content"] if "choices" in body else ""
    chunks = [chunk for chunk in SseReader().feed(reply.content) if "choices" in chunk]
    return reassemble(chunks)["choices"][0]["message"]["content"] or ""


def _error(reply: httpx.Response) -> dict[str, Any]:
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["error"]
    return next(chunk["error"] for chunk in SseReader().feed(reply.content) if "error" in chunk)


class Held:
    """An engine's answer that comes when it may."""

    def __init__(self, confidence: float = 0.99) -> None:
        self.may_answer, self.is_asked = asyncio.Event(), asyncio.Event()
        self.confidence = confidence

    async def __call__(self) -> EngineAnswer:
        self.is_asked.set()
        await self.may_answer.wait()
        return engine_answer(SPECIALIST_TEXT, self.confidence)


async def _until(run: Running, num_requests: int = 1) -> None:
    """Wait until the LLM has been asked so often."""
    while len(run.llm.requests) < num_requests:
        await asyncio.sleep(0.001)


async def _left(run: Running, num_left: int) -> None:
    """Wait until so many clients of the LLM have left."""
    while run.llm.num_left < num_left:
        await asyncio.sleep(0.001)


@BOTH
def test_an_answer_whose_confidence_is_lost_is_given_up_at_once(tmp_path: pathlib.Path, is_stream: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            # The gate is at 0.9: the second token loses it; the others would follow for nothing.
            run.engine.logprobs = [-0.01, -2.0, *[-0.01] * 10]
            reply = await run.ask(stream=is_stream)
            assert _said(reply) == LLM_TEXT and run.engine.num_tokens == 2
            assert reply.headers["x-understudy-route"] == "escalate"
            assert reply.headers["x-understudy-reason"] == "confidence below threshold, known early"
            assert float(reply.headers["x-understudy-confidence"]) == pytest.approx(0.134, abs=1e-3)
            assert run.core.meter.counts[("understudy_early_rejections_total", "triage")] == 1
            run.engine.logprobs = [-0.001] * 12
            assert _said(await run.ask(stream=is_stream)) == SPECIALIST_TEXT

    asyncio.run(scenario())


@BOTH
def test_a_slow_specialist_is_hedged_and_stopped_when_the_llm_is_first(tmp_path: pathlib.Path, is_stream: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, hedge_after_s=0.001, prices=PriceConfig(replica_usd_per_hour=3600.0)) as run:
            run.engine.answer_with = Held()
            reply = await run.ask(stream=is_stream)
            assert _said(reply) == LLM_TEXT and run.engine.num_aborted == 1
            assert reply.headers["x-understudy-route"] == "fall_back"
            assert reply.headers["x-understudy-reason"] == "slower than the LLM"
            assert run.core.meter.counts[("understudy_hedges_total", "llm")] == 1
            (call,) = await run.captured()
            assert call.served_by == "llm" and call.cost_usd is not None and call.cost_usd > 120e-6, "both are paid"

    asyncio.run(scenario())


@BOTH
def test_a_hedged_llm_is_left_when_the_specialist_is_first_after_all(tmp_path: pathlib.Path, is_stream: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, hedge_after_s=0.001) as run:
            run.llm.may_answer.clear()
            run.engine.answer_with = held = Held()
            asking = asyncio.ensure_future(run.ask(stream=is_stream))
            await _until(run)
            held.may_answer.set()
            reply = await asking
            assert _said(reply) == SPECIALIST_TEXT and reply.headers["x-understudy-route"] == "accept"
            await _left(run, 1)
            assert run.core.meter.counts[("understudy_hedges_total", "specialist")] == 1
            (call,) = await run.captured()
            # At one dollar a million: the LLM has read the request.
            assert call.served_by == "specialist" and call.cost_usd == pytest.approx(40e-6, rel=0.5)

    asyncio.run(scenario())


def test_a_hedge_that_is_refused_waits_for_its_llm_and_a_quick_one_never_asks_it(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, hedge_after_s=0.001) as run:
            run.llm.may_answer.clear()
            run.engine.answer_with = held = Held(confidence=0.1)
            asking = asyncio.ensure_future(run.ask())
            await _until(run)
            held.may_answer.set()
            await asyncio.sleep(0.01)
            assert not asking.done()
            run.llm.may_answer.set()
            reply = await asking
            assert _said(reply) == LLM_TEXT and reply.headers["x-understudy-route"] == "escalate"
            assert len(run.llm.requests) == 1, "asked once, not again"
        async with gateway(tmp_path, hedge_after_s=5.0) as run:
            assert _said(await run.ask()) == SPECIALIST_TEXT and not run.llm.requests

    asyncio.run(scenario())


@BOTH
@pytest.mark.parametrize("status", [503, 400])
def test_where_the_hedged_llm_fails_or_refuses_the_slow_specialist_answers(
    tmp_path: pathlib.Path, is_stream: bool, status: int
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, hedge_after_s=0.001) as run:
            run.llm.status = status
            run.engine.answer_with = held = Held()
            asking = asyncio.ensure_future(run.ask(stream=is_stream))
            await _until(run)
            await asyncio.sleep(0.02)
            held.may_answer.set()
            assert _said(await asking) == SPECIALIST_TEXT

    asyncio.run(scenario())


# What fails depends on who is quicker, so nothing is gained by shrinking it.
@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([0.1, 0.99]),
            st.integers(0, 8),
            st.integers(0, 8),
            st.sampled_from(["finish", "cut", "unfinished", "error"]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_no_client_sees_words_of_two_models(calls: list[tuple[bool, float, int, int, str]]) -> None:
    """Whoever is quicker, unsure or breaks off: a client has one model's words, and its call is captured once."""

    async def scenario(folder: pathlib.Path) -> None:
        async with gateway(folder, hedge_after_s=0.0) as run:
            for is_stream, confidence, engine_ms, llm_ms, fate in calls:

                async def answer(confidence: float = confidence, engine_ms: int = engine_ms) -> EngineAnswer:
                    await asyncio.sleep(engine_ms / 1e3)
                    return engine_answer(SPECIALIST_TEXT, confidence)

                run.engine.answer_with, run.llm.fate = answer, fate if is_stream else "finish"
                run.llm.may_answer.clear()
                asyncio.get_running_loop().call_later(llm_ms / 1e3, run.llm.may_answer.set)
                reply = await run.ask(stream=is_stream)
                said, model = _said(reply), reply.headers["x-understudy-route"]
                if model == "accept":
                    assert said == SPECIALIST_TEXT and LLM_TEXT[:4] not in reply.text and confidence > 0.9
                else:
                    assert SPECIALIST_TEXT not in reply.text
                    assert said == (LLM_TEXT if fate == "finish" or not is_stream else LLM_TEXT[:4])
                await run.llm.may_answer.wait()
            captured = await run.captured()
            assert len(captured) == len(calls) == len({call.call_id for call in captured})

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(pathlib.Path(folder)))


@BOTH
@pytest.mark.parametrize("by_header", [False, True])
def test_the_deadline_covers_specialist_and_llm(tmp_path: pathlib.Path, is_stream: bool, by_header: bool) -> None:
    async def scenario() -> None:
        config = {} if by_header else {"deadline_s": 0.1}
        async with gateway(tmp_path, specialist_timeout_s=LONG, **config) as run:
            run.engine.answer_with = Held()
            run.llm.may_answer.clear()
            headers = {"x-deadline-s": "0.1"} if by_header else {}
            reply = await run.http.post(PATH, json={**REQUEST, "stream": is_stream}, headers=headers)
            assert reply.status_code == 504 and _error(reply)["code"] == "deadline_exceeded"
            assert set(_error(reply)) == {"message", "type", "param", "code"}
            # The specialist had half of the time, so the LLM was asked; neither works on.
            assert run.engine.num_aborted == len(run.llm.requests) == 1
            await _left(run, 1)
            (call,) = await run.captured()
            assert (call.status, call.response) == (504, None) and call.route is not None
            assert (call.route.action, call.route.reason) == ("fall_back", "timeout")

    asyncio.run(scenario())


@pytest.mark.parametrize("is_late", [True, False])
def test_a_specialist_stands_in_with_its_whole_answer_but_not_beyond_the_deadline(
    tmp_path: pathlib.Path, is_late: bool
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, degraded="specialist", specialist_timeout_s=LONG) as run:
            run.engine.logprobs, run.llm.status = [-2.0, -0.01, -0.01], 503
            if is_late:
                run.llm.status = 200
                run.llm.may_answer.clear()
            reply = await run.http.post(PATH, json=REQUEST, headers={"x-deadline-s": "0.3" if is_late else "60"})
            if is_late:
                assert (reply.status_code, _error(reply)["code"]) == (504, "deadline_exceeded")
                assert run.engine.num_asked == 1
            else:
                assert _said(reply) == SPECIALIST_TEXT and reply.headers["x-understudy-route"] == "degrade"
                assert run.engine.num_tokens == 1 + 3, "given up first, then whole"

    asyncio.run(scenario())


def test_a_slow_specialist_leaves_the_llm_its_time(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, specialist_timeout_s=LONG, deadline_s=2.0) as run:
            run.engine.answer_with = Held()
            reply = await run.ask()
            assert _said(reply) == LLM_TEXT and reply.headers["x-understudy-reason"] == "timeout"

    asyncio.run(scenario())


def test_a_stream_that_outlasts_the_deadline_is_broken_off_and_captured(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.llm.may_go_on.clear()
            asked = {**REQUEST, "stream": True, "n": 2}
            reply = await run.http.post(PATH, json=asked, headers={"x-deadline-s": "0.3"})
            assert reply.status_code == 200 and _error(reply)["code"] == "deadline_exceeded"
            (call,) = await run.captured()
            assert call.status == 504 and call.error == "the LLM broke off its answer: deadline_exceeded"
            assert call.message is not None and call.message["content"] == LLM_TEXT[:4]
            await _left(run, 1)

    asyncio.run(scenario())


@BOTH
def test_an_llm_that_could_cost_more_than_the_budget_is_not_asked(tmp_path: pathlib.Path, is_stream: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, budget_usd=1.0) as run:
            asked = {**REQUEST, "max_tokens": 1000, "stream": is_stream}
            headers = {"x-budget-usd": "0.001"}
            # The specialist alone: its answer is within the budget.
            assert _said(await run.http.post(PATH, json=asked, headers=headers)) == SPECIALIST_TEXT
            run.engine.confidence = 0.1
            reply = await run.http.post(PATH, json=asked, headers=headers)
            assert (reply.status_code, _error(reply)["code"]) == (400, "budget_exceeded")
            assert not run.llm.requests
            assert _said(await run.http.post(PATH, json=asked, headers={"x-budget-usd": "0.01"})) == LLM_TEXT
            kept, refused, paid = await run.captured()
            assert [kept.status, refused.status, paid.status] == [200, 400, 200] and refused.response is None
            # Without a limit of its own, the request gets the one that the budget pays for: two dollars a million.
            await run.http.post(PATH, json={**REQUEST, "stream": is_stream}, headers=headers)
            assert 450 < run.llm.requests[-1]["max_completion_tokens"] < 500
            assert "max_completion_tokens" not in (await run.captured())[-1].request

    asyncio.run(scenario())


def test_a_limit_that_cannot_be_read_is_an_error_before_there_is_a_call(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            reply = await run.http.post(PATH, json=REQUEST, headers={"x-deadline-s": "soon"})
            assert (reply.status_code, _error(reply)["param"]) == (400, "x-deadline-s")
            assert not await run.captured() and not run.engine.num_asked

    asyncio.run(scenario())


@pytest.mark.parametrize("hedge_after_s", [None, 0.001])
def test_a_client_that_leaves_ends_the_engines_work_and_the_llms(
    tmp_path: pathlib.Path, hedge_after_s: float | None
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, hedge_after_s=hedge_after_s) as run:
            run.llm.may_answer.clear()
            run.engine.answer_with = held = Held()
            raw = json.dumps(REQUEST).encode()
            authorization = (b"authorization", f"Bearer {run.key}".encode())
            scope = {"type": "http", "method": "POST", "path": PATH, "headers": [authorization], "query_string": b""}

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": raw}

            async def send(_: dict[str, Any]) -> None:
                raise AssertionError("nobody listens")

            # Serve cancels the request of a client that left.
            task = asyncio.ensure_future(run.api(scope, receive, send))
            await held.is_asked.wait()
            if hedge_after_s:
                await _until(run)
            task.cancel()
            await asyncio.wait([task])
            assert run.engine.num_aborted == 1
            if hedge_after_s:
                await _left(run, 1)
            (call,) = await run.captured()
            assert (call.status, call.error) == (CLIENT_GONE, "the client left")
            assert call.route is not None and call.route.reason == "given up while it answered"

    asyncio.run(scenario())


def test_a_hedge_that_never_could_happen_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="hedge_after_s: got 10; allowed: less than specialist_timeout_s=5"):
        validate(GatewayConfig, {"hedge_after_s": 10, "specialist_timeout_s": 5})
