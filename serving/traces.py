"""The steps of one call as spans: the gateway's request, the router, the specialist that is asked, the LLM that is asked.

    POST /v1/chat/completions (server, goes on from the client's traceparent)
        route
        chat SPECIALIST (client) -> chat SPECIALIST (server, in the engine's replica)
        chat MODEL (client), one for each LLM that is asked -> the LLM's own, by its traceparent

Wraps the parts where tracing is on and leaves them as they are where it is off (cluster/tracing.py). Attributes are names,
counts, costs and reasons, never content. Attributes named gen_ai.* are OpenTelemetry's.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.engine import Engine, EngineAnswer
from cluster.errors import UpstreamError
from cluster.prompts import PromptFormat
from cluster.records import AgentCall
from cluster.tracing import Kind, begin_span, current_span, is_tracing, span
from cluster.upstream import LLMNodeConfig, UpstreamConfig, UpstreamReply, UpstreamStream

if TYPE_CHECKING:
    from serving.fallback import LLM

_CARRIED = (b"traceparent", b"tracestate")
_CHAT = {"gen_ai.operation.name": "chat"}
_MAX_NAME_CHARS = 200


class TracedRequests:
    """ASGI middleware: a span for each POST to a known path, up to its last byte."""

    def __init__(self, app: ASGIApp, *, paths: Collection[str]) -> None:
        """Other paths have no span: what a client makes up is no name of ours."""
        self._app, self._paths = app, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
        facts = {"http.request.method": "POST", "http.route": path}
        with span(f"POST {path}", "server", facts, carrier) as request:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    request.note({"http.response.status_code": message["status"]})
                    if message["status"] >= 500:
                        request.fail(str(message["status"]))
                await send(message)

            await self._app(scope, receive, noted)


def note_call(call: AgentCall) -> None:
    """Say in the request's span what was done with its call."""
    if not is_tracing():
        return
    route, usage = call.route, call.usage
    facts: dict[str, Any] = {
        **_CHAT,
        "gen_ai.conversation.id": call.session_id,
        "gen_ai.usage.input_tokens": usage and usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage and usage.completion_tokens,
        "understudy.call_id": call.call_id,
        "understudy.served_by": call.served_by,
        "understudy.cost_usd": call.cost_usd,
    }
    if route is not None:
        facts |= {
            "understudy.action": route.action,
            "understudy.reason": route.reason[:_MAX_NAME_CHARS],
            "understudy.task_id": route.task_id,
            "understudy.specialist": route.specialist,
            "understudy.confidence": route.confidence,
            "understudy.release": route.release,
        }
    current_span().note(facts)


def traced_engine(engine: Engine) -> Engine:
    """The engine with a span for each answer; itself where tracing is off."""
    return _TracedEngine(engine) if is_tracing() else engine


def traced_llm(llm: LLM) -> LLM:
    """The LLM with a span for each time it is asked; itself where tracing is off."""
    return _TracedLLM(llm) if is_tracing() else llm


def traced_answers(answer: Callable[..., Awaitable[EngineAnswer]]) -> Any:
    """A replica's method `answer` with a span for each call, which goes on from the `trace` of who asks."""

    @functools.wraps(answer)
    async def traced(
        self: Any, adapter: str | None, *asked: Any, trace: dict[str, str] | None = None, **named: Any
    ) -> EngineAnswer:
        return await _spanned(adapter, "server", answer(self, adapter, *asked, **named), trace)

    return traced


async def _spanned(
    adapter: str | None, kind: Kind, answering: Awaitable[EngineAnswer], carrier: dict[str, str] | None = None
) -> EngineAnswer:
    if not is_tracing():
        return await answering
    name = adapter or "base"
    facts = {**_CHAT, "gen_ai.provider.name": "understudy", "gen_ai.request.model": name}
    with span(f"chat {name}", kind, facts, carrier) as asked:
        answer = await answering
        asked.note(
            {
                "gen_ai.usage.input_tokens": answer.prompt_tokens,
                "gen_ai.usage.output_tokens": answer.completion_tokens,
                "gen_ai.response.finish_reasons": [answer.finish_reason],
                "understudy.confidence": answer.confidence,
            }
        )
        return answer


class _TracedEngine:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def fingerprint(self) -> str:
        return await self._engine.fingerprint()

    async def load(self, adapter: str) -> None:
        await self._engine.load(adapter)

    async def answer(
        self,
        adapter: str | None,
        prompt_format: PromptFormat,
        request: dict[str, Any],
        max_answer_tokens: int,
        stop_below: float = 0.0,
    ) -> EngineAnswer:
        answering = self._engine.answer(adapter, prompt_format, request, max_answer_tokens, stop_below)
        return await _spanned(adapter, "client", answering)


class _TracedLLM:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._facts = {**_CHAT, **_place(llm.config), "gen_ai.request.model": llm.config.own_model}
        self._name = f"chat {llm.config.own_model}" if llm.config.own_model else "chat"

    @property
    def config(self) -> LLMNodeConfig:
        return self._llm.config

    async def chat(self, body: dict[str, Any], *, until: float) -> UpstreamReply:
        with span(self._name, "client", self._facts) as asked:
            try:
                reply = await self._llm.chat(body, until=until)
            except UpstreamError as error:
                asked.note({"http.response.status_code": error.status})
                raise
            usage = reply.body.get("usage")
            usage = usage if isinstance(usage, dict) else {}
            asked.note(
                {
                    "http.response.status_code": reply.status,
                    "gen_ai.usage.input_tokens": _count(usage.get("prompt_tokens")),
                    "gen_ai.usage.output_tokens": _count(usage.get("completion_tokens")),
                }
            )
            if reply.status >= 400:
                asked.fail(str(reply.status))
            return reply

    @contextlib.asynccontextmanager
    async def stream(self, body: dict[str, Any], *, until: float) -> AsyncIterator[UpstreamStream]:
        begin = time.perf_counter()
        with begin_span(self._name, "client", {**self._facts, "gen_ai.request.stream": True}) as asked:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    # Current until the stream has begun and not while it is read: whoever reads it is the request.
                    with asked.current():
                        begun = await stack.enter_async_context(self._llm.stream(body, until=until))
                    waited_s = time.perf_counter() - begin
                    asked.note(
                        {"http.response.status_code": begun.status, "gen_ai.response.time_to_first_chunk": waited_s}
                    )
                    if begun.status >= 400:
                        asked.fail(str(begun.status))
                    yield begun
            except UpstreamError as error:
                asked.note({"http.response.status_code": error.status})
                raise

    async def list_models(self) -> list[dict[str, Any]]:
        return await self._llm.list_models()

    async def close(self) -> None:
        await self._llm.close()


def _place(config: LLMNodeConfig) -> dict[str, Any]:
    """Whose API an LLM has and where it is; an endpoint's is OpenAI's whoever runs it, as the conventions say."""
    if not isinstance(config, UpstreamConfig):
        return {"gen_ai.provider.name": "understudy"}
    parts = urlsplit(config.base_url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return {"gen_ai.provider.name": "openai", "server.address": parts.hostname, "server.port": port}


def _count(value: Any) -> int | None:
    return value if type(value) is int else None
