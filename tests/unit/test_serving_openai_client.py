"""OpenAI's own client against the gateway over HTTP: a specialist's answers and the LLM's look as OpenAI's do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import openai
import pytest
from aiohttp import web
from fakes import LLM_TEXT, PATH, REQUEST, Running, engine_answer, gateway, llm_body, make_specialist, tool_message
from loopback import served
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from cluster.access import ApiKeys
from cluster.engine import EngineAnswer
from cluster.records import AnswerKind, Specialist
from serving import api
from serving.audit import AuditConfig

MESSAGES: Any = REQUEST["messages"]
NAMED = "understudy/triage"
USAGE: Any = {"include_usage": True}


class Order(BaseModel):
    order_id: str
    count: int


class Look(BaseModel):
    """Look an order up."""

    order_id: str


LOOK: Any = pydantic_function_tool(Look)
ANY_TOOL: Any = {"type": "function", "function": {"name": "Look"}}


class Clients(NamedTuple):
    run: Running
    plain: OpenAI
    """Its calls block: use it in a thread."""
    quick: AsyncOpenAI


def specialist_of(kind: AnswerKind) -> Specialist:
    made = make_specialist()
    return made.model_copy(update={"prompt_format": {**made.prompt_format, "answer_kind": kind}})


@contextlib.asynccontextmanager
async def clients(tmp_path: pathlib.Path, kind: AnswerKind = "label", **config: Any) -> AsyncIterator[Clients]:
    async with gateway(tmp_path, specialist_of(kind), **config) as run, served(run.api) as url:
        known: Any = {"base_url": f"{url}/v1", "api_key": run.key, "max_retries": 0}
        with OpenAI(**known) as plain:
            async with AsyncOpenAI(**known) as quick:
                yield Clients(run, plain, quick)


def say(run: Running, message: dict[str, Any], text: str = "") -> None:
    """Let the engine answer with this message."""

    async def answer() -> EngineAnswer:
        return engine_answer(text, 0.99).model_copy(update={"message": message})

    run.engine.answer_with = answer


@pytest.mark.parametrize("is_sure", [True, False], ids=["specialist", "llm"])
def test_both_answer_every_kind_of_client_alike(tmp_path: pathlib.Path, is_sure: bool) -> None:
    text, counts = ("refund", (10, 2, 12)) if is_sure else (LLM_TEXT, (100, 10, 110))

    def ask_plainly(client: OpenAI) -> tuple[Any, list[Any]]:
        whole = client.chat.completions.create(model="any", messages=MESSAGES)
        with client.chat.completions.create(
            model="any", messages=MESSAGES, stream=True, stream_options=USAGE
        ) as stream:
            return whole, list(stream)

    async def scenario() -> None:
        async with clients(tmp_path) as (run, plain, quick):
            run.engine.confidence = 0.99 if is_sure else 0.1
            run.llm.answer_with = lambda _: {"role": "assistant", "content": LLM_TEXT}
            whole, chunks = await asyncio.to_thread(ask_plainly, plain)
            also = await quick.chat.completions.create(model="any", messages=MESSAGES)
            async with quick.chat.completions.stream(model="any", messages=MESSAGES, stream_options=USAGE) as stream:
                streamed = await stream.get_final_completion()
            for one in (whole, also, streamed):
                assert one.object == "chat.completion" and one.id and one.created and one.usage
                (choice,) = one.choices
                assert (choice.message.role, choice.message.content, choice.message.refusal) == (
                    "assistant",
                    text,
                    None,
                )
                assert (choice.index, choice.finish_reason, choice.message.tool_calls) == (0, "stop", None)
                usage = one.usage
                assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == counts
            assert "".join(part.choices[0].delta.content or "" for part in chunks if part.choices) == text
            assert [part.usage for part in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert not chunks[-1].choices and chunks[-1].usage.total_tokens == counts[2]
            assert {part.object for part in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
            calls = await run.captured()
            assert len(calls) == 4 and {call.served_by for call in calls} == {"specialist" if is_sure else "llm"}
            assert [calls[0].call_id, calls[2].call_id] == [whole._request_id, also._request_id]
            if is_sure:
                assert whole.system_fingerprint == chunks[0].system_fingerprint == "fp_" + "f" * 12

    asyncio.run(scenario())


@pytest.mark.parametrize("extra", [{}, {"stream_options": USAGE}], ids=["plain", "counted"])
def test_an_llm_that_does_not_stream_is_a_stream_to_the_client(tmp_path: pathlib.Path, extra: dict[str, Any]) -> None:
    body = llm_body()
    tokens = [{"token": LLM_TEXT, "bytes": None, "logprob": -0.5, "top_logprobs": []}]
    calls = tool_message(("Look", {"order_id": "A-1"}), ("Look", {"order_id": "B-2"}))
    refused = {"role": "assistant", "content": None, "refusal": "I will not"}
    body["choices"] = [
        {**body["choices"][0], "index": 0, "logprobs": {"content": tokens, "refusal": None}},
        {"index": 1, "message": calls, "logprobs": None, "finish_reason": "tool_calls"},
        {"index": 2, "message": refused, "logprobs": None, "finish_reason": "stop"},
    ]

    async def whole(_: web.Request) -> web.StreamResponse:
        return web.json_response(body)

    async def scenario() -> None:
        async with clients(tmp_path) as (run, _, quick):
            run.llm._stream = whole  # type: ignore[method-assign]
            ask: Any = {"model": "any", "messages": MESSAGES, "n": 3, "logprobs": True, **extra}
            async with quick.chat.completions.stream(**ask) as stream:
                text, called, refusal = (await stream.get_final_completion()).choices
            assert (text.message.content, text.finish_reason) == (LLM_TEXT, "stop")
            assert text.logprobs is not None and text.logprobs.content[0].logprob == -0.5
            assert [call.to_dict() for call in called.message.tool_calls] == [
                {**call, "index": index, "function": {**call["function"], "parsed_arguments": None}}
                for index, call in enumerate(calls["tool_calls"])
            ] and called.finish_reason == "tool_calls"
            assert (refusal.message.refusal, refusal.message.content) == ("I will not", None)
            chunks = [chunk async for chunk in await quick.chat.completions.create(**ask, stream=True)]
            assert [chunk.usage is not None for chunk in chunks if not chunk.choices] == [True] * len(extra)
            kept = await run.captured()
            assert [call.response for call in kept] == [body] * 2 and {call.status for call in kept} == {200}
            run.llm.status = 404
            with pytest.raises(openai.NotFoundError):
                await quick.chat.completions.create(**ask, stream=True)

    asyncio.run(scenario())


def test_a_stream_without_usage_has_none(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with clients(tmp_path) as (_, _, quick):
            stream = await quick.chat.completions.create(model="any", messages=MESSAGES, stream=True)
            chunks = [chunk async for chunk in stream]
            assert all(chunk.choices and chunk.usage is None for chunk in chunks)

    asyncio.run(scenario())


def test_a_parsed_answer_is_the_specialists_only_where_it_has_the_schema(tmp_path: pathlib.Path) -> None:
    good, bad = Order(order_id="A-1", count=2), '{"order_id":"A-1","count":"two"}'

    async def scenario() -> None:
        async with clients(tmp_path, "json", llm_model="llm-1") as (run, plain, quick):
            run.llm.answer_with = lambda _: {"role": "assistant", "content": '{"order_id":"L-9","count":9}'}
            ask: Any = {"model": NAMED, "messages": MESSAGES, "response_format": Order}
            run.engine.text = good.model_dump_json()
            whole = await asyncio.to_thread(plain.chat.completions.parse, **ask)
            async with quick.chat.completions.stream(**ask) as stream:
                streamed = await stream.get_final_completion()
            assert whole.choices[0].message.parsed == streamed.choices[0].message.parsed == good
            assert not run.llm.requests
            for text in (bad, "no JSON", f"```json\n{good.model_dump_json()}\n```"):
                run.engine.text = text
                left = await quick.chat.completions.parse(**ask)
                assert left.choices[0].message.parsed == Order(order_id="L-9", count=9)
            # An object is all that json_object asks for.
            run.engine.text = bad
            loose = await quick.chat.completions.create(**{**ask, "response_format": {"type": "json_object"}})
            assert json.loads(loose.choices[0].message.content) == json.loads(bad) and len(run.llm.requests) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("is_specialist", [True, False])
def test_parallel_tool_calls_come_whole_and_streamed(tmp_path: pathlib.Path, is_specialist: bool) -> None:
    message = tool_message(("Look", {"order_id": "A-1"}), ("Look", {"order_id": "B-2"}))
    expected = [Look(order_id="A-1"), Look(order_id="B-2")]

    async def scenario() -> None:
        async with clients(tmp_path, "tool_call", llm_model="llm-1") as (run, _, quick):
            say(run, message)
            run.llm.answer_with = lambda _: message
            ask: Any = {"model": NAMED if is_specialist else "any", "messages": MESSAGES, "tools": [LOOK]}
            found = [await quick.chat.completions.parse(**ask)]
            async with quick.chat.completions.stream(**ask) as stream:
                found.append(await stream.get_final_completion())
            for completion in found:
                (choice,) = completion.choices
                assert choice.finish_reason == "tool_calls" and choice.message.content is None
                calls = choice.message.tool_calls or []
                assert [call.function.parsed_arguments for call in calls] == expected
                assert [call.type for call in calls] == ["function"] * 2
            ids = [call.id for one in found for call in one.choices[0].message.tool_calls]
            if is_specialist:
                assert len(set(ids)) == 4 and max(map(len, ids)) <= 40 and not run.llm.requests
            else:
                assert len(run.llm.requests) == 2 and not run.engine.num_asked

    asyncio.run(scenario())


ASKED: list[tuple[dict[str, Any], bool]] = [
    ({"tool_choice": "auto"}, True),
    ({"tool_choice": "required"}, True),
    ({"tool_choice": ANY_TOOL}, True),
    ({"tool_choice": "none"}, False),
    ({"parallel_tool_calls": False}, True),
    ({"max_completion_tokens": 2}, True),
    ({"max_completion_tokens": 1}, False),
    ({"max_tokens": 1}, False),
    ({"stop": ["\nObservation:"], "seed": 7}, True),
    ({"stop": "A-1"}, False),
    ({"metadata": {"a": "b"}, "store": True, "user": "u"}, True),
    ({"logprobs": True}, False),
    ({"n": 2}, False),
    ({"extra_body": {"not_openais": 1}}, False),
]
"""What a request adds -> whether a specialist's tool call may answer it."""


