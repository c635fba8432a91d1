"""One endpoint's other paths: a request's bytes -> the endpoint's own bytes, nothing read or changed.

The key is the endpoint's; what belongs to one connection (RFC 9110 section 7.6.1), to the client's account or to this
gateway stays behind. Sent once, because a body that streams cannot be sent again. Has a breaker of its own: what an
endpoint does on these paths says nothing of its chat completions. Knows nothing of which paths are allowed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import NamedTuple

import aiohttp
import yarl

from cluster.breaker import Breaker, Permit
from cluster.endpoint_key import authorization
from cluster.tracing import outgoing
from cluster.upstream import UpstreamConfig
from cluster.upstream_errors import EndpointErrors, is_owners

Headers = list[tuple[str, str]]

_OF_ONE_CONNECTION = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade "
    "expect".split()
)
_OF_THE_CLIENT = frozenset(
    "authorization api-key x-api-key cookie host openai-organization openai-project forwarded x-forwarded-for "
    "x-forwarded-host x-forwarded-proto x-real-ip x-agent x-session-id x-step x-faces-person "
    "x-understudy-route x-deadline-s x-budget-usd".split()
)
_OF_THE_ACCOUNT = frozenset({"set-cookie", "openai-organization", "openai-project"})
_MADE_HERE = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")


class RawReply(NamedTuple):
    """A begun reply. Iterating `pieces` raises UpstreamError where the endpoint breaks off."""

    status: int
    headers: Headers
    pieces: AsyncIterator[bytes]


class RawUpstream:
    """Client of one endpoint. Belongs to one event loop; close it there."""

    def __init__(self, config: UpstreamConfig) -> None:
        """Read the API key; connect to nothing yet.

        Raises:
            ConfigError: the key's variable is unset and the address is not a loopback one.
        """
        self.config = config
        self._authorization = authorization(config)
        self._errors = EndpointErrors(config.base_url, config.api_key_env)
        self._breaker = Breaker(config.breaker_failures, config.breaker_reset_s)
        self._session: aiohttp.ClientSession | None = None

    @contextlib.asynccontextmanager
    async def post(
        self, path: str, query: str, headers: Iterable[tuple[str, str]], body: AsyncIterator[bytes]
    ) -> AsyncIterator[RawReply]:
        """Send one request; the reply's headers are here when the block is entered.

        Args:
            path: what follows base_url; put together by the caller, never taken from a request.
            query: as the client sent it, without the question mark.
            body: raises ConnectionError to give the request up, which says nothing of the endpoint.

        Raises:
            UpstreamError: no reply, or one that is the owner's to mend; `status` and `body` are fit for the client.
        """
        permit = self._breaker.begin()
        if permit is None:
            raise self._errors.left_alone(self._breaker.wait_s, has_asked=False)
        address = f"{self.config.base_url.rstrip('/')}{path}" + (f"?{query}" if query else "")
        try:
            response = await self._send(yarl.URL(address, encoded=True), _kept(headers, _OF_THE_CLIENT), body, permit)
        finally:
            # Where nothing was said yet, the client left first.
            permit.leave()
        try:
            if is_owners(response.status):
                raise self._errors.misconfigured(response.status)
            replied = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.raw_headers]
            yield RawReply(response.status, _kept(replied, _OF_THE_ACCOUNT), self._pieces(response))
        finally:
            response.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _send(
        self, address: yarl.URL, headers: Headers, body: AsyncIterator[bytes], permit: Permit
    ) -> aiohttp.ClientResponse:
        limit_s = self.config.timeout_s
        # How long a body may take is the client's affair; the endpoint's time counts from its end.
        timeout = aiohttp.ClientTimeout(total=None, connect=limit_s, sock_connect=limit_s, sock_read=limit_s)
        if self._session is None:
            # Bytes as they come, compressed or not, and no header that the client did not send.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
                skip_auto_headers=_MADE_HERE,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        has_body_failed = False

        async def sent() -> AsyncIterator[bytes]:
            nonlocal has_body_failed
            try:
                async for piece in body:
                    yield piece
            except ConnectionError:
                has_body_failed = True
                raise

        try:
            response = await self._session.post(
                address,
                data=sent(),
                headers=[*_replaced(headers, outgoing()), *self._authorization.items()],
                timeout=timeout,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            if not has_body_failed:
                permit.fail()
            raise self._errors.unreachable(error) from None
        permit.succeed()
        return response

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for piece in response.content.iter_any():
                yield piece
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"broke off its reply ({type(error).__name__}); send the request again"
            raise self._errors.error(502, reason) from None


def _replaced(headers: Headers, ours: Mapping[str, str]) -> Headers:
    """With ours instead of those of the same name."""
    return [*(one for one in headers if one[0] not in ours), *ours.items()] if ours else headers


def _kept(headers: Iterable[tuple[str, str]], left_out: frozenset[str]) -> Headers:
    """The headers that go on, without those that the Connection header names."""
    given = [(name.lower(), value) for name, value in headers]
    named = {one.strip().lower() for name, value in given if name == "connection" for one in value.split(",")}
    return [(name, value) for name, value in given if name not in _OF_ONE_CONNECTION | left_out | named]
