"""LiteLLM: payloads of its logging callbacks, and rows of its spend log.

StandardLoggingPayload (docs.litellm.ai/docs/proxy/logging_spec; litellm/types/utils.py) is what every callback writes
to a file, a bucket or a queue: `messages`, `response`, `model_parameters`, `status`, `startTime`. A row of
LiteLLM_SpendLogs (schema.prisma; litellm/proxy/spend_tracking/spend_tracking_utils.py) has `request_id` and `spend`
instead; its prompt stands in `proxy_server_request`, and only where the proxy runs with store_prompts_in_spend_logs.
The proxy shortens long strings of a row, leaving a mark: such a call is quarantined, because nobody should learn from
half a prompt. Of an error the class and the code are kept, never its text. Knows nothing of files and pseudonyms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from training.log_files import Unusable
from training.log_records import (
    REQUEST_FIELDS,
    Logged,
    Place,
    Skipped,
    as_number,
    as_object,
    as_seconds,
    completion,
    content_id,
    count_answers,
    error_class,
    error_status,
    first_text,
    from_json_text,
    milliseconds_between,
    usage_of,
)

_CHAT_TYPES = ("completion", "acompletion", "", "chat_completion", "achat_completion")
_OTHER_TYPES = (
    *("embedding", "aembedding", "text_completion", "atext_completion", "responses", "aresponses"),
    *("image_generation", "aimage_generation", "moderation", "amoderation", "transcription", "atranscription"),
    *("speech", "aspeech", "rerank", "arerank", "anthropic_messages", "pass_through_endpoint", "call_mcp_tool"),
)
_TRUNCATED = "litellm_truncated"
"""Mark that litellm.constants.LITELLM_TRUNCATED_PAYLOAD_FIELD leaves in a shortened string."""


class LiteLLMSource:
    """Callback payloads and spend-log rows."""

    name = "litellm"

    def recognises(self, value: Any) -> bool:
        value = _payload(value)
        return isinstance(value, dict) and "call_type" in value and bool({"startTime", "request_id"} & value.keys())

    def is_lookup(self, value: Any) -> bool:
        return False

    def read(self, value: Any, place: Place) -> Iterator[Logged | Skipped]:
        """Raises Unusable where the payload can be no call."""
        payload = _payload(value)
        if not isinstance(payload, dict):
            raise Unusable("wrong type", f"line: {type(payload).__name__}, needs object")
        call_type = payload.get("call_type") or ""
        if call_type not in _CHAT_TYPES:
            yield Skipped(f"not a chat call: {call_type if call_type in _OTHER_TYPES else 'another call_type'}")
            return
        metadata = as_object(payload.get("metadata"))
        request = _request_of(payload)
        start, end = as_seconds(payload.get("startTime")), as_seconds(payload.get("endTime"))
        cost = payload["response_cost"] if "response_cost" in payload else payload.get("spend")
        record = {
            "id": first_text(payload.get("id"), payload.get("request_id")) or content_id("litellm", place, value),
            "source": "litellm",
            "agent": first_text(metadata.get("user_api_key_alias"), metadata.get("user_api_key_team_alias")),
            "client": _client_of(payload, metadata),
            "session": first_text(payload.get("session_id"), payload.get("trace_id")),
            "step": count_answers(request),
            "ts": start,
            "latency_ms": milliseconds_between(start, end),
            "cost_usd": as_number(cost),
            "request": request,
            **_answer_of(payload, metadata),
        }
        yield Logged(record, payload)


def _payload(value: Any) -> Any:
    """The payload itself, or the one under the key that callbacks receive it by."""
    if isinstance(value, dict) and "standard_logging_object" in value:
        return value["standard_logging_object"]
    return value


def _client_of(payload: dict[str, Any], metadata: dict[str, Any]) -> str | None:
    """The end user where one is named, else the user or the key that paid."""
    return first_text(
        payload.get("end_user"),
        metadata.get("user_api_key_end_user_id"),
        payload.get("user"),
        metadata.get("user_api_key_user_id"),
        metadata.get("user_api_key_alias"),
        metadata.get("user_api_key_hash"),
        payload.get("api_key"),
    )


def _request_of(payload: dict[str, Any]) -> dict[str, Any]:
    """The body the client sent, from wherever this kind of record keeps it."""
    sent = as_object(payload.get("proxy_server_request"))
    sent = as_object(sent["body"]) if "messages" not in sent and "body" in sent else sent
    parameters = as_object(payload.get("model_parameters"))
    messages = from_json_text(payload.get("messages")) or sent.get("messages")
    if isinstance(messages, dict):
        messages = messages.get("messages")
    if not isinstance(messages, list):
        raise Unusable("no messages", "messages: not stored, redacted, or no list of messages")
    fields = {**sent, **parameters, "model": sent.get("model") or payload.get("model_group") or payload.get("model")}
    request = {key: fields[key] for key in REQUEST_FIELDS if fields.get(key) is not None} | {"messages": messages}
    if _TRUNCATED in json.dumps(request):
        raise Unusable("truncated", "request: the proxy stored long strings shortened")
    return request


def _answer_of(payload: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """response, and status and error of a failed call."""
    if payload.get("status") == "failure":
        problem = as_object(payload.get("error_information")) or as_object(metadata.get("error_information"))
        status = error_status(problem.get("error_code"))
        return {"response": None, "status": status, "error": error_class(problem.get("error_class"))}
    said = payload.get("response")
    response = from_json_text(said)
    if isinstance(said, str) and said not in ("", "{}") and not (isinstance(response, dict) and "choices" in response):
        response = completion({"role": "assistant", "content": said}, model=payload.get("model"))
    if not isinstance(response, dict) or not response:
        raise Unusable("no response", "response: not stored or redacted")
    if _TRUNCATED in json.dumps(response):
        raise Unusable("truncated", "response: the proxy stored long strings shortened")
    usage = usage_of(payload.get("prompt_tokens"), payload.get("completion_tokens"))
    return {"response": response if response.get("usage") or not usage else {**response, "usage": usage}}