def test_what_a_specialist_answers_is_what_was_asked_for(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with clients(tmp_path, "tool_call", llm_model="llm-1") as (run, _, quick):
            say(run, tool_message(("Look", {"order_id": "A-1"})), 'Look {"order_id":"A-1"}')
            for extra, is_kept in ASKED:
                run.llm.requests.clear()
                reply = await quick.chat.completions.with_raw_response.create(
                    model=NAMED, messages=MESSAGES, tools=[LOOK], **extra
                )
                assert (reply.headers["x-understudy-route"] == "accept") == is_kept, extra
                assert reply.headers["x-understudy-reason"] and bool(run.llm.requests) != is_kept, extra

    asyncio.run(scenario())


def test_what_no_specialist_takes_reaches_the_llm_as_it_was_sent(tmp_path: pathlib.Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    audio = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
    asked: list[dict[str, Any]] = [
        {"n": 2, "logprobs": True, "top_logprobs": 2, "logit_bias": {"7": -1}},
        {"messages": [*MESSAGES[:1], {"role": "user", "content": [{"type": "text", "text": "see"}, image]}]},
        {"messages": [*MESSAGES[:1], {"role": "user", "content": [audio]}], "modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"tools": [{"type": "custom", "custom": {"name": "free"}}]},
    ]

    async def scenario() -> None:
        async with clients(tmp_path) as (run, _, quick):
            body = llm_body()
            body["choices"] = [
                {**body["choices"][0], "index": n, "logprobs": {"content": [], "refusal": None}} for n in range(2)
            ]
            run.llm.body = body
            for extra in asked:
                known: Any = {"model": "any", "messages": MESSAGES, "seed": 3, "metadata": {"a": "b"}, **extra}
                reply = await quick.chat.completions.with_raw_response.create(**known, extra_body={"odd": [1.5]})
                assert run.llm.requests[-1] == {**known, "odd": [1.5]}
                assert reply.parse().to_dict() == body and reply.headers["x-understudy-route"] == "llm"
            assert not run.engine.num_asked

    asyncio.run(scenario())


@pytest.mark.parametrize("role", ["system", "developer"])
def test_text_in_parts_and_either_name_of_the_system_are_a_specialists(tmp_path: pathlib.Path, role: str) -> None:
    parts = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]
    messages: Any = [{"role": role, "content": MESSAGES[0]["content"]}, {"role": "user", "content": parts}]

    async def scenario() -> None:
        async with clients(tmp_path) as (run, _, quick):
            reply = await quick.chat.completions.create(model="any", messages=messages)
            assert reply.choices[0].message.content == "refund" and not run.llm.requests

    asyncio.run(scenario())


def test_errors_are_those_that_the_client_knows(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As large as it is, it would take seconds.
    monkeypatch.setattr(api, "MAX_REQUEST_BYTES", 2**20)

    async def scenario() -> None:
        async with clients(tmp_path) as (run, _, quick):
            ask = quick.chat.completions.create
            off_route: Any = [{"role": "user", "content": "another kind"}]
            with pytest.raises(openai.AuthenticationError) as wrong_key:
                await quick.with_options(api_key="us-no").chat.completions.create(model="any", messages=MESSAGES)
            assert (wrong_key.value.code, wrong_key.value.type) == ("invalid_api_key", "invalid_request_error")
            with pytest.raises(openai.NotFoundError) as no_model:
                await ask(model="understudy/nothing", messages=MESSAGES)
            assert (no_model.value.code, no_model.value.param) == ("model_not_found", "model")
            for messages in ([], "text", [{"content": "x"}]):
                with pytest.raises(openai.BadRequestError) as bad:
                    await ask(model="any", messages=messages)  # type: ignore[arg-type]
                assert bad.value.type == "invalid_request_error" and bad.value.param.startswith("messages")
            with pytest.raises(openai.APIStatusError) as too_large:
                await ask(model="any", messages=[{"role": "user", "content": "x" * 2**20}])
            assert (too_large.value.status_code, too_large.value.code) == (413, "too_large")
            for raw in (b"{", b"[]", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}'):
                reply = await run.http.post(PATH, content=raw)
                assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
            limited = ApiKeys(tmp_path / "keys.json").create("slow", "agent", rate_per_minute=1)
            slow = quick.with_options(api_key=limited).chat.completions
            await slow.create(model="any", messages=MESSAGES)
            with pytest.raises(openai.RateLimitError) as too_often:
                await slow.create(model="any", messages=MESSAGES)
            assert too_often.value.code == "rate_limit_exceeded" and too_often.value.response.headers["retry-after"]
            for status, kind in ((400, openai.BadRequestError), (404, openai.NotFoundError)):
                run.llm.status, run.llm.error = status, {"message": "no", "type": "t", "param": "p", "code": "c"}
                for is_stream in (False, True):
                    with pytest.raises(kind) as refused:
                        await ask(model="any", messages=off_route, stream=is_stream)
                    assert (refused.value.code, refused.value.param, refused.value.type) == ("c", "p", "t")
            run.llm.status = 503
            with pytest.raises(openai.InternalServerError):
                await ask(model="any", messages=off_route)
            run.llm.status, run.llm.fate = 200, "cut"
            with pytest.raises(openai.APIError, match="broke off"):
                _ = [chunk async for chunk in await ask(model="any", messages=off_route, stream=True)]

    asyncio.run(scenario())


@pytest.mark.parametrize("own_model", [None, "llm-1"])
def test_models_are_listed_and_looked_up(tmp_path: pathlib.Path, own_model: str | None) -> None:
    async def scenario() -> None:
        async with clients(tmp_path, llm_model=own_model) as (run, plain, quick):
            names = ["llm-1", *(["understudy/llm"] if own_model else []), NAMED]
            assert [model.id async for model in quick.models.list()] == names
            for name in names:
                model = await asyncio.to_thread(plain.models.retrieve, name)
                assert (model.id, model.object) == (name, "model")
            for name in ("gpt-none", "understudy/none", "llm-1/..", "a b"):
                with pytest.raises(openai.NotFoundError) as missing:
                    await quick.models.retrieve(name)
                assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
            with pytest.raises(openai.AuthenticationError):
                await quick.with_options(api_key="us-no").models.retrieve(NAMED)
            with pytest.raises(openai.APIStatusError) as not_allowed:
                await quick.models.delete("llm-1")
            assert not_allowed.value.status_code == 405
            run.llm.lists_models = False
            listed = [model.id async for model in quick.models.list()]
            assert listed == (names if own_model else [NAMED]), "what the recipe names, where the LLM lists nothing"
            await run.llm.close()
            assert (await quick.models.retrieve(NAMED)).owned_by == "understudy"

    asyncio.run(scenario())


def test_a_client_may_ask_for_the_llm_by_header_or_by_name(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with clients(tmp_path, llm_model="llm-1", audit=AuditConfig(share=1.0)) as (run, _, quick):
            ask = quick.chat.completions.create
            header = {"x-understudy-route": "llm"}
            for known in ({"model": "understudy/llm"}, {"model": "any", "extra_headers": header}):
                for is_stream in (False, True):
                    reply: Any = await ask(messages=MESSAGES, stream=is_stream, **known)
                    if is_stream:
                        _ = [chunk async for chunk in reply]
                    assert run.llm.requests[-1]["model"] == "llm-1"
            assert not run.engine.num_asked
            calls = await run.captured()
            assert len(calls) == 4 and not any(call.is_reference for call in calls)
            assert {call.route.reason for call in calls if call.route} == {"the client asks for the LLM"}
            with pytest.raises(openai.BadRequestError, match="allowed is llm"):
                await ask(model="any", messages=MESSAGES, extra_headers={"x-understudy-route": "specialist"})

    asyncio.run(scenario())


def test_where_no_llm_has_a_model_of_its_own_only_the_header_asks_for_it(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with clients(tmp_path) as (run, _, quick):
            ask = quick.chat.completions.create
            await ask(model="any", messages=MESSAGES, extra_headers={"x-understudy-route": "llm"})
            assert run.llm.requests[-1]["model"] == "any"
            with pytest.raises(openai.BadRequestError) as refused:
                await ask(model="understudy/llm", messages=MESSAGES)
            assert refused.value.code == "model_not_found" and "allowed: llm-1" in refused.value.message

    asyncio.run(scenario())
