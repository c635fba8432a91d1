"""What counts as the first content of a stream, and which beginnings are broken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_llm import END, HELLO, ROLE, chunk

from cluster.opening import MAX_OPENING_BYTES, Opening, error_status


def _opened(*pieces: bytes) -> Opening:
    opening = Opening()
    for piece in pieces:
        if opening.is_over:
            break
        opening.feed(piece)
    return opening


@pytest.mark.parametrize(
    "first",
    [
        HELLO,
        chunk({"role": "assistant", "content": "hi"}),
        chunk({"reasoning_content": "hm"}),
        chunk({"refusal": "no"}),
        chunk({"tool_calls": [{"index": 0, "function": {"name": "look"}}]}),
        # An empty answer that ends properly is one: its budget was spent, or it was filtered.
        chunk({}, "length"),
    ],
)
def test_content_opens_the_stream(first: bytes) -> None:
    assert _opened(ROLE, first).has_content


@pytest.mark.parametrize(
    "first",
    [
        ROLE,
        b": ping\n\n",
        chunk({"content": None, "tool_calls": []}),
        b"event: message\n\n",
        b'data: {"choices": [], "prompt_filter_results": [{}]}\n\n',
        HELLO[:-1],
    ],
)
def test_what_is_no_content_holds_the_stream_back(first: bytes) -> None:
    opening = _opened(first)
    assert not opening.is_over and opening.held == first


@pytest.mark.parametrize(
    ("pieces", "fault"),
    [
        ([ROLE, b"data: [DONE]\n\n"], "ended without content"),
        ([b"data: {oh\n\n"], "does not parse"),
        ([b"data: {oh\n\n" + HELLO], "does not parse"),
        ([b": ping\n\n" * (MAX_OPENING_BYTES // 8 + 1)], "without content"),
    ],
)
def test_broken_beginnings_say_how(pieces: list[bytes], fault: str) -> None:
    opening = _opened(*pieces)
    assert not opening.has_content and opening.fault is not None and fault in opening.fault


def test_a_stream_that_closes_before_its_content_is_broken_and_one_that_lacks_its_line_ends_is_not() -> None:
    opening = _opened(ROLE)
    opening.end()
    assert opening.fault is not None and not opening.has_content
    opening = _opened(HELLO.rstrip())
    opening.end()
    assert opening.has_content and opening.fault is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"code": 400}, 400),
        ({"code": "429"}, 429),
        ({"status": 503}, 503),
        ({"code": "overloaded"}, 502),
        ({"code": True}, 502),
    ],
)
def test_an_error_as_the_first_event_is_one_with_its_status(error: dict[str, Any], status: int) -> None:
    opening = _opened(ROLE, b"data: " + json.dumps({"error": error}).encode() + b"\n\n")
    assert opening.error == {"error": error} and error_status(opening.error) == status


def test_an_error_without_words_and_a_finish_of_error_are_errors() -> None:
    opening = _opened(b'data: {"error": "busy"}\n\n')
    assert opening.error is not None and opening.error["error"]["message"] == "busy"
    assert _opened(chunk({"content": ""}, "error")).error is not None


@pytest.mark.parametrize("later", [b'data: {"error": {"code": 500}}\n\n', b"data: {oh\n\n", b"data: [DONE]\n\n"])
def test_what_comes_after_content_is_the_clients_to_see_even_in_one_piece(later: bytes) -> None:
    opening = _opened(HELLO + later)
    assert opening.has_content and opening.error is None and opening.fault is None and opening.held == HELLO + later


@given(st.data())
def test_held_bytes_are_the_streams_however_they_are_cut(data: st.DataObject) -> None:
    whole = b": ping\n\n" + ROLE + HELLO + END
    opening, sent = Opening(), b""
    while not opening.is_over:
        size = data.draw(st.integers(1, 60))
        opening.feed(whole[len(sent) : len(sent) + size])
        sent = whole[: len(sent) + size]
    assert opening.has_content and opening.held == sent and HELLO.strip() in sent
