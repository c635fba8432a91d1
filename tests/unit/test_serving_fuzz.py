"""Whatever comes over HTTP is answered as OpenAI would: no fault of the gateway's, and every call it took is kept once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import LLM_TEXT, PATH, Running, gateway
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.records import AgentCall
from cluster.sse import MAX_NESTING, SseReader

ANY_TEXT = st.text(st.characters(), max_size=20) | st.sampled_from(["\ud800", "a\udfff", "\x00", "understudy/triage"])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | ANY_TEXT,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(ANY_TEXT, one, max_size=3),
    max_leaves=8,
)
PLAIN_TEXT = st.text(max_size=20)
PLAIN_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | PLAIN_TEXT,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(PLAIN_TEXT, one, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | ANY_JSON},
    optional={
        "content": ANY_TEXT
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": ANY_JSON}), max_size=2)
        | ANY_JSON,
        "tool_calls": st.lists(st.fixed_dictionaries({}, optional={"id": ANY_JSON, "function": ANY_JSON}), max_size=2)
        | ANY_JSON,
        "tool_call_id": ANY_JSON,
        "name": ANY_JSON,
        "refusal": ANY_JSON,
    },
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function")},
    optional={"function": st.fixed_dictionaries({}, optional={"name": ANY_JSON, "parameters": ANY_JSON}) | ANY_JSON},
)
PLAIN_TOOL = st.fixed_dictionaries({"type": st.just("function")}, optional={"function": PLAIN_JSON})
FIELDS = (
    "model temperature top_p n stream_options stop max_tokens max_completion_tokens presence_penalty frequency_penalty "
    "logit_bias user seed logprobs top_logprobs response_format tool_choice functions function_call parallel_tool_calls "
    "modalities audio web_search_options store metadata reasoning_effort service_tier prediction"
).split()
KNOWN = [{"role": "system", "content": "Name the intent."}, {"role": "user", "content": "Where is it?"}]
REQUEST = st.fixed_dictionaries(
    {"messages": st.just(KNOWN) | st.lists(MESSAGE, max_size=3) | ANY_JSON},
    optional={
        "stream": st.booleans() | ANY_JSON,
        "tools": st.lists(TOOL, max_size=2) | ANY_JSON,
        **{name: ANY_JSON for name in FIELDS},
    },
)
ODD_HEADERS = st.dictionaries(
    st.sampled_from(
        ["x-agent", "x-session-id", "x-step", "x-faces-person", "content-type", "content-encoding", "accept", "cookie"]
    ),
    st.binary(max_size=30) | st.sampled_from([b"true", b"application/xml", b"gzip", b"-1", b"9" * 400]),
    max_size=4,
)
SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
Ask = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture
def ask(tmp_path: pathlib.Path) -> Iterator[Ask]:
    """One gateway; asks it (method, path, body, headers) and checks each answer. At the end, all it took must be stored."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        run = runner.run(stack.enter_async_context(gateway(tmp_path, specialist_timeout_s=5.0)))
        taken: list[AgentCall] = []
        put = run.core.capture.put
        run.core.capture.put = lambda call: (taken.append(call), put(call))[1]  # type: ignore[method-assign]

        def ask_one(
            method: str, path: str, body: bytes, headers: dict[str, bytes]
        ) -> tuple[int, dict[str, str], bytes]:
            taken.clear()
            found = runner.run(_ask(run, method, path, body, headers))
            _check(*found, taken)
            return found

        try:
            yield ask_one
            ids = {call.call_id for call in runner.run(run.captured())}
            assert len(ids) == run.core.meter.total("understudy_calls_total")
            assert not run.core.meter.total("understudy_calls_dropped_total")
        finally:
            runner.run(stack.aclose())


async def _ask(
    run: Running, method: str, path: str, body: bytes, headers: dict[str, bytes]
) -> tuple[int, dict[str, str], bytes]:
    status, got, replied = 0, b"", {}
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, got, replied
        if message["type"] == "http.response.start":
            status = message["status"]
            replied = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        got += message.get("body", b"")

    pairs = {"authorization": f"Bearer {run.key}".encode(), **headers}
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    raw = [(name.encode(), value) for name, value in pairs.items()]
    await run.api({**scope, "headers": raw, "scheme": "http", "server": ("g", 80)}, receive, send)
    return status, replied, got


