"""Traces: what a collector gets of a call, that other programs' traces go on, and that nothing of it holds content."""

from __future__ import annotations

import asyncio
import pathlib
from typing import Any

import pytest
from fakes import DEAD, REQUEST, FakeEngine, engine_answer, gateway
from otlp import Taken, collector

from cluster.config import validate
from cluster.engine import EngineAnswer
from cluster.errors import ConfigError, EngineError
from cluster.prompts import PromptFormat
from cluster.tracing import TelemetryConfig, is_tracing, outgoing, span, start_tracing, stop_tracing
from serving.audit import AuditConfig
from serving.specialist import ServeEngine
from serving.traces import traced_answers, traced_engine

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CARRIED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
PATH = "/v1/chat/completions"
SECRET = "patient zero"


def secretly(**extra: Any) -> dict[str, Any]:
    return {
        **REQUEST,
        "messages": [REQUEST["messages"][0], {"role": "user", "content": SECRET}],
        "user": SECRET,
        **extra,
    }


def test_a_call_s_steps_are_one_trace_that_goes_on_from_the_client_s(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with collector() as seen, gateway(tmp_path) as run:
            run.engine.confidence = 0.1
            reply = await run.http.post(PATH, json=REQUEST, headers=CARRIED)
            assert reply.headers["x-understudy-route"] == "escalate"
            await asyncio.to_thread(stop_tracing)
            by_name = {one.name: one for one in seen.spans}
            assert set(by_name) == {f"POST {PATH}", "route", "chat adapters/triage", "chat"}
            root = by_name.pop(f"POST {PATH}")
            assert (root.trace_id, root.parent_id, root.kind) == (TRACE, PARENT, "server")
            assert all((one.trace_id, one.parent_id) == (TRACE, root.span_id) for one in by_name.values())
            assert root.facts["understudy.call_id"] == reply.headers["x-understudy-call-id"]
            assert root.facts["understudy.action"] == "escalate" and root.facts["understudy.task_id"] == "triage"
            assert root.facts["gen_ai.usage.input_tokens"] == 100 and root.facts["http.response.status_code"] == 200
            asked = by_name["chat"]
            assert asked.kind == "client" and asked.facts["gen_ai.operation.name"] == "chat"
            assert asked.facts["server.address"] == "127.0.0.1" and asked.facts["gen_ai.usage.output_tokens"] == 10
            specialist = by_name["chat adapters/triage"].facts
            assert specialist["understudy.confidence"] == 0.1 and specialist["gen_ai.usage.output_tokens"] == 2
            assert specialist["gen_ai.response.finish_reasons"] == ["stop"]
            assert not any(one.has_failed for one in seen.spans)

    asyncio.run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_llm_goes_on_with_the_trace_and_nothing_of_a_call_s_content_is_in_it(
    tmp_path: pathlib.Path, is_stream: bool
) -> None:
    async def scenario() -> None:
        async with collector() as seen, gateway(tmp_path, audit=AuditConfig(share=1.0)) as run:
            run.engine.confidence = 0.1
            for headers in (CARRIED, {"traceparent": f"junk {SECRET}"}):
                reply = await run.http.post(PATH, json=secretly(stream=is_stream), headers=headers)
                assert reply.status_code == 200
            run.engine.text, run.engine.confidence = SECRET, 0.99
            assert (await run.ask(user=SECRET)).headers["x-understudy-route"] == "accept"
            await run.core.auditor.close()
            await asyncio.to_thread(stop_tracing)
            roots, asked = seen.named(f"POST {PATH}"), seen.named("chat")
            assert len(roots) == 3 and len(asked) == 3  # the third is the audit of what a specialist answered
            assert roots[0].trace_id == TRACE and roots[1].trace_id != TRACE and not roots[1].parent_id
            assert [one.parent_id for one in asked] == [one.span_id for one in roots]
            # The LLM is told the span that asked it, not the client's.
            assert all(map(is_of, run.llm.headers, asked)) and len(run.llm.headers) == 3
            assert run.llm.headers[0]["tracestate"] == "vendor=1"
            if is_stream:
                assert 0 < asked[0].facts["gen_ai.response.time_to_first_chunk"] < 30
                assert roots[0].facts["gen_ai.usage.output_tokens"] == 10
            spoken = [SECRET, "from the LLM", "Name the intent", "billing"]
            assert not [one for one in seen.spans for word in spoken if word.encode() in one.raw]

    asyncio.run(scenario())


def test_what_fails_is_told_by_its_type_alone(tmp_path: pathlib.Path) -> None:
    async def fail() -> Any:
        raise EngineError(f"cannot read {SECRET}")

    async def scenario() -> None:
        async with collector() as seen, gateway(tmp_path, dead_first=True) as run:
            run.engine.answer_with = fail
            run.llm.status, run.llm.error = 500, {"message": SECRET}
            assert (await run.http.post(PATH, json=REQUEST)).status_code == 500
            await run.http.post(f"/v1/{SECRET}", json=REQUEST)
            await asyncio.to_thread(stop_tracing)
            assert [one.facts["error.type"] for one in seen.named("chat adapters/triage")] == ["EngineError"]
            asked = seen.named("chat")
            assert [one.facts["server.port"] for one in asked][0] == int(DEAD.split(":")[2][:1])
            assert (
                all(one.has_failed and one.facts["error.type"] == "UpstreamError" for one in asked) and len(asked) == 2
            )
            (root,) = seen.named(f"POST {PATH}")
            assert root.has_failed and root.facts["http.response.status_code"] == 500
            assert not [one for one in seen.spans if SECRET.encode() in one.raw]

    asyncio.run(scenario())


def test_a_specialist_s_replica_is_told_the_trace() -> None:
    """Over a handle as Ray Serve's; the replica goes on with it."""
    asked: list[dict[str, Any]] = []

    class Replica:
        @traced_answers
        async def answer(self, adapter: str, *_: Any) -> EngineAnswer:
            return engine_answer("refund", 0.9)

    class Handle:
        def __init__(self, method: str = "") -> None:
            self.method = method

        def options(self, **_: Any) -> Handle:
            return self

        def __getattr__(self, method: str) -> Handle:
            return Handle(method)

        def remote(self, *given: Any, **words: Any) -> Any:
            if self.method == "answer":
                asked.append(words)
                return asyncio.ensure_future(Replica().answer(*given, **words))
            return asyncio.ensure_future(asyncio.sleep(0, "ready"))

    prompt_format = PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100)

    async def scenario() -> None:
        engine = ServeEngine(Handle())
        await engine.answer("adapters/a", prompt_format, REQUEST, 8)
        async with collector() as seen:
            with span("caller"):
                await traced_engine(engine).answer("adapters/a", prompt_format, REQUEST, 8)
            await asyncio.to_thread(stop_tracing)
            theirs, one = seen.named("chat adapters/a")
            assert theirs.parent_id == one.span_id and (theirs.kind, one.kind) == ("server", "client")
            assert asked[0] == {} and is_of(asked[1]["trace"], one)

    asyncio.run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_llm_that_refuses_is_a_step_that_failed(tmp_path: pathlib.Path, is_stream: bool) -> None:
    async def scenario() -> None:
        async with collector() as seen, gateway(tmp_path) as run:
            run.engine.confidence, run.llm.status = 0.1, 400
            assert (await run.ask(stream=is_stream)).status_code == 400
            await asyncio.to_thread(stop_tracing)
            (asked,) = seen.named("chat")
            assert asked.has_failed and asked.facts["error.type"] == "400"

    asyncio.run(scenario())


