"""Stand-ins for tests of the request path: an engine, an LLM over HTTP, a release in a store, and a gateway of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from aiohttp import web
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster import registry
from cluster.access import ApiKeys, Pseudonyms
from cluster.calls import read_calls
from cluster.confidence import ConfidenceBound, confidence
from cluster.engine import EngineAnswer
from cluster.errors import EngineError, StoreError
from cluster.faces import FacesConfig
from cluster.prices import PriceConfig
from cluster.prompts import PromptFormat
from cluster.raw_upstream import RawUpstream
from cluster.records import AgentCall, Gate, Release, Specialist
from cluster.route_model import RouteModel
from cluster.signature import signature_of
from cluster.store import Store
from cluster.telemetry import Meter
from cluster.upstream import Upstream, UpstreamConfig
from serving.api import build_api
from serving.audit import AuditConfig, Auditor
from serving.capture import Capture, CaptureConfig
from serving.fallback import FallbackLLM
from serving.feedback import FeedbackBox
from serving.gateway import GatewayCore
from serving.gateway_config import GatewayConfig
from serving.late_engines import AppState
from serving.passthrough import PassThrough
from serving.table import ServingTable
from serving.traces import traced_engine, traced_llm

BASE, ADAPTER, ROUTES = "bases/tiny", "adapters/triage", "routes/one"
FINGERPRINT = "engine-1"
REQUEST: dict[str, Any] = {
    "model": "any",
    "messages": [{"role": "system", "content": "Name the intent."}, {"role": "user", "content": "Where is it?"}],
}
LLM_TEXT = "from the LLM"
PATH = "/v1/chat/completions"
NO_AUDIT = AuditConfig(share=0.0)
FREE = PriceConfig()
DEFAULT_FACES = FacesConfig()
_LAST_WORDS = {
    "unfinished": b"",
    "unreadable": b"data: {oh\n\ndata: [DONE]\n\n",
    "error": b'data: {"error": {"message": "busy", "code": "overloaded"}}\n\ndata: [DONE]\n\n',
}
DEAD = "http://127.0.0.1:9/v1"


class FakeApps:
    """`serving.late_engines.EngineApps` whose applications are up as soon as they are started, and gone on `finish`."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}
        self.ended: list[str] = []
        self.down: set[str] = set()
        """Models whose start fails."""
        self.failed: set[str] = set()
        """Applications that Serve gave up."""
        self.num_tries = 0

    def states(self) -> dict[str, AppState]:
        def state(app: str) -> AppState:
            return "ending" if app in self.ended else "failed" if app in self.failed else "up"

        return {app: state(app) for app in self.models}

    def start(self, app: str, model: str) -> None:
        self.num_tries += 1
        if model in self.down:
            raise OSError("no bucket\nfirst line\nthe last line")
        assert app not in self.models or app in self.failed
        self.failed.discard(app)
        self.models[app] = model

    def end(self, app: str) -> None:
        assert app in self.models and app not in self.ended
        self.ended.append(app)

    def finish(self) -> None:
        """What was told to end has ended."""
        self.models = {app: model for app, model in self.models.items() if app not in self.ended}
        self.ended = []


