"""A copy that is read late says at every piece what one that is read at once says, where it matters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.sse import SseReader
from cluster.stream_usage import is_usage_alone
from serving.reassembly import Reassembler
from serving.stream_copy import StreamCopy


def _event(value: Any, separators: tuple[str, str] = (",", ":")) -> bytes:
    return f"data: {json.dumps(value, separators=separators)}\n\n".encode()


def _chunk(index: int = 0, *, text: str = "a", **part: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": index, "delta": {"content": text}, **part}], "usage": None}


_QUOTING = 'data: {"finish_reason":"stop"}\n\ndata: [DONE]\n\n'
_EVENTS = st.sampled_from(
    [
        _event(_chunk(finish_reason=None)),
        _event(_chunk(finish_reason=None, logprobs=None), (", ", ": ")),
        _event(_chunk(finish_reason=None, text=_QUOTING)),
        _event(_chunk(1, finish_reason=None)),
        _event(_chunk(text="no end is told")),
        _event(_chunk(finish_reason="stop")),
        _event(_chunk(1, finish_reason="length")),
        _event({"choices": [{"index": 0, "delta": {}, "finish_reason": None},
                            {"index": 1, "delta": {}, "finish_reason": "stop"}]}),
        _event(_chunk(finish_reason="stop")).replace(b"finish_reason", b"finish\\u005freason"),
        _event({"choices": [], "usage": {"prompt_tokens": 1}}),
        _event({"choices": [], "usage": {"prompt_tokens": 1}}).replace(b"usage", b"us\\u0061ge"),
        _event({"error": {"message": "m"}}),
        b"data: [DONE]\n\n",
        b"data: {broken\n\n",
        b": comment\n\n",
        b"event: x\r\ndata: {}\r\n\r\n",
    ]
)  # fmt: skip


@given(st.lists(_EVENTS, max_size=12), st.integers(1, 3), st.data())
def test_a_copy_read_late_knows_in_time_what_matters(events: list[bytes], choices: int, data: st.DataObject) -> None:
    raw = b"".join(events)
    ends = [sum(map(len, events[:number])) for number in range(len(events) + 1)]
    drawn = data.draw(st.sets(st.sampled_from(ends) | st.integers(0, len(raw))))
    places = sorted({0, *drawn, len(raw)})
    reader, parts, copy = SseReader(), Reassembler(choices), StreamCopy(choices)
    for begin, end in zip(places, places[1:], strict=False):
        piece = raw[begin:end]
        now = reader.feed(piece)
        for chunk in now:
            parts.add(chunk)
        read = copy.take(piece)
        assert any(map(is_usage_alone, read)) == any(map(is_usage_alone, now))
        assert (copy.is_ending, copy.is_done) == (reader.is_done or parts.is_finished, reader.is_done)
    for chunk in reader.end():
        parts.add(chunk)
    copy.end()
    assert copy.body() == parts.body()
    assert (copy.has_end, copy.has_error, copy.is_whole) == (parts.has_end, parts.has_error, not reader.num_bad)


def test_pieces_that_go_on_wait_and_are_read_together() -> None:
    copy = StreamCopy(1)
    assert not any(copy.take(_event(_chunk(finish_reason=None, text=letter))) for letter in "abc")
    assert [len(copy.take(_event(_chunk(finish_reason="stop", text="d")))), copy.is_ending] == [4, True]
    assert copy.body()["choices"][0]["message"]["content"] == "abcd"


def test_a_client_that_leaves_is_kept_with_what_had_come() -> None:
    copy = StreamCopy(1)
    copy.take(_event(_chunk(finish_reason=None, text="as far as this")))
    assert copy.body()["choices"][0]["message"]["content"] == "as far as this" and not copy.has_end


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_what_waits_is_bounded(size: int) -> None:
    copy, piece = StreamCopy(1), _event(_chunk(finish_reason=None, text="x" * size))
    waiting = 0
    for _ in range(500):
        waiting = 0 if copy.take(piece) else waiting + len(piece)
        assert waiting < 2**16 + len(piece)
