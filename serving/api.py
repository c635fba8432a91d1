"""The HTTP side of the gateway: OpenAI's paths, the allow list's, feedback, health and the page; every error as OpenAI writes it.

Everything that is not named here answers 404. Knows nothing of routes, specialists or the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import UpstreamError
from cluster.telemetry import log_event
from cluster.tracing import is_tracing, stop_tracing
from serving.body import read_body
from serving.feedback import MAX_FEEDBACK_BYTES
from serving.gateway import GatewayCore
from serving.openai_wire import Denied, parse_request, parse_strictly
from serving.overload import InFlightLimit, retry_headers
from serving.passthrough import OWN_PATHS
from serving.policy import no_such_model
from serving.replies import failed_reply, fault_reply
from serving.status import status_routes
from serving.table import model_entries
from serving.traces import TracedRequests

MAX_REQUEST_BYTES = 32 * 2**20
_YOUNG_OBJECTS = 10_000
"""New objects that a round of the garbage collector waits for. A call makes some hundred, which nearly all go by reference
counts: at Python's 700 the rounds take as long as a tenth of the call."""
_READY_WAIT_S = 120.0
"""Longest time a starting gateway waits for its specialists; then the LLM answers until they are loaded."""


def build_api(core: GatewayCore) -> FastAPI:
    """The HTTP side of `core`; its lifespan runs the table's loop, the capture and the feedback."""
    api = FastAPI(lifespan=_lifespan_of(core), docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    async def complete(request: Request) -> Response:
        identity = core.admission.admit(request.headers, "call_models")
        return await core.complete(
            identity, request.headers, parse_request(await read_body(request, MAX_REQUEST_BYTES))
        )

    def own_models() -> list[dict[str, Any]]:
        return model_entries(core.table.snapshot, has_llm=core.fallback.has_own_model)

    async def list_models(request: Request) -> Response:
        core.admission.admit(request.headers, "call_models")
        return JSONResponse({"object": "list", "data": [*await core.fallback.list_models(), *own_models()]})

    async def show_model(request: Request) -> Response:
        core.admission.admit(request.headers, "call_models")
        name, own = request.path_params["model"], own_models()
        # The LLM is not asked where the gateway knows: its specialists can be looked up while the LLM is away.
        found = [model for model in own if model["id"] == name]
        found = found or [model for model in await core.fallback.list_models() if model.get("id") == name]
        if not found:
            raise no_such_model(name, "those of GET /v1/models")
        return JSONResponse(found[0])

    async def relay(request: Request) -> Response:
        core.admission.admit(request.headers, "call_models")
        return await core.passthrough.relay(request, core.drain)

    async def take_feedback(request: Request) -> Response:
        identity = core.admission.admit(request.headers, "give_feedback")
        feedback_id = core.feedback.take(identity, parse_strictly(await read_body(request, MAX_FEEDBACK_BYTES)))
        return JSONResponse({"object": "feedback", "id": feedback_id}, 202)

    async def show_health(_: Request) -> Response:
        snapshot = core.table.snapshot
        counts = {"num_specialists": len(snapshot.specialists), "num_skipped": len(snapshot.skipped)}
        return JSONResponse({"status": "ok", "release": snapshot.release, **counts})

    # Starlette's own routes: FastAPI's validation would read the body a second time.
    routes = {path: ("POST", relay) for path in core.passthrough.paths}
    routes |= dict(zip(OWN_PATHS, (("POST", complete), ("GET", list_models), ("POST", take_feedback)), strict=True))
    routes |= {"/v1/models/{model:path}": ("GET", show_model), "/healthz": ("GET", show_health)}
    routes |= status_routes(core)
    for path, (method, endpoint) in routes.items():
        api.router.add_route(path, endpoint, methods=[method])
    api.add_middleware(InFlightLimit, max_ongoing=core.config.max_ongoing, meter=core.meter)
    if is_tracing():
        posted = [path for path, (method, _) in routes.items() if method == "POST" and path.startswith("/v1/")]
        api.add_middleware(TracedRequests, paths=posted)
    _answer_errors(api, core, {path: method for path, (method, _) in routes.items()})
    return api


def _answer_errors(api: FastAPI, core: GatewayCore, methods: dict[str, str]) -> None:
    async def deny(_: Request, error: Denied) -> Response:
        core.count_failure(error.status)
        headers = {**retry_headers(error.status, None), **error.headers}
        return JSONResponse(error.body, error.status, headers=headers)

    async def fail(_: Request, error: UpstreamError) -> Response:
        core.count_failure(error.status)
        return failed_reply(error, {})

    async def not_found(request: Request, _: Exception) -> Response:
        listed = ", ".join(core.passthrough.paths) or "none"
        own = ", ".join(
            f"{method} {path}"
            for path, method in methods.items()
            if path not in core.passthrough.paths and not path.startswith("/status/")
        )
        message = (
            f"No such path here; allowed: {own}, and POST to those in the recipe's gateway.passthrough ({listed}); "
            "next: ask the owner of this gateway to add the path to gateway.passthrough"
        )
        return await deny(request, Denied(404, message, code="not_found"))

    async def not_allowed(request: Request, error: HTTPException) -> Response:
        method = (error.headers or {}).get("Allow", "another method")
        message = f"Not with this method; allowed: {method}"
        return await deny(request, Denied(405, message, code="method_not_allowed", headers=error.headers))

    async def fail_inside(_: Request, error: Exception) -> Response:
        # The process edge of what is no chat completion; Starlette raises it again, for the server's own log.
        log_event("request_failed", logging.ERROR, error=type(error).__name__)
        core.count_failure(500)
        return fault_reply()

    api.add_exception_handler(Exception, fail_inside)
    api.add_exception_handler(Denied, deny)  # type: ignore[arg-type]
    api.add_exception_handler(UpstreamError, fail)  # type: ignore[arg-type]
    api.add_exception_handler(404, not_found)
    api.add_exception_handler(405, not_allowed)  # type: ignore[arg-type]


def _lifespan_of(core: GatewayCore) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        core.drain.attach()
        core.capture.start()
        core.feedback.backlog.start()
        # So that a ready gateway serves the release; what fails here is tried again and logged by the loop.
        await asyncio.gather(asyncio.wait_for(core.table.refresh(), _READY_WAIT_S), return_exceptions=True)
        polling = asyncio.get_running_loop().create_task(core.table.run())
        # Ray Serve itself leaves what a replica started with out of collections.
        gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
        try:
            yield
        finally:
            core.drain.close()
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            await core.auditor.close()
            await core.shadows.close()
            await core.capture.close()
            await core.feedback.backlog.close()
            await core.fallback.close()
            await core.passthrough.close()
            await asyncio.to_thread(stop_tracing)

    return lifespan
