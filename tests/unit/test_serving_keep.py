"""No client sees an answer finished before its call is kept; what cannot be kept is not finished; each is kept once."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import httpx
import pytest
from fakes import LLM_TEXT, PATH, REQUEST, Running, gateway

from cluster.calls import CALLS_FOLDER
from cluster.errors import StoreError
from cluster.records import AgentCall
from cluster.sse import SseReader
from serving.openai_wire import CLIENT_GONE

FINISH, DONE = b'"finish_reason": "stop"', b"[DONE]"


class SlowKeep:
    """Keeps a call when it is told to, or fails to."""

    def __init__(self, run: Running, is_broken: bool = False) -> None:
        self.may_keep, self.has_begun = asyncio.Event(), asyncio.Event()
        self.kept: list[AgentCall] = []
        self._is_broken = is_broken
        run.core.capture.keep = self.keep  # type: ignore[method-assign]

    async def keep(self, call: AgentCall) -> None:
        self.kept.append(call)
        self.has_begun.set()
        await self.may_keep.wait()
        if self._is_broken:
            raise StoreError("the journal's disk is full")


class Client:
    """One request at the ASGI application, with what has reached the client so far."""

    def __init__(self, run: Running, **extra: Any) -> None:
        self.body, self.status, self.is_whole = b"", 0, False
        self.leaves = asyncio.Event()
        self.has_body = asyncio.Event()
        self._messages = [{"type": "http.request", "body": json.dumps({**REQUEST, **extra}).encode()}]
        headers = [(b"authorization", f"Bearer {run.key}".encode())]
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers, "query_string": b""}
        self.task = asyncio.create_task(run.api(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop()
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.body += message.get("body", b"")
        self.is_whole = not message.get("more_body", False)
        if self.body:
            self.has_body.set()


@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"stream": True}], ids=["specialist", "llm", "specialist's stream"])
def test_no_byte_of_a_whole_answer_leaves_before_its_call_is_kept(
    tmp_path: pathlib.Path, extra: dict[str, Any]
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            keep, client = SlowKeep(run), Client(run, **extra)
            await keep.has_begun.wait()
            await asyncio.sleep(0.02)
            assert (client.status, client.body) == (0, b"")
            keep.may_keep.set()
            await client.task
            assert client.status == 200 and client.is_whole and client.body and len(keep.kept) == 1

    asyncio.run(scenario())


def test_a_stream_flows_but_its_end_waits_for_its_call_to_be_kept(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.engine.confidence = 0.0
            run.llm.may_go_on.clear()
            keep, client = SlowKeep(run), Client(run, stream=True)
            await client.has_body.wait()
            run.llm.may_go_on.set()
            await keep.has_begun.wait()
            await asyncio.sleep(0.02)
            assert LLM_TEXT[:4].encode() in client.body
            assert FINISH not in client.body and DONE not in client.body and not client.is_whole
            keep.may_keep.set()
            await client.task
            assert client.body.count(DONE) == client.body.count(FINISH) == 1 and client.is_whole
            (call,) = keep.kept
            assert call.status == 200 and call.message == {"role": "assistant", "content": LLM_TEXT}
            assert call.usage.prompt_tokens == 100

    asyncio.run(scenario())


def test_pieces_before_the_end_do_not_wait_for_later_ones(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.engine.confidence, run.llm.fate = 0.0, "hang"
            client = Client(run, stream=True)
            async with asyncio.timeout(3):
                await client.has_body.wait()
            client.leaves.set()
            await asyncio.gather(client.task, return_exceptions=True)
            (call,) = await run.captured()
            assert call.status == CLIENT_GONE and call.error == "the client left"
            assert call.message == {"role": "assistant", "content": LLM_TEXT[:4]}

    asyncio.run(scenario())


@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"stream": True, "n": 2}], ids=["specialist", "llm", "stream"])
def test_a_call_that_cannot_be_kept_is_not_answered(tmp_path: pathlib.Path, extra: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            keep = SlowKeep(run, is_broken=True)
            keep.may_keep.set()
            reply = await run.ask(**extra)
            if extra.get("stream"):
                error = SseReader().feed(reply.content)[-1]
                assert reply.status_code == 200 and DONE not in reply.content and FINISH not in reply.content
            else:
                error = reply.json()
                assert reply.status_code == 503 and "refund" not in reply.text and LLM_TEXT not in reply.text
            assert error["error"]["code"] == "capture_failed" and len(keep.kept) == 1
            assert _failures(run) == {"503": 1}
            assert run.core.meter.total("understudy_calls_total") == 1

    asyncio.run(scenario())


def test_a_cut_stream_that_cannot_be_kept_says_that(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.engine.confidence, run.llm.fate = 0.0, "cut"
            keep = SlowKeep(run, is_broken=True)
            keep.may_keep.set()
            reply = await run.ask(stream=True)
            assert SseReader().feed(reply.content)[-1]["error"]["code"] == "capture_failed"
            assert [call.status for call in keep.kept] == [502]
            assert _failures(run) == {"503": 1}

    asyncio.run(scenario())


@pytest.mark.parametrize("is_broken", [True, False])
def test_a_call_that_fails_is_counted_once_by_what_its_client_is_told(tmp_path: pathlib.Path, is_broken: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.llm.status = 500
            keep = SlowKeep(run, is_broken=is_broken)
            keep.may_keep.set()
            reply = await run.ask(n=2)
            assert reply.status_code == (503 if is_broken else 500) and [call.status for call in keep.kept] == [500]
            assert _failures(run) == {str(reply.status_code): 1}

    asyncio.run(scenario())


def _failures(run: Running) -> dict[str, float]:
    counts = run.core.meter.counts
    return {tags[0]: number for (name, *tags), number in counts.items() if name == "understudy_requests_failed_total"}


@pytest.mark.parametrize("is_specialist", [True, False])
def test_a_unary_call_that_is_cancelled_is_kept_once(tmp_path: pathlib.Path, is_specialist: bool) -> None:
    """As Ray Serve does when its client hangs up: first while the answer is waited for, then while it is being kept."""

    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            extra: dict[str, Any] = {} if is_specialist else {"n": 2}
            run.llm.may_answer.clear()
            run.engine.answer_with = asyncio.Event().wait  # type: ignore[assignment]
            client = Client(run, **extra)
            await asyncio.sleep(0.05)
            client.task.cancel()
            await asyncio.gather(client.task, return_exceptions=True)
            (call,) = await run.captured()
            assert (call.status, call.error, call.response) == (CLIENT_GONE, "the client left", None)

            run.llm.may_answer.set()
            run.engine.answer_with = None
            keep = SlowKeep(run)
            client = Client(run, **extra)
            await keep.has_begun.wait()
            client.task.cancel()
            await asyncio.gather(client.task, return_exceptions=True)
            assert len(keep.kept) == 1 and len(await run.captured()) == 1 and client.body == b""

    asyncio.run(scenario())


def test_a_fault_of_the_gateways_own_is_an_openai_error_and_its_call_is_kept(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:

            async def fail(*_: Any) -> None:
                raise ZeroDivisionError("SECRET")

            run.core.fallback.chat = fail  # type: ignore[method-assign]
            reply = await run.ask(n=2)
            assert (reply.status_code, reply.json()["error"]["code"]) == (
                500,
                "internal",
            ) and "SECRET" not in reply.text
            (call,) = await run.captured()
            assert (call.status, call.error) == (500, "internal error: ZeroDivisionError")

    asyncio.run(scenario())


def test_a_fault_beside_calls_is_an_openai_error_too(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:

            async def fail() -> None:
                raise ZeroDivisionError("SECRET")

            run.core.fallback.list_models = fail  # type: ignore[method-assign]
            transport = httpx.ASGITransport(run.api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
                reply = await http.get("/v1/models", headers={"Authorization": f"Bearer {run.key}"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
            assert "SECRET" not in reply.text
            assert run.core.meter.counts["understudy_requests_failed_total", "500"] == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("fate", ["endless line", "endless end"])
def test_an_endless_stream_is_broken_off_and_captured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    """Neither a line without an end nor what follows the answer's end is gathered beyond the limit."""
    monkeypatch.setattr("cluster.sse.MAX_STREAM_BYTES", 2**20)

    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.llm.fate = fate
            reply = await run.ask(stream=True, n=1, user="u", logprobs=True)
            assert len(reply.content) < 2 * 2**20 and SseReader().feed(reply.content[-400:])[-1]["error"]
            (call,) = await run.captured()
            assert (call.status, call.error) == (502, "the LLM broke off its answer: upstream_error")
            assert call.message is not None and call.message["content"] == LLM_TEXT[:4]
            while not run.llm.num_left:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fate", "status", "error"),
    [
        ("cut", 502, "the LLM broke off its answer: upstream_error"),
        ("unfinished", 502, "the LLM's stream ended early"),
        ("unreadable", 502, "the LLM's stream does not parse"),
        ("error", 502, "the LLM reported an error in its stream: overloaded"),
    ],
)
def test_streams_that_do_not_end_well_are_kept_as_failed_with_what_came(
    tmp_path: pathlib.Path, fate: str, status: int, error: str
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.engine.confidence, run.llm.fate = 0.0, fate
            reply = await run.ask(stream=True)
            assert LLM_TEXT[:4] in reply.text
            if fate == "unfinished":
                assert SseReader().feed(reply.content)[-1]["error"], "half an answer must not look like a whole one"
            (call,) = await run.captured()
            assert (call.status, call.error) == (status, error)
            assert call.message is not None and call.message["content"] == LLM_TEXT[:4]

    asyncio.run(scenario())


def test_the_error_of_an_llm_is_kept_by_its_code_and_never_by_its_words(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            for status, code in (
                (400, "context_length_exceeded"),
                (429, "rate_limit_exceeded"),
                (400, "what the user said"),
            ):
                run.llm.status, run.llm.error = status, {"message": "SECRET", "type": "t", "param": None, "code": code}
                reply = await run.ask(n=2)
                assert reply.status_code == status and reply.json()["error"]["code"] == code
            errors = [(call.status, call.error) for call in await run.captured()]
            assert errors == [
                (400, "refused by the LLM: context_length_exceeded"),
                (429, "the LLM gave no answer: rate_limit_exceeded"),
                (400, "refused by the LLM: t"),
            ]
            assert run.store.list(CALLS_FOLDER)

    asyncio.run(scenario())


def test_an_llm_that_is_too_slow_is_kept_as_a_timeout(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, llm_timeout_s=0.1) as run:
            run.llm.may_answer.clear()
            reply = await run.ask(n=2)
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "upstream_timeout")
            run.llm.may_answer.set()
            run.llm.fate = "hang"
            reply = await run.ask(n=2, stream=True)
            assert SseReader().feed(reply.content)[-1]["error"]
            unary, stream = await run.captured()
            assert (unary.status, unary.error) == (504, "the LLM gave no answer: upstream_timeout")
            assert stream.status == 502 and stream.message is not None and stream.message["content"] == LLM_TEXT[:4]

    asyncio.run(scenario())
