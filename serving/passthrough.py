"""Paths of the recipe's allow list -> the first endpoint of `upstream`, byte for byte in both directions.

Exact paths alone: what is asked of the endpoint is put together from the list, never from the request, so that no
spelling of a path reaches anything else under the owner's key. These requests are no chat completions: they are
counted and paid at the endpoint's prices (serving/tally.py), not captured and not routed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.errors import UpstreamError
from cluster.raw_upstream import RawReply, RawUpstream
from cluster.telemetry import Meter
from cluster.upstream import UpstreamConfig
from serving.billing import Spending, spent_error, was_at_work
from serving.openai_wire import Denied
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

    async def relay(self, request: Request) -> StreamingResponse:
        """Answer one POST to one of `paths`.

        Raises:
            HTTPException: 404, the path is spelt otherwise.
            Denied: 501, there is no endpoint; 413, the body is too large.
            UpstreamError: the endpoint gave no reply; 429, it has cost what it may cost today.
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
        async with contextlib.AsyncExitStack() as stack:
            try:
                headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw]
                sent = self._upstream.post(path.removeprefix(VERSION), query.decode(), headers, body.pieces())
                reply = await stack.enter_async_context(sent)
            except (UpstreamError, asyncio.CancelledError) as error:
                if was_at_work(error):
                    self._charge(endpoint, tally)
                if not isinstance(error, UpstreamError):
                    raise
                status = 413 if body.is_too_large else 499 if body.is_abandoned else error.status
                self._count(path, status)
                if body.is_too_large:
                    raise too_large() from None
                raise
            self._count(path, reply.status)
            if reply.status < 400:
                tally.begin_reply(reply.headers)
                stack.callback(self._charge, endpoint, tally)
            return _RawResponse(reply, tally, stack.pop_all())
        raise AssertionError("the block returns or raises")

    async def close(self) -> None:
        if self._upstream is not None:
            await self._upstream.close()

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


def too_large() -> Denied:
    return Denied(413, f"body: more than {MAX_BODY_BYTES} bytes", code="too_large")


class _Body:
    """A request's body as it comes, at most MAX_BODY_BYTES."""

    def __init__(self, request: Request, tally: Tally) -> None:
        self._request, self._tally = request, tally
        self.is_too_large = self.is_abandoned = False

    async def pieces(self) -> AsyncIterator[bytes]:
        size = 0
        try:
            async for piece in self._request.stream():
                size += len(piece)
                if size > MAX_BODY_BYTES:
                    self.is_too_large = True
                    # Any error makes the client of the endpoint hang up; the flag says which it was.
                    raise ConnectionError("too large")
                if piece:
                    self._tally.add_sent(piece)
                    yield piece
        except ClientDisconnect:
            self.is_abandoned = True
            raise ConnectionError("the client left") from None


class _RawResponse(StreamingResponse):
    def __init__(self, reply: RawReply, tally: Tally, stack: contextlib.AsyncExitStack) -> None:
        super().__init__(_until_cut(reply.pieces, tally), reply.status)
        self.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers]
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _until_cut(pieces: AsyncIterator[bytes], tally: Tally) -> AsyncIterator[bytes]:
    """Raises OSError where the endpoint broke off, so that the server cuts the client's connection as well."""
    try:
        async for piece in pieces:
            tally.add_got(piece)
            yield piece
    except UpstreamError:
        raise ConnectionError("the endpoint broke off its reply") from None