class FakeEngine:
    """Answers what it is told to; `answer_with` may raise or wait."""

    def __init__(self, text: str = "refund", confidence: float = 0.99) -> None:
        self.text, self.confidence = text, confidence
        self.answer_with: Callable[[], Awaitable[EngineAnswer]] | None = None
        self.name = FINGERPRINT
        self.loaded: list[str] = []
        self.broken: set[str] = set()
        """Adapters that do not load."""
        self.is_away = False
        """Whether the engine cannot be reached."""
        self.num_asked = 0
        self.logprobs: list[float] | None = None
        """Of the answer's tokens, one a turn of the loop; gives the confidence, and lets an answer be given up."""
        self.num_tokens = 0
        """Said of `logprobs` so far."""
        self.num_aborted = 0
        """Calls whose caller left."""

    async def fingerprint(self) -> str:
        return self.name

    async def load(self, adapter: str) -> None:
        if self.is_away:
            raise ConnectionError("no replica")
        if adapter in self.broken:
            raise EngineError(f"{adapter}: cannot be loaded")
        self.loaded.append(adapter)

    async def answer(
        self,
        adapter: str | None,
        prompt_format: PromptFormat,
        request: dict[str, Any],
        max_answer_tokens: int,
        stop_below: float = 0.0,
    ) -> EngineAnswer:
        self.num_asked += 1
        try:
            if self.answer_with is not None:
                return await self.answer_with()
            if self.logprobs is not None:
                return await self._generate(self.logprobs, max_answer_tokens, stop_below)
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        return engine_answer(self.text, self.confidence)

    async def _generate(self, logprobs: list[float], max_tokens: int, stop_below: float) -> EngineAnswer:
        bound = ConfidenceBound()
        for number, logprob in enumerate(logprobs[:max_tokens], 1):
            await asyncio.sleep(0)
            self.num_tokens += 1
            bound.add(logprob)
            if number < len(logprobs) and bound.is_lost(stop_below):
                given_up = {"message": None, "completion_tokens": number}
                return engine_answer(self.text, bound.value, "rejected").model_copy(update=given_up)
        is_whole = len(logprobs) <= max_tokens
        answer = engine_answer(self.text, confidence(logprobs) if is_whole else 0.0, "stop" if is_whole else "length")
        return answer.model_copy(update={"completion_tokens": min(len(logprobs), max_tokens)})


class FakeKms:
    """Wraps data keys with AES-GCM under a key in memory; a KeyWrapper."""

    def __init__(self, key: bytes = b"k" * 32) -> None:
        self._cipher = AESGCM(key)
        self.is_away = False
        """Whether it cannot be reached."""

    def new_data_key(self) -> tuple[bytes, str]:
        self._check()
        key, nonce = os.urandom(32), os.urandom(12)
        return key, (nonce + self._cipher.encrypt(nonce, key, None)).hex()

    def unwrap(self, wrapped: str) -> bytes:
        self._check()
        data = bytes.fromhex(wrapped)
        try:
            return self._cipher.decrypt(data[:12], data[12:], None)
        except InvalidTag:
            raise StoreError("not wrapped by this KMS") from None

    def _check(self) -> None:
        if self.is_away:
            raise StoreError("the KMS is away")


