"""The request path over ASGI, with a scripted engine and a scripted LLM: what the client gets and what is captured."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import httpx
import pytest
from fakes import (
    LLM_TEXT,
    PATH,
    REQUEST,
    engine_answer,
    gateway,
    llm_body,
    make_specialist,
)
from hypothesis import given
from hypothesis import strategies as st

from cluster.access import ApiKeys, Pseudonyms
from cluster.engine import EngineAnswer
from cluster.errors import EngineError, InputError
from cluster.prices import PriceConfig
from cluster.records import Specialist, Usage
from cluster.sse import SseReader
from serving.audit import AuditConfig
from serving.openai_wire import CLIENT_GONE, completion_body, completion_chunks
from serving.reassembly import reassemble


def _text(reply: httpx.Response) -> str:
    return reply.json()["choices"][0]["message"]["content"]


def _streamed(reply: httpx.Response) -> dict[str, Any]:
    reader = SseReader()
    body = reassemble(reader.feed(reply.content))
    assert reader.is_done and not reader.num_bad
    return body


def test_a_confident_answer_is_served_and_the_llm_is_not_asked(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            reply = await run.ask()
            assert (reply.status_code, _text(reply)) == (200, "refund")
            assert not run.llm.requests and run.engine.loaded
            assert reply.headers["x-understudy-route"] == "accept"
            assert reply.headers["x-understudy-release"] == run.release
            (call,) = await run.captured()
            assert call.call_id == reply.headers["x-understudy-call-id"]
            assert (call.served_by, call.status, call.usage.prompt_tokens) == ("specialist", 200, 10)
            assert call.response == reply.json() and call.request == REQUEST

    asyncio.run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_unsure_answer_never_reaches_the_client(tmp_path: pathlib.Path, is_stream: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.engine.text, run.engine.confidence = "SECRET", 0.5
            reply = await run.ask(stream=is_stream)
            assert LLM_TEXT == (_streamed(reply)["choices"][0]["message"]["content"] if is_stream else _text(reply))
            assert "SECRET" not in reply.text and reply.headers["x-understudy-route"] == "escalate"
            (call,) = await run.captured()
            assert call.served_by == "llm" and call.route is not None and call.route.confidence == 0.5
            assert call.cost_usd == pytest.approx(120e-6)
            assert call.message == {"role": "assistant", "content": LLM_TEXT}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (EngineError("x"), "fall_back"),
        (InputError("long"), "escalate"),
        (RuntimeError("x"), "fall_back"),
        (None, "fall_back"),
    ],
)
def test_whatever_a_specialist_does_the_llm_answers(
    tmp_path: pathlib.Path, error: Exception | None, action: str
) -> None:
    async def fail() -> EngineAnswer:
        if error is not None:
            raise error
        await asyncio.sleep(60)
        return engine_answer("late", 1.0)

    async def scenario() -> None:
        async with gateway(tmp_path, specialist_timeout_s=0.05) as run:
            run.engine.answer_with = fail
            reply = await run.ask()
            assert _text(reply) == LLM_TEXT and reply.headers["x-understudy-route"] == action

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("extra", "action"),
    [
        ({"n": 2}, "llm"),
        ({"response_format": {"type": "json_object"}}, "escalate"),
        ({"max_tokens": 1}, "escalate"),
        ({"messages": [{"role": "user", "content": "another kind"}]}, "llm"),
    ],
)
def test_requests_a_specialist_must_not_answer(tmp_path: pathlib.Path, extra: dict[str, Any], action: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            reply = await run.ask(**extra)
            assert _text(reply) == LLM_TEXT and reply.headers["x-understudy-route"] == action

    asyncio.run(scenario())


def test_a_prompt_that_does_not_fit_goes_to_the_llm_and_is_captured_whole(tmp_path: pathlib.Path) -> None:
    async def too_long() -> EngineAnswer:
        raise InputError("prompt: 75000 tokens; allowed: 768; this call goes to the LLM")

    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.engine.answer_with = too_long
            messages = [*REQUEST["messages"][:-1], {"role": "user", "content": "x" * 300_000}]
            reply = await run.ask(messages=messages)
            assert _text(reply) == LLM_TEXT and reply.headers["x-understudy-route"] in ("escalate", "llm")
            assert [request["messages"] for request in run.llm.requests] == [messages]
            (call,) = await run.captured()
            assert call.request["messages"] == messages and call.served_by == "llm" and call.status == 200

    asyncio.run(scenario())


def test_an_accepted_answer_streams_as_openai_does(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            body = _streamed(await run.ask(stream=True, stream_options={"include_usage": True}))
            assert body["choices"][0]["message"]["content"] == "refund"
            assert body["choices"][0]["finish_reason"] == "stop" and body["usage"]["total_tokens"] == 12
            assert "usage" not in _streamed(await run.ask(stream=True))

    asyncio.run(scenario())


def test_a_stream_that_breaks_off_is_captured_as_failed_with_what_came(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.llm.fate = "cut"
            reply = await run.ask(stream=True, n=2)
            assert "error" in SseReader().feed(reply.content)[-1]
            (call,) = await run.captured()
            assert call.status == 502 and call.message is not None and call.message["content"] == LLM_TEXT[:4]

    asyncio.run(scenario())


def test_a_client_that_leaves_is_captured(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.llm.fate = "hang"
            raw = json.dumps({**REQUEST, "stream": True, "n": 2}).encode()
            messages = [{"type": "http.request", "body": raw}]
            has_begun = asyncio.Event()

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await has_begun.wait()
                return {"type": "http.disconnect"}

            async def send(message: dict[str, Any]) -> None:
                if message.get("body"):
                    has_begun.set()

            authorization = (b"authorization", f"Bearer {run.key}".encode())
            scope = {"type": "http", "method": "POST", "path": PATH, "headers": [authorization], "query_string": b""}
            async with asyncio.timeout(3):
                await run.api(scope, receive, send)
            (call,) = await run.captured()
            assert call.status == CLIENT_GONE and call.message is not None

    asyncio.run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
def test_errors_of_the_llm_are_passed_on_and_captured(tmp_path: pathlib.Path, is_stream: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            for status in (400, 503):
                run.llm.status = status
                reply = await run.ask(n=2, stream=is_stream)
                assert reply.status_code == status and reply.json()["error"]["message"] == "no"
            assert [(call.status, call.response) for call in await run.captured()] == [(400, None), (503, None)]

    asyncio.run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_next_endpoint_answers_for_a_dead_one(tmp_path: pathlib.Path, is_stream: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, dead_first=True) as run:
            assert (await run.ask(n=2, stream=is_stream)).status_code == 200
            assert run.core.meter.counts[("understudy_upstream_failures_total", "0")] == 1

    asyncio.run(scenario())


def test_wrong_keys_bodies_and_paths_get_openai_errors(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            bad = {"Authorization": "Bearer us-wrong"}
            replies = [
                await run.http.post(PATH, json=REQUEST, headers=bad),
                await run.http.post(PATH, content=b"[1]"),
                await run.http.post(PATH, json={"messages": [{"role": "user", "content": ["x"]}]}),
                await run.http.post(PATH, json={"messages": [{"content": "x"}]}),
                await run.http.post(PATH, json={"messages": [{"role": 7, "content": "x"}]}),
                await run.http.post("/v1/files", json={}),
                await run.http.get(PATH),
            ]
            assert [reply.status_code for reply in replies] == [401, 400, 400, 400, 400, 404, 405]
            assert all(set(reply.json()["error"]) == {"message", "type", "param", "code"} for reply in replies)
            assert "gateway.passthrough" in replies[5].json()["error"]["message"]
            assert not await run.captured()
            models = (await run.http.get("/v1/models")).json()["data"]
            assert [model["id"] for model in models] == ["llm-1", "understudy/triage"]
            assert (await run.http.get("/healthz")).json()["release"] == run.release

    asyncio.run(scenario())


def test_headers_name_session_agent_and_step_and_names_become_pseudonyms(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            headers = {"x-session-id": "s-1", "x-agent": "support", "x-step": "3", "x-faces-person": "true"}
            await run.http.post(PATH, json=REQUEST, headers=headers)
            await run.ask()
            await run.ask()
            named, first, second = await run.captured()
            assert (named.agent, named.step, named.faces_person) == ("support", 3, True)
            assert named.session_id == Pseudonyms(b"k" * 32).session_of("billing", "s-1")
            assert first.session_id == second.session_id != named.session_id
            other = {
                **headers,
                "Authorization": f"Bearer {ApiKeys(tmp_path / 'keys.json').create('shipping', 'agent')}",
            }
            await run.http.post(PATH, json=REQUEST, headers=other)
            assert (await run.captured())[-1].session_id != named.session_id
            assert "billing" not in first.model_dump_json()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "specialist", [make_specialist(fingerprint="other"), make_specialist(base="bases/unserved")], ids=["engine", "base"]
)
def test_a_gate_that_does_not_hold_here_leaves_the_task_to_the_llm(
    tmp_path: pathlib.Path, specialist: Specialist
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, specialist) as run:
            reply = await run.ask()
            assert _text(reply) == LLM_TEXT and run.engine.num_asked == 0
            assert reply.headers["x-understudy-reason"] == run.core.table.snapshot.skipped["triage"]

    asyncio.run(scenario())


_MESSAGES = st.one_of(
    st.builds(lambda text: {"role": "assistant", "content": text}, st.text(min_size=1)),
    st.builds(
        lambda names: {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": f"call_{i}",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps({"a": name})},
                }
                for i, name in enumerate(names)
            ],
        },
        st.lists(st.text(min_size=1), min_size=1, max_size=3),
    ),
)


@given(_MESSAGES, st.integers(1, 40), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_what_is_written_as_a_stream_reads_back_whatever_way_it_is_cut(
    message: dict[str, Any], size: int, line_end: bytes
) -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=2)
    body = completion_body(message, call_id="1", model="m", created=1, usage=usage)
    raw = b"".join(completion_chunks(body, include_usage=True)).replace(b"\n", line_end) + line_end
    reader = SseReader()
    chunks = [chunk for i in range(0, len(raw), size) for chunk in reader.feed(raw[i : i + size])]
    again = reassemble(chunks)
    assert reader.is_done and again["usage"] == body["usage"]
    said = {key: value for key, value in body["choices"][0]["message"].items() if key != "refusal"}
    assert again["choices"][0]["message"] == said and said["content"] == message["content"]
    calls = [[call["function"] for call in one.get("tool_calls") or ()] for one in (said, message)]
    assert calls[0] == calls[1]
    assert again["choices"][0]["finish_reason"] == body["choices"][0]["finish_reason"]


def test_reassembly_joins_arguments_choices_refusals_and_logprobs() -> None:
    def chunk(index: int, delta: dict[str, Any], **rest: Any) -> dict[str, Any]:
        return {"id": "x", "choices": [{"index": index, "delta": delta, **rest}]}

    def call(index: int, arguments: str, **rest: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, "function": {"arguments": arguments, **rest}}]}

    body = reassemble(
        [
            chunk(0, {"role": "assistant", "content": ""}),
            chunk(0, call(0, "", name="a")),
            chunk(0, call(1, '{"y"', name="b")),
            chunk(0, call(0, "{}")),
            chunk(0, call(1, ":1}"), finish_reason="tool_calls"),
            chunk(1, {"refusal": "I "}, logprobs={"refusal": [{"token": "I "}]}),
            chunk(1, {"refusal": "won't"}, logprobs={"refusal": [{"token": "won't"}]}),
            {"choices": [], "usage": llm_body()["usage"]},
        ]
    )
    calls, refused = body["choices"]
    assert [one["function"] for one in calls["message"]["tool_calls"]] == [
        {"arguments": "{}", "name": "a"},
        {"arguments": '{"y":1}', "name": "b"},
    ]
    assert calls["finish_reason"] == "tool_calls" and calls["message"]["content"] is None
    assert refused["message"]["refusal"] == "I won't" and len(refused["logprobs"]["refusal"]) == 2
    assert refused["finish_reason"] is None and body["usage"]["total_tokens"] == 110


NAMED = {"model": "understudy/triage"}
OFF_ROUTE = [{"role": "user", "content": "another kind"}]


@pytest.mark.parametrize("messages", [REQUEST["messages"], OFF_ROUTE], ids=["routed", "off route"])
def test_a_call_that_names_a_specialist_is_asked_of_it(tmp_path: pathlib.Path, messages: list[dict[str, Any]]) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0)) as run:
            reply = await run.ask(**NAMED, messages=messages)
            assert (reply.status_code, _text(reply)) == (200, "refund")
            assert reply.headers["x-understudy-route"] == "accept" and not run.llm.requests
            (call,) = await run.captured()
            assert call.served_by == "specialist" and not call.is_reference
            assert call.route is not None and call.route.is_named

    asyncio.run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("extra", [{}, {"n": 2}], ids=["unsure", "unservable"])
def test_what_a_named_specialist_does_not_keep_is_asked_of_the_llms_own_model(
    tmp_path: pathlib.Path, is_stream: bool, extra: dict[str, Any]
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, llm_model="llm-1", dead_first=True) as run:
            run.engine.confidence = 0.5
            reply = await run.ask(**NAMED, **extra, stream=is_stream)
            assert reply.status_code == 200 and reply.headers["x-understudy-route"] == ("llm" if extra else "escalate")
            assert [request["model"] for request in run.llm.requests] == ["llm-1"]
            # The first endpoint has no model of its own, so it was not even tried.
            assert not run.core.meter.counts[("understudy_upstream_failures_total", "0")]

    asyncio.run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
def test_where_no_llm_has_a_model_of_its_own_the_answer_says_which_may_be_asked(
    tmp_path: pathlib.Path, is_stream: bool
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.engine.confidence = 0.5
            reply = await run.ask(**NAMED, stream=is_stream)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (400, "model_not_found", "model")
            assert "allowed: llm-1; or let upstream.N.model name one" in error["message"]
            assert not run.llm.requests
            (call,) = await run.captured()
            assert call.status == 400 and call.response is None

    asyncio.run(scenario())


def test_a_specialist_that_is_not_served_is_a_model_that_does_not_exist(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            reply = await run.ask(model="understudy/nothing")
            error = reply.json()["error"]
            assert reply.status_code == 404
            assert (error["type"], error["code"], error["param"]) == (
                "invalid_request_error",
                "model_not_found",
                "model",
            )
            assert "`understudy/nothing` does not exist; served are understudy/triage" in error["message"]
            assert not run.llm.requests and not run.engine.num_asked

    asyncio.run(scenario())


def test_an_accepted_answer_costs_its_share_of_the_replicas_time(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, prices=PriceConfig(replica_usd_per_hour=3600.0)) as run:
            await run.ask()
            (call,) = await run.captured()
            assert call.served_by == "specialist" and call.latency_ms is not None and call.cost_usd is not None
            assert 0 < call.cost_usd <= call.latency_ms / 1e3

    asyncio.run(scenario())
