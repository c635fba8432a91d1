"""Paths of the recipe's allow list -> the first endpoint of `upstream`, byte for byte in both directions.

Exact paths alone: what is asked of the endpoint is put together from the list, never from the request, so that no
spelling of a path reaches anything else under the owner's key. These requests are no chat completions: they are
counted and paid at the endpoint's prices (serving/tally.py), not captured and not routed. What outlasts the drain time of a
gateway that stops ends with `shutting_down`, a stream of events within itself; of another reply that has begun nothing can
be said, and its connection is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.errors import UpstreamError
from cluster.raw_upstream import RawReply, RawUpstream
from cluster.telemetry import Meter
from cluster.upstream import UpstreamConfig
from serving.billing import Spending, spent_error, was_at_work
from serving.body import pieces_of, stalled, too_large
from serving.draining import SHUTTING_DOWN, Drain
from serving.limits import until, within
from serving.openai_wire import CLIENT_GONE, Denied, error_code, sse_event
from serving.tally import Tally

VERSION = "/v1"
OWN_PATHS = ("/v1/chat/completions", "/v1/models", "/v1/feedback")
MAX_BODY_BYTES = 32 * 2**20


def check_path(path: str) -> str:
    """A path that may be on the allow list.

    Raises:
        ValueError: it is the gateway's own, or not plain.
    """
    if path in OWN_PATHS:
        raise ValueError(f"{path!r}: is a path of the gateway's own; allowed: others, such as /v1/embeddings")
    parts = path.removeprefix(f"{VERSION}/").split("/")
    plain = all(part and part.isascii() and part.replace("-", "").replace("_", "").isalnum() for part in parts)
    if not path.startswith(f"{VERSION}/") or not plain:
        raise ValueError(
            f"{path!r}: allowed: a whole path below {VERSION} of letters, digits, - and _, such as /v1/embeddings"
        )
    return path


DEFAULT_PATHS = ("/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/moderations")


class PassThrough:
    """Passes requests on. Belongs to one event loop; close it there."""

    def __init__(self, upstream: RawUpstream | None, paths: Sequence[str], meter: Meter, spending: Spending) -> None:
        """Take the endpoint, whose config is one of those that `spending` knows; None where `upstream` has only models on
        the cluster, which have no other paths."""
        self.paths = tuple(paths)
        self._upstream, self._meter, self._spending = upstream, meter, spending

    async def relay(self, request: Request, drain: Drain) -> StreamingResponse:
        """Answer one POST to one of `paths`, until `drain` ends it.

        Raises:
            HTTPException: 404, the path is spelt otherwise.
            Denied: 501, there is no endpoint; 413, the body is too large; 408, it stalls.
            UpstreamError: the endpoint gave no reply; 429, it has cost what it may cost today; 503, this gateway stops.
        """
        path, query = self._path_of(request), request.scope.get("query_string", b"")
        if self._upstream is None:
            message = (
                f"{path} needs an endpoint over HTTP in `upstream`, and this gateway has only models on its cluster"
            )
            raise Denied(501, message, code="not_supported")
        if any(not 0x21 <= byte <= 0x7E for byte in query):
            raise Denied(400, "query: allowed are visible ASCII characters, others as %XX", code="invalid_request")
        endpoint = self._upstream.config
        wait_s = self._spending.wait_s(endpoint)
        if wait_s:
            self._count(path, 429)
            raise spent_error(wait_s)
        tally = Tally()
        body = _Body(request, tally)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw]
        sent = self._upstream.post(path.removeprefix(VERSION), query.decode(), headers, body.pieces())
        try:
            reply, stack = await within(self._begin(sent, endpoint, tally), None, drain)
        except UpstreamError as error:
            self._count(path, body.denied.status if body.denied else CLIENT_GONE if body.is_abandoned else error.status)
            if body.denied:
                raise body.denied from None
            raise
        return _RawResponse(reply, tally, stack, drain, lambda status: self._count(path, status))

    async def close(self) -> None:
        if self._upstream is not None:
            await self._upstream.close()

    async def _begin(
        self, sent: AbstractAsyncContextManager[RawReply], endpoint: UpstreamConfig, tally: Tally
    ) -> tuple[RawReply, contextlib.AsyncExitStack]:
        """The begun reply, and what closes it and charges for it."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                reply = await stack.enter_async_context(sent)
            except (UpstreamError, asyncio.CancelledError) as error:
                if was_at_work(error):
                    self._charge(endpoint, tally)
                raise
            if reply.status < 400:
                tally.begin_reply(reply.headers)
                stack.callback(self._charge, endpoint, tally)
            return reply, stack.pop_all()
        raise AssertionError("the block returns or raises")

    def _path_of(self, request: Request) -> str:
        """The path, where it is written as it stands in the list: without an encoded letter, too."""
        whole, raw = request.scope["path"], request.scope.get("raw_path")
        path = whole.removeprefix(request.scope.get("root_path", ""))
        if path not in self.paths or (raw is not None and raw.split(b"?")[0] != whole.encode()):
            raise HTTPException(404)
        return path

    def _charge(self, endpoint: UpstreamConfig, tally: Tally) -> None:
        used = tally.used()
        self._spending.charge(endpoint, used.usage, is_estimated=used.is_estimated)

    def _count(self, path: str, status: int) -> None:
        self._meter.count("understudy_passthrough_total", path=path, status=str(status))


