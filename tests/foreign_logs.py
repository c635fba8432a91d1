"""Logs of foreign formats for tests: calls, and each written as its source's own documents say, and read back.

`TIMED` writes a call in every format that keeps times, clients and sessions; `shared_samples` are real calls, the
others (`SAMPLES`) cover tools, a tool's result and a cut answer. `check_same` compares by meaning, not by spelling.
"""

import datetime
import functools
import itertools
import json
import pathlib

import pytest
from shared_data import DATA, NO_DATA

from cluster.access import Pseudonyms
from cluster.records import AgentCall
from training.formats import LogReader

PSEUDONYMS = Pseudonyms(b"k" * 32)
TOOL = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Looks an order up.",
        "parameters": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
    },
}
ASKED = {"id": "call_1", "type": "function", "function": {"name": "find_order", "arguments": '{"id": "A7"}'}}
SAMPLES = [
    {
        "request": {
            "model": "big",
            "temperature": 0.5,
            "tools": [TOOL],
            "messages": [{"role": "system", "content": "Help."}, {"role": "user", "content": "Where is A7? é"}],
        },
        "message": {"role": "assistant", "content": None, "tool_calls": [ASKED]},
        "finish": "tool_calls",
        "usage": {"prompt_tokens": 30, "completion_tokens": 9},
    },
    {
        "request": {
            "model": "big",
            "tools": [TOOL],
            "messages": [
                {"role": "user", "content": "Where is A7?"},
                {"role": "assistant", "content": None, "tool_calls": [ASKED]},
                {"role": "tool", "tool_call_id": "call_1", "content": '{"at": "sea"}'},
            ],
        },
        "message": {"role": "assistant", "content": "At sea."},
        "finish": "stop",
        "usage": {"prompt_tokens": 50, "completion_tokens": 4},
    },
    {
        "request": {"model": "big", "max_tokens": 3, "messages": [{"role": "user", "content": "Count to ten."}]},
        "message": {"role": "assistant", "content": "1 2 3"},
        "finish": "length",
        "usage": {"prompt_tokens": 5, "completion_tokens": 3},
    },
]
START = 1_760_000_000.25


@functools.cache
def shared_samples() -> list[dict]:
    """Real calls of the shared data whose fields every format has a place for; read once, not to be changed."""
    path = DATA / "agents"
    if not path.is_dir():
        pytest.skip(NO_DATA)
    files = [path / "tau_airline.sessions.jsonl.gz", path / "http_pydantic_ai.calls.jsonl.gz"]
    reader, found = LogReader(PSEUDONYMS, 0.0), []
    for file in files:
        calls = (item for item in reader.read(file) if isinstance(item, AgentCall) and _is_plain(item))
        for call in itertools.islice(calls, 60):
            kept = ("model", "messages", "tools", "temperature", "max_tokens")
            request = {key: call.request[key] for key in kept if call.request.get(key) is not None}
            usage = {key: count for key, count in call.usage.model_dump().items() if count is not None}
            sample = {"request": request, "message": call.message, "finish": call.finish_reason, "usage": usage}
            found.append(sample)
    assert len(found) > 60
    return found


def _is_plain(call: AgentCall) -> bool:
    def is_plain(message: dict) -> bool:
        is_known = set(message) <= {"role", "content", "tool_calls", "tool_call_id"}
        return is_known and (message.get("content") is None or isinstance(message["content"], str))

    has_functions = all("function" in tool for tool in call.request.get("tools") or [])
    messages = [*call.request["messages"], call.message or {"is": "absent"}]
    return all(map(is_plain, messages)) and bool(call.finish_reason) and has_functions


def value(plain):
    """An OTLP AnyValue."""
    if isinstance(plain, bool):
        return {"boolValue": plain}
    if isinstance(plain, int):
        return {"intValue": str(plain)}
    if isinstance(plain, float):
        return {"doubleValue": plain}
    if isinstance(plain, list):
        return {"arrayValue": {"values": [value(item) for item in plain]}}
    if isinstance(plain, dict):
        return {"kvlistValue": {"values": [{"key": key, "value": value(item)} for key, item in plain.items()]}}
    return {"stringValue": plain} if plain is not None else {}