class FakeLLM:
    """An OpenAI-compatible server that streams its text in two pieces, then does as `fate` says."""

    def __init__(self) -> None:
        self.status = 200
        self.fate = "finish"
        """finish, or after the first piece: cut (break the connection off), hang (say nothing), unfinished (end), unreadable
        (send no JSON, then end), error (report one, then end)."""
        self.error: dict[str, Any] = {"message": "no", "type": "test", "param": None, "code": None}
        """What it answers where its status is not 200."""
        self.text = LLM_TEXT
        """What it says in a whole answer."""
        self.body: dict[str, Any] | None = None
        """A whole answer to give instead."""
        self.answer_with: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        """The assistant message for a request, given whole or streamed; instead of all of the above."""
        self.may_answer = asyncio.Event()
        """While unset, answers are held back, streams before their first byte."""
        self.may_answer.set()
        self.may_go_on = asyncio.Event()
        """While unset, streams stop after their first piece."""
        self.may_go_on.set()
        self.lists_models = True
        """Whether it has a list of its models."""
        self.gives_counts = True
        """Whether streams bring token counts where they are asked for."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        """Of the requests, by lower-case name."""
        self.num_left = 0
        """Calls whose client left before their end."""
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listen on a free loopback port; returns the base_url."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        if not self.lists_models:
            raise web.HTTPNotFound
        return web.json_response({"object": "list", "data": [{"id": "llm-1", "object": "model"}]})

    async def _complete(self, http_request: web.Request) -> web.StreamResponse:
        request = await http_request.json()
        self.requests.append(request)
        self.headers.append({name.lower(): value for name, value in http_request.headers.items()})
        if self.status != 200:
            return web.json_response({"error": self.error}, status=self.status)
        try:
            if self.answer_with is not None:
                return await _say(http_request, self._heard(request), self.answer_with(request))
            await self.may_answer.wait()
            if request.get("stream"):
                return await self._stream(http_request)
            return web.json_response(self.body or llm_body(self.text))
        except (asyncio.CancelledError, ConnectionError):
            self.num_left += 1
            raise

    def _heard(self, request: dict[str, Any]) -> dict[str, Any]:
        return request if self.gives_counts else {**request, "stream_options": None}

    async def _stream(self, http_request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http_request)
        await response.write(_event({"role": "assistant", "content": LLM_TEXT[:4]}, None))
        if self.fate == "hang":
            await asyncio.Event().wait()
        await self.may_go_on.wait()
        if self.fate.startswith("endless"):
            is_line = self.fate == "endless line"
            await response.write(b"data: " if is_line else _event({}, "stop"))
            while True:
                await response.write(b"x" * 2**15 if is_line else b": ping\n\n" * 2**12)
        if self.fate in _LAST_WORDS:
            await response.write(_LAST_WORDS[self.fate])
            return response
        if self.fate != "finish":
            assert http_request.transport is not None
            http_request.transport.abort()
            return response
        await response.write(_event({"content": LLM_TEXT[4:]}, "stop"))
        usage = {"choices": [], "usage": llm_body()["usage"]}
        await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        return response


@dataclass
class Running:
    """One gateway with its parts."""

    http: httpx.AsyncClient
    api: Any
    core: GatewayCore
    engine: FakeEngine
    llm: FakeLLM
    store: Store
    release: str
    key: str

    async def ask(self, **extra: Any) -> httpx.Response:
        return await self.http.post(PATH, json={**REQUEST, **extra})

    async def captured(self) -> list[AgentCall]:
        await self.core.capture.flush()
        return read_calls(self.store)


@contextlib.asynccontextmanager
async def gateway(
    tmp_path: pathlib.Path,
    specialist: Specialist | None = None,
    dead_first: bool = False,
    audit: AuditConfig = NO_AUDIT,
    requests: Sequence[dict[str, Any]] = (),
    prices: PriceConfig = FREE,
    llm_model: str | None = None,
    llm_timeout_s: float = 120.0,
    faces: FacesConfig = DEFAULT_FACES,
    is_cluster_only: bool = False,
    max_usd_per_day: float | None = None,
    **config: Any,
) -> AsyncIterator[Running]:
    store, engine, llm = Store(str(tmp_path / "store")), FakeEngine(), FakeLLM()
    release = promote_release(store, tmp_path / "scratch", specialist or make_specialist(), requests=requests)
    upstream = [
        UpstreamConfig(
            base_url=await llm.start(),
            max_attempts=1,
            prompt_usd_per_million=1.0,
            completion_usd_per_million=2.0,
            model=llm_model,
            timeout_s=llm_timeout_s,
            max_usd_per_day=max_usd_per_day,
        )
    ]
    if dead_first:
        upstream.insert(0, UpstreamConfig(base_url=DEAD, max_attempts=1))
    keys, meter = ApiKeys(tmp_path / "keys.json"), Meter()
    key = keys.create("billing", "agent")
    capture, fallback = (
        Capture(store, CaptureConfig(flush_interval_s=1000.0), meter),
        FallbackLLM([traced_llm(Upstream(one)) for one in upstream], meter),
    )
    pseudonyms, settings = Pseudonyms(b"k" * 32), GatewayConfig(**config)
    raw = None if is_cluster_only else RawUpstream(upstream[0])
    core = GatewayCore(
        settings,
        capture=capture,
        fallback=fallback,
        auditor=Auditor(audit, fallback, capture, pseudonyms, meter),
        table=ServingTable(store, {BASE: engine}, max_adapters=8),
        engines={BASE: traced_engine(engine)},
        pseudonyms=pseudonyms,
        api_keys=keys,
        prices=prices,
        passthrough=PassThrough(raw, settings.passthrough, meter, fallback.spending),
        feedback=FeedbackBox(store, pseudonyms, meter),
        faces=faces,
        meter=meter,
    )
    api = build_api(core)
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with api.router.lifespan_context(api):
            transport = httpx.ASGITransport(api)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as http:
                yield Running(http, api, core, engine, llm, store, release, key)
    finally:
        await llm.close()


def engine_answer(text: str, confidence: float, finish_reason: str = "stop") -> EngineAnswer:
    return EngineAnswer(
        message={"role": "assistant", "content": text},
        text=text,
        confidence=confidence,
        prompt_tokens=10,
        completion_tokens=2,
        finish_reason=finish_reason,
    )


def llm_body(text: str = LLM_TEXT) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "llm-1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


def make_specialist(*, threshold: float | None = 0.9, fingerprint: str = FINGERPRINT, base: str = BASE) -> Specialist:
    gate = Gate(
        reference="llm",
        population="calls of this task as served",
        epsilon=0.05,
        delta=0.05,
        threshold=threshold,
        num_calibration=100,
        num_accepted=80,
        num_disagreements=0,
        upper_bound=0.03,
        coverage=0.8,
        fingerprint=fingerprint,
        refused=None if threshold is not None else "too few calls",
    )
    prompt_format = PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100)
    return Specialist(
        task_id="triage",
        sha="f" * 64,
        base=base,
        adapter=ADAPTER,
        prompt_format=prompt_format.model_dump(mode="json"),
        gate=gate,
        report="reports/triage",
        max_answer_tokens=16,
    )


def promote_release(
    store: Store,
    scratch: pathlib.Path,
    specialist: Specialist,
    snapshot: str = "one",
    requests: Sequence[dict[str, Any]] = (),
) -> str:
    """Publish all that a release of one specialist for REQUEST and `requests` names, and make it the served one."""
    scratch.mkdir(exist_ok=True)
    (scratch / "weights").write_text("none")
    for folder in (specialist.base, specialist.adapter):
        store.publish(folder, scratch, {"kind": "test"})
    requests = (REQUEST, {**REQUEST, "response_format": {"type": "json_object"}}, *requests)
    RouteModel({signature_of(request): specialist.task_id for request in requests}, {}).save(store, ROUTES)
    release = Release(
        specialists={specialist.task_id: specialist}, refused={}, route_model=ROUTES, snapshot=snapshot, created_ts=1.0
    )
    sha = registry.publish_release(store, release)
    registry.promote(store, sha)
    return sha


async def _say(
    http_request: web.Request, request: dict[str, Any], message: dict[str, Any]
) -> web.Response | web.StreamResponse:
    """The message as OpenAI gives it: whole, or in deltas that cut texts and arguments in two, with usage if asked."""
    calls = message.get("tool_calls") or []
    end = "tool_calls" if calls else "stop"
    if not request.get("stream"):
        body = llm_body()
        body["choices"] = [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": end}]
        return web.json_response(body)
    text = message.get("content") or ""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if calls else ""}]
    deltas += [{"content": part} for part in (text[:3], text[3:]) if part]
    for index, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        deltas.append({"tool_calls": [{"index": index, **call, "function": {"name": name, "arguments": ""}}]})
        parts = (arguments[:3], arguments[3:])
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": part}}]} for part in parts]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http_request)
    for event in [*(_event(delta, None) for delta in deltas), _event({}, end)]:
        await response.write(event)
    if (request.get("stream_options") or {}).get("include_usage"):
        usage = {**json.loads(_event({}, None)[6:]), "choices": [], "usage": llm_body()["usage"]}
        await response.write(f"data: {json.dumps(usage)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


def tool_message(*calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """An assistant message that calls tools, as an LLM writes it."""
    written = [
        {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for n, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": None, "tool_calls": written}


def _event(delta: dict[str, Any], finish_reason: str | None) -> bytes:
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "llm-1",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }
    return f"data: {json.dumps(chunk)}\n\n".encode()
