"""One OpenAI-compatible endpoint over HTTP: chat.completions body -> the LLM's reply, whole or as SSE bytes.

Retries what may be retried (429, 500, 502, 503, 504 and failed connections) and only before the first byte of the
answer; a timeout is not retried, for the LLM may still be working, and paid, on the first request. A circuit breaker
spares a dead endpoint and the callers' time. Knows nothing of specialists or of what its replies are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from pydantic import AfterValidator, Field

from cluster.config import Config, has_credentials
from cluster.errors import ConfigError, UpstreamError
from cluster.json_text import read_json, write_json

RETRYABLE = frozenset({429, 500, 502, 503, 504})
MAX_REPLY_BYTES = 64 * 2**20
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.25, 8.0
_LONGEST_RETRY_AFTER_S = 30.0


def _check_address(url: str) -> str:
    if has_credentials(url):
        raise ValueError(
            "the address carries credentials, which would be shown and written beside every release; allowed: "
            "https://HOST/VERSION; next: take them out, and put the LLM's key into the environment variable that "
            "api_key_env names (OPENAI_API_KEY)"
        )
    return url


class LLMNodeConfig(Config):
    """How patient to be with one LLM, and what it costs; the same for an endpoint and for a model on the cluster."""

    timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for a whole unary answer, or between two pieces of a stream."""
    first_byte_timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for the first piece of a stream."""
    breaker_failures: int = Field(default=5, ge=1)
    """Failed calls in a row after which the LLM is left alone."""
    breaker_reset_s: float = Field(default=10.0, gt=0)
    """How long it is left alone before one call probes it."""
    prompt_usd_per_million: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens in US dollars."""
    completion_usd_per_million: float = Field(default=0.0, ge=0)
    """Price of a million completion tokens in US dollars."""

    @property
    def own_model(self) -> str | None:
        """The model that is asked whatever a request names; None where it is the request's."""
        return None


class UpstreamConfig(LLMNodeConfig):
    """Where one endpoint is."""

    base_url: Annotated[str, AfterValidator(_check_address)] = Field(pattern=r"^https?://[^\s/]+")
    """Address up to and including the version, e.g. https://api.openai.com/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; it may be unset only for a loopback address."""
    model: str | None = None
    """Model to ask for instead of the one the client names; None asks for the client's."""
    max_attempts: int = Field(default=3, ge=1, le=10)
    """How often one call is sent at most."""

    @property
    def own_model(self) -> str | None:
        return self.model


class UpstreamReply(NamedTuple):
    """A whole answer: 200, or an error that is the client's own (400, 404, 422 and the like)."""

    status: int
    body: dict[str, Any]
    raw: bytes
    """`body` as it came."""
    latency_ms: float


class UpstreamStream(NamedTuple):
    """A started answer. Iterating `chunks` raises UpstreamError where the LLM breaks off."""

    status: int
    content_type: str
    chunks: AsyncIterator[bytes]


