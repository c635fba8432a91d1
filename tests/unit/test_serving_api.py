"""The HTTP side: what each role may do and how often, which paths pass through and how, and feedback."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import pathlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

import pytest
from aiohttp import web
from fakes import PATH, REQUEST, Running, gateway
from otlp import collector

from cluster.access import ApiKeys, Pseudonyms
from cluster.feedback import read_feedback
from cluster.raw_upstream import RawUpstream
from cluster.sse import SseReader
from cluster.upstream import UpstreamConfig
from serving import body as bodies
from serving.admission import RateLimiter
from serving.billing import Spending
from serving.passthrough import MAX_BODY_BYTES, PassThrough

KEY_ENV = "UNDERSTUDY_TEST_UPSTREAM_KEY"
EMBEDDINGS = "/v1/embeddings"
NAMES = Pseudonyms(b"k" * 32)


def _headers(tmp_path: pathlib.Path, role: Any, client: str = "ann", **facts: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {ApiKeys(tmp_path / 'keys.json').create(client, role, **facts)}"}


class Endpoint:
    """An endpoint that keeps the requests it got, whatever their path, and answers as it is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.status, self.body, self.headers = 200, b'{ "odd":  1}', {"Content-Type": "application/json"}
        self.is_cut = self.is_silent = False
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.method, request.raw_path, headers, await request.read()))
        if self.is_silent:
            await asyncio.sleep(5)
        reply = web.StreamResponse(status=self.status, headers=self.headers)
        await reply.prepare(request)
        await reply.write(self.body[:4])
        await self.may_go_on.wait()
        if self.is_cut:
            assert request.transport is not None
            request.transport.abort()
            return reply
        await reply.write(self.body[4:])
        return reply


