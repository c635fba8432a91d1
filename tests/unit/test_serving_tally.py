"""Bytes of a reply, whatever way they are cut and packed -> the tokens it reports, else the stated estimate."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.records import Usage
from serving.tally import Tally, TokensUsed

JSON_KIND = {"content-type": "application/json"}
STREAM_KIND = {"content-type": "text/event-stream; charset=utf-8"}
RESPONSES = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 3, "total_tokens": 10}
COMPLETION = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def _used(sent: bytes, got: bytes, headers: dict[str, str], size: int = 10**9) -> TokensUsed:
    tally = Tally()
    tally.add_sent(sent)
    tally.begin_reply(headers.items())
    for start in range(0, len(got), size):
        tally.add_got(got[start : start + size])
    return tally.used()


@given(
    st.sampled_from(["identity", "gzip", "deflate"]),
    st.sampled_from([RESPONSES, COMPLETION]),
    st.booleans(),
    st.integers(1, 40),
    st.text(max_size=200),
)
def test_reported_counts_are_found(coding: str, usage: dict[str, int], is_stream: bool, size: int, said: str) -> None:
    """Also beside a model's own words that look like counts, and for any cut."""
    trap = said + '"usage": {"prompt_tokens": 1, "completion_tokens": 1}'
    body = json.dumps({"output": trap, "usage": usage, "user": None, "metadata": {}}).encode()
    if is_stream:
        early = b'event: a\ndata: {"response": {"usage": null}}\n\n'
        body = early + b'event: b\ndata: {"type": "response.completed", "response": ' + body + b"}\n\ndata: [DONE]\n\n"
    packed = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[coding](body)
    headers = {**(STREAM_KIND if is_stream else JSON_KIND), "content-encoding": coding}
    assert _used(b"x" * 30, packed, headers, size) == (Usage(prompt_tokens=7, completion_tokens=3), False)


def test_embeddings_have_a_prompt_alone() -> None:
    body = json.dumps({"data": [{"embedding": [0.1] * 100_000}], "usage": {"prompt_tokens": 9, "total_tokens": 9}})
    assert _used(b"x", body.encode(), JSON_KIND, 4_096) == (Usage(prompt_tokens=9, completion_tokens=0), False)


@pytest.mark.parametrize(
    ("headers", "got", "completion"),
    [
        (JSON_KIND, b"{" + b"y" * 299, 100),
        (STREAM_KIND, b'data: {"delta": "a"}\n\n' * 20, 20),
        ({**JSON_KIND, "content-encoding": "br"}, b"z" * 300, 100),
        ({**STREAM_KIND, "content-encoding": "zstd"}, b"z" * 300, 100),
        ({**JSON_KIND, "content-encoding": "gzip"}, b"no gzip".ljust(300), 100),
        ({"content-type": "audio/mpeg"}, b"s" * 3_000, 0),
        ({}, b"?" * 300, 0),
        (JSON_KIND, b'{"usage": {"prompt_tokens": -1}}'.ljust(300), 100),
        (JSON_KIND, b'{"usage": {"prompt_tokens": true, "comp'.ljust(300), 100),
    ],
    ids=["json", "stream", "br", "zstd", "bad gzip", "sound", "unnamed", "negative", "cut"],
)
def test_what_reports_nothing_is_estimated(headers: dict[str, str], got: bytes, completion: int) -> None:
    assert _used(b"x" * 30, got, headers) == (Usage(prompt_tokens=10, completion_tokens=completion), True)


def test_a_reply_that_unpacks_to_a_flood_is_not_read_on() -> None:
    flood = gzip.compress(b"\0" * 2**26)
    used = _used(b"x", flood, {**JSON_KIND, "content-encoding": "gzip"})
    assert used.is_estimated and (used.usage.completion_tokens or 0) < 2**20


def test_the_end_of_a_long_reply_is_kept_and_no_more() -> None:
    tally = Tally()
    tally.begin_reply(STREAM_KIND.items())
    for _ in range(5_000):
        tally.add_got(b"data: " + b"y" * 1_000 + b"\n\n")
    assert tally._num_tail < 2**17 and sum(map(len, tally._tail)) == tally._num_tail
    tally.add_got(b'data: {"usage": ' + json.dumps(COMPLETION).encode() + b"}\n\n")
    assert tally.used() == (Usage(prompt_tokens=7, completion_tokens=3), False)
