"""OpenAI's chat.completions on the wire: requests, a completion -> SSE bytes, and error bodies.

What a client sends is read strictly. Writing is exact. What an LLM sends goes to the client as it is; its copy is read
by cluster/sse.py. Source: OpenAI API reference, chat completions and its chunk object; RFC 8259 (JSON).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cluster.json_text import read_json
from cluster.records import Usage
from cluster.sse import MAX_NESTING, is_too_deep

CLIENT_GONE = 499
"""Status of a request whose client left before the last byte (as nginx writes it)."""
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


def parse_request(raw: bytes) -> dict[str, Any]:
    """The body as far as the gateway itself needs it; the rest is the LLM's to judge.

    Raises:
        Denied: 400, naming the field.
    """
    body = parse_strictly(raw)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise _invalid("messages: allowed is a list of at least one object", "messages")
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise _invalid(f"messages.{number}.role: allowed is a text such as user", f"messages.{number}.role")
        content = message.get("content")
        if not isinstance(content, str | list | None) or (
            isinstance(content, list) and not all(isinstance(part, dict) for part in content)
        ):
            field = f"messages.{number}.content"
            raise _invalid(f"{field}: allowed is a text, a list of objects or null", field)
    if not isinstance(body.get("stream"), bool | None):
        raise _invalid("stream: allowed is true, false or null", "stream")
    return body


def parse_strictly(raw: bytes) -> dict[str, Any]:
    """A client's JSON object: in UTF-8, of finite numbers and whole surrogate pairs, nested no deeper than MAX_NESTING.

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
    if is_too_deep(raw, body):
        raise _invalid(f"body: allowed are {MAX_NESTING} objects and lists within each other")
    return body


def error_code(body: dict[str, Any] | None) -> str | None:
    """What an error calls itself (its code, else its type), where that is an identifier and so holds no content."""
    error = (body or {}).get("error")
    names = [error.get("code"), error.get("type")] if isinstance(error, dict) else []
    return next((name for name in names if isinstance(name, str) and _CODE.fullmatch(name)), None)


def with_code(what: str, body: dict[str, Any] | None) -> str:
    """`what`, and what the error in `body` calls itself, if it does."""
    code = error_code(body)
    return f"{what}: {code}" if code else what


def usage_of(body: dict[str, Any] | None) -> Usage:
    """Token counts of a completion, as far as they are given."""
    reported = (body or {}).get("usage")
    counts = reported if isinstance(reported, dict) else {}
    names = ("prompt_tokens", "completion_tokens")
    return Usage(**{name: counts[name] for name in names if _is_count(counts.get(name))})


def completion_body(message: dict[str, Any], *, call_id: str, model: str, created: int, usage: Usage) -> dict[str, Any]:
    """The chat.completion of one accepted message.

    Args:
        model: the specialist's name, TASK@VERSION; its version is what clients who set `seed` watch for a change.
    """
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    calls = message.get("tool_calls") or []
    if calls:
        # A specialist's ids are equal for equal calls; clients tell the calls of a conversation apart by them.
        numbered = [{**call, "id": f"call_{call_id[:24]}_{index}"} for index, call in enumerate(calls)]
        message = {**message, "tool_calls": numbered}
    return {
        "id": f"chatcmpl-{call_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "system_fingerprint": f"fp_{model.rpartition('@')[2]}",
        "choices": [
            {
                "index": 0,
                "message": {"refusal": None, **message},
                "logprobs": None,
                "finish_reason": "tool_calls" if calls else "stop",
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def completion_chunks(body: dict[str, Any], *, include_usage: bool) -> list[bytes]:
    """A completion as SSE events: of each choice role, content or tool calls, finish; usage if asked for; [DONE].

    Args:
        body: as `is_completion` says.
    """
    envelope = {key: value for key, value in body.items() if key not in ("choices", "usage")}
    envelope["object"] = "chat.completion.chunk"
    if include_usage:
        envelope["usage"] = None
    events = [{**envelope, "choices": [one]} for choice in body["choices"] for one in _chunk_choices(choice)]
    if include_usage:
        events.append({**envelope, "choices": [], "usage": body.get("usage")})
    return [*(sse_event(event) for event in events), b"data: [DONE]\n\n"]


def is_completion(body: dict[str, Any] | None) -> bool:
    """Whether a body is a chat.completion, as far as it must be to be written as a stream."""
    choices = (body or {}).get("choices")
    messages = [one.get("message") for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    return bool(messages) and len(messages) == len(choices or ()) and all(map(_is_message, messages))


def sse_event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it; `kind` is its type, e.g. invalid_request_error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _invalid(message: str, param: str | None = None) -> Denied:
    return Denied(400, message, "invalid_request_error", "invalid_request", param)


def _is_message(message: Any) -> bool:
    calls = (message.get("tool_calls") or []) if isinstance(message, dict) else None
    return isinstance(calls, list) and all(isinstance(call, dict) for call in calls)


def _chunk_choices(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """One choice in pieces."""
    message = choice["message"]
    others = {name: value for name, value in message.items() if value and name not in ("role", "content", "tool_calls")}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if message.get("content") is None else ""}]
    if message.get("content") or others or choice.get("logprobs"):
        deltas.append({**({"content": message["content"]} if message.get("content") else {}), **others})
    for index, call in enumerate(message.get("tool_calls") or ()):
        deltas.append({"tool_calls": [{"index": index, **call}]})
    pieces = [
        {"index": choice.get("index", 0), "delta": one, "logprobs": None, "finish_reason": None} for one in deltas
    ]
    if choice.get("logprobs"):
        pieces[1]["logprobs"] = choice["logprobs"]
    return [*pieces, {**pieces[0], "delta": {}, "finish_reason": choice.get("finish_reason")}]
