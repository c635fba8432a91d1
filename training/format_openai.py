"""OpenAI chat JSONL: fine-tuning examples, batch inputs and outputs, stored completions, request-response pairs.

| line | becomes | described at |
|---|---|---|
| {"messages", "tools"?, "parallel_tool_calls"?} | the last assistant message that is trained on (weight is not 0) is the answer to what stands before it | platform.openai.com/docs/api-reference/fine-tuning/chat-input (OpenAPI: FineTuneChatRequestInput) |
| {"id", "custom_id", "response": {"status_code", "body"}, "error"} | one call, joined by custom_id to the input line {"custom_id", "method", "url", "body"} | .../api-reference/batch/request-output (BatchRequestOutput) |
| {"object": "chat.completion", "messages", "choices", ...} | one stored completion with its messages | .../api-reference/chat/list |
| {"request": {...}, "response": {...}} | one pair of HTTP bodies | .../api-reference/chat/create |

A batch output carries no prompt: both files are needed. The bodies of the inputs are held compressed meanwhile; the
API bounds one input file at 50,000 requests and 200 MB. Knows nothing of files and pseudonyms.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

from training.log_files import Unusable
from training.log_records import (
    REQUEST_FIELDS,
    Logged,
    Place,
    Skipped,
    as_object,
    completion,
    content_id,
    count_answers,
    error_class,
    error_status,
    first_text,
    get,
)

CHAT_URL = "/v1/chat/completions"
_ENDPOINTS = ("/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/moderations", "/v1/images/generations")
_ORIGIN_FIELDS = frozenset({"user", "safety_identifier", "metadata", "prompt_cache_key"})
"""Who asked: read for client and session, and kept out of the stored request."""


class OpenAISource:
    """Remembers batch inputs until their outputs are read."""

    name = "openai"

    def __init__(self) -> None:
        self._inputs: dict[str, bytes | None] = {}
        """Compressed input line by custom_id; None where two files say different things under one id."""
        self._answered: set[str] = set()

    def recognises(self, value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        is_pair = isinstance(value.get("request"), dict) and "response" in value
        is_batch = "custom_id" in value and ("body" in value or "response" in value)
        is_completion = value.get("object") == "chat.completion" and "choices" in value
        return is_pair or is_batch or is_completion or "messages" in value or "preferred_output" in value

    def is_lookup(self, value: Any) -> bool:
        """Whether `value` is a line of a batch input, without which its output cannot be read."""
        return isinstance(value, dict) and "custom_id" in value and "body" in value and "response" not in value

    def remember(self, value: Any) -> None:
        """Keep one batch input line; one that is none is left for `read` to find."""
        if self.is_lookup(value) and isinstance(value["custom_id"], str):
            line = zlib.compress(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), 1)
            known = self._inputs.setdefault(value["custom_id"], line)
            if known != line:
                self._inputs[value["custom_id"]] = None

    def read(self, value: Any, place: Place) -> Iterator[Logged | Skipped]:
        """Raises Unusable where the line can be no call."""
        if not isinstance(value, dict):
            raise Unusable("wrong type", f"line: {type(value).__name__}, needs object")
        if "preferred_output" in value:
            yield Skipped("a preference pair, which no model answered as it stands")
        elif self.is_lookup(value):
            yield from self._read_input(value)
        elif "custom_id" in value:
            yield self._read_output(value, place)
        elif "request" in value and "response" in value:
            yield _read_pair(value, place)
        elif "choices" in value:
            yield _read_stored(value, place)
        else:
            yield _read_example(value, place)

    def _read_input(self, value: dict[str, Any]) -> Iterator[Skipped]:
        if get(value, "custom_id", str) not in self._answered:
            yield Skipped("a batch request without an output in the files given")

    def _read_output(self, value: dict[str, Any], place: Place) -> Logged | Skipped:
        custom_id = get(value, "custom_id", str)
        if custom_id not in self._inputs:
            raise Unusable("no request", "custom_id: in no batch input file given; name it on the same command line")
        kept = self._inputs[custom_id]
        if kept is None:
            raise Unusable("ambiguous request", "custom_id: two batch inputs differ; ingest each batch by itself")
        self._answered.add(custom_id)
        line = json.loads(zlib.decompress(kept))
        if line.get("url") != CHAT_URL:
            url = line.get("url") if line.get("url") in _ENDPOINTS else "another endpoint"
            return Skipped(f"not a chat call: {url}")
        request, answer = get(line, "body", dict) or {}, get(value, "response", dict) or {}
        body = as_object(answer.get("body"))
        status = answer.get("status_code", 200 if answer else None)
        problem = as_object(value.get("error")) or (as_object(body.get("error")) if status != 200 else {})
        record = _record(request, body or None)
        if status != 200 or problem:
            record |= {"response": None, "status": error_status(status), "error": _error_of(problem)}
        call_id = first_text(value.get("id"))
        return Logged({**record, "id": call_id or content_id("openai", place, value)}, {**line, **value})


def _read_pair(value: dict[str, Any], place: Place) -> Logged:
    request = get(value, "request", dict) or {}
    request = as_object(request["body"]) if "messages" not in request and "body" in request else request
    answer = get(value, "response", dict) or {}
    status = answer.get("status_code", 200)
    body = as_object(answer["body"]) if "choices" not in answer and "body" in answer else answer
    record = _record(request, body or None)
    if status != 200 or "error" in body:
        problem = as_object(body.get("error"))
        record |= {"response": None, "status": error_status(status, problem.get("code")), "error": _error_of(problem)}
    call_id = first_text(value.get("id"), value.get("request_id"), body.get("id"))
    return Logged({**record, "id": call_id or content_id("openai", place, value)}, value)


def _read_stored(value: dict[str, Any], place: Place) -> Logged:
    """A stored completion: one object holds the answer, the request's settings and the messages."""
    messages = value.get("messages") or value.get("input_messages") or value.get("input")
    request = {key: value[key] for key in REQUEST_FIELDS if value.get(key) is not None} | {"messages": messages}
    answer = {"object", "id", "created", "model", "choices", "usage", "system_fingerprint"}
    record = _record(request, {key: item for key, item in value.items() if key in answer})
    record |= _origin_of({"metadata": value.get("metadata"), "user": value.get("input_user")})
    return Logged({**record, "id": first_text(value.get("id")) or content_id("openai", place, value)}, value)


