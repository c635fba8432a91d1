"""OpenAI's chat.completions on the wire: requests, SSE bytes <-> chunks <-> one completion, and error bodies.

Reading is lenient, because what an LLM sends goes to the client as it is and only the captured copy is made here;
what does not parse is counted. Writing is exact. Source: OpenAI API reference, chat completions and its chunk
object; WHATWG HTML section 9.2 (server-sent events).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.records import Usage

MAX_STREAM_BYTES = 64 * 2**20
_LINE_END = re.compile(rb"\r\n|\n|\r")
_DONE = b"[DONE]"


class Denied(Exception):
    """A request that is answered with an error before it is a call."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind=kind, code=code, param=param)


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
        text = self._rest + piece
        # A carriage return at the end may be half of a line end.
        held = text[-1:] if text.endswith(b"\r") else b""
        *lines, rest = _LINE_END.split(text[: len(text) - len(held)])
        self._rest = rest + held
        return [event for line in lines for event in self._read_line(line)]

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
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            yield event
        else:
            self.num_bad += 1


def parse_request(raw: bytes) -> dict[str, Any]:
    """The body as far as the gateway itself needs it; the rest is the LLM's to judge.

    Raises:
        Denied: 400, naming the field.
    """
    body = parse_object(raw)
    if body is None:
        raise _invalid("body: not a JSON object")
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


def parse_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object in `raw`, or None."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def reassemble(chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Join the chunks of one stream to the chat.completion that the unary call would have given.

    A cut stream gives what arrived: a choice without its end has finish_reason None.
    """
    body: dict[str, Any] = {"object": "chat.completion"}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for key, value in chunk.items():
            if key not in ("object", "choices") and value is not None:
                body[key] = value
        for part in _dicts(chunk.get("choices")):
            index = part.get("index") if isinstance(part.get("index"), int) else 0
            choice = choices.setdefault(index, {"index": index, "message": {}, "finish_reason": None})
            _merge_choice(choice, part)
    body["choices"] = [_finish_choice(choices[index]) for index in sorted(choices)]
    return body


def usage_of(body: dict[str, Any] | None) -> Usage:
    """Token counts of a completion, as far as they are given."""
    reported = (body or {}).get("usage")
    counts = reported if isinstance(reported, dict) else {}
    names = ("prompt_tokens", "completion_tokens")
    return Usage(**{name: counts[name] for name in names if type(counts.get(name)) is int})


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


def _invalid(message: str) -> Denied:
    return Denied(400, message, "invalid_request_error", "invalid_request")


def _chunk_choice(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _merge_choice(choice: dict[str, Any], part: dict[str, Any]) -> None:
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    logprobs = part.get("logprobs")
    if isinstance(logprobs, dict):
        joined = choice.setdefault("logprobs", {})
        for key, items in logprobs.items():
            joined[key] = [*(joined.get(key) or []), *items] if isinstance(items, list) else joined.get(key)
    delta = part.get("delta")
    for key, value in (delta if isinstance(delta, dict) else {}).items():
        if key == "tool_calls":
            for call in _dicts(value):
                _merge_call(choice["message"].setdefault("tool_calls", {}), call)
        elif key == "function_call" and isinstance(value, dict):
            _merge_texts(choice["message"].setdefault(key, {}), value, ())
        else:
            _merge_texts(choice["message"], {key: value}, ("role",))


def _merge_call(calls: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    index = part.get("index")
    if not isinstance(index, int):
        # Some servers leave the index out: an id begins a call, anything else continues the last one.
        index = max(calls, default=-1) + 1 if part.get("id") or not calls else max(calls)
    call = calls.setdefault(index, {"function": {}})
    function = part.get("function")
    _merge_texts(call["function"], function if isinstance(function, dict) else {}, ("name",))
    rest = {key: value for key, value in part.items() if key not in ("index", "function")}
    _merge_texts(call, rest, tuple(rest))


def _merge_texts(target: dict[str, Any], part: dict[str, Any], whole: tuple[str, ...]) -> None:
    """Append texts; values under the keys in `whole`, and those that are not texts, replace the earlier ones."""
    for key, value in part.items():
        if isinstance(value, str) and isinstance(target.get(key), str) and key not in whole:
            target[key] += value
        elif value is not None or key not in target:
            target[key] = value


def _finish_choice(choice: dict[str, Any]) -> dict[str, Any]:
    parts = choice["message"]
    message = {"role": "assistant", "content": None, **parts}
    if "tool_calls" in parts:
        message["tool_calls"] = [
            {"type": "function", **parts["tool_calls"][index]} for index in sorted(parts["tool_calls"])
        ]
        message["content"] = parts.get("content") or None
    return {**choice, "message": message}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
