"""One OpenAI-compatible endpoint over HTTP: chat.completions body -> the LLM's reply, whole or as SSE bytes.

Retries what may be retried (cluster/retries.py, failed connections, broken answers) and only before anything of an
answer was given out: a whole answer is given out whole, a stream from its first content on (cluster/opening.py). A
timeout is not retried, for the LLM may still be working, and paid, on the first request. A breaker spares a dead endpoint
and the callers' time; a limit of calls in flight spares a slow one. Knows nothing of specialists or of what its replies
are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, NamedTuple

import aiohttp
from pydantic import AfterValidator, Field, model_validator

from cluster.breaker import Breaker, Pauses
from cluster.config import Config
from cluster.endpoint_key import authorization, check_address
from cluster.errors import UpstreamError
from cluster.json_text import write_json
from cluster.opening import Opening, error_status, reported_error
from cluster.retries import LONGEST_PAUSE_S, LONGEST_RETRY_AFTER_S, backoff_s, is_retryable, parse_retry_after
from cluster.slots import Slots
from cluster.sse import parse_object
from cluster.stream_usage import StreamUsage, model_of
from cluster.tracing import outgoing
from cluster.upstream_errors import EndpointErrors, FailedAttempt, is_out_of_quota, is_owners

MAX_REPLY_BYTES = 64 * 2**20
_HANGS_AFTER = 0.5
"""Share of first_token_timeout_s after which a stream without content, when its caller leaves it, counts as one that hangs."""
EVENT_STREAM = "text/event-stream"
JSON = "application/json"


class LLMNodeConfig(Config):
    """How patient to be with one LLM, and what it costs; the same for an endpoint and for a model on the cluster."""

    timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait of one attempt for a whole unary answer, or between two pieces of a stream, in seconds."""
    first_token_timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait of one attempt for the first content of a stream, in seconds; role chunks and keep-alives are none. Raise
    it for models that think silently before they answer."""
    total_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time of one call at this LLM, with all attempts, waits and the whole stream, in seconds."""
    breaker_failures: int = Field(default=5, ge=1)
    """Failed calls in a row after which the LLM is left alone."""
    breaker_reset_s: float = Field(default=10.0, gt=0)
    """How long it is left alone before one call probes it."""
    prompt_usd_per_million: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens in US dollars."""
    completion_usd_per_million: float = Field(default=0.0, ge=0)
    """Price of a million completion tokens in US dollars."""
    max_usd_per_day: float | None = Field(default=None, gt=0)
    """What its tokens may cost in a day (UTC); then it is left alone until midnight. Counted by each gateway replica for
    itself, as calls report it or else by an estimate, when they end: those in flight, and all after a restart, come on
    top."""

    @model_validator(mode="after")
    def _check_price(self) -> LLMNodeConfig:
        if self.max_usd_per_day is not None and not (self.prompt_usd_per_million or self.completion_usd_per_million):
            raise ValueError(
                f"max_usd_per_day={self.max_usd_per_day:g}: nothing is spent at prices of 0; allowed: with a price; "
                "next: prompt_usd_per_million=USD and completion_usd_per_million=USD"
            )
        return self

    @property
    def own_model(self) -> str | None:
        """The model that is asked whatever a request names; None where it is the request's."""
        return None


class UpstreamConfig(LLMNodeConfig):
    """Where one endpoint is."""

    base_url: Annotated[str, AfterValidator(check_address)] = Field(pattern=r"^https?://[^\s/]+")
    """Address up to and including the version, e.g. https://api.openai.com/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; it may be unset only for a loopback address."""
    model: str | None = None
    """Model to ask for instead of the one the client names; None asks for the client's."""
    max_attempts: int = Field(default=3, ge=1, le=10)
    """How often one call is sent at most."""
    max_concurrent: int = Field(default=1_000, ge=1)
    """Calls in flight at most, from each gateway replica; the default is what a gateway itself takes. As many others wait
    for a place."""
    max_wait_s: float = Field(default=2.0, ge=0)
    """Longest wait for a place, in seconds; then the next LLM is asked, or the client gets 429."""

    @property
    def own_model(self) -> str | None:
        return self.model


class UpstreamReply(NamedTuple):
    """A whole answer: 200, or an error that is the client's own (400, 404, 422 and the like)."""

    status: int
    body: dict[str, Any]
    raw: bytes
    """`body` as it came."""


class UpstreamStream(NamedTuple):
    """A started answer. Iterating `chunks` raises UpstreamError where the LLM breaks off."""

    status: int
    content_type: str
    chunks: AsyncIterator[bytes]
    hides_usage: bool = False
    """Whether its token counts were asked for here, and the event that brings them is not for the client."""


class _Begun(NamedTuple):
    """An answer worth having: whole, or a stream up to its first content."""

    status: int
    content_type: str
    first: bytes
    body: dict[str, Any] | None
    """`first` as an object, where it is whole."""
    response: aiohttp.ClientResponse | None
    """Where the rest of a stream comes from."""
    hides_usage: bool = False