def pairs(attributes: dict) -> list[dict]:
    return [{"key": key, "value": value(item)} for key, item in attributes.items() if item is not None]


def span(number: int, attributes: dict, events: list[tuple[str, dict]] = (), **fields) -> dict:
    nanoseconds = int((START + number) * 1e9)
    base = {
        "traceId": f"{number:032x}",
        "spanId": f"{number:016x}",
        "name": "chat big",
        "kind": 3,
        "startTimeUnixNano": str(nanoseconds),
        "endTimeUnixNano": str(nanoseconds + 1_500_000_000),
        "attributes": pairs(attributes),
        "events": [{"name": name, "attributes": pairs(inner)} for name, inner in events],
        "status": {},
    }
    return {**base, **fields}


def otlp(*spans: dict) -> dict:
    resource = {"attributes": pairs({"service.name": "desk"})}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "s"}, "spans": list(spans)}]}]}


def common_attributes(sample: dict) -> dict:
    request = sample["request"]
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.conversation.id": "talk",
        "gen_ai.request.model": request.get("model"),
        "gen_ai.request.temperature": request.get("temperature"),
        "gen_ai.request.max_tokens": request.get("max_tokens"),
        "gen_ai.response.finish_reasons": [sample["finish"]],
        "gen_ai.usage.input_tokens": sample["usage"].get("prompt_tokens"),
        "gen_ai.usage.output_tokens": sample["usage"].get("completion_tokens"),
        "user.id": "ann",
    }


def parts(message: dict) -> dict:
    """semantic-conventions-genai: model/gen-ai/gen-ai-input-messages.json."""
    if message["role"] == "tool":
        inner = [{"type": "tool_call_response", "id": message.get("tool_call_id"), "response": message["content"]}]
        return {"role": "tool", "parts": inner}
    inner = [{"type": "text", "content": message["content"]}] if message.get("content") is not None else []
    for call in message.get("tool_calls") or []:
        function = call["function"]
        inner.append(
            {
                "type": "tool_call",
                "id": call["id"],
                "name": function["name"],
                "arguments": json.loads(function["arguments"]),
            }
        )
    return {"role": message["role"], "parts": inner}


def as_otel(number: int, sample: dict, structured: bool = False) -> dict:
    request = sample["request"]
    finish = {"tool_calls": "tool_call"}.get(sample["finish"], sample["finish"])
    content = {
        "gen_ai.input.messages": [parts(message) for message in request["messages"]],
        "gen_ai.output.messages": [{**parts(sample["message"]), "finish_reason": finish}],
        "gen_ai.tool.definitions": [{"type": "function", **tool["function"]} for tool in request.get("tools", [])],
    }
    content = content if structured else {key: json.dumps(item) for key, item in content.items()}
    return otlp(span(number, {**common_attributes(sample), **content}))


def as_openllmetry(number: int, sample: dict) -> dict:
    """opentelemetry-semantic-conventions-ai: one attribute for each leaf."""
    attributes = {**common_attributes(sample), "gen_ai.operation.name": None, "llm.request.type": "chat"}
    attributes |= {"gen_ai.usage.input_tokens": None, "gen_ai.usage.output_tokens": None}
    attributes["gen_ai.usage.prompt_tokens"] = sample["usage"].get("prompt_tokens")
    attributes["gen_ai.usage.completion_tokens"] = sample["usage"].get("completion_tokens")
    attributes |= {"user.id": None, "traceloop.association.properties.user_id": "ann"}
    attributes |= {"gen_ai.conversation.id": None, "traceloop.association.properties.session_id": "talk"}
    said = {**sample["message"], "finish_reason": sample["finish"]}
    for prefix, messages in (("gen_ai.prompt", sample["request"]["messages"]), ("gen_ai.completion", [said])):
        for at, message in enumerate(messages):
            for key in ("role", "content", "tool_call_id", "finish_reason"):
                attributes[f"{prefix}.{at}.{key}"] = message.get(key)
            for index, call in enumerate(message.get("tool_calls") or []):
                for key, leaf in {"id": call["id"], **call["function"]}.items():
                    attributes[f"{prefix}.{at}.tool_calls.{index}.{key}"] = leaf
    for at, tool in enumerate(sample["request"].get("tools", [])):
        for key, leaf in tool["function"].items():
            attributes[f"llm.request.functions.{at}.{key}"] = json.dumps(leaf) if key == "parameters" else leaf
    return otlp(span(number, attributes))