@contextlib.asynccontextmanager
async def endpoint(run: Running, **config: Any) -> AsyncIterator[Endpoint]:
    """An endpoint that the gateway's allow list leads to."""
    found = Endpoint()
    app = web.Application(client_max_size=2**27)
    app.router.add_route("*", "/{path:.*}", found.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, auto_decompress=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/deep/v1"
    raw = RawUpstream(UpstreamConfig(base_url=base_url, api_key_env=KEY_ENV, **config))
    spending = Spending([raw.config], run.core.meter)
    await run.core.passthrough.close()
    run.core.passthrough = PassThrough(raw, run.core.passthrough.paths, run.core.meter, spending)
    try:
        yield found
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("agent", [200, 200, 404, 202]),
        ("viewer", [403] * 4),
        ("curator", [403, 403, 403, 202]),
        ("admin", [200, 200, 404, 202]),
    ],
)
def test_each_role_may_do_what_the_table_says_and_nothing_else(
    tmp_path: pathlib.Path, role: str, expected: list[int]
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            headers = _headers(tmp_path, role)
            replies = [
                await run.http.post(PATH, json=REQUEST, headers=headers),
                await run.http.get("/v1/models", headers=headers),
                # The fake LLM has no such path: its own 404.
                await run.http.post(EMBEDDINGS, json={}, headers=headers),
                await run.http.post("/v1/feedback", json={"call_id": "c", "score": 1}, headers=headers),
            ]
            assert [reply.status_code for reply in replies] == expected
            codes = {reply.json()["error"]["code"] for reply in replies if reply.status_code == 403}
            assert codes <= {"insufficient_permissions"}
            # Nobody's key: nothing at all.
            for method, path in (("POST", PATH), ("GET", "/v1/models"), ("POST", EMBEDDINGS), ("POST", "/v1/feedback")):
                denied = await run.http.request(method, path, headers={"Authorization": "Bearer us-no"})
                assert denied.status_code == 401 and denied.json()["error"]["code"] == "invalid_api_key"

    asyncio.run(scenario())


def test_a_key_has_its_rate_over_all_paths_and_others_are_not_slowed(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            headers = _headers(tmp_path, "agent", rate_per_minute=2)
            assert (await run.http.get("/v1/models", headers=headers)).status_code == 200
            assert (await run.http.post(PATH, json=REQUEST, headers=headers)).status_code == 200
            late = await run.http.post(PATH, json=REQUEST, headers=headers)
            assert (late.status_code, late.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(late.headers["retry-after"]) <= 30
            assert (await run.ask()).status_code == 200
            assert len(await run.captured()) == 2

    asyncio.run(scenario())


def test_a_bucket_holds_a_minutes_requests_and_fills_evenly() -> None:
    now = [0.0]
    rates = RateLimiter(lambda: now[0])
    assert [rates.wait_s("a", 6) for _ in range(6)] == [0.0] * 6
    assert rates.wait_s("a", 6) == pytest.approx(10.0)
    now[0] = 5.0
    assert rates.wait_s("a", 6) == pytest.approx(5.0) and rates.wait_s("b", 6) == 0.0
    now[0] = 10.0
    assert rates.wait_s("a", 6) == 0.0 and rates.wait_s("a", 6) > 0
    now[0] = 10_000.0
    assert [rates.wait_s("a", 6) for _ in range(7)][-1] > 0
    assert all(rates.wait_s("c", None) == 0.0 for _ in range(100))


def test_a_revoked_key_is_out_at_its_next_request(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            headers = _headers(tmp_path, "agent")
            assert (await run.http.get("/v1/models", headers=headers)).status_code == 200
            ApiKeys(tmp_path / "keys.json").revoke("ann")
            assert (await run.http.get("/v1/models", headers=headers)).status_code == 401
            (tmp_path / "keys.json").write_text("{}")
            broken = await run.http.get("/v1/models", headers=headers)
            assert (broken.status_code, broken.json()["error"]["code"]) == (503, "no_keys")

    asyncio.run(scenario())


def test_what_passes_through_is_byte_for_byte_the_clients_and_the_endpoints(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-owner")

    async def scenario() -> None:
        async with gateway(tmp_path) as run, endpoint(run) as upstream:
            upstream.body = gzip.compress(b"an answer that is no JSON")
            upstream.headers = {
                "Content-Type": "x/y; z=1", "Content-Encoding": "gzip", "X-Request-Id": "r", "Set-Cookie": "a=b",
                "OpenAI-Organization": "owner",
            }  # fmt: skip
            sent = b'{"input":  ["\xff"]}' + bytes(range(256)) * 1_000
            headers = {
                "Content-Type": "odd/type", "X-Custom": "kept", "Cookie": "c=d", "OpenAI-Organization": "other",
                "X-Session-Id": "s", "Connection": "close, x-hop", "X-Hop": "1", "Accept-Encoding": "gzip", "User-Agent": "me",
            }  # fmt: skip
            for path in run.core.passthrough.paths:
                async with run.http.stream("POST", f"{path}?a=%2Fb&c=d&c=", content=sent, headers=headers) as reply:
                    assert b"".join([piece async for piece in reply.aiter_raw()]) == upstream.body
                assert reply.status_code == 200 and reply.headers["x-request-id"] == "r"
                assert reply.headers["content-type"] == "x/y; z=1" and reply.headers["content-encoding"] == "gzip"
                assert not {"set-cookie", "openai-organization"} & set(reply.headers)
                method, raw_path, got, body = upstream.requests[-1]
                assert (method, raw_path, body) == ("POST", f"/deep{path}?a=%2Fb&c=d&c=", sent)
                assert got["authorization"] == "Bearer sk-owner" and run.key not in str(got)
                assert (got["x-custom"], got["content-type"], got["user-agent"]) == ("kept", "odd/type", "me")
                assert got["content-length"] == str(len(sent)) and got["accept-encoding"] == "gzip"
                assert not {"cookie", "openai-organization", "x-session-id", "x-hop"} & set(got)
                assert run.core.meter.counts[("understudy_passthrough_total", path, "200")] == 1
            assert not await run.captured()

    asyncio.run(scenario())


def test_what_passes_through_carries_the_client_s_trace_or_where_tracing_is_on_the_gateway_s(
    tmp_path: pathlib.Path,
) -> None:
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}

    async def carried(folder: pathlib.Path) -> str:
        async with gateway(folder) as run, endpoint(run) as upstream:
            assert (await run.http.post(EMBEDDINGS, json={"input": "x"}, headers=headers)).status_code == 200
            return upstream.requests[-1][2]["traceparent"]

    async def scenario() -> None:
        assert await carried(tmp_path / "off") == headers["traceparent"]
        async with collector() as seen:
            told = await carried(tmp_path / "on")
            (root,) = seen.named(f"POST {EMBEDDINGS}")
            assert root.parent_id == parent_id and told.split("-")[1:3] == [trace_id, root.span_id]

    asyncio.run(scenario())


def test_both_directions_stream(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run, endpoint(run) as upstream:
            upstream.headers, upstream.body = {"Content-Type": "text/event-stream"}, b"data: 1\n\ndata: 2\n\n"
            upstream.may_go_on.clear()
            got: list[bytes] = []
            has_first = asyncio.Event()
            pieces = [b"one", b"two"]

            async def receive() -> dict[str, Any]:
                if pieces:
                    return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
                await asyncio.Event().wait()
                raise AssertionError

            async def send(message: dict[str, Any]) -> None:
                if message.get("body"):
                    got.append(message["body"])
                    has_first.set()

            headers = [(b"authorization", f"Bearer {run.key}".encode())]
            scope = {"type": "http", "method": "POST", "path": EMBEDDINGS, "headers": headers, "query_string": b""}
            task = asyncio.create_task(run.api({**scope, "raw_path": EMBEDDINGS.encode()}, receive, send))
            async with asyncio.timeout(3):
                await has_first.wait()
            assert b"".join(got) == upstream.body[:4]
            upstream.may_go_on.set()
            await task
            assert b"".join(got) == upstream.body and upstream.requests[0][3] == b"onetwo"

    asyncio.run(scenario())


TRICKS = [
    "/v1/files", "/v1/files/f-1/content", "/v1/batches", "/v1/fine_tuning/jobs", "/v1/embeddings/", "/v1//embeddings",
    "/v1/embeddings/../files", "/v1/embeddings/..", "/v1/./embeddings", "/v1/%65mbeddings", "/v1/embeddings%2F..%2Ffiles",
    "/v1/embeddings%00", "/v1/embeddings;x", "/v1/EMBEDDINGS", "/V1/embeddings", "//v1/embeddings", "/v1/embeddings%3Fx",
    "/v1%2Fembeddings", "/v1/", "/v1", "/v1/responses/resp_1", "/v1/embeddings%20", "/v1/chat/completions/x", "/openapi.json", "/docs",
]  # fmt: skip


def test_no_spelling_of_a_path_reaches_anything_else(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run, endpoint(run) as upstream:
            for raw in TRICKS:
                for method in ("POST", "GET", "DELETE"):
                    status, body = await _raw(run, method, raw, unquote(raw))
                    error = json.loads(body)["error"]
                    assert status == 404 or (status, method) in ((405, "GET"), (405, "DELETE")), (method, raw)
                    assert status == 405 or "gateway.passthrough" in error["message"]
            for method in ("GET", "DELETE", "PUT", "PATCH", "OPTIONS"):
                status, body = await _raw(run, method, EMBEDDINGS, EMBEDDINGS)
                assert status == 405 and "POST" in json.loads(body)["error"]["message"]
            assert not upstream.requests

    asyncio.run(scenario())


async def _raw(
    run: Running, method: str, raw_path: str, path: str, query: bytes = b"", body: bytes = b"{}"
) -> tuple[int, bytes]:
    """A request as a server hands it on, spelt in a way that no client library would."""
    status, got = 0, b""
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, got
        status, got = message.get("status", status), got + message.get("body", b"")

    headers = [(b"authorization", f"Bearer {run.key}".encode())]
    scope = {"type": "http", "method": method, "path": path, "raw_path": raw_path.encode(), "headers": headers}
    await run.api({**scope, "query_string": query, "scheme": "http", "server": ("g", 80)}, receive, send)
    return status, got


def test_the_allow_list_is_the_recipes(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, passthrough=("/v1/audio/speech",)) as run, endpoint(run) as upstream:
            assert (await run.http.post("/v1/audio/speech", content=b"x")).content == upstream.body
            refused = await run.http.post(EMBEDDINGS, content=b"x")
            assert refused.status_code == 404 and "(/v1/audio/speech)" in refused.json()["error"]["message"]
            assert len(upstream.requests) == 1

    asyncio.run(scenario())


def test_what_the_endpoint_says_is_passed_on_but_what_is_the_owners_to_mend(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run, endpoint(run) as upstream:
            upstream.body = b'{"error": {"message": "sk-owner is wrong"}}'
            for status, expected in (
                (400, 400),
                (404, 404),
                (429, 429),
                (500, 500),
                (401, 502),
                (402, 502),
                (302, 502),
            ):
                upstream.status = status
                reply = await run.http.post(EMBEDDINGS, content=b"{}")
                assert reply.status_code == expected and len(upstream.requests) == 1
                assert (reply.content == upstream.body) == (status == expected)
                assert "code" in reply.json()["error"] or status == expected
                upstream.requests.clear()

    asyncio.run(scenario())


def test_an_endpoint_that_is_away_is_left_alone_and_a_clients_own_fault_is_not_its(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run, endpoint(run, breaker_failures=2):
            for _ in range(3):
                large = await run.http.post(EMBEDDINGS, content=_pieces_of(MAX_BODY_BYTES + 1))
                assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
            assert (await run.http.post(EMBEDDINGS, content=b"x")).status_code == 200

        async with gateway(tmp_path / "away", dead_first=True) as run:
            codes = [(await run.http.post(EMBEDDINGS, content=b"x")).json()["error"]["code"] for _ in range(6)]
            assert codes == ["upstream_unavailable"] * 6
            last = (await run.http.post(EMBEDDINGS, content=b"x")).json()["error"]["message"]
            assert "left alone" in last
            # Chat completions have a breaker of their own.
            assert (await run.ask(n=2)).status_code == 200

    asyncio.run(scenario())


def test_an_endpoints_time_counts_from_the_end_of_the_clients_body(tmp_path: pathlib.Path) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0.3)
            yield b"x"

    async def scenario() -> None:
        async with gateway(tmp_path) as run, endpoint(run, timeout_s=0.5) as upstream:
            assert (await run.http.post(EMBEDDINGS, content=slowly())).status_code == 200
            upstream.is_silent = True
            slow = await run.http.post(EMBEDDINGS, content=b"x")
            assert (slow.status_code, slow.json()["error"]["code"]) == (504, "upstream_timeout")

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [EMBEDDINGS, PATH])
def test_a_body_that_stalls_is_given_up_and_says_nothing_of_the_endpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(bodies, "STALL_S", 0.05)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def scenario() -> None:
        async with gateway(tmp_path, max_ongoing=1) as run, endpoint(run, breaker_failures=1):
            for _ in range(2):
                late = await run.http.post(path, content=stalling())
                assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")
            assert (await run.http.post(EMBEDDINGS, content=b"x")).status_code == 200

    asyncio.run(scenario())


async def _pieces_of(num_bytes: int) -> AsyncIterator[bytes]:
    piece = b"x" * 2**20
    for _ in range(num_bytes // len(piece) + 1):
        yield piece


def test_a_reply_that_breaks_off_breaks_off_at_the_client_too(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run, endpoint(run) as upstream:
            upstream.is_cut = True
            with pytest.raises(ConnectionError, match="broke off"):
                await run.http.post(EMBEDDINGS, content=b"x")

    asyncio.run(scenario())


def test_what_passes_through_is_paid_and_a_days_limit_holds_for_it(tmp_path: pathlib.Path) -> None:
    prices = {"prompt_usd_per_million": 1.0, "completion_usd_per_million": 2.0, "max_usd_per_day": 0.001}

    async def scenario() -> None:
        async with gateway(tmp_path) as run, endpoint(run, **prices) as upstream:
            spent = run.core.meter.counts

            async def ask() -> int:
                return (await run.http.post(EMBEDDINGS, content=b"x" * 300)).status_code

            upstream.body = b'{"usage": {"prompt_tokens": 50, "total_tokens": 50}}'
            assert await ask() == 200
            assert spent["understudy_llm_spend_usd_total", "0", "reported"] == pytest.approx(50e-6)
            upstream.status = 500
            assert await ask() == 500
            assert run.core.meter.total("understudy_llm_spend_usd_total") == pytest.approx(50e-6)
            upstream.status, upstream.body = 200, b"{".ljust(600)
            statuses = [await ask() for _ in range(4)]
            assert statuses == [200, 200, 429, 429], "500 millionths of a dollar each, reported by nobody"
            assert spent["understudy_passthrough_total", EMBEDDINGS, "429"] == 2
            refused = await run.http.post(EMBEDDINGS, content=b"x")
            assert refused.json()["error"]["code"] == "insufficient_quota" and int(refused.headers["retry-after"]) >= 1

    asyncio.run(scenario())


def test_a_reply_that_is_cut_or_left_is_paid_as_far_as_it_came(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        prices = {"prompt_usd_per_million": 1.0, "completion_usd_per_million": 2.0}
        async with gateway(tmp_path) as run, endpoint(run, timeout_s=0.3, **prices) as upstream:
            upstream.is_cut = True
            with pytest.raises(ConnectionError):
                await run.http.post(EMBEDDINGS, content=b"x" * 30)
            assert run.core.meter.total("understudy_llm_spend_usd_total") == pytest.approx(10e-6 + 2 * 2e-6)
            upstream.is_silent = True
            assert (await run.http.post(EMBEDDINGS, content=b"x" * 30)).status_code == 504
            assert run.core.meter.total("understudy_llm_spend_usd_total") == pytest.approx(20e-6 + 2 * 2e-6)

    asyncio.run(scenario())


def test_what_outlasts_the_drain_time_ends_in_order(tmp_path: pathlib.Path) -> None:
    """A reply of events within itself, one that has not begun with 503, another is cut; each counted as it ended."""

    async def scenario() -> None:
        async with gateway(tmp_path, drain_timeout_s=0.2) as run, endpoint(run) as upstream:
            upstream.may_go_on.clear()
            path, counts = "/v1/responses", run.core.meter.counts
            upstream.body, upstream.headers = b"data", {"Content-Type": "text/event-stream; charset=utf-8"}
            stream = asyncio.create_task(run.http.post(path, content=b"x"))
            await _num_asked(upstream, 1)
            upstream.headers = {**upstream.headers, "Content-Encoding": "gzip"}
            packed = asyncio.create_task(run.http.post(path, content=b"x"))
            await _num_asked(upstream, 2)
            upstream.is_silent = True
            waiting = asyncio.create_task(run.http.post(EMBEDDINGS, content=b"x"))
            await _num_asked(upstream, 3)
            run.core.drain.begin()
            async with asyncio.timeout(3):
                (told,) = SseReader().feed((await stream).content.removeprefix(b"data"))
                assert told["error"]["code"] == told["code"] == "shutting_down" and told["type"] == "error"
                with pytest.raises(ConnectionError, match="stops"):
                    await packed
                refused = await waiting
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["retry-after"]) >= 1
            late = await run.http.post(EMBEDDINGS, content=b"x")
            assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
            assert counts["understudy_passthrough_total", path, "503"] == 2
            assert counts["understudy_passthrough_total", EMBEDDINGS, "503"] == 2
            assert counts["understudy_passthrough_total", path, "200"] == 0

    asyncio.run(scenario())


async def _num_asked(upstream: Endpoint, number: int) -> None:
    while len(upstream.requests) < number:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)


def test_what_is_over_within_the_drain_time_passes_whole(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, drain_timeout_s=30.0) as run, endpoint(run) as upstream:
            upstream.may_go_on.clear()
            asking = asyncio.create_task(run.http.post(EMBEDDINGS, content=b"x"))
            await _num_asked(upstream, 1)
            run.core.drain.begin()
            await asyncio.sleep(0.02)
            upstream.may_go_on.set()
            assert (await asking).content == upstream.body
            assert run.core.meter.counts["understudy_passthrough_total", EMBEDDINGS, "200"] == 1

    asyncio.run(scenario())


def test_without_an_endpoint_over_http_nothing_passes_through(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, is_cluster_only=True) as run:
            reply = await run.http.post(EMBEDDINGS, content=b"x")
            assert reply.status_code == 501 and "upstream" in reply.json()["error"]["message"]

    asyncio.run(scenario())


def test_feedback_is_stored_under_pseudonyms(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            call_id = (await run.http.post(PATH, json=REQUEST, headers={"x-session-id": "s-1"})).headers[
                "x-understudy-call-id"
            ]
            bodies = [
                {"call_id": call_id, "score": 0, "label": "wrong", "text": "not caf\u00e9"},
                {"session_id": "s-1", "score": 0.5, "call_id": None},
            ]
            replies = [await run.http.post("/v1/feedback", json=body) for body in bodies]
            curator = _headers(tmp_path, "curator")
            (call,) = await run.captured()
            replies.append(
                await run.http.post("/v1/feedback", json={"session_id": call.session_id, "label": "x"}, headers=curator)
            )
            assert [reply.status_code for reply in replies] == [202, 202, 202]
            await run.core.feedback.backlog.flush()
            own, session, curated = rows = read_feedback(run.store)
            assert [row.feedback_id for row in rows] == [reply.json()["id"] for reply in replies]
            assert (own.call_id, own.score, own.label, own.text) == (call_id, 0.0, "wrong", "not caf\u00e9")
            assert own.client_id == call.client_id == NAMES.of("client", "billing") and not own.is_curated
            assert session.session_id == call.session_id == curated.session_id != "s-1"
            assert curated.is_curated and curated.client_id == NAMES.of("client", "ann")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"score": 1}, "call_id"),
        ({"call_id": "c", "session_id": "s", "score": 1}, "call_id"),
        ({"call_id": "c"}, "score"),
        ({"call_id": "c", "score": "1"}, "score"),
        ({"call_id": "c", "score": True}, "score"),
        ({"call_id": "c", "score": 10**400}, "score"),
        ({"call_id": "c", "label": 7}, "label"),
        ({"call_id": "c", "label": ""}, "label"),
        ({"call_id": "c", "text": "x" * 20_001}, "text"),
        ({"call_id": ["c"], "score": 1}, "call_id"),
        ({"session_id": "s" * 1_001, "score": 1}, "session_id"),
        ({"call_id": "c", "score": 1, "rating": 5}, "rating"),
    ],
)
def test_wrong_feedback_is_refused_by_its_field(tmp_path: pathlib.Path, body: dict[str, Any], field: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            reply = await run.http.post("/v1/feedback", json=body)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_feedback", field)
            assert "allowed" in error["message"]
            for raw in (b'{"call_id": "c", "score": NaN}', b'{"call_id": "c", "score": 1e999}', b"[]", b"\xff", b""):
                assert (await run.http.post("/v1/feedback", content=raw)).status_code == 400
            assert (await run.http.post("/v1/feedback", content=b"x" * 2**19)).status_code == 413
            await run.core.feedback.backlog.flush()
            assert read_feedback(run.store) == []

    asyncio.run(scenario())


def test_feedback_waits_while_the_store_fails_and_is_refused_when_too_much_waits(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            monkeypatch.setattr("serving.backlog._QUEUE_SIZE", 2)
            write = run.store.write_table

            def fail(*_: Any, **__: Any) -> None:
                raise OSError("no space")

            monkeypatch.setattr(run.store, "write_table", fail)
            body = {"call_id": "c", "score": 1}
            statuses = [(await run.http.post("/v1/feedback", json=body)).status_code for _ in range(3)]
            assert statuses == [202, 202, 503] and not await run.core.feedback.backlog.flush()
            monkeypatch.setattr(run.store, "write_table", write)
            assert await run.core.feedback.backlog.flush() and len(read_feedback(run.store)) == 2

    asyncio.run(scenario())
