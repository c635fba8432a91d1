"""OpenAI's chat.completions on the wire: requests, SSE bytes -> chunks, a completion -> SSE bytes, and error bodies.

What an LLM sends is read leniently, because it goes to the client as it is and only the captured copy is made here;
what does not parse is counted. What a client sends is read strictly. Writing is exact. Source: OpenAI API reference,
chat completions and its chunk object; RFC 8259 (JSON); WHATWG HTML section 9.2 (server-sent events).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.json_text import read_json
from cluster.records import Usage

MAX_STREAM_BYTES = 64 * 2**20
MAX_NESTING = 256
"""Objects and lists within each other, in a request or an answer; further on, code that walks them would overflow."""
_LINE_END = re.compile(rb"\r\n|\n|\r")
_DONE = b"[DONE]"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_COUNT = 2**63 - 1
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Denied(Exception):
    """A request that is answered with an error before it is a call."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind=kind, code=code, param=param)
        self.headers = dict(headers or {})


class SseReader:
    """Bytes of a stream, cut anywhere -> the JSON objects of its events."""

    def __init__(self, max_bytes: int = MAX_STREAM_BYTES) -> None:
        self.is_done = False
        """Whether `[DONE]` has come."""
        self.num_bad = 0
        """Events that were no JSON object, and 1 for a stream longer than `max_bytes`, whose rest is ignored."""
        self._rest = b""
        self._data: list[bytes] = []
        self._num_left = max_bytes

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """Objects completed by this piece."""
        if self._num_left < 0:
            return []
        self._num_left -= len(piece)
        if self._num_left < 0:
            self.num_bad += 1
            return []
        if not (self._rest or self._data) and (events := _whole_events(piece)):
            return [one for event in events for one in self._read_event(event)]
        text = self._rest + piece
        # A carriage return at the end may be half of a line end.
        held = text[-1:] if text.endswith(b"\r") else b""
        *lines, rest = _LINE_END.split(text[: len(text) - len(held)])
        self._rest = rest + held
        return [event for line in lines for event in self._read_line(line)]

    def end(self) -> list[dict[str, Any]]:
        """What the stream ended with, where its last event lacks only the line ends; an event cut short gives nothing."""
        if self._num_left < 0:
            return []
        events = list(self._read_line(self._rest.rstrip(b"\r")))
        data, self._data, self._rest = b"\n".join(self._data), [], b""
        num_bad = self.num_bad
        events += self._read_event(data) if data else []
        self.num_bad = num_bad
        return events

    def _read_line(self, line: bytes) -> Iterator[dict[str, Any]]:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line and self._data:
            data, self._data = b"\n".join(self._data), []
            yield from self._read_event(data)

    def _read_event(self, data: bytes) -> Iterator[dict[str, Any]]:
        if data.strip() == _DONE:
            self.is_done = True
            return
        event = parse_object(data)
        if event is None:
            self.num_bad += 1
        else:
            yield event


def _whole_events(piece: bytes) -> list[bytes]:
    """The data of each event where all lines are whole and of the form that servers send; else nothing.

    Four times as fast as line by line, and a gateway reads every piece of every stream.
    """
    if not piece.startswith(b"data: ") or not piece.endswith(b"\n\n") or b"\r" in piece:
        return []
    events = piece[6:-2].split(b"\n\ndata: ")
    return [] if any(b"\n" in event for event in events) else events


def parse_request(raw: bytes) -> dict[str, Any]:
    """The body as far as the gateway itself needs it; the rest is the LLM's to judge.

    Raises:
        Denied: 400, naming the field.
    """
    body = parse_strictly(raw)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise _invalid("messages: allowed is a list of at least one object")
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise _invalid(f"messages.{number}.role: allowed is a text such as user")
        content = message.get("content")
        if not isinstance(content, str | list | None) or (
            isinstance(content, list) and not all(isinstance(part, dict) for part in content)
        ):
            raise _invalid(f"messages.{number}.content: allowed is a text, a list of objects or null")
    if not isinstance(body.get("stream"), bool | None):
        raise _invalid("stream: allowed is true, false or null")
    return body


def parse_strictly(raw: bytes) -> dict[str, Any]:
    """A client's JSON object: in UTF-8, without NaN and half surrogate pairs, nested no deeper than MAX_NESTING.

    Raises:
        Denied: 400, with the reason.
    """
    try:
        body = read_json(raw, is_strict=True)
        if _SURROGATE.search(raw):
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError:
        raise _invalid("body: allowed is Unicode text in UTF-8, without halves of surrogate pairs") from None
    except (ValueError, RecursionError):
        raise _invalid("body: not a JSON object") from None
    if not isinstance(body, dict):
        raise _invalid("body: not a JSON object")
    if _is_too_deep(raw, body):
        raise _invalid(f"body: allowed are {MAX_NESTING} objects and lists within each other")
    return body


def parse_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object in `raw`, or None."""
    try:
        value = read_json(raw, is_strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not _is_too_deep(raw, value) else None


def error_code(body: dict[str, Any] | None) -> str | None:
    """What an error calls itself (its code, else its type), where that is an identifier and so holds no content."""
    error = (body or {}).get("error")
    names = [error.get("code"), error.get("type")] if isinstance(error, dict) else []
    return next((name for name in names if isinstance(name, str) and _CODE.fullmatch(name)), None)


def usage_of(body: dict[str, Any] | None) -> Usage:
    """Token counts of a completion, as far as they are given."""
    reported = (body or {}).get("usage")
    counts = reported if isinstance(reported, dict) else {}
    names = ("prompt_tokens", "completion_tokens")
    return Usage(**{name: counts[name] for name in names if _is_count(counts.get(name))})


def completion_body(message: dict[str, Any], *, call_id: str, model: str, created: int, usage: Usage) -> dict[str, Any]:
    """The chat.completion of one accepted message."""
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "id": f"chatcmpl-{call_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"refusal": None, **message},
                "logprobs": None,
                "finish_reason": "tool_calls" if message.get("tool_calls") else "stop",
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def completion_chunks(body: dict[str, Any], *, include_usage: bool) -> list[bytes]:
    """A completion of one choice as SSE events: role, content or tool calls, finish, usage if asked for, [DONE]."""
    choice = body["choices"][0]
    message = choice["message"]
    envelope = {key: body[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    if include_usage:
        envelope["usage"] = None
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if message.get("tool_calls") else ""}]
    if message.get("content"):
        deltas.append({"content": message["content"]})
    for index, call in enumerate(message.get("tool_calls") or ()):
        deltas.append({"tool_calls": [{"index": index, **call}]})
    events = [{**envelope, "choices": [_chunk_choice(delta, None)]} for delta in deltas]
    events.append({**envelope, "choices": [_chunk_choice({}, choice["finish_reason"])]})
    if include_usage:
        events.append({**envelope, "choices": [], "usage": body["usage"]})
    return [*(sse_event(event) for event in events), b"data: [DONE]\n\n"]


def sse_event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it; `kind` is its type, e.g. invalid_request_error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _is_too_deep(raw: bytes, value: Any) -> bool:
    if raw.count(b"{") + raw.count(b"[") <= MAX_NESTING:
        return False
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        items = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _invalid(message: str) -> Denied:
    return Denied(400, message, "invalid_request_error", "invalid_request")


def _chunk_choice(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
