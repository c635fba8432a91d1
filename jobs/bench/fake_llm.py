"""An LLM endpoint that costs next to nothing: HTTP/1.1 by hand, answers made beforehand, and every fault on request.

    python -m jobs.bench.fake_llm [GAP_MS]      # prints its address; ends with SIGTERM

Answers `POST .../chat/completions` with one text, or as 17 chunks that are GAP_MS apart, each sent by itself as tokens of
a real LLM are; with token counts where `include_usage` asks for them. The text repeats the request's `#NUMBER#`, so that a client sees whether the answer is its own. A request
whose `user` is `fate:NAME` is treated as FATES says. Knows only as much of HTTP as the clients of the benchmarks send.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from typing import Any

NUM_CHUNKS = 17
FATES = {
    "hang": "the request is never answered",
    "hang_mid": "a stream says nothing more after its third chunk",
    "cut": "the connection is reset in the middle of the answer",
    "cut_first": "the connection is reset before the first byte of the answer's body",
    "empty": "a stream that ends in order without a chunk",
    "malformed": "one event of a stream, or the whole answer, is no JSON",
    "unfinished": "a stream that ends in order without its last chunk and [DONE]",
    "error_event": "a stream that reports an error in an event and ends",
    "s429": "429 with Retry-After: 0",
    "s500": "500",
}
_MARK = re.compile(rb"#\d{1,9}#")
_FATE = re.compile(rb'"user":\s*"fate:([a-z0-9_]+)"')
_STREAM = re.compile(rb'"stream":\s*true')
_COUNTED = re.compile(rb'"include_usage":\s*true')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_JSON_HEAD = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nretry-after: 0\r\ncontent-length: %d\r\n\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_ENVELOPE = {"id": "chatcmpl-1", "created": 1, "model": "scripted"}
_ERROR = json.dumps({"error": {"message": "no", "type": "server_error", "param": None, "code": "busy"}}).encode()
_END = b"0\r\n\r\n"
_USAGE = {"prompt_tokens": 100, "completion_tokens": 15, "total_tokens": 115}


def answer_text(mark: str) -> str:
    """What is answered to a request that holds `mark`, in one piece or in chunks."""
    return mark + "".join(f" word{number}" for number in range(NUM_CHUNKS - 3))


def _unary(mark: bytes) -> bytes:
    message = {"role": "assistant", "content": answer_text(mark.decode())}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({**_ENVELOPE, "object": "chat.completion", "choices": [choice], "usage": _USAGE}).encode()


def _event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: " + json.dumps({**_ENVELOPE, "object": "chat.completion.chunk", "choices": [choice]}).encode()


def _framed(event: bytes) -> bytes:
    return b"%x\r\n%s\n\n\r\n" % (len(event) + 2, event)


_PLACE = b"#0#"
_UNARY = _unary(_PLACE)
_WORDS = [_event({"content": piece}) for piece in re.findall(r" ?\S+", answer_text(_PLACE.decode()))]
_OPENING, _FINISH = _event({"role": "assistant", "content": ""}), _event({}, "stop")
_DONE = _framed(b"data: [DONE]") + _END
_COUNTS = (
    b"data: " + json.dumps({**_ENVELOPE, "object": "chat.completion.chunk", "choices": [], "usage": _USAGE}).encode()
)


class _Connection(asyncio.Protocol):
    """One client, one request at a time."""

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._data = b""
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._data, 0, end)
        size = end + 4 + (int(length[1]) if length else 0)
        if len(self._data) >= size:
            head, body, self._data = self._data[:end], self._data[end + 4 : size], self._data[size:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET"):
            return self._send_json(200, b'{"object": "list", "data": [{"id": "scripted", "object": "model"}]}')
        mark, fate = _MARK.search(body), _FATE.search(body)
        name = fate[1].decode() if fate else ""
        assert not name or name in FATES, f"no such fate: {name}"
        if name == "hang":
            return
        if name in ("s429", "s500"):
            return self._send_json(int(name[1:]), _ERROR)
        number = mark[0] if mark else _PLACE
        if _STREAM.search(body):
            last = [_FINISH, _COUNTS] if _COUNTED.search(body) else [_FINISH]
            self._stream(number, name, b"".join(map(_framed, last)) + _DONE)
        else:
            self._send_whole(_UNARY.replace(_PLACE, number, 1), name)

    def _send_json(self, status: int, body: bytes) -> None:
        self._transport.write(_JSON_HEAD % (status, b"OK" if status == 200 else b"Error", len(body)) + body)

    def _send_whole(self, body: bytes, fate: str) -> None:
        if fate == "malformed":
            body = body[: len(body) // 2]
        if fate not in ("cut", "cut_first"):
            return self._send_json(200, body)
        head = _JSON_HEAD % (200, b"OK", len(body))
        self._transport.write(head + (body[:100] if fate == "cut" else b""))
        # A turn later, so that what was written leaves before the reset.
        self._timer = asyncio.get_running_loop().call_later(0.02, self._transport.abort)

    def _stream(self, mark: bytes, fate: str, last: bytes) -> None:
        pieces: list[bytes | None] = [_STREAM_HEAD + _framed(_OPENING), _framed(_WORDS[0].replace(_PLACE, mark))]
        pieces += map(_framed, _WORDS[1:])
        if fate == "hang_mid":
            pieces = pieces[:3]
        elif fate == "cut":
            pieces = [*pieces[:5], None]
        elif fate == "cut_first":
            pieces = [_STREAM_HEAD, None]
        elif fate == "empty":
            pieces = [_STREAM_HEAD + _END]
        elif fate == "malformed":
            pieces = [*pieces[:5], _framed(b"data: {oh"), *pieces[5:], last]
        elif fate == "unfinished":
            pieces = [*pieces[:5], _END]
        elif fate == "error_event":
            pieces = [*pieces[:5], _framed(b"data: " + _ERROR), _DONE]
        else:
            pieces.append(last)
        self._send_next(pieces, 0)

    def _send_next(self, pieces: list[bytes | None], number: int) -> None:
        if self._transport.is_closing():
            return
        piece = pieces[number]
        if piece is None:
            return self._transport.abort()
        self._transport.write(piece)
        if number + 1 < len(pieces):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._gap_s, self._send_next, pieces, number + 1)


async def listen(gap_s: float, port: int = 0) -> asyncio.Server:
    """Answer on loopback, on a free port where none is named.

    Raises:
        OSError: somebody else listens there.
    """
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: _Connection(gap_s), "127.0.0.1", port, backlog=1_024)


async def _serve(gap_s: float) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server = await listen(gap_s)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await stopped.wait()
    server.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(float(sys.argv[1]) / 1e3 if len(sys.argv) > 1 else 0.001))
