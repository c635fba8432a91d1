"""A streamed answer put together is the unary one, whatever way it was cut into deltas, events and bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.sse import SseReader
from serving.openai_wire import sse_event
from serving.reassembly import Reassembler, reassemble

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_SOME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
_TOKENS = st.lists(
    st.fixed_dictionaries(
        {"token": _SOME, "logprob": st.floats(-9, 0), "bytes": st.none(), "top_logprobs": st.just([])}
    ),
    max_size=4,
)
_CALL = st.builds(
    lambda name, arguments, kind: (
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        if kind
        else {"type": "custom", "custom": {"name": name, "input": arguments}}
    ),
    _SOME,
    _TEXT,
    st.booleans(),
)


def _whole(content: str, refusal: str | None, calls: list[dict[str, Any]], function: dict[str, Any] | None) -> Any:
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal}
    if calls:
        message["tool_calls"] = [{"id": f"call_{number}", **call} for number, call in enumerate(calls)]
    if function:
        message["function_call"] = function
    if calls or function or refusal:
        message["content"] = content or None
    return message


_MESSAGE = st.builds(
    _whole,
    _TEXT,
    st.none() | _SOME,
    st.lists(_CALL, max_size=3),
    st.none() | st.fixed_dictionaries({"name": _SOME, "arguments": _TEXT}),
)
_CHOICE = st.fixed_dictionaries(
    {
        "message": _MESSAGE,
        "finish_reason": st.sampled_from(["stop", "length", "tool_calls", "content_filter", "function_call"]),
        "logprobs": st.none() | st.fixed_dictionaries({"content": _TOKENS, "refusal": st.none() | _TOKENS}),
    }
)
_COUNTS = st.fixed_dictionaries({"prompt_tokens": st.integers(0, 10**6), "completion_tokens": st.integers(0, 10**6)})
_BODY = st.builds(
    lambda choices, usage, fingerprint: {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 17,
        "model": "llm-1",
        "system_fingerprint": fingerprint,
        "choices": [{"index": number, **choice} for number, choice in enumerate(choices)],
        "usage": usage,
    },
    st.lists(_CHOICE, min_size=1, max_size=3),
    _COUNTS,
    st.none() | _SOME,
)


def _cut(text: str, draw: Any) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


def _deltas(choice: dict[str, Any], draw: Any, has_indexes: bool) -> list[dict[str, Any]]:
    """Parts of one choice in order: role, texts in pieces, tool calls (interleaved where they are numbered), the end."""
    message = choice["message"]
    opening = {"role": "assistant", "content": "" if message["content"] is not None else None, "refusal": None}
    parts: list[dict[str, Any]] = [{"delta": opening}]
    for key in ("content", "refusal"):
        parts += [{"delta": {key: piece}} for piece in _cut(message[key] or "", draw) if piece]
    if "function_call" in message:
        parts.append({"delta": {"function_call": {"name": message["function_call"]["name"], "arguments": ""}}})
        parts += [
            {"delta": {"function_call": {"arguments": piece}}}
            for piece in _cut(message["function_call"]["arguments"], draw)
        ]
    rows = [_call_deltas(number, call, draw, has_indexes) for number, call in enumerate(message.get("tool_calls", ()))]
    parts += _interleaved(rows, draw) if has_indexes else [part for row in rows for part in row]
    if choice["logprobs"] is not None:
        for key, tokens in choice["logprobs"].items():
            parts.append({"delta": {}, "logprobs": {key: tokens and tokens[:1]}})
            parts.append({"delta": {}, "logprobs": {key: tokens and tokens[1:]}})
    else:
        parts[0]["logprobs"] = None
    return [*parts, {"delta": {}, "finish_reason": choice["finish_reason"]}]


def _call_deltas(number: int, call: dict[str, Any], draw: Any, has_indexes: bool) -> list[dict[str, Any]]:
    kind = call["type"]
    words = "arguments" if kind == "function" else "input"
    index = {"index": number} if has_indexes else {}
    begin = {**index, "id": call["id"], "type": kind, kind: {"name": call[kind]["name"], words: ""}}
    rest = [{**index, kind: {words: piece}} for piece in _cut(call[kind][words], draw)]
    return [{"delta": {"tool_calls": [one]}} for one in (begin, *rest)]


def _interleaved(rows: list[list[Any]], draw: Any) -> list[Any]:
    rows, mixed = [list(row) for row in rows if row], []
    while rows:
        row = rows[draw(st.integers(0, len(rows) - 1))]
        mixed.append(row.pop(0))
        rows = [row for row in rows if row]
    return mixed


@given(_BODY, st.data())
def test_a_stream_gives_what_the_unary_call_would_have(body: dict[str, Any], data: st.DataObject) -> None:
    has_indexes = data.draw(st.booleans())
    envelope = {key: body[key] for key in ("id", "created", "model", "system_fingerprint")}
    rows = [
        [{"index": choice["index"], "finish_reason": None, **part} for part in _deltas(choice, data.draw, has_indexes)]
        for choice in body["choices"]
    ]
    events = [
        {**envelope, "object": "chat.completion.chunk", "obfuscation": "x", "usage": None, "choices": [part]}
        for part in _interleaved(rows, data.draw)
    ]
    events.append({**envelope, "object": "chat.completion.chunk", "choices": [], "usage": body["usage"]})
    raw = b": hello\n\n" + b"".join(map(sse_event, events)) + b"data: [DONE]\n\n"
    raw = raw.replace(b"\n", data.draw(st.sampled_from([b"\n", b"\r\n", b"\r"])))
    size = data.draw(st.integers(1, 60))

    reader, parts = SseReader(), Reassembler(len(rows))
    for begin in range(0, len(raw), size):
        for event in reader.feed(raw[begin : begin + size]):
            parts.add(event)
    # A carriage return at the very end may be half of a line end.
    for event in reader.end():
        parts.add(event)
    assert reader.is_done and not reader.num_bad and parts.is_finished
    assert parts.body() == body


def _calls(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    chunks = [{"choices": [{"index": 0, "delta": {"tool_calls": [part]}}]} for part in parts]
    body = reassemble(chunks)
    assert body is not None
    return body["choices"][0]["message"]["tool_calls"]


def _part(arguments: str, **rest: Any) -> dict[str, Any]:
    name = {"name": rest.pop("name")} if "name" in rest else {}
    return {**rest, "function": {**name, "arguments": arguments}}


@pytest.mark.parametrize(
    "parts",
    [
        [_part("{", id="a", name="f"), _part("}"), _part("[", id="b", name="g"), _part("]")],
        [_part("{", id="a", name="f"), _part("}", id="a"), _part("[", id="b", name="g"), _part("]", id="b")],
        [_part("{}", index=0, id="a", name="f"), _part("[", index=0, id="b", name="g"), _part("]", index=0)],
        [_part("[", index=1, id="b", name="g"), _part("{}", index=0, id="a", name="f"), _part("]", index=1)],
        [
            _part("", index=0, id="a", name="f"),
            _part("{}", index=0, id="a", name="f"),
            _part("[]", index=1, id="b", name="g"),
        ],
    ],
    ids=["no index", "ids repeated", "all numbered 0", "out of order", "names repeated"],
)
def test_servers_number_tool_calls_in_their_own_ways(parts: list[dict[str, Any]]) -> None:
    assert _calls(*parts) == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "[]"}},
    ]


def test_calls_without_numbers_and_ids_are_told_apart_by_their_names() -> None:
    assert [call["function"] for call in _calls(_part("{}", name="f"), _part("[]", name="f"))] == [
        {"name": "f", "arguments": "{}"},
        {"name": "f", "arguments": "[]"},
    ]


def test_halves_of_a_surrogate_pair_meet_again() -> None:
    raw = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n'
    raw += b'data: {"choices":[{"index":0,"delta":{"content":"\\ude00 \xc3\xa9"}}]}\n\n'
    body = reassemble(SseReader().feed(raw))
    assert body is not None and body["choices"][0]["message"]["content"] == "\U0001f600 \u00e9"


def test_fields_of_a_servers_own_stay_where_a_whole_answer_has_them() -> None:
    parts = [
        {"index": 0, "delta": {"reasoning_content": "a", "annotations": [1]}, "content_filter_results": {"x": 1}},
        {"index": 0, "delta": {"reasoning_content": "b", "annotations": [2]}, "stop_reason": 7},
    ]
    body = reassemble([{"choices": [part]} for part in parts])
    assert body is not None
    (choice,) = body["choices"]
    assert choice["message"]["reasoning_content"] == "ab" and choice["message"]["annotations"] == [1, 2]
    assert choice["content_filter_results"] == {"x": 1} and choice["stop_reason"] == 7


def test_the_end_without_its_last_line_ends_counts_and_a_cut_event_does_not() -> None:
    reader = SseReader()
    assert reader.feed(b'data: {"a":1}\n\ndata: {"b":2}') == [{"a": 1}]
    assert reader.end() == [{"b": 2}] and not reader.num_bad
    reader = SseReader()
    assert reader.feed(b"data: [DONE]") == [] and reader.end() == [] and reader.is_done
    reader = SseReader()
    assert reader.feed(b'data: {"a":') == [] and reader.end() == [] and not reader.num_bad and not reader.is_done


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda one: st.lists(one, max_size=2) | st.dictionaries(st.text(max_size=5), one, max_size=2),
    max_leaves=4,
)
_ODD = st.fixed_dictionaries(
    {},
    optional={
        "id": _JSON,
        "usage": _JSON,
        "choices": _JSON
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "index": _JSON,
                    "finish_reason": _JSON,
                    "logprobs": _JSON,
                    "delta": _JSON
                    | st.fixed_dictionaries(
                        {},
                        optional={
                            "role": _JSON,
                            "content": _JSON,
                            "function_call": _JSON,
                            "tool_calls": _JSON
                            | st.lists(
                                st.fixed_dictionaries({}, optional={"index": _JSON, "id": _JSON, "function": _JSON})
                            ),
                        },
                    ),
                },
            )
        ),
    },
)


@given(st.lists(_ODD, max_size=4))
def test_whatever_an_llm_streams_is_put_together_without_an_error(chunks: list[dict[str, Any]]) -> None:
    body = reassemble(chunks)
    assert body is None or isinstance(json.loads(json.dumps(body))["choices"], list)


@given(st.binary(max_size=200), st.integers(1, 20))
def test_whatever_bytes_come_are_read_without_an_error(raw: bytes, size: int) -> None:
    reader = SseReader()
    for begin in range(0, len(raw), size):
        reader.feed(b"data: " + raw[begin : begin + size])
    reader.end()
