"""OpenTelemetry GenAI spans in OTLP JSON: resourceSpans -> scopeSpans -> spans.

One document, or one for each line as the Collector's file exporter writes them (opentelemetry-proto: docs/specification.md,
"JSON Protobuf Encoding": 64-bit integers are text, ids hexadecimal). A span is one call where its
`gen_ai.operation.name` is chat, generate_content or text_completion, or where an older instrumentation names none and
there is chat content; agent, workflow, tool and embedding spans are skipped, because they repeat or hold no chat. Content
is opt-in at the source: a span without it cannot be used. Of a failed span the class of its error is kept, never the text
of its status. training/otel_messages.py reads the content. Knows nothing of files and pseudonyms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.log_files import Unusable
from training.log_records import (
    MAX_COUNT,
    Logged,
    Place,
    Skipped,
    as_count,
    content_id,
    count_answers,
    error_class,
    error_status,
    first_text,
    from_json_text,
    milliseconds_between,
    usage_of,
)
from training.otel_messages import Chat, Event, read_chat

_CHAT_OPERATIONS = ("chat", "generate_content", "text_completion")
_OTHER_OPERATIONS = (
    *("embeddings", "execute_tool", "invoke_agent", "create_agent", "invoke_workflow", "retrieval", "rerank", "plan"),
)
_STATUS_ERROR = (2, "STATUS_CODE_ERROR")
_REQUEST_ATTRIBUTES = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "max_tokens": "gen_ai.request.max_tokens",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "stop": "gen_ai.request.stop_sequences",
    "n": "gen_ai.request.choice.count",
    "reasoning_effort": "gen_ai.request.reasoning.level",
}


class OTelSource:
    """OTLP documents of traces."""

    name = "otel"

    def recognises(self, value: Any) -> bool:
        return isinstance(value, dict) and isinstance(value.get("resourceSpans"), list)

    def is_lookup(self, value: Any) -> bool:
        return False

    def read(self, value: Any, place: Place) -> Iterator[Logged | Skipped | Unusable]:
        """One item for each span; a bad span costs that span. Raises Unusable where `value` holds no spans at all."""
        if not self.recognises(value):
            raise Unusable("wrong type", "resourceSpans: missing or no list")
        for resource, span in _spans(value):
            try:
                yield _read_span(span, resource, place)
            except Unusable as problem:
                yield problem


def _spans(value: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    for group in _objects(value.get("resourceSpans")):
        resource = group.get("resource")
        attributes = _attributes(resource.get("attributes")) if isinstance(resource, dict) else {}
        for scope in _objects(group.get("scopeSpans") or group.get("instrumentationLibrarySpans")):
            spans = scope.get("spans")
            for span in spans if isinstance(spans, list) else ():
                yield attributes, span


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair["key"]: _decode(pair.get("value")) for pair in _objects(pairs) if isinstance(pair.get("key"), str)}


def _decode(value: Any) -> Any:
    """An AnyValue as a plain one."""
    if not isinstance(value, dict):
        return None
    if "intValue" in value:
        return as_count(value["intValue"])
    if "arrayValue" in value:
        items = value["arrayValue"].get("values") if isinstance(value["arrayValue"], dict) else None
        return [_decode(item) for item in _objects(items)]
    if "kvlistValue" in value:
        return _attributes(value["kvlistValue"].get("values")) if isinstance(value["kvlistValue"], dict) else {}
    return next((value[key] for key in ("stringValue", "boolValue", "doubleValue", "bytesValue") if key in value), None)


def _read_span(span: Any, resource: dict[str, Any], place: Place) -> Logged | Skipped:
    if not isinstance(span, dict):
        raise Unusable("wrong type", f"span: {type(span).__name__}, needs object")
    attributes = _attributes(span.get("attributes"))
    events = [
        Event(str(event.get("name")), _attributes(event.get("attributes"))) for event in _objects(span.get("events"))
    ]
    operation = attributes.get("gen_ai.operation.name") or attributes.get("llm.request.type")
    if operation is None and not any(key.startswith(("gen_ai.", "llm.request.")) for key in attributes):
        return Skipped("a span that is no call to a model")
    if operation is not None and operation not in _CHAT_OPERATIONS:
        return Skipped(f"not a chat call: {operation if operation in _OTHER_OPERATIONS else 'another operation'}")
    chat = read_chat(attributes, events)
    if operation is None and not chat.messages:
        return Skipped("a span that is no call to a model")
    start, end = _seconds(span.get("startTimeUnixNano")), _seconds(span.get("endTimeUnixNano"))
    ids = [text for key in ("traceId", "spanId") if (text := first_text(span.get(key)))]
    request = _request_of(attributes, chat)
    record = {
        "id": "-".join(ids) if len(ids) == 2 else content_id("otel", place, span),
        "source": "otel",
        "agent": first_text(attributes.get("gen_ai.agent.name"), resource.get("service.name")),
        "client": _client_of(attributes, resource),
        "session": _session_of(attributes) or first_text(span.get("traceId")),
        "step": count_answers(request),
        "ts": start,
        "latency_ms": milliseconds_between(start, end),
        "request": request,
        **_answer_of(span, attributes, chat),
    }
    return Logged(record, {**attributes, "resource": resource})


def _seconds(nanoseconds: Any) -> float | None:
    count = as_count(nanoseconds)
    return count / 1e9 if type(count) is int and 0 < count <= MAX_COUNT else None


def _client_of(attributes: dict[str, Any], resource: dict[str, Any]) -> str | None:
    keys = ("user.id", "enduser.id", "traceloop.association.properties.user_id", "gen_ai.user", "llm.user")
    return first_text(*(attributes.get(key) for key in keys), resource.get("service.name"))


def _session_of(attributes: dict[str, Any]) -> str | None:
    prefix = "traceloop.association.properties"
    keys = ("gen_ai.conversation.id", "session.id", f"{prefix}.session_id", f"{prefix}.thread_id")
    return first_text(*(attributes.get(key) for key in keys))


def _request_of(attributes: dict[str, Any], chat: Chat) -> dict[str, Any]:
    request = {"model": attributes.get("gen_ai.request.model"), "messages": chat.messages, "tools": chat.tools or None}
    request |= {field: attributes.get(key) for field, key in _REQUEST_ATTRIBUTES.items()}
    schema = from_json_text(attributes.get("gen_ai.request.structured_output_schema"))
    if isinstance(schema, dict):
        request["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    elif attributes.get("gen_ai.output.type") == "json":
        request["response_format"] = {"type": "json_object"}
    return {key: value for key, value in request.items() if value is not None}


def _answer_of(span: dict[str, Any], attributes: dict[str, Any], chat: Chat) -> dict[str, Any]:
    """response, and status and error of a failed call."""
    status = span.get("status")
    kind = attributes.get("error.type")
    if (isinstance(status, dict) and status.get("code") in _STATUS_ERROR) or kind:
        code = error_status(attributes.get("http.response.status_code"), attributes.get("http.status_code"), kind)
        return {"response": None, "status": code, "error": error_class(kind)}
    reasons = attributes.get("gen_ai.response.finish_reasons")
    reasons = reasons if isinstance(reasons, list) else []
    choices = []
    for index, (message, reason) in enumerate(chat.answers):
        is_call = isinstance(message, dict) and message.get("tool_calls")
        reason = reason or (reasons[index] if index < len(reasons) else None) or ("tool_calls" if is_call else "stop")
        choices.append({"index": index, "message": message, "finish_reason": reason})
    usage = usage_of(
        attributes.get("gen_ai.usage.input_tokens", attributes.get("gen_ai.usage.prompt_tokens")),
        attributes.get("gen_ai.usage.output_tokens", attributes.get("gen_ai.usage.completion_tokens")),
    )
    model = attributes.get("gen_ai.response.model") or attributes.get("gen_ai.request.model")
    body = {"object": "chat.completion", "id": attributes.get("gen_ai.response.id"), "model": model, "choices": choices}
    body |= {"usage": usage} if usage else {}
    return {"response": {key: value for key, value in body.items() if value is not None}}
