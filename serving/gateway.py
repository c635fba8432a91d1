"""The OpenAI-compatible ingress: one chat.completions call -> a specialist's accepted answer, else the LLM's; captured.

Authenticate, parse, route, ask the specialist under a deadline, and accept, escalate or fall back. Nothing of a
specialist's answer leaves before it is accepted; the LLM's bytes pass through as they come while a copy is put
together for capture. Every parsed call is captured once, answered or not. Content is never logged.
Source: OpenAI API reference, chat completions; DESIGN "Serve".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.access import ApiKeys, Pseudonyms
from cluster.config import Config
from cluster.engine import Engine, EngineAnswer
from cluster.errors import InputError, UpstreamError
from cluster.prices import PriceConfig, seconds_cost_usd
from cluster.prompts import PromptFormat
from cluster.records import AgentCall, RouteDecision, ServedBy, Specialist, Usage
from cluster.route_model import RouteGuess
from cluster.servable import ask_engine
from cluster.telemetry import Meter, log_event
from cluster.upstream import LLMNodeConfig, UpstreamStream
from serving import policy
from serving.audit import Auditor
from serving.capture import Capture
from serving.fallback import FallbackLLM
from serving.openai_wire import (
    Denied,
    SseReader,
    completion_body,
    completion_chunks,
    error_body,
    parse_object,
    parse_request,
    reassemble,
    sse_event,
)
from serving.pending import PendingCall
from serving.table import ServingTable, Snapshot, model_entries

MAX_REQUEST_BYTES = 32 * 2**20
CLIENT_GONE = 499
"""Status of a captured call whose client left before the last byte (as nginx writes it)."""
_EVENT_STREAM = "text/event-stream"
_READY_WAIT_S = 120.0
"""Longest time a starting gateway waits for its specialists; then the LLM answers until they are loaded."""


class GatewayConfig(Config):
    """Who may call, and how long a specialist may take."""

    auth: Literal["keys", "open"] = "keys"
    """`keys` asks for an API key of this store; `open` lets everybody in who reaches the port."""
    specialist_timeout_s: float = Field(default=10.0, gt=0)
    """Longest wait for a specialist's answer, in seconds; then the LLM is asked."""
    max_temperature: float = Field(default=1.0, ge=0)
    """A request with a higher temperature wants variety, which a greedy specialist does not give. Gates count with it:
    raise it before a conversion, not after."""


