"""At most so many requests in one gateway at once: further ones are answered 503 with Retry-After before they are read.

A request counts until its last byte has left, a stream too. Only POSTs count: health and model lists must answer when
all else waits. Also says, for every answer of 429 or 503, when to come back (RFC 9110 section 10.2.3).
"""

from __future__ import annotations

import math

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.telemetry import Meter
from serving.openai_wire import error_body

_USUAL_WAIT_S = 1.0
_MESSAGE = "This gateway has as many requests in flight as it takes; try again shortly"


class InFlightLimit:
    """ASGI middleware. Belongs to one event loop."""

    def __init__(self, app: ASGIApp, *, max_ongoing: int, meter: Meter) -> None:
        self._app, self._max_ongoing, self._meter = app, max_ongoing, meter
        self._num_ongoing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._num_ongoing >= self._max_ongoing:
            self._meter.count("understudy_requests_failed_total", status="503")
            body = error_body(_MESSAGE, kind="server_error", code="overloaded")
            await JSONResponse(body, 503, headers=retry_headers(503, None))(scope, receive, send)
            return
        self._num_ongoing += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_ongoing -= 1


def retry_headers(status: int, wait_s: float | None) -> dict[str, str]:
    """The Retry-After header, in whole seconds, of an answer of this status; none where nothing suggests to come back.

    Example:
        >>> retry_headers(429, 6.2), retry_headers(503, None), retry_headers(500, None)
        ({'retry-after': '7'}, {'retry-after': '1'}, {})
    """
    if wait_s is None and status not in (429, 503):
        return {}
    return {"retry-after": str(max(1, math.ceil(_USUAL_WAIT_S if wait_s is None else wait_s)))}