class Breaker:
    """Closed until `failures` calls in a row failed; open for `reset_s`; then one call at a time probes."""

    def __init__(self, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._reset_s, self._clock = failures, reset_s, clock
        self._num_failures = 0
        self._retry_at = 0.0

    def may_call(self) -> bool:
        """Whether a call may go out; while open, a yes books the probe, so that the next caller gets a no."""
        if self._num_failures < self._limit:
            return True
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._clock() + self._reset_s
        return True

    def succeed(self) -> None:
        self._num_failures = 0

    def fail(self) -> None:
        self._num_failures += 1
        self._retry_at = self._clock() + self._reset_s


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
        self.breaker = Breaker(config.breaker_failures, config.breaker_reset_s, clock)
        self._sleep = sleep
        self._headers = {"Content-Type": "application/json", **authorization(config)}
        self._session: aiohttp.ClientSession | None = None

    async def chat(self, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> UpstreamReply:
        """Ask for a whole answer.

        Raises:
            UpstreamError: no usable answer after all attempts; `status` and `body` are fit for the client.
        """
        begin = time.perf_counter()
        async with self._opened(body, headers or {}, is_stream=False) as (response, _):
            raw = await self._read(response)
        reply = self._parse(response.status, raw)
        return UpstreamReply(response.status, reply, raw, (time.perf_counter() - begin) * 1e3)

    @contextlib.asynccontextmanager
    async def stream(
        self, body: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[UpstreamStream]:
        """Start a streamed answer; its first byte is here when the block is entered.

        Raises:
            UpstreamError: the LLM gave no first byte after all attempts.
        """
        async with self._opened(body, headers or {}, is_stream=True) as (response, first):
            yield UpstreamStream(response.status, response.content_type, self._chunks(response, first))

    async def list_models(self) -> list[dict[str, Any]]:
        """Entries of the endpoint's own model list.

        Raises:
            UpstreamError: the endpoint did not give one.
        """
        try:
            async with self._client().get(
                f"{self.config.base_url.rstrip('/')}/models", headers=self._headers
            ) as response:
                entries = self._parse(response.status, await self._read(response)).get("data")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise unreachable(self.config, error) from None
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @contextlib.asynccontextmanager
    async def _opened(
        self, body: dict[str, Any], headers: Mapping[str, str], *, is_stream: bool
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, bytes]]:
        """The response to the first attempt worth having, with the first bytes of a stream."""
        if not self.breaker.may_call():
            raise upstream_error(
                self.config,
                503,
                "has failed repeatedly and is being left alone; try again shortly",
                "upstream_unavailable",
            )
        model = {"model": self.config.model} if self.config.model else {}
        data = write_json({**body, **model})
        try:
            response, first = await self._attempts(data, headers, is_stream)
        except UpstreamError as error:
            if error.status != 429:
                self.breaker.fail()
            raise
        self.breaker.succeed()
        try:
            yield response, first
        finally:
            response.close() if is_stream else response.release()

    async def _attempts(
        self, data: bytes, headers: Mapping[str, str], is_stream: bool
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        for attempt in range(1, self.config.max_attempts + 1):
            is_last = attempt == self.config.max_attempts
            wait_s = _backoff_s(attempt)
            try:
                response, first = await self._send(data, headers, is_stream)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                if is_last or isinstance(error, TimeoutError):
                    raise unreachable(self.config, error) from None
            except (aiohttp.ClientError, TimeoutError) as error:
                raise unreachable(self.config, error) from None
            else:
                if response.status not in RETRYABLE:
                    return response, first
                asked_s = _retry_after_s(response.headers.get("Retry-After"))
                if is_last or asked_s > _LONGEST_RETRY_AFTER_S:
                    raise await self._refused(response)
                response.close()
                wait_s = max(wait_s, asked_s)
            await self._sleep(wait_s)
        raise AssertionError("max_attempts is at least 1")

    async def _send(
        self, data: bytes, headers: Mapping[str, str], is_stream: bool
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """One attempt: the response, for a good stream with its first bytes; closed where it fails."""
        limit = self.config.first_byte_timeout_s if is_stream else self.config.timeout_s
        timeout = aiohttp.ClientTimeout(
            total=None if is_stream else self.config.timeout_s, sock_connect=limit, sock_read=self.config.timeout_s
        )
        async with asyncio.timeout(limit):
            response = await self._client().post(
                f"{self.config.base_url.rstrip('/')}/chat/completions",
                data=data,
                headers={**headers, **self._headers},
                timeout=timeout,
                allow_redirects=False,
            )
            with contextlib.ExitStack() as undo:
                undo.callback(response.close)
                if response.status in (401, 403) or 300 <= response.status < 400:
                    raise misconfigured(self.config, response.status)
                first = await response.content.readany() if is_stream and response.status not in RETRYABLE else b""
                if is_stream and response.ok and not first:
                    raise aiohttp.ClientPayloadError("the stream ended before its first byte")
                undo.pop_all()
        return response, first

    async def _chunks(self, response: aiohttp.ClientResponse, first: bytes) -> AsyncIterator[bytes]:
        yield first
        try:
            async for chunk in response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            raise upstream_error(
                self.config, 502, f"broke off its answer ({type(error).__name__}); send the request again"
            ) from None

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        try:
            async for chunk in response.content.iter_any():
                pieces.append(chunk)
                size += len(chunk)
                if size > MAX_REPLY_BYTES:
                    response.close()
                    raise upstream_error(
                        self.config, 502, f"sent more than {MAX_REPLY_BYTES} bytes; ask for a shorter answer"
                    )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise unreachable(self.config, error) from None
        return b"".join(pieces)

    def _parse(self, status: int, raw: bytes) -> dict[str, Any]:
        try:
            body = read_json(raw, is_strict=False)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise upstream_error(
                self.config, 502, f"answered {status} with something that is no JSON object; is this the API's address?"
            )
        return body

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # limit=0: how many calls run at once is the gateway's business, not the connection pool's.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=True)
        return self._session

    async def _refused(self, response: aiohttp.ClientResponse) -> UpstreamError:
        """The LLM's own error, passed on as it is where it is an OpenAI-shaped one."""
        status = response.status
        try:
            body = self._parse(status, await self._read(response))
        except UpstreamError:
            body = None
        finally:
            response.close()
        error = upstream_error(
            self.config, status, f"answered {status} {self.config.max_attempts} time(s); try again later"
        )
        return error if body is None or "error" not in body else UpstreamError(error.message, status, body)


def misconfigured(config: UpstreamConfig, status: int) -> UpstreamError:
    """The error for a reply that is the owner's to mend: a refused key or a moved address."""
    step = f"put a valid key into {config.api_key_env}" if status in (401, 403) else "set its final address"
    return upstream_error(config, 502, f"answered {status} to the gateway's request; {step}", "upstream_misconfigured")


def unreachable(config: UpstreamConfig, error: BaseException) -> UpstreamError:
    """The error for an endpoint that gave no reply."""
    if isinstance(error, TimeoutError):
        reason = "did not answer in time; raise upstream.timeout_s or try again"
        return upstream_error(config, 504, reason, "upstream_timeout")
    reason = f"cannot be reached ({type(error).__name__}); check the address and that the LLM is up"
    return upstream_error(config, 503, reason, "upstream_unavailable")


def upstream_error(config: UpstreamConfig, status: int, reason: str, code: str = "upstream_error") -> UpstreamError:
    """An error that names the endpoint; `status` and body are fit for the client."""
    message = f"upstream.base_url={_shown(config.base_url)} {reason}"
    body = {"error": {"message": message, "type": "upstream_error", "param": None, "code": code}}
    return UpstreamError(message, status, body)


def authorization(config: UpstreamConfig) -> dict[str, str]:
    """The header that carries the endpoint's key; none for a loopback address without one.

    Raises:
        ConfigError: the key's variable is unset and the address is not a loopback one.
    """
    key = os.environ.get(config.api_key_env)
    if key:
        return {"Authorization": f"Bearer {key}"}
    if not is_loopback(config.base_url):
        raise ConfigError(
            f"upstream.api_key_env={config.api_key_env!r}: this variable is not set, and upstream.base_url="
            f"{_shown(config.base_url)} is not on this machine; set it: export {config.api_key_env}=..."
        )
    return {}


def is_loopback(url: str) -> bool:
    """Whether the address is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(url: str) -> str:
    """The address without its query, which may hold a key."""
    return urlsplit(url)._replace(query="").geturl()


def _backoff_s(attempt: int) -> float:
    """Exponential with jitter in [50%, 100%], so that callers who failed together do not come back together."""
    return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def _retry_after_s(value: str | None) -> float:
    """Seconds asked for by a Retry-After header (RFC 9110 section 10.2.3: seconds or a date); 0 where absent or wrong."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
