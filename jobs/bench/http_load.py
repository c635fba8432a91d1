"""HTTP load on loopback that costs the machine little: raw HTTP/1.1 over kept connections, every answer looked at.

Turns a list of request bodies, an address and a number of clients into latencies and what went wrong. Knows of chat
completions only what `checked` is told; knows nothing of who serves.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PATH = "/v1/chat/completions"
_TIMEOUT_S = 60.0


class Reply(NamedTuple):
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes
    first_byte_ms: float
    whole_ms: float


@dataclass
class Turn:
    """What one turn of load saw."""

    seconds: float = 0.0
    whole_ms: list[float] = field(default_factory=list)
    first_byte_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class _Exchange(asyncio.Protocol):
    """One connection: a request out, its answer in."""

    def __init__(self) -> None:
        self.is_lost = False
        self._transport: Any = None
        self._done: asyncio.Future[None] | None = None
        self._data = bytearray()
        self._size = -1
        self._is_chunked = False
        self._first = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"the server closed the connection ({error})"))

    def data_received(self, data: bytes) -> None:
        if not self._data:
            self._first = time.perf_counter()
        self._data += data
        if self._size < 0:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return
            headers = _headers(bytes(self._data[:end]))
            self._is_chunked = "chunked" in headers.get("transfer-encoding", "")
            self._size = end + 4 + int(headers.get("content-length", 0))
        if self._is_chunked:
            is_whole = self._data.endswith(b"\r\n0\r\n\r\n")
        else:
            is_whole = len(self._data) >= self._size
        if is_whole and self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def ask(self, request: bytes) -> Reply:
        """Send one request.

        Raises:
            ConnectionError: the connection ended before the answer.
            TimeoutError: there was none in a minute.
        """
        if self.is_lost:
            raise ConnectionError("the server closed the connection before")
        self._data.clear()
        self._size, self._done = -1, asyncio.get_running_loop().create_future()
        begin = time.perf_counter()
        self._transport.write(request)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._done
        finally:
            self._done = None
        whole_ms = (time.perf_counter() - begin) * 1e3
        head, _, body = bytes(self._data).partition(b"\r\n\r\n")
        content = unchunked(body) if self._is_chunked else body
        status = int(head.split(b" ", 2)[1])
        return Reply(status, _headers(head), content, (self._first - begin) * 1e3, whole_ms)

    @property
    def has_begun(self) -> bool:
        """Whether some of the answer is here."""
        return bool(self._data)

    def close(self) -> None:
        self._transport.abort()


def unchunked(body: bytes) -> bytes:
    """The content of a body in chunked coding (RFC 9112 section 7.1)."""
    pieces, at = [], 0
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end].split(b";")[0], 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(body[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


def http_request(url: str, body: bytes, key: str, headers: Sequence[tuple[str, str]] = ()) -> bytes:
    """A POST of chat completions to the server at `url`, under an API key."""
    lines = [f"POST {PATH} HTTP/1.1", f"host: {urlsplit(url).netloc}", "content-type: application/json"]
    lines += [f"authorization: Bearer {key}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def connect(url: str) -> _Exchange:
    """Open one connection to the server at `url`."""
    parts = urlsplit(url)
    _, exchange = await asyncio.get_running_loop().create_connection(_Exchange, parts.hostname, parts.port)
    return exchange


async def load(
    url: str,
    requests: Sequence[bytes],
    checked: Callable[[int, Reply], str | None],
    *,
    concurrency: int,
    max_requests: int,
    max_seconds: float,
) -> Turn:
    """Clients that ask without a pause, until the requests or the time are used up.

    Args:
        requests: whole HTTP requests, sent in turn.
        checked: what is wrong with the answer to the request of that number, or None.
    """
    turn, numbers = Turn(), itertools.count()
    end = time.perf_counter() + max_seconds

    async def client() -> None:
        exchange = await connect(url)
        while (number := next(numbers)) < max_requests and time.perf_counter() < end:
            try:
                if exchange.is_lost:
                    exchange = await connect(url)
                reply = await exchange.ask(requests[number % len(requests)])
            except (OSError, TimeoutError) as error:
                turn.errors.append(f"{type(error).__name__}: {error}")
                exchange.close()
                await asyncio.sleep(0.05)
                continue
            wrong = checked(number % len(requests), reply)
            if wrong:
                turn.errors.append(wrong)
            turn.whole_ms.append(reply.whole_ms)
            turn.first_byte_ms.append(reply.first_byte_ms)
        exchange.close()

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    turn.seconds = time.perf_counter() - begin
    return turn


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank); nan of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread_ms(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    return {"p50_ms": round(percentile(values, 0.5), 3), "p99_ms": round(percentile(values, 0.99), 3)}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of y over x; 0 where all x are equal."""
    if len(points) < 2 or len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _headers(head: bytes) -> dict[str, str]:
    found = {}
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        found[name.decode().lower()] = value.strip().decode("latin-1")
    return found