class GatewayCore:
    """The request path without its HTTP. Belongs to one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        capture: Capture,
        fallback: FallbackLLM,
        auditor: Auditor,
        table: ServingTable,
        engines: Mapping[str, Engine],
        pseudonyms: Pseudonyms,
        api_keys: ApiKeys | None,
        prices: PriceConfig,
        meter: Meter | None = None,
    ) -> None:
        """Take the parts; `engines` are by store path of their base model, `api_keys` may be None where auth is open."""
        assert api_keys is not None or config.auth == "open", "auth=keys needs API keys"
        self.config, self.capture, self.fallback, self.table = config, capture, fallback, table
        self.auditor, self.prices = auditor, prices
        self.meter = meter or Meter()
        self._engines, self._pseudonyms, self._api_keys = engines, pseudonyms, api_keys
        self._num_asking = 0

    def authenticate(self, headers: Mapping[str, str]) -> str:
        """Name of the client.

        Raises:
            Denied: 401 without a valid key, 403 where the key's role may not call.
        """
        if self.config.auth == "open":
            return "open"
        assert self._api_keys is not None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        identity = self._api_keys.verify(key.strip()) if scheme.lower() == "bearer" else None
        if identity is None:
            message = "Incorrect or missing API key; send one of this gateway's keys as `Authorization: Bearer us-...`"
            raise Denied(401, message, "invalid_request_error", "invalid_api_key")
        if identity.role not in ("agent", "admin"):
            message = f"A key of role {identity.role} may not call models; use one of role agent"
            raise Denied(403, message, "invalid_request_error", "insufficient_permissions")
        return identity.client

    async def complete(self, client: str, headers: Mapping[str, str], request: dict[str, Any]) -> Response:
        """Answer one parsed chat.completions request.

        Raises:
            Denied: 404, it asks for a specialist that is not served.
        """
        snapshot = self.table.snapshot
        task_id = policy.named_task(request, snapshot.specialists)
        undecided = RouteDecision(action="llm", reason="undecided", release=snapshot.release)
        call = PendingCall(uuid.uuid4().hex, time.time(), time.perf_counter(), client, request, headers, undecided)
        # A call that the router did not send says nothing of the task's traffic.
        call.is_reference = task_id is None and self.auditor.is_drawn(call.call_id)
        try:
            answer = await self._ask_specialist(call, snapshot, task_id)
            if answer is not None:
                return await self._accept(call, answer, snapshot)
            return await (self._stream_llm(call) if request.get("stream") else self._ask_llm(call))
        except asyncio.CancelledError:
            self.capture.put(self._captured(call, status=CLIENT_GONE, error="the client left"))
            raise

    async def _ask_specialist(self, call: PendingCall, snapshot: Snapshot, task_id: str | None) -> EngineAnswer | None:
        """The accepted answer, or None for the LLM; the decision is left in `call`. `task_id` is what the client named."""
        specialist: Specialist | None = None
        release = snapshot.release or ""
        begin = time.perf_counter()
        self._num_asking += 1
        try:
            found = self._decide_before(call.request, snapshot, task_id)
            if isinstance(found, RouteDecision):
                call.decision = found
                return None
            specialist = found
            async with asyncio.timeout(self.config.specialist_timeout_s):
                answer, call.decision = await self._judge(specialist, call.request, release)
            return answer if call.decision.action == "accept" else None
        except InputError:
            kept = policy.fall_back(specialist, "the prompt does not fit", release=release) if specialist else None
            call.decision = kept.model_copy(update={"action": "escalate"}) if kept else _unrouted(snapshot)
        except Exception as error:  # The process edge: whatever a specialist or its request does, the LLM answers.
            name = type(error).__name__
            log_event("specialist_failed", logging.ERROR, call_id=call.call_id, error=name)
            reason = "timeout" if isinstance(error, TimeoutError) else f"error: {name}"
            kept = policy.fall_back(specialist, reason, release=release) if specialist else None
            call.decision = kept or _unrouted(snapshot)
        finally:
            self._note_specialist(call, specialist, time.perf_counter() - begin)
            self._num_asking -= 1
        return None

    def _decide_before(
        self, request: dict[str, Any], snapshot: Snapshot, task_id: str | None
    ) -> Specialist | RouteDecision:
        if snapshot.route_model is None or snapshot.release is None:
            return RouteDecision(action="llm", reason="no release", release=snapshot.release)
        return policy.decide_before(
            RouteGuess(task_id=task_id, reason="named") if task_id else snapshot.route_model.task_of(request),
            request,
            specialists=snapshot.specialists,
            refused=snapshot.refused,
            release=snapshot.release,
            max_temperature=self.config.max_temperature,
        )

    async def _judge(
        self, specialist: Specialist, request: dict[str, Any], release: str
    ) -> tuple[EngineAnswer, RouteDecision]:
        prompt_format = PromptFormat.model_validate(specialist.prompt_format)
        engine = self._engines[specialist.base]
        answer, invalid = await ask_engine(
            engine, specialist.adapter, prompt_format, request, specialist.max_answer_tokens
        )
        return answer, policy.decide_after(answer, specialist, invalid, release=release)

    def _note_specialist(self, call: PendingCall, specialist: Specialist | None, seconds: float) -> None:
        if specialist is not None:
            self.meter.observe("understudy_specialist_latency_ms", seconds * 1e3, task_id=specialist.task_id)
            call.specialist_cost_usd = seconds_cost_usd(seconds, num_sharing=self._num_asking, config=self.prices)

    async def _accept(self, call: PendingCall, answer: EngineAnswer, snapshot: Snapshot) -> Response:
        assert answer.message is not None and call.decision.specialist is not None
        usage = Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
        body = completion_body(
            answer.message, call_id=call.call_id, model=call.decision.specialist, created=int(call.ts), usage=usage
        )
        await self.capture.keep(self._captured(call, response=body, served_by="specialist"))
        # Runs once the client has its last byte.
        audit = BackgroundTask(self._audit, call, answer.message, snapshot) if call.is_reference else None
        if not call.request.get("stream"):
            return JSONResponse(body, headers=call.response_headers(), background=audit)
        options = call.request.get("stream_options")
        include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        content = b"".join(completion_chunks(body, include_usage=include_usage))
        return Response(content, media_type=_EVENT_STREAM, headers=call.response_headers(), background=audit)

    async def _audit(self, call: PendingCall, message: dict[str, Any], snapshot: Snapshot) -> None:
        """Begin the call's audit; a coroutine only because Starlette would run a plain function in a thread."""
        specialist = snapshot.specialists[call.decision.task_id or ""]
        self.auditor.start(call, message, PromptFormat.model_validate(specialist.prompt_format).answer_kind)

    async def _ask_llm(self, call: PendingCall) -> Response:
        try:
            reply, endpoint = await self.fallback.chat(call.request)
        except UpstreamError as error:
            return await self._fail(call, error)
        return await self._whole(call, reply.status, reply.raw, reply.body, endpoint)

    async def _stream_llm(self, call: PendingCall) -> Response:
        stack = contextlib.AsyncExitStack()
        try:
            stream, endpoint = await stack.enter_async_context(self.fallback.stream(call.request))
        except UpstreamError as error:
            return await self._fail(call, error)
        if stream.status == 200 and stream.content_type == _EVENT_STREAM:
            return _Relay(self, call, stream, endpoint, stack)
        async with stack:
            try:
                raw = b"".join([piece async for piece in stream.chunks])
            except UpstreamError as error:
                return await self._fail(call, error)
        return await self._whole(call, stream.status, raw, parse_object(raw), endpoint)

    async def _whole(
        self, call: PendingCall, status: int, raw: bytes, body: dict[str, Any] | None, endpoint: LLMNodeConfig
    ) -> Response:
        """Pass on a reply that came in one piece: an answer, or an error that is the client's own."""
        outcome: dict[str, Any] = {"response": body, "endpoint": endpoint}
        if status >= 400 or body is None:
            outcome = {"status": status if status >= 400 else 502, "error": "refused by the LLM"}
        await self.capture.keep(self._captured(call, **outcome))
        return Response(raw, status, media_type="application/json", headers=call.response_headers())

    async def _fail(self, call: PendingCall, error: UpstreamError) -> Response:
        body = error.body or error_body(error.message, kind="upstream_error", code="upstream_error")
        await self.capture.keep(self._captured(call, status=error.status, error="the LLM gave no answer"))
        return JSONResponse(body, error.status, headers=call.response_headers())

    def _captured(
        self,
        call: PendingCall,
        *,
        response: dict[str, Any] | None = None,
        endpoint: LLMNodeConfig | None = None,
        served_by: ServedBy = "llm",
        status: int = 200,
        error: str | None = None,
    ) -> AgentCall:
        captured = call.captured(
            self._pseudonyms, response=response, endpoint=endpoint, served_by=served_by, status=status, error=error
        )
        action = call.decision.action
        self.meter.count("understudy_calls_total", action=action, task_id=call.decision.task_id or "")
        self.meter.observe("understudy_call_latency_ms", captured.latency_ms or 0.0, action=action)
        if status >= 400:
            self.meter.count("understudy_requests_failed_total", status=str(status))
        return captured