def _read_example(value: dict[str, Any], place: Place) -> Logged | Skipped:
    """A fine-tuning example; weights are training's and no part of a request."""
    messages = get(value, "messages", list)
    if not messages:
        raise Unusable("no messages", "messages: missing or empty")
    answers = [at for at, message in enumerate(messages) if isinstance(message, dict) and _is_answer(message)]
    trained = [at for at in answers if messages[at].get("weight") != 0]
    if not answers:
        raise Unusable("no response", "messages: none is an assistant's")
    if not trained:
        return Skipped("a fine-tuning example whose answers all have weight 0")
    plain = [_without_weight(message) for message in messages[: trained[-1] + 1]]
    request = {key: value[key] for key in REQUEST_FIELDS if value.get(key) is not None} | {"messages": plain[:-1]}
    record = _record(request, completion(plain[-1], model=value.get("model")))
    return Logged({**record, "id": content_id("openai", place, value)}, value)


def _is_answer(message: dict[str, Any]) -> bool:
    return message.get("role") == "assistant"


def _without_weight(message: Any) -> Any:
    return {key: item for key, item in message.items() if key != "weight"} if isinstance(message, dict) else message


def _record(request: dict[str, Any], response: dict[str, Any] | None) -> dict[str, Any]:
    asked = {key: item for key, item in request.items() if key not in _ORIGIN_FIELDS}
    record = {"source": "openai", "request": asked, "response": response, "step": count_answers(asked)}
    return {**record, "ts": (response or {}).get("created") or None, **_origin_of(request)}


def _origin_of(request: dict[str, Any]) -> dict[str, Any]:
    """Client, session and agent as the request's own fields name them."""
    metadata = as_object(request.get("metadata"))
    session = first_text(metadata.get("session_id"), metadata.get("conversation_id"), metadata.get("thread_id"))
    client = first_text(request.get("safety_identifier"), request.get("user"), metadata.get("user_id"))
    found = {"client": client, "session": session, "agent": first_text(metadata.get("agent"))}
    return {key: item for key, item in found.items() if item}


def _error_of(problem: dict[str, Any]) -> str:
    return error_class(problem.get("code"), problem.get("type"))