class _Body:
    """A request's body as it comes, at most MAX_BODY_BYTES."""

    def __init__(self, request: Request, tally: Tally) -> None:
        self._request, self._tally = request, tally
        self.denied: Denied | None = None
        """Why it was given up."""
        self.is_abandoned = False

    async def pieces(self) -> AsyncIterator[bytes]:
        size = 0
        try:
            async for piece in pieces_of(self._request):
                size += len(piece)
                if size > MAX_BODY_BYTES:
                    self.denied = too_large(MAX_BODY_BYTES)
                    # Any error makes the client of the endpoint hang up.
                    raise ConnectionError("too large")
                if piece:
                    self._tally.add_sent(piece)
                    yield piece
        except ClientDisconnect:
            self.is_abandoned = True
            raise ConnectionError("the client left") from None
        except TimeoutError:
            self.denied = stalled()
            raise ConnectionError("the body stalls") from None


class _RawResponse(StreamingResponse):
    """A begun reply on its way; counted once it is over."""

    def __init__(
        self,
        reply: RawReply,
        tally: Tally,
        stack: contextlib.AsyncExitStack,
        drain: Drain,
        count: Callable[[int], None],
    ) -> None:
        super().__init__(self._until_cut(reply, tally, drain), reply.status)
        self.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers]
        self._stack, self._count = stack, count
        self._end = CLIENT_GONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._stack:
                await super().__call__(scope, receive, send)
        finally:
            self._count(self._end)

    async def _until_cut(self, reply: RawReply, tally: Tally, drain: Drain) -> AsyncIterator[bytes]:
        """Raises OSError where the reply ends before its time and cannot say so, so that the server cuts the connection."""
        try:
            async for piece in until(reply.pieces, None, drain):
                tally.add_got(piece)
                yield piece
        except UpstreamError as error:
            self._end = error.status
            if error_code(error.body) != SHUTTING_DOWN:
                raise ConnectionError("the endpoint broke off its reply") from None
            if not _takes_events(reply):
                raise ConnectionError("the gateway stops") from None
            yield _last_event(error)
        else:
            self._end = reply.status


def _takes_events(reply: RawReply) -> bool:
    """Whether an event can be added to a reply: one of events, not packed, whose length was not told."""
    known = dict(reply.headers)
    is_stream = known.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"
    return is_stream and not {"content-encoding", "content-length"} & known.keys()


def _last_event(error: UpstreamError) -> bytes:
    """The error as clients of completions read it and, named and typed, as those of responses do."""
    assert error.body is not None
    told = {name: error.body["error"][name] for name in ("code", "message", "param")}
    # The blank line ends an event that was cut in its middle.
    return b"\n\nevent: error\n" + sse_event({"type": "error", **told, **error.body})
