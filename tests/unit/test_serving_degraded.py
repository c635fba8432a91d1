"""What a call gets that no LLM answers: the LLM's error, or, where the recipe says so, its specialist's marked answer."""

from __future__ import annotations

import asyncio
import pathlib

import pytest
from fakes import engine_answer, gateway

from cluster.engine import EngineAnswer
from cluster.errors import EngineError


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_valid_answer_below_the_threshold_is_served_marked_and_captured_as_such(
    tmp_path: pathlib.Path, is_stream: bool
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, degraded="specialist") as run:
            run.engine.confidence, run.llm.status = 0.2, 503
            reply = await run.ask(stream=is_stream)
            assert reply.status_code == 200 and "refund" in reply.text and "no" not in reply.text.split()
            assert reply.headers["x-understudy-degraded"] == "below threshold"
            assert reply.headers["x-understudy-route"] == "degrade"
            assert reply.headers["x-understudy-confidence"] == "0.200000"
            (call,) = await run.captured()
            assert (call.served_by, call.status, call.is_reference) == ("specialist", 200, False)
            assert call.route is not None and call.route.action == "degrade"

    asyncio.run(scenario())


def test_by_default_the_call_fails(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.engine.confidence, run.llm.status = 0.2, 503
            reply = await run.ask()
            assert reply.status_code == 503 and "x-understudy-degraded" not in reply.headers
            assert int(reply.headers["retry-after"]) >= 1

    asyncio.run(scenario())


def test_an_llm_that_answers_is_never_degraded(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, degraded="specialist") as run:
            run.engine.confidence = 0.2
            assert (await run.ask()).headers["x-understudy-route"] == "escalate"
            run.llm.status = 400
            assert (await run.ask()).status_code == 400

    asyncio.run(scenario())


async def _raise() -> EngineAnswer:
    raise EngineError("dead")


async def _cut() -> EngineAnswer:
    return engine_answer("refu", 0.0, "length").model_copy(update={"message": None})


@pytest.mark.parametrize("answer_with", [_raise, _cut])
def test_what_is_no_valid_answer_is_not_served(tmp_path: pathlib.Path, answer_with: object) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, degraded="specialist") as run:
            run.engine.answer_with, run.llm.status = answer_with, 500  # type: ignore[assignment]
            reply = await run.ask()
            assert reply.status_code == 500 and "x-understudy-degraded" not in reply.headers
            assert len(await run.captured()) == 1

    asyncio.run(scenario())


def test_a_call_that_no_specialist_was_asked_has_none_to_stand_in(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, degraded="specialist") as run:
            run.llm.status = 500
            reply = await run.ask(messages=[{"role": "user", "content": "nobody knows this"}])
            assert reply.status_code == 500 and run.engine.num_asked == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("first", "confidence", "route"),
    [("fails", 0.99, "accept"), ("fails", 0.2, "degrade"), ("unsure", 0.99, "degrade")],
)
def test_a_stand_in_above_its_threshold_is_no_stand_in(
    tmp_path: pathlib.Path, first: str, confidence: float, route: str
) -> None:
    """One that was only late or broken the first time is kept as ever; a second try at the threshold does not count."""

    async def scenario() -> None:
        async with gateway(tmp_path, degraded="specialist") as run:

            async def answer() -> EngineAnswer:
                if run.engine.num_asked > 1:
                    return engine_answer("refund", confidence)
                if first == "fails":
                    raise EngineError("dead")
                return engine_answer("refund", 0.2)

            run.engine.answer_with, run.llm.status = answer, 503
            reply = await run.ask()
            assert reply.status_code == 200 and run.engine.num_asked == 2
            assert reply.headers["x-understudy-route"] == route
            assert ("x-understudy-degraded" in reply.headers) == (route == "degrade")
            (call,) = await run.captured()
            assert call.route is not None and (call.route.action, call.route.confidence) == (route, confidence)

    asyncio.run(scenario())