def as_message_events(number: int, sample: dict) -> dict:
    """semantic-conventions v1.36.0: gen-ai-events.md; the body in `gen_ai.event.content`."""
    events = []
    for message in sample["request"]["messages"]:
        body = {key: item for key, item in message.items() if key != "tool_call_id"}
        body |= {"id": message["tool_call_id"]} if "tool_call_id" in message else {}
        events.append((f"gen_ai.{message['role']}.message", {"gen_ai.event.content": json.dumps(body)}))
    choice = {"index": 0, "finish_reason": sample["finish"], "message": sample["message"]}
    events.append(("gen_ai.choice", {"gen_ai.event.content": json.dumps(choice)}))
    tools = [{"type": "function", **tool["function"]} for tool in sample["request"].get("tools", [])]
    attributes = {**common_attributes(sample), "gen_ai.tool.definitions": json.dumps(tools)}
    return otlp(span(number, attributes, events))


def completion(sample: dict) -> dict:
    choice = {"index": 0, "message": sample["message"], "finish_reason": sample["finish"]}
    usage = {"usage": sample["usage"]} if sample["usage"] else {}
    model = sample["request"].get("model")
    return {"id": "chatcmpl-x", "object": "chat.completion", "model": model, "choices": [choice], **usage}


def as_litellm(number: int, sample: dict) -> dict:
    """docs.litellm.ai/docs/proxy/logging_spec."""
    parameters = {key: item for key, item in sample["request"].items() if key not in ("model", "messages")}
    return {
        "id": f"chatcmpl-{number}",
        "trace_id": "talk",
        "call_type": "acompletion",
        "response_cost": 0.002,
        "status": "success",
        "prompt_tokens": sample["usage"].get("prompt_tokens"),
        "completion_tokens": sample["usage"].get("completion_tokens"),
        "startTime": START + number,
        "endTime": START + number + 1.5,
        "model": "openai/big-2026",
        "model_group": sample["request"].get("model"),
        "metadata": {"user_api_key_alias": "desk", "user_api_key_hash": "h"},
        "end_user": "ann",
        "messages": sample["request"]["messages"],
        "response": completion(sample),
        "model_parameters": parameters,
    }


def as_spend_row(number: int, sample: dict) -> dict:
    """schema.prisma: LiteLLM_SpendLogs with store_prompts_in_spend_logs, as a CSV-like dump prints it."""
    start = "2025-10-09T08:53:20.250000+00:00" if not number else None
    return {
        "request_id": f"chatcmpl-{number}",
        "call_type": "acompletion",
        "api_key": "hash",
        "spend": 0.002,
        "prompt_tokens": sample["usage"].get("prompt_tokens"),
        "completion_tokens": sample["usage"].get("completion_tokens"),
        "startTime": start or iso(START + number),
        "endTime": iso(START + number + 1.5),
        "model": "openai/big-2026",
        "model_group": sample["request"].get("model"),
        "metadata": json.dumps({"user_api_key_alias": "desk"}),
        "end_user": "ann",
        "messages": "{}",
        "response": json.dumps(completion(sample)),
        "proxy_server_request": json.dumps({**sample["request"], "user": "ann"}),
        "session_id": "talk",
        "status": "success",
    }