def test_without_a_collector_nothing_is_traced_and_the_client_s_trace_stays_its_own(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        start_tracing(TelemetryConfig(), "test")
        async with gateway(tmp_path) as run:
            run.engine.confidence = 0.1
            assert isinstance(run.core._engines["bases/tiny"], FakeEngine)
            await run.http.post(PATH, json=secretly(), headers=CARRIED)
            assert not is_tracing() and outgoing() == {} and "traceparent" not in run.llm.headers[0]

    asyncio.run(scenario())


def test_a_collector_that_is_away_costs_no_call(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with collector() as seen:
            await asyncio.to_thread(stop_tracing)
            start_tracing(TelemetryConfig(otlp_endpoint="http://127.0.0.1:9"), "test")
            async with gateway(tmp_path) as run:
                assert (await run.ask()).status_code == 200
                assert len(await run.captured()) == 1
            assert not is_tracing() and seen.spans == []

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["collector:4318", "http://me:secret@collector:4318", "ftp://collector"])
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint") as told:
        validate(TelemetryConfig, {"otlp_endpoint": address})
    assert "me:secret" not in str(told.value)


def is_of(headers: dict[str, str], one: Taken) -> bool:
    """Whether they name this span and say that it is sampled."""
    version, trace_id, span_id, flags = headers["traceparent"].split("-")
    return (version, trace_id, span_id) == ("00", one.trace_id, one.span_id) and bool(int(flags, 16) & 1)