def _check(status: int, headers: dict[str, str], body: bytes, taken: list[AgentCall]) -> None:
    assert 200 <= status < 500
    call_id = headers.get("x-understudy-call-id")
    assert [call.call_id for call in taken] == ([call_id] if call_id else [])
    if status >= 400:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    elif call_id:
        said = SseReader().feed(body) if body.startswith(b"data: ") else [json.loads(body)]
        text = json.dumps(said)
        assert "refund" in text or LLM_TEXT in text or LLM_TEXT[:4] in text


@SETTINGS
@given(
    body=st.binary(max_size=60)
    | st.text(max_size=40).map(str.encode)
    | ANY_JSON.map(lambda one: json.dumps(one).encode())
)
def test_any_bytes_and_any_json_are_refused_as_openai_does(ask: Ask, body: bytes) -> None:
    status, headers, _ = ask("POST", PATH, body, {})
    assert status == 400 and "x-understudy-call-id" not in headers


@SETTINGS
@given(request_=REQUEST, headers=ODD_HEADERS)
def test_wrong_types_in_every_field_are_answered_and_kept(
    ask: Ask, request_: dict[str, Any], headers: dict[str, bytes]
) -> None:
    ask("POST", PATH, json.dumps(request_).encode(), headers)


@SETTINGS
@given(
    fields=st.dictionaries(
        st.sampled_from([*FIELDS, "tools"]), PLAIN_JSON | st.lists(PLAIN_TOOL, max_size=2), max_size=6
    ),
    stream=st.none() | st.booleans(),
    content=PLAIN_TEXT | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": PLAIN_JSON}), max_size=2),
    headers=ODD_HEADERS,
)
def test_what_only_the_llm_can_judge_reaches_it_and_is_kept(
    ask: Ask, fields: dict[str, Any], stream: bool | None, content: Any, headers: dict[str, bytes]
) -> None:
    if fields.get("model") == "understudy/triage":
        del fields["model"]
    request = {**fields, "messages": [KNOWN[0], {"role": "user", "content": content}], "stream": stream}
    assert ask("POST", PATH, json.dumps(request).encode(), headers)[0] == 200


@SETTINGS
@given(
    depth=st.integers(1, 400) | st.integers(900, 1_100) | st.just(100_000),
    place=st.sampled_from(["", "content", "tools"]),
    kind=st.sampled_from(["list", "object"]),
)
def test_deep_nesting_is_answered_and_kept_or_refused(ask: Ask, depth: int, place: str, kind: str) -> None:
    nest = ("[" * depth + "]" * depth) if kind == "list" else '{"a":' * depth + "1" + "}" * depth
    content = f'[{{"type":"text","text":{nest}}}]' if place == "content" else '"x"'
    other = "" if place == "content" else f',"{place or "x"}":{nest}'
    body = f'{{"messages":[{{"role":"user","content":{content}}}]{other}}}'
    status, _, _ = ask("POST", PATH, body.encode(), {})
    assert status == (200 if depth <= MAX_NESTING - 10 else 400) or abs(depth - MAX_NESTING) < 10


@SETTINGS
@given(
    method=st.sampled_from(["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "POST", "TRACE", "", "\u00e9"]),
    path=st.sampled_from([PATH, "/v1/models", "/v1/feedback", "/healthz", "/", "", "/v1/files"]) | st.text(max_size=20),
    body=st.binary(max_size=20),
    headers=ODD_HEADERS,
)
def test_any_method_at_any_path_is_answered(
    ask: Ask, method: str, path: str, body: bytes, headers: dict[str, bytes]
) -> None:
    ask(method, path, body, headers)


@SETTINGS
@given(authorization=st.binary(max_size=100) | st.sampled_from([b"", b"Bearer", b"Bearer us-", b"Basic eA=="]))
def test_no_made_up_authorization_lets_anybody_in(ask: Ask, authorization: bytes) -> None:
    body = json.dumps({"messages": KNOWN}).encode()
    assert ask("POST", PATH, body, {"authorization": authorization})[0] == 401


@SETTINGS
@given(
    body=st.dictionaries(
        st.sampled_from(["call_id", "session_id", "score", "label", "text"]) | ANY_TEXT, ANY_JSON, max_size=5
    ).map(lambda one: json.dumps(one).encode())
)
def test_any_feedback_is_taken_or_refused(ask: Ask, body: bytes) -> None:
    assert ask("POST", "/v1/feedback", body, {})[0] in (202, 400)