def iso(ts: float) -> str:
    return datetime.datetime.fromtimestamp(ts, datetime.UTC).isoformat()


def as_langfuse_api(number: int, sample: dict) -> dict:
    """api-reference: ObservationsView, beside what the trace carries."""
    settings = {key: item for key, item in sample["request"].items() if key not in ("model", "messages", "tools")}
    tools = {"tools": sample["request"]["tools"]} if "tools" in sample["request"] else {}
    return {
        "id": f"obs-{number}",
        "traceId": f"trace-{number}",
        "type": "GENERATION",
        "name": "llm",
        "startTime": iso(START + number).replace("+00:00", "Z"),
        "endTime": iso(START + number + 1.5).replace("+00:00", "Z"),
        "level": "DEFAULT",
        "model": sample["request"].get("model"),
        "modelParameters": settings,
        "input": {"messages": sample["request"]["messages"], **tools},
        "output": {**sample["message"], "finish_reason": sample["finish"]},
        "usageDetails": {
            "input": sample["usage"].get("prompt_tokens"),
            "output": sample["usage"].get("completion_tokens"),
        },
        "calculatedTotalCost": 0.002,
        "userId": "ann",
        "sessionId": "talk",
        "traceName": "desk",
    }


def as_langfuse_blob(number: int, sample: dict) -> dict:
    """blob-storage-export-fields: snake case, JSON in text."""
    api = as_langfuse_api(number, sample)
    tools = {tool["function"]["name"]: json.dumps(tool) for tool in sample["request"].get("tools", [])}
    return {
        "id": api["id"],
        "trace_id": api["traceId"],
        "type": "GENERATION",
        "start_time": iso(START + number).replace("T", " ").removesuffix("+00:00"),
        "end_time": iso(START + number + 1.5).replace("T", " ").removesuffix("+00:00"),
        "name": "llm",
        "level": "DEFAULT",
        "provided_model_name": api["model"],
        "model_parameters": json.dumps(api["modelParameters"]),
        "input": json.dumps(sample["request"]["messages"]),
        "output": json.dumps(api["output"]),
        "usage_details": {key: count for key, count in api["usageDetails"].items() if count is not None},
        "total_cost": 0.002,
        "tool_definitions": tools,
        "user_id": "ann",
        "session_id": "talk",
        "trace_name": "desk",
    }


TIMED = {
    "otel": as_otel,
    "otel structured": lambda number, sample: as_otel(number, sample, structured=True),
    "openllmetry": as_openllmetry,
    "message events": as_message_events,
    "litellm": as_litellm,
    "spend log": as_spend_row,
    "langfuse api": as_langfuse_api,
    "langfuse blob": as_langfuse_blob,
}


def write(tmp_path, records: list, name: str = "log.jsonl") -> pathlib.Path:
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def read(path, **options) -> list:
    return list(LogReader(PSEUDONYMS, 1000.0, **options).read(path))


def read_records(tmp_path, *records, **options) -> list:
    return read(write(tmp_path, list(records)), **options)


def what(items) -> list[str]:
    return [item.reason if not isinstance(item, AgentCall) else "call" for item in items]


def canonical(message: dict) -> dict:
    """Equal for equal meaning: arguments by value, and null, absent and empty lists alike."""
    kept = {key: item for key, item in message.items() if item not in (None, [])}
    if "tool_calls" in kept:
        kept["tool_calls"] = [
            (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in kept["tool_calls"]
        ]
    return kept


def check_same(call: AgentCall, sample: dict) -> None:
    request = sample["request"]
    assert [canonical(message) for message in call.request["messages"]] == [
        canonical(message) for message in request["messages"]
    ]
    settings = {key: item for key, item in call.request.items() if key != "messages"}
    assert settings == {key: item for key, item in request.items() if key != "messages" and item not in (None, [])}
    assert (canonical(call.message), call.finish_reason) == (canonical(sample["message"]), sample["finish"])
    assert call.usage.model_dump(exclude_none=True) == sample["usage"]
