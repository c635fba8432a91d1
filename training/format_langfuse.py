"""Langfuse exports: observations of type GENERATION, alone or inside their trace; JSON, JSON lines, CSV or Parquet.

Three spellings of one record: the public API's camelCase (`traceId`, `startTime`, `usageDetails`,
`calculatedTotalCost`; api-reference: ObservationsView, TraceWithFullDetails), the blob-storage export's snake_case, whose
`input`, `output` and `model_parameters` are JSON in text (langfuse.com/docs/api-and-data-platform/features/
blob-storage-export-fields), and its CSV, where every value is text. A trace downloaded in the browser is {"trace",
"observations"}. The legacy blob export keeps user and session in a file of traces: given together, that file is read
first. Of a failed generation (level ERROR) no message is kept, because it may quote the conversation. Knows nothing of
files and pseudonyms.
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
    first_text,
    from_json_text,
    milliseconds_between,
    usage_of,
)

_OTHER_TYPES = (*("SPAN", "EVENT", "AGENT", "TOOL", "CHAIN", "RETRIEVER", "EVALUATOR", "EMBEDDING", "GUARDRAIL"),)
_ORIGIN = {"user": ("userId", "user_id"), "session": ("sessionId", "session_id"), "name": ("name", "traceName")}


class LangfuseSource:
    """Observations and traces; remembers what a file of bare traces says of each."""

    name = "langfuse"

    def __init__(self) -> None:
        self._traces: dict[str, dict[str, str | None]] = {}

    def recognises(self, value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        is_observation = _any(value, "traceId", "trace_id") is not None and bool(
            {"startTime", "start_time"} & value.keys()
        )
        return is_observation or isinstance(from_json_text(value.get("observations")), list) or self.is_lookup(value)

    def is_lookup(self, value: Any) -> bool:
        """Whether `value` is a trace without its observations."""
        return (
            isinstance(value, dict)
            and {"id", "timestamp"} <= value.keys()
            and bool({"userId", "user_id", "sessionId", "session_id"} & value.keys())
            and not {"type", "traceId", "trace_id", "call_type"} & value.keys()
            and not isinstance(from_json_text(value.get("observations")), list)
        )

    def remember(self, value: Any) -> None:
        """Keep who and which session a bare trace belongs to."""
        if self.is_lookup(value) and isinstance(value["id"], str):
            self._traces[value["id"]] = _origin_of(value)

    def read(self, value: Any, place: Place) -> Iterator[Logged | Skipped | Unusable]:
        """One item for each observation; a bad one costs itself. Raises Unusable where there is none."""
        if not isinstance(value, dict):
            raise Unusable("wrong type", f"line: {type(value).__name__}, needs object")
        observations = from_json_text(value.get("observations"))
        if isinstance(observations, list):
            inner = as_object(value.get("trace"))
            trace = inner or value
            for observation in observations:
                try:
                    yield self._read_observation(observation, trace, place)
                except Unusable as problem:
                    yield problem
        elif self.is_lookup(value):
            yield Skipped("a trace without its observations")
        else:
            yield self._read_observation(value, {}, place)

    def _read_observation(self, value: Any, trace: dict[str, Any], place: Place) -> Logged | Skipped:
        if not isinstance(value, dict):
            raise Unusable(
                "wrong type", f"observation: {type(value).__name__}, needs an object (a trace lists only ids)"
            )
        kind = value.get("type") or "GENERATION"
        if kind != "GENERATION":
            return Skipped(f"not a chat call: {kind if kind in _OTHER_TYPES else 'another type'}")
        trace_id = first_text(_any(value, "traceId", "trace_id"), trace.get("id"))
        known = _origin_of(trace) if trace else self._traces.get(trace_id or "", {})
        start = as_seconds(_any(value, "startTime", "start_time"))
        request = _request_of(value)
        cost = _any(value, "calculatedTotalCost", "totalCost", "total_cost")
        cost = as_object(_any(value, "costDetails", "cost_details")).get("total") if cost is None else cost
        record = {
            "id": first_text(value.get("id")) or content_id("langfuse", place, value),
            "source": "langfuse",
            "agent": first_text(_any(value, "traceName", "trace_name"), known.get("name")),
            "client": first_text(_any(value, "userId", "user_id"), known.get("user")),
            "session": first_text(_any(value, "sessionId", "session_id"), known.get("session"), trace_id),
            "step": count_answers(request),
            "ts": start,
            "latency_ms": milliseconds_between(start, as_seconds(_any(value, "endTime", "end_time"))),
            "cost_usd": as_number(cost),
            "request": request,
            **_answer_of(value),
        }
        return Logged(record, {**value, "trace": trace} if trace else value)


def _origin_of(trace: dict[str, Any]) -> dict[str, str | None]:
    return {key: first_text(_any(trace, *names)) for key, names in _ORIGIN.items()}


def _any(value: dict[str, Any], *names: str) -> Any:
    """The first of these fields that says something."""
    return next((found for name in names if (found := value.get(name)) not in (None, "")), None)


def _request_of(value: dict[str, Any]) -> dict[str, Any]:
    asked = _as_messages(value.get("input"))
    fields = dict(as_object(_any(value, "modelParameters", "model_parameters")))
    if isinstance(asked, dict) and "messages" in asked:
        fields |= asked
        asked = from_json_text(asked["messages"])
    elif isinstance(asked, dict) and "role" in asked:
        asked = [asked]
    elif isinstance(asked, str) and asked:
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list):
        raise Unusable("no messages", "input: missing, or no list of messages")
    # Some integrations put the tools among the messages, as {"role": "tool", "content": {"type": "function", ...}}.
    definitions = [item["content"] for item in asked if _is_definition(item)]
    messages = [item for item in asked if not _is_definition(item)]
    tools = fields.get("tools") or definitions or _tools_of(_any(value, "toolDefinitions", "tool_definitions"))
    model = _any(value, "model", "provided_model_name", "providedModelName")
    fields |= {"model": model, "tools": from_json_text(tools) or None, "messages": messages}
    return {key: fields[key] for key in REQUEST_FIELDS if fields.get(key) is not None}


def _as_messages(value: Any) -> Any:
    """Text that is a message, messages, a request or a completion as JSON; any other text is what was said."""
    found = from_json_text(value)
    if not isinstance(value, str):
        return found
    if isinstance(found, dict) and {"role", "messages", "choices"} & found.keys():
        return found
    is_list = isinstance(found, list) and bool(found) and all(isinstance(m, dict) and "role" in m for m in found)
    return found if is_list else value


def _is_definition(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, dict) and content.get("type") == "function" and "function" in content


def _tools_of(value: Any) -> list[Any]:
    """The export's {name: definition as JSON} as a chat request's list."""
    tools = []
    for name, given in as_object(value).items():
        tool = as_object(given)
        inner = tool if "function" not in tool else as_object(tool["function"])
        kept = {key: inner[key] for key in ("description", "parameters", "strict") if inner.get(key) is not None}
        kept |= {"parameters": from_json_text(kept["parameters"])} if "parameters" in kept else {}
        tools.append({"type": "function", "function": {"name": name, **kept}})
    return tools


def _answer_of(value: dict[str, Any]) -> dict[str, Any]:
    """response, and status and error of a failed call."""
    if value.get("level") == "ERROR":
        return {"response": None, "status": 500, "error": "ERROR"}
    said = _as_messages(value.get("output"))
    model = _any(value, "model", "provided_model_name", "providedModelName")
    counts = as_object(_any(value, "usageDetails", "usage_details")) or as_object(value.get("usage"))
    usage = usage_of(
        _any(counts, "input", "prompt_tokens", "promptTokens"),
        _any(counts, "output", "completion_tokens", "completionTokens"),
    )
    if isinstance(said, list) and said:
        said = said[-1]
    if isinstance(said, dict) and isinstance(said.get("choices"), list):
        return {"response": {**said, "usage": usage} if usage and not said.get("usage") else said}
    if isinstance(said, dict) and isinstance(said.get("message"), dict):
        said = {**said["message"], "finish_reason": said.get("finish_reason")}
    if isinstance(said, dict) and not {"role", "content", "tool_calls"} & said.keys():
        said = json.dumps(said, ensure_ascii=False)  # what the model said is an object by itself
    if isinstance(said, str) and said:
        said = {"role": "assistant", "content": said}
    if not isinstance(said, dict):
        raise Unusable("no response", "output: missing, or no message")
    message = {"role": "assistant", **{key: item for key, item in said.items() if key != "finish_reason"}}
    return {"response": completion(message, model=model, finish_reason=said.get("finish_reason"), usage=usage)}
