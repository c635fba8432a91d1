"""What a client is sent of an answer that was kept, or of an error, as OpenAI's API sends it.

Knows nothing of how calls are answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, Response

from cluster.errors import UpstreamError
from serving.openai_wire import completion_chunks, error_body, is_completion
from serving.overload import retry_headers
from serving.relay import EVENT_STREAM


def kept_reply(
    body: dict[str, Any], request: Mapping[str, Any], headers: Mapping[str, str], background: BackgroundTask | None
) -> Response:
    """A specialist's answer, whole or as the events of a stream, as the request wants it.

    Args:
        body: a chat.completion.
        background: runs once the client has the last byte.
    """
    if request.get("stream"):
        return _streamed(body, request, headers, background)
    return JSONResponse(body, headers=dict(headers), background=background)


def llm_reply(
    status: int, raw: bytes, body: dict[str, Any] | None, request: Mapping[str, Any], headers: Mapping[str, str]
) -> Response:
    """What an LLM sent in one piece, as it came; but a whole answer to a request for a stream becomes one.

    There are endpoints that do not stream, and clients find nothing in a stream that is none.

    Args:
        body: `raw` as JSON; None where it is no object.
    """
    if request.get("stream") and status == 200 and body is not None and is_completion(body):
        return _streamed(body, request, headers, None)
    return Response(raw, status, media_type="application/json", headers=dict(headers))


def failed_reply(error: UpstreamError, headers: Mapping[str, str]) -> Response:
    """The error of a call that no LLM answered."""
    told = {**headers, **retry_headers(error.status, error.retry_after_s)}
    return JSONResponse(told_of(error), error.status, headers=told)


def told_of(error: UpstreamError) -> dict[str, Any]:
    """What a client reads of an error: its own body, where it has one."""
    return error.body or error_body(error.message, kind="upstream_error", code="upstream_error")


def fault_reply(headers: Mapping[str, str] | None = None) -> Response:
    """A fault of the gateway's own: it says no more than that."""
    body = error_body("The gateway failed at this request; send it again", kind="server_error", code="internal")
    return JSONResponse(body, 500, headers=headers and dict(headers))


def _streamed(
    body: dict[str, Any], request: Mapping[str, Any], headers: Mapping[str, str], background: BackgroundTask | None
) -> Response:
    options = request.get("stream_options")
    include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
    content = b"".join(completion_chunks(body, include_usage=include_usage))
    return Response(content, media_type=EVENT_STREAM, headers=dict(headers), background=background)
