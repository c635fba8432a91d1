"""Recorded traffic of real LLMs through the gateway over HTTP: bytes pass as they are, and calls are kept as recorded.

An upstream answers each record whole and as a stream, cut into odd deltas, events and bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import pathlib
import random
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fakes import PATH, Running, gateway
from loopback import served
from shared_data import DATA, NO_DATA

from cluster.stream_usage import without_usage
from cluster.upstream import Upstream, UpstreamConfig
from serving.fallback import FallbackLLM

FILES = sorted(DATA.glob("agents/http_*.calls.jsonl.gz"))
NUM_AT_ONCE = 16
STEP = 16
"""Every sixteenth record is asked."""


def _records() -> list[dict[str, Any]]:
    records = []
    for path in FILES:
        with gzip.open(path, "rt") as lines:
            records += [json.loads(line) for line in lines]
    return records[::STEP]


def _pieces(text: str, source: random.Random) -> list[str]:
    places = sorted(source.randint(0, len(text)) for _ in range(source.randint(0, 4)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


def _deltas(choice: dict[str, Any], source: random.Random) -> list[dict[str, Any]]:
    message = choice["message"]
    deltas: list[dict[str, Any]] = [{"role": message["role"]}]
    for key, value in message.items():
        if key == "tool_calls":
            for index, call in enumerate(value or ()):
                words = call["function"].get("arguments")
                head = {
                    **call,
                    "index": index,
                    "function": {**call["function"], **({"arguments": ""} if words else {})},
                }
                rest = [
                    {"index": index, "function": {"arguments": piece}}
                    for piece in _pieces(words or "", source)
                    if piece
                ]
                deltas += [{"tool_calls": [part]} for part in (head, *rest)]
        elif isinstance(value, str) and key != "role":
            deltas += [{key: piece} for piece in _pieces(value, source)]
        elif key != "role":
            deltas.append({key: value})
    return deltas


def _stream(response: dict[str, Any], source: random.Random) -> bytes:
    envelope = {key: value for key, value in response.items() if key not in ("object", "choices", "usage")}
    rows = []
    for choice in response["choices"]:
        own = {key: value for key, value in choice.items() if key not in ("message", "finish_reason")}
        parts = [{"index": choice["index"], "delta": delta} for delta in _deltas(choice, source)]
        parts[-1] = {**own, **parts[-1]}
        rows.append([*parts, {"index": choice["index"], "delta": {}, "finish_reason": choice.get("finish_reason")}])
    events = []
    while any(rows):
        part = source.choice([row for row in rows if row]).pop(0)
        events.append({**envelope, "object": "chat.completion.chunk", "choices": [part]})
    if "usage" in response:
        events.append({**envelope, "choices": [], "usage": response["usage"]})
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def _asks_for_counts(number: int) -> bool:
    return bool(number % 2)


class RecordedLLM:
    """Answers request `seed`=N as record N was; keeps what of it is for the client."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records = records
        self.sent: dict[tuple[int, bool], bytes] = {}

    async def answer(self, http_request: web.Request) -> web.StreamResponse:
        request = await http_request.json()
        number, is_stream = request["seed"], bool(request.get("stream"))
        source, response = random.Random(number), self._records[number]["response"]
        raw = _stream(response, source) if is_stream else json.dumps(response, indent=1).encode()
        self.sent[number, is_stream] = raw if _asks_for_counts(number) else without_usage(raw)
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream" if is_stream else "application/json"})
        await reply.prepare(http_request)
        places = sorted(source.randint(0, len(raw)) for _ in range(6))
        for begin, end in zip([0, *places], [*places, len(raw)], strict=True):
            await reply.write(raw[begin:end])
            await asyncio.sleep(0)
        return reply


@contextlib.asynccontextmanager
async def served_before(run: Running, llm: RecordedLLM) -> AsyncIterator[str]:
    """The gateway behind a real HTTP server, in front of the recorded LLM behind another; its base address."""
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", llm.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await run.core.fallback.close()
    config = UpstreamConfig(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1", max_attempts=1)
    run.core.fallback = FallbackLLM([Upstream(config)], run.core.meter)
    try:
        async with served(run.api) as url:
            yield url
    finally:
        await runner.cleanup()


def _same(body: dict[str, Any]) -> dict[str, Any]:
    """Without what no stream can tell: an empty content beside tool calls, an empty list of them, an end that is an
    empty text; and without the numbers that recorders left in the tool calls of a whole answer."""
    choices = []
    for choice in body["choices"]:
        message = {key: value for key, value in choice["message"].items() if key != "tool_calls"}
        calls = [{k: v for k, v in call.items() if k != "index"} for call in choice["message"].get("tool_calls") or ()]
        if calls:
            message |= {"tool_calls": calls, "content": message.get("content") or None}
        calls_type = [{"type": "function", **call} for call in calls]
        message |= {"tool_calls": calls_type} if calls else {}
        ending = {"finish_reason": choice.get("finish_reason") or None}
        choices.append({**choice, **ending, "message": {"content": None, **message}})
    return {**body, "choices": choices}


@pytest.mark.skipif(not FILES, reason=NO_DATA)
def test_recorded_answers_pass_byte_for_byte_and_are_kept_as_they_were(tmp_path: pathlib.Path) -> None:
    records = _records()
    llm = RecordedLLM(records)

    async def ask(http: aiohttp.ClientSession, url: str, number: int, is_stream: bool) -> tuple[str, dict[str, Any]]:
        request = {**records[number]["request"], "seed": number, "stream": is_stream}
        if is_stream and _asks_for_counts(number):
            request["stream_options"] = {"include_usage": True}
        async with http.post(f"{url}{PATH}", json=request) as reply:
            assert reply.status == 200
            assert await reply.read() == llm.sent[number, is_stream]
            return reply.headers["x-understudy-call-id"], request

    async def scenario() -> None:
        async with gateway(tmp_path) as run, served_before(run, llm) as url:
            headers = {"Authorization": f"Bearer {run.key}"}
            connector = aiohttp.TCPConnector(limit=NUM_AT_ONCE)
            async with aiohttp.ClientSession(headers=headers, connector=connector) as http:
                asked = [(number, is_stream) for number in range(len(records)) for is_stream in (False, True)]
                found = await asyncio.gather(*(ask(http, url, *one) for one in asked))
            calls = {call.call_id: call for call in await run.captured()}
            assert len(calls) == len(asked)
            num_exact = 0
            for (number, is_stream), (call_id, request) in zip(asked, found, strict=True):
                call, expected = calls[call_id], records[number]["response"]
                assert (
                    call.response is not None and call.request == request and (call.status, call.error) == (200, None)
                )
                if is_stream:
                    assert _same(call.response) == _same(expected)
                    num_exact += call.response == expected
                else:
                    assert call.response == expected
            assert num_exact >= 0.9 * len(records)

    asyncio.run(scenario())