class _Ends(NamedTuple):
    """Of one call, on the event loop's clock."""

    total: float
    """When it has used up total_timeout_s."""
    caller: float
    """When nobody waits for it any more."""


class Upstream:
    """Client of one endpoint. Belongs to one event loop; close it there."""

    def __init__(
        self,
        config: UpstreamConfig,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the API key; connect to nothing yet.

        Raises:
            ConfigError: the key's variable is unset and the address is not a loopback one.
        """
        self.config = config
        self._breaker = Breaker(config.breaker_failures, config.breaker_reset_s, clock)
        self._pauses = Pauses(clock)
        self._slots = Slots(config.max_concurrent, config.max_concurrent, config.max_wait_s)
        self._errors = EndpointErrors(config.base_url, config.api_key_env)
        self._usage = StreamUsage(clock)
        self._sleep = sleep
        self._headers = {"Content-Type": JSON, **authorization(config)}
        self._session: aiohttp.ClientSession | None = None

    async def chat(self, body: dict[str, Any], *, until: float = math.inf) -> UpstreamReply:
        """Ask for a whole answer.

        Args:
            until: when its caller leaves, on the event loop's clock; no attempt is waited for beyond it.

        Raises:
            UpstreamError: no usable answer after all attempts; `status` and `body` are fit for the client.
        """
        async with self._opened(body, until, is_stream=False) as (begun, _):
            assert begun.body is not None
            return UpstreamReply(begun.status, begun.body, begun.first)

    @contextlib.asynccontextmanager
    async def stream(self, body: dict[str, Any], *, until: float = math.inf) -> AsyncIterator[UpstreamStream]:
        """Start a streamed answer; its first content is here when the block is entered.

        Args:
            until: as `chat` takes it.

        Raises:
            UpstreamError: the LLM gave no content after all attempts.
        """
        async with self._opened(body, until, is_stream=True) as (begun, deadline):
            yield UpstreamStream(begun.status, begun.content_type, self._chunks(begun, deadline), begun.hides_usage)

    async def list_models(self) -> list[dict[str, Any]]:
        """Entries of the endpoint's own model list.

        Raises:
            UpstreamError: the endpoint did not give one.
        """
        address = f"{self.config.base_url.rstrip('/')}/models"
        timeout = aiohttp.ClientTimeout(total=self.config.timeout_s)
        try:
            asked = self._client().get(address, headers=self._headers, timeout=timeout, allow_redirects=False)
            async with asked as response:
                if response.status != 200:
                    raise self._errors.without_list(response.status)
                body = self._parse(response.status, await self._read(response))
        except FailedAttempt as failed:
            raise failed.error from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._errors.unreachable(error) from None
        entries = body.get("data")
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @contextlib.asynccontextmanager
    async def _opened(
        self, body: dict[str, Any], until: float, *, is_stream: bool
    ) -> AsyncIterator[tuple[_Begun, float]]:
        """The first attempt's answer worth having, and when the call has to end; holds one of the endpoint's places."""
        ends = _Ends(asyncio.get_running_loop().time() + self.config.total_timeout_s, until)
        if not await self._slots.take():
            raise self._errors.busy()
        try:
            begun = await self._begun(body, is_stream, ends)
            try:
                yield begun, ends.total
            finally:
                if begun.response is not None:
                    begun.response.close()
        finally:
            self._slots.give()

    async def _begun(self, body: dict[str, Any], is_stream: bool, ends: _Ends) -> _Begun:
        """What the attempts gave, after a word to the breaker."""
        asked = {**body, "model": self.config.model} if self.config.model else body
        if wait_s := self._pauses.wait_s(model_of(asked)):
            raise self._errors.left_alone(wait_s, has_asked=True)
        permit = self._breaker.begin()
        if permit is None:
            raise self._errors.left_alone(self._breaker.wait_s, has_asked=False)
        clock = asyncio.get_running_loop().time
        hangs_at = clock() + self.config.first_token_timeout_s * _HANGS_AFTER
        try:
            begun = await self._counted(asked, is_stream, ends)
            permit.succeed()
            return begun
        except asyncio.CancelledError:
            # An LLM that hangs would never be left alone where every caller is less patient than its timeout.
            if is_stream and clock() >= hangs_at:
                permit.fail()
            raise
        except UpstreamError as error:
            if error.status != 429:
                permit.fail()
            raise
        finally:
            permit.leave()

    async def _counted(self, body: dict[str, Any], is_stream: bool, ends: _Ends) -> _Begun:
        """What the attempts gave, with a stream's token counts where the endpoint gives them."""

        async def send(asked: dict[str, Any]) -> _Begun:
            try:
                return await self._attempts(write_json(asked), is_stream, ends)
            except UpstreamError as error:
                if error.retry_after_s:
                    self._pauses.add(model_of(asked), min(error.retry_after_s, LONGEST_PAUSE_S))
                raise

        begun, hides_usage = await self._usage.ask(body, send)
        return begun._replace(hides_usage=hides_usage)

    async def _attempts(self, data: bytes, is_stream: bool, ends: _Ends) -> _Begun:
        clock = asyncio.get_running_loop().time
        for attempt in range(1, self.config.max_attempts + 1):
            try:
                return await self._attempt(data, is_stream, ends.total)
            except FailedAttempt as failed:
                asked_s = failed.error.retry_after_s or 0.0
                wait_s = max(backoff_s(attempt), asked_s)
                is_last = attempt == self.config.max_attempts or clock() + wait_s >= min(ends)
                if is_last or not failed.may_retry or asked_s > LONGEST_RETRY_AFTER_S:
                    raise failed.error from None
            await self._sleep(wait_s)
        raise AssertionError("max_attempts is at least 1")

    async def _attempt(self, data: bytes, is_stream: bool, deadline: float) -> _Begun:
        """Raises FailedAttempt; the response is closed then."""
        clock = asyncio.get_running_loop().time
        limit_s = self.config.first_token_timeout_s if is_stream else self.config.timeout_s
        # The total goes on to count while a stream is read, and whatever keeps its pieces coming.
        timeout = aiohttp.ClientTimeout(
            total=deadline - clock(), sock_connect=limit_s, sock_read=self.config.timeout_s if is_stream else None
        )
        try:
            async with asyncio.timeout_at(min(clock() + limit_s, deadline)):
                response = await self._client().post(
                    f"{self.config.base_url.rstrip('/')}/chat/completions",
                    data=data,
                    headers={**self._headers, **outgoing()},
                    timeout=timeout,
                    allow_redirects=False,
                )
                with contextlib.ExitStack() as undo:
                    undo.callback(response.close)
                    begun = await self._begin(response, is_stream)
                    undo.pop_all()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise FailedAttempt(
                self._errors.unreachable(error), may_retry=not isinstance(error, TimeoutError)
            ) from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise FailedAttempt(self._errors.unreachable(error), may_retry=False) from None
        if begun.response is None:
            response.release()
        return begun

    async def _begin(self, response: aiohttp.ClientResponse, is_stream: bool) -> _Begun:
        """The answer of one response, as far as it is needed to call it one."""
        status = response.status
        if is_owners(status):
            raise FailedAttempt(self._errors.misconfigured(status), may_retry=False)
        if is_retryable(status):
            asked_s = parse_retry_after(response.headers.get("Retry-After"))
            body = parse_object(await self._read(response))
            raise FailedAttempt(self._errors.passed_on(status, body, asked_s), may_retry=not is_out_of_quota(body))
        if is_stream and status == 200 and response.content_type == EVENT_STREAM:
            return await self._open_stream(response)
        raw = await self._read(response)
        body = self._parse(status, raw)
        reported = reported_error(body) if status == 200 else None
        return self._reported(reported) if reported else _Begun(status, JSON, raw, body, None)

    async def _open_stream(self, response: aiohttp.ClientResponse) -> _Begun:
        opening = Opening()
        async for piece in response.content.iter_any():
            opening.feed(piece)
            if opening.is_over:
                break
        else:
            opening.end()
        if opening.error is not None:
            response.close()
            return self._reported(opening.error)
        if opening.fault is not None:
            raise FailedAttempt(self._errors.error(502, f"broke off: its stream {opening.fault}"), may_retry=True)
        return _Begun(200, EVENT_STREAM, opening.held, None, response)

    def _reported(self, reported: dict[str, Any]) -> _Begun:
        """An error that came under status 200: the client's own is an answer, as it is under its own status."""
        status = error_status(reported)
        if is_owners(status):
            raise FailedAttempt(self._errors.misconfigured(status), may_retry=False)
        if is_retryable(status):
            raise FailedAttempt(self._errors.passed_on(status, reported, None), may_retry=not is_out_of_quota(reported))
        return _Begun(status, JSON, write_json(reported), reported, None)

    async def _chunks(self, begun: _Begun, deadline: float) -> AsyncIterator[bytes]:
        yield begun.first
        if begun.response is None:
            return
        try:
            async for chunk in begun.response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            is_late = asyncio.get_running_loop().time() >= deadline
            what = "took longer than upstream.total_timeout_s" if is_late else f"broke off ({type(error).__name__})"
            raise self._errors.error(504 if is_late else 502, f"{what}; send the request again") from None

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        async for chunk in response.content.iter_any():
            pieces.append(chunk)
            size += len(chunk)
            if size > MAX_REPLY_BYTES:
                reason = f"sent more than {MAX_REPLY_BYTES} bytes; ask for a shorter answer"
                raise FailedAttempt(self._errors.error(502, reason), may_retry=False)
        return b"".join(pieces)

    def _parse(self, status: int, raw: bytes) -> dict[str, Any]:
        body = parse_object(raw)
        if body is None:
            reason = f"answered {status} with something that is no JSON object; is this the API's address?"
            raise FailedAttempt(self._errors.error(502, reason), may_retry=False)
        return body

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # limit=0: how many calls run at once is counted here, not by the connection pool.
            # No cookies: an endpoint must not know one client's call by another's.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session
