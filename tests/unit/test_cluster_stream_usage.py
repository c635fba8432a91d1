"""Streams report what they used whether or not their client asks: it sees nothing of that, and no endpoint is lost to it."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any, NamedTuple

import pytest
from aiohttp import web
from fakes import gateway
from hypothesis import given
from hypothesis import strategies as st
from scripted_llm import BODY, END, GOOD, HELLO, KEY_ENV, ROLE, Reply, Script, read_stream, running, streamed, whole

from cluster.errors import UpstreamError
from cluster.records import Usage
from cluster.sse import SseReader
from cluster.stream_usage import FORGOTTEN_AFTER_S, StreamUsage, WithoutUsage, is_usage_alone, without_usage

ASKED = {"include_usage": True}
COUNTS = b'data: {"id": "1", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWER = ROLE + HELLO + END.removesuffix(DONE)
STREAM = {**BODY, "stream": True}


class Replied(NamedTuple):
    status: int
    first: bytes


GIVEN, REFUSED = Replied(200, HELLO), Replied(422, b'{"error": {"message": "no"}}')


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)


@given(
    st.lists(st.sampled_from([ROLE, HELLO, b": ping\n\n", COUNTS, DONE, b'data: {"choices": [], "usage": null}\n\n'])),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.integers(1, 200),
    st.booleans(),
)
def test_all_but_the_counts_stays_byte_for_byte(events: list[bytes], line_end: bytes, size: int, is_cut: bool) -> None:
    """Whole, and in pieces that are read as a relay reads them; also where the last line end never comes."""
    given, left = (
        b"".join(one.replace(b"\n", line_end) for one in events if one != dropped) for dropped in (None, COUNTS)
    )
    assert without_usage(given) == left
    if is_cut and events and events[-1] != COUNTS:
        given, left = given.removesuffix(line_end), left.removesuffix(line_end)
    reader, kept, got = SseReader(), WithoutUsage(), []
    for begin in range(0, len(given), size):
        piece = given[begin : begin + size]
        got.append(kept.feed(piece, has_usage=any(map(is_usage_alone, reader.feed(piece)))))
    assert b"".join([*got, kept.end()]) == left


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
def test_an_end_that_comes_byte_by_byte_is_an_end(line_end: bytes) -> None:
    counts, hello = (one.replace(b"\n", line_end) for one in (COUNTS, HELLO))
    reader, kept, got = SseReader(), WithoutUsage(), []
    for piece in [counts[:-4], *(bytes([one]) for one in counts[-4:]), b"", hello[:20], hello[20:]]:
        got.append(kept.feed(piece, has_usage=any(map(is_usage_alone, reader.feed(piece)))))
    assert b"".join([*got, kept.end()]) == hello


@pytest.mark.parametrize(
    "event",
    [
        COUNTS.replace(b"[]", b'[{"index": 0, "delta": {}}]'),
        COUNTS.replace(b'"id"', b'"error": {"message": "no"}, "id"'),
        COUNTS[10:],
        COUNTS[:-10],
        b'data: {"choices": [], "prompt_filter_results": []}\n\n',
    ],
)
def test_what_says_more_than_counts_or_is_cut_stays(event: bytes) -> None:
    assert without_usage(event + HELLO) == event + HELLO


def test_pieces_of_whole_events_are_not_copied_and_an_event_goes_on_once_it_is_whole() -> None:
    kept = WithoutUsage()
    assert kept.feed(HELLO, has_usage=False) is HELLO
    assert kept.feed(HELLO[:20], has_usage=False) == b"" and kept.feed(HELLO[20:-1], has_usage=False) == b""
    assert kept.feed(b"\n" + ROLE + HELLO[:5], has_usage=False) == HELLO + ROLE
    assert kept.end() == HELLO[:5]


def _refusing(*errors: Any) -> Reply:
    """An endpoint that refuses the option with each of the errors in turn, and streams without it."""
    left = list(errors)

    async def reply(request: web.Request) -> web.StreamResponse:
        if (await request.json()).get("stream_options"):
            return await whole(400, {"error": left.pop(0)})(request)
        return await GOOD(request)

    return reply


def test_an_endpoint_that_refuses_the_option_is_asked_without_it_from_then_on() -> None:
    script = Script(_refusing({"message": "Extra inputs are not permitted"}))

    async def main() -> None:
        async with running(script) as (upstream, _):
            for _ in range(2):
                assert await read_stream(upstream) == ROLE + HELLO + END
            async with upstream.stream(STREAM) as stream:
                assert not stream.hides_usage

    asyncio.run(main())
    assert [body.get("stream_options") for body in script.bodies] == [ASKED, None, None, None]


def test_the_clients_own_errors_are_sent_once_where_the_option_is_known_to_be_taken() -> None:
    named, other = {"message": "stream_options is not supported by this deployment"}, {"message": "no such field"}
    script = Script(whole(400, {"error": other}), whole(400, {"error": other}), GOOD, whole(400, {"error": other}))
    script.replies += [whole(400, {"error": named}), GOOD, whole(400, {"error": other})]

    async def main() -> list[int]:
        async with running(script) as (upstream, _):
            statuses = []
            for _ in range(5):
                async with upstream.stream(STREAM) as stream:
                    statuses.append(stream.status)
            return statuses

    # Of the first error the endpoint might have meant the option; the second model name knows nothing of the first.
    assert asyncio.run(main()) == [400, 200, 400, 200, 400]
    options = [body.get("stream_options") for body in script.bodies]
    assert options == [ASKED, None, ASKED, ASKED, ASKED, None, None]


def test_one_model_that_refuses_says_nothing_of_another() -> None:
    script = Script(_refusing({"message": "no"}, {"message": "no"}))

    async def main() -> None:
        async with running(script) as (upstream, _):
            await read_stream(upstream)
            async with upstream.stream({**STREAM, "model": "llm-2"}) as stream:
                assert stream.status == 200

    asyncio.run(main())
    asked = [(body["model"], "stream_options" in body) for body in script.bodies]
    assert asked == [("llm-1", True), ("llm-1", False), ("llm-2", True), ("llm-2", False)]


@pytest.mark.parametrize(
    ("message", "seen"),
    [("no such field", 400), ("stream_options is not supported", 429)],
    ids=["the client's own", "ours"],
)
def test_a_clients_own_error_is_not_hidden_by_what_becomes_of_the_request_without_the_option(
    message: str, seen: int
) -> None:
    refusal = {"error": {"message": message}}
    script = Script(whole(400, refusal), whole(429, {"error": {"message": "busy"}}, Retry_After="50"), GOOD)

    async def main() -> None:
        async with running(script) as (upstream, _):
            try:
                async with upstream.stream(STREAM) as stream:
                    raw = b"".join([piece async for piece in stream.chunks])
                    assert (stream.status, json.loads(raw)) == (seen, refusal)
            except UpstreamError as error:
                assert error.status == seen
            # What the endpoint asked for is kept to all the same.
            with pytest.raises(UpstreamError, match="left alone"):
                await upstream.chat(BODY)

    asyncio.run(main())
    assert [body.get("stream_options") for body in script.bodies] == [ASKED, None]


def test_a_refusal_is_believed_for_a_while() -> None:
    """An endpoint is upgraded after its model refused the option; one that took it is never forgotten."""
    now, can_count, asked = 1_000.0, False, []

    async def send(body: dict[str, Any]) -> Any:
        asked.append("stream_options" in body)
        return GIVEN if can_count or not asked[-1] else REFUSED

    async def main() -> None:
        nonlocal now, can_count
        usage = StreamUsage(lambda: now)
        for is_upgraded, later_s in ((False, 0.0), (False, FORGOTTEN_AFTER_S - 1), (True, 2.0), (True, 10 * 86_400.0)):
            can_count = is_upgraded
            now += later_s
            assert await usage.ask(STREAM, send) == (GIVEN, is_upgraded)

    asyncio.run(main())
    assert asked == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (None, ASKED),
        ({"include_usage": False, "include_obfuscation": False}, {**ASKED, "include_obfuscation": False}),
        ("odd", "odd"),
    ],
)
def test_what_the_client_says_beside_it_goes_on(options: Any, sent: Any) -> None:
    script = Script(GOOD)

    async def main() -> None:
        async with running(script) as (upstream, _), upstream.stream({**STREAM, "stream_options": options}) as stream:
            assert stream.hides_usage == (sent != "odd")

    asyncio.run(main())
    assert script.bodies[0]["stream_options"] == sent


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_a_client_that_does_not_ask_gets_the_llms_bytes_without_the_counts_which_are_kept(
    tmp_path: pathlib.Path, size: int
) -> None:
    raw = ANSWER + COUNTS + b": bye\n\n" + DONE
    pieces = [raw[begin : begin + size] for begin in range(0, len(raw), size)]

    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            asked: list[dict[str, Any]] = []

            async def stream(request: web.Request) -> web.StreamResponse:
                asked.append(await request.json())
                return await streamed(*pieces)(request)

            run.llm._stream = stream  # type: ignore[method-assign]
            hidden = await run.ask(stream=True, n=1, temperature=2.0)
            assert hidden.content == raw.replace(COUNTS, b"")
            shown = await run.ask(stream=True, temperature=2.0, stream_options=ASKED)
            assert shown.content == raw
            assert [one["stream_options"] for one in asked] == [ASKED, ASKED]
            for call in await run.captured():
                assert call.usage == Usage(prompt_tokens=7, completion_tokens=3)
                assert (call.cost_basis, call.cost_usd) == ("reported", pytest.approx(13e-6))
            first, _ = await run.captured()
            assert "stream_options" not in json.dumps(first.request), "what is kept is what the client sent"

    asyncio.run(scenario())