class _Relay(StreamingResponse):
    """Passes an LLM's stream through, and captures it however it ends: whole, broken off or abandoned."""

    def __init__(
        self,
        core: GatewayCore,
        call: PendingCall,
        stream: UpstreamStream,
        endpoint: LLMNodeConfig,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        super().__init__(self._pieces(stream), media_type=_EVENT_STREAM, headers=call.response_headers())
        self._core, self._call, self._endpoint, self._stack = core, call, endpoint, stack
        self._reader = SseReader()
        self._chunks: list[dict[str, Any]] = []
        self._status, self._error, self._is_finished = CLIENT_GONE, "the client left", False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Before anything is awaited: a cancelled request may not get another turn.
            if not self._is_finished:
                self._core.capture.put(self._core._captured(self._call, **self._outcome()))
            await self._stack.aclose()

    def _outcome(self) -> dict[str, Any]:
        response = reassemble(self._chunks) if self._chunks else None
        error = self._error if self._status >= 400 else None
        return {"response": response, "endpoint": self._endpoint, "status": self._status, "error": error}

    async def _pieces(self, stream: UpstreamStream) -> AsyncIterator[bytes]:
        """The stream as it comes; what follows the answer's end leaves once the call is kept."""
        last = b""
        try:
            async for piece in stream.chunks:
                self._chunks += self._reader.feed(piece)
                if last or self._reader.is_done or any(map(_has_finish, self._chunks)):
                    last += piece
                else:
                    yield piece
            is_whole = self._reader.is_done or any(map(_has_finish, self._chunks))
            self._status = 200 if is_whole and not self._reader.num_bad else 502
            self._error = "the LLM's stream does not parse" if self._reader.num_bad else "the LLM's stream ended early"
        except UpstreamError as error:
            self._status, self._error = error.status, "the LLM broke off its answer"
            # The blank line ends an event that was cut in its middle.
            last += b"\n\n" + sse_event(error.body or error_body(error.message, kind="upstream_error"))
        self._is_finished = True
        await self._core.capture.keep(self._core._captured(self._call, **self._outcome()))
        yield last


def build_api(core: GatewayCore) -> FastAPI:
    """The HTTP side of `core`; its lifespan runs the table's loop and the capture."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        core.capture.start()
        # So that a ready gateway serves the release; what fails here is tried again and logged by the loop.
        await asyncio.gather(asyncio.wait_for(core.table.refresh(), _READY_WAIT_S), return_exceptions=True)
        polling = asyncio.get_running_loop().create_task(core.table.run())
        try:
            yield
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            await core.auditor.close()
            await core.capture.close()
            await core.fallback.close()

    async def complete(request: Request) -> Response:
        client = core.authenticate(request.headers)
        return await core.complete(client, request.headers, parse_request(await _read(request)))

    async def list_models(request: Request) -> Response:
        core.authenticate(request.headers)
        try:
            models = [*await core.fallback.list_models(), *model_entries(core.table.snapshot)]
            return JSONResponse({"object": "list", "data": models})
        except UpstreamError as error:
            return JSONResponse(error.body or error_body(error.message, kind="upstream_error"), error.status)

    async def show_health(_: Request) -> Response:
        snapshot = core.table.snapshot
        counts = {"num_specialists": len(snapshot.specialists), "num_skipped": len(snapshot.skipped)}
        return JSONResponse({"status": "ok", "release": snapshot.release, **counts})

    async def deny(_: Request, error: Denied) -> Response:
        core.meter.count("understudy_requests_failed_total", status=str(error.status))
        return JSONResponse(error.body, error.status)

    async def not_found(request: Request, _: HTTPException) -> Response:
        allowed = "No such endpoint here; allowed: POST /v1/chat/completions, GET /v1/models, GET /healthz"
        return await deny(request, Denied(404, allowed, "invalid_request_error", "not_found"))

    api = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    api.add_exception_handler(Denied, deny)  # type: ignore[arg-type]
    api.add_exception_handler(404, not_found)  # type: ignore[arg-type]
    api.add_exception_handler(405, not_found)  # type: ignore[arg-type]
    # Starlette's own routes: FastAPI's validation would read the body a second time.
    api.router.add_route("/v1/chat/completions", complete, methods=["POST"])
    api.router.add_route("/v1/models", list_models, methods=["GET"])
    api.router.add_route("/healthz", show_health, methods=["GET"])
    return api


async def _read(request: Request) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_REQUEST_BYTES:
            raise Denied(413, f"body: more than {MAX_REQUEST_BYTES} bytes", "invalid_request_error", "too_large")
        pieces.append(piece)
    return b"".join(pieces)


def _unrouted(snapshot: Snapshot) -> RouteDecision:
    return RouteDecision(action="llm", reason="the request cannot be routed", release=snapshot.release)


def _has_finish(chunk: dict[str, Any]) -> bool:
    choices = chunk.get("choices")
    return isinstance(choices, list) and any(isinstance(one, dict) and one.get("finish_reason") for one in choices)
