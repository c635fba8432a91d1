"""The foreign formats: records written as each source's own documents say, read back as the calls they were made of."""

import csv
import io
import itertools
import json
import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.access import Pseudonyms
from cluster.errors import InputError
from cluster.quarantine import QuarantineRow
from cluster.records import AgentCall
from training.formats import LogReader
from training.log_records import ReadRules, Skipped

PSEUDONYMS = Pseudonyms(b"k" * 32)
DATA = pathlib.Path(os.environ.get("UNDERSTUDY_DATA", pathlib.Path(__file__).parents[2] / "../shared/data"))
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


def shared_samples() -> list[dict]:
    """Real calls of the shared data whose fields every format has a place for."""
    path = DATA / "agents"
    if not path.is_dir():
        pytest.skip("shared data not found")
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
        "startTime": start or _iso(START + number),
        "endTime": _iso(START + number + 1.5),
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


def _iso(ts: float) -> str:
    import datetime

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
        "startTime": _iso(START + number).replace("+00:00", "Z"),
        "endTime": _iso(START + number + 1.5).replace("+00:00", "Z"),
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
        "start_time": _iso(START + number).replace("T", " ").removesuffix("+00:00"),
        "end_time": _iso(START + number + 1.5).replace("T", " ").removesuffix("+00:00"),
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


@pytest.mark.parametrize("origin", ["inline", "shared"])
@pytest.mark.parametrize("source", TIMED)
def test_a_call_survives_the_way_through_a_foreign_log(tmp_path, source, origin):
    samples = SAMPLES if origin == "inline" else shared_samples()
    calls = read_records(tmp_path, *(TIMED[source](number, sample) for number, sample in enumerate(samples)))
    assert what(calls) == ["call"] * len(samples)
    for number, (call, sample) in enumerate(zip(calls, samples, strict=True)):
        check_same(call, sample)
        assert (call.ts, call.latency_ms) == pytest.approx((START + number, 1500.0))
        assert (call.agent, call.status) == ("desk", 200)
        assert call.client_id == PSEUDONYMS.of("client", "ann")
        assert call.session_id == PSEUDONYMS.session_of("ann", "talk")
        assert call.step == sum(message["role"] == "assistant" for message in sample["request"]["messages"])
        assert "otel" in source or call.cost_usd in (0.002, None)


@pytest.mark.parametrize("origin", ["inline", "shared"])
def test_a_fine_tuning_file_asks_what_stands_before_its_last_answer(tmp_path, origin):
    samples = SAMPLES if origin == "inline" else shared_samples()
    lines = []
    for sample in samples:
        history = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in sample["request"]["messages"]]
        tools = {"tools": sample["request"]["tools"]} if "tools" in sample["request"] else {}
        lines.append({"messages": [*history, sample["message"]], **tools, "parallel_tool_calls": False})
    calls = read_records(tmp_path, *lines)
    assert what(calls) == ["call"] * len(samples)
    for call, sample in zip(calls, samples, strict=True):
        assert call.request["messages"] == sample["request"]["messages"]
        assert (call.message, call.request.get("tools")) == (sample["message"], sample["request"].get("tools"))
        assert call.request["parallel_tool_calls"] is False
    assert len({call.session_id for call in calls}) == len({call.call_id for call in calls}) == len(calls)
    assert [call.call_id for call in read_records(tmp_path, *lines)] == [call.call_id for call in calls]


def test_a_fine_tuning_answer_of_weight_0_is_no_answer(tmp_path):
    user, first, second = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
    )
    one, none, no_answer = read_records(
        tmp_path, {"messages": [user, first, user, second]}, {"messages": [user, second]}, {"messages": [user]}
    )
    assert (one.message, one.request["messages"]) == (first, [user])
    assert isinstance(none, Skipped) and "weight 0" in none.reason
    assert no_answer.reason == "no response"


def batch(number: int, sample: dict, url: str = "/v1/chat/completions") -> tuple[dict, dict]:
    """api-reference/batch: BatchRequestInput and BatchRequestOutput."""
    asked = {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {**sample["request"], "user": "ann"}}
    answer = {"status_code": 200, "request_id": "q", "body": {**completion(sample), "created": int(START)}}
    return asked, {"id": f"batch_req_{number}", "custom_id": f"r{number}", "response": answer, "error": None}


@pytest.mark.parametrize("order", [("in", "out"), ("out", "in")])
def test_batch_outputs_are_joined_to_their_inputs_whatever_file_comes_first(tmp_path, order):
    asked, said = zip(*(batch(number, sample) for number, sample in enumerate(SAMPLES)), strict=True)
    failed, expired, other = batch(7, SAMPLES[0]), batch(8, SAMPLES[0]), batch(9, SAMPLES[0], "/v1/embeddings")
    failed[1]["response"] = {"status_code": 429, "body": {"error": {"message": "SECRET", "code": "rate_limit"}}}
    expired[1].update(response=None, error={"code": "batch_expired", "message": "SECRET"})
    lost = {"custom_id": "lost", "method": "POST", "url": "/v1/chat/completions", "body": SAMPLES[0]["request"]}
    stray = {**said[0], "id": "batch_req_stray", "custom_id": "stray"}
    files = {
        "in": write(tmp_path, [*asked, failed[0], expired[0], other[0], lost], "in.jsonl"),
        "out": write(tmp_path, [*reversed(said), failed[1], expired[1], other[1], stray], "out.jsonl"),
    }
    reader = LogReader(PSEUDONYMS, 0.0)
    items = [item for path in reader.prepare([files[name] for name in order]) for item in reader.read(path)]
    assert what(items)[:3] == ["call"] * 3
    for call, sample in zip(items[:3], reversed(SAMPLES), strict=True):
        check_same(call, sample)
        assert (call.ts, call.client_id) == (int(START), PSEUDONYMS.of("client", "ann"))
        assert "user" not in call.request
    assert [(call.status, call.error, call.response) for call in items[3:5]] == [
        (429, "rate_limit", None),
        (500, "batch_expired", None),
    ]
    assert what(items)[5:] == [
        "not a chat call: /v1/embeddings",
        "no request",
        "a batch request without an output in the files given",
    ]


def test_two_batches_that_use_one_custom_id_for_two_requests_are_not_mixed(tmp_path):
    asked, said = batch(0, SAMPLES[0])
    files = [
        write(tmp_path, [asked], "in1.jsonl"),
        write(tmp_path, [{**asked, "body": SAMPLES[1]["request"]}], "in2.jsonl"),
        write(tmp_path, [said], "out.jsonl"),
    ]
    reader = LogReader(PSEUDONYMS, 0.0)
    items = [item for path in reader.prepare(files) for item in reader.read(path)]
    assert what(items)[0] == "ambiguous request"


def test_pairs_and_stored_completions_of_openai(tmp_path):
    sample = SAMPLES[0]
    stored = {**completion(sample), "id": "chatcmpl-s", "messages": sample["request"]["messages"], "tools": [TOOL]}
    stored |= {"temperature": 0.5, "created": int(START), "metadata": {"session_id": "talk", "user_id": "ann"}}
    error = {"request": sample["request"], "response": {"error": {"type": "server_error", "message": "SECRET"}}}
    pair, kept, failed = read_records(
        tmp_path, {"request": sample["request"], "response": completion(sample)}, stored, error
    )
    check_same(pair, sample)
    check_same(kept, sample)
    assert (kept.session_id, kept.ts) == (PSEUDONYMS.session_of("ann", "talk"), int(START))
    assert (failed.status, failed.error, failed.response) == (500, "server_error", None)


def test_failed_calls_are_kept_with_the_class_of_their_error_and_no_text(tmp_path):
    broken = as_otel(0, SAMPLES[0])["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    broken["status"] = {"code": 2, "message": "SECRET"}
    broken["attributes"] += pairs({"error.type": "RateLimitError", "http.response.status_code": 429})
    litellm = {**as_litellm(0, SAMPLES[0]), "status": "failure", "error_str": "SECRET", "response": None}
    litellm["error_information"] = {
        "error_code": "401",
        "error_class": "AuthenticationError",
        "error_message": "SECRET",
    }
    langfuse = {**as_langfuse_api(0, SAMPLES[0]), "level": "ERROR", "statusMessage": "SECRET", "output": None}
    found = []
    for index, record in enumerate((otlp(broken), litellm, langfuse)):
        (call,) = read(write(tmp_path, [record], f"{index}.jsonl"))
        assert call.response is None and "SECRET" not in call.model_dump_json()
        found.append((call.status, call.error))
    assert found == [(429, "RateLimitError"), (401, "AuthenticationError"), (500, "ERROR")]


def test_what_is_no_chat_call_is_skipped_with_its_reason(tmp_path):
    embedding = {**common_attributes(SAMPLES[0]), "gen_ai.operation.name": "embeddings"}
    items = read(write(tmp_path, [otlp(span(0, embedding), span(1, {"http.method": "GET"}))], "otel.jsonl"))
    items += read(write(tmp_path, [{**as_litellm(0, SAMPLES[0]), "call_type": "aembedding"}], "litellm.jsonl"))
    items += read(write(tmp_path, [{**as_langfuse_api(0, SAMPLES[0]), "type": "SPAN"}], "langfuse.jsonl"))
    assert what(items) == [
        "not a chat call: embeddings",
        "a span that is no call to a model",
        "not a chat call: aembedding",
        "not a chat call: SPAN",
    ]
    assert all(isinstance(item, Skipped) for item in items)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (otlp(span(0, {"gen_ai.operation.name": "chat"})), "no messages"),
        (otlp("SECRET"), "wrong type"),
        ({"resourceSpans": "SECRET"}, "wrong type"),
        (otlp(span(0, {**common_attributes(SAMPLES[2]), "gen_ai.input.messages": "[SECRET"})), "no messages"),
        (
            otlp(
                span(
                    0,
                    {
                        "gen_ai.operation.name": "chat",
                        "gen_ai.input.messages": json.dumps(
                            [{"role": "user", "parts": [{"type": "blob", "modality": "audio", "content": "SECRET"}]}]
                        ),
                    },
                )
            ),
            "unsupported part",
        ),
        ({**as_litellm(0, SAMPLES[0]), "messages": "redacted-by-litellm"}, "no messages"),
        ({**as_litellm(0, SAMPLES[0]), "response": None}, "no response"),
        ({**as_litellm(0, SAMPLES[0]), "startTime": "SECRET"}, "wrong type"),
        ({**as_spend_row(0, SAMPLES[0]), "proxy_server_request": "{}"}, "no messages"),
        (
            {
                **as_spend_row(0, SAMPLES[0]),
                "proxy_server_request": json.dumps(
                    {"messages": [{"role": "user", "content": "a... (litellm_truncated skipped 9 chars) ...b"}]}
                ),
            },
            "truncated",
        ),
        ({**as_langfuse_api(0, SAMPLES[0]), "input": None}, "no messages"),
        ({**as_langfuse_api(0, SAMPLES[0]), "output": None}, "no response"),
        ({**as_langfuse_api(0, SAMPLES[0]), "usageDetails": {"input": 2**63}}, "out of range"),
        ({**as_langfuse_api(0, SAMPLES[0]), "startTime": "yesterday"}, "wrong type"),
        ({"custom_id": "x", "id": "b", "response": {"status_code": 200, "body": {}}}, "no request"),
        ({"messages": "SECRET"}, "wrong type"),
        ({"request": {"messages": [{"role": "user"}]}, "response": {"choices": []}}, "no response"),
    ],
)
def test_a_bad_foreign_record_is_quarantined_without_its_content(tmp_path, record, reason):
    good = {
        "resourceSpans": as_otel,
        "call_type": as_litellm,
        "traceId": as_langfuse_api,
    }
    make = next((make for key, make in good.items() if key in record), None)
    after = make(5, SAMPLES[2]) if make else {"messages": [{"role": "user", "content": "q"}, SAMPLES[2]["message"]]}
    row, call = read_records(tmp_path, record, after)
    assert isinstance(row, QuarantineRow) and (row.reason, row.line) == (reason, 1)
    assert "SECRET" not in row.reason + row.detail
    assert isinstance(call, AgentCall)


def test_a_bad_span_costs_that_span_alone(tmp_path):
    good = [as_otel(n, SAMPLES[2])["resourceSpans"][0]["scopeSpans"][0]["spans"][0] for n in (1, 2)]
    items = read_records(tmp_path, otlp(good[0], span(9, {"gen_ai.operation.name": "chat"}), good[1]))
    assert what(items) == ["call", "no messages", "call"]


def test_a_trace_gives_its_observations_who_and_which_session(tmp_path):
    bare = ("userId", "sessionId", "traceName")
    inner = [
        {key: item for key, item in as_langfuse_api(n, s).items() if key not in bare} for n, s in enumerate(SAMPLES)
    ]
    inner.append({"id": "s", "type": "SPAN", "startTime": _iso(START)})
    trace = {"id": "t", "timestamp": _iso(START), "userId": "ann", "sessionId": "talk", "name": "desk"}
    legacy = {"id": "trace-0", "timestamp": _iso(START), "user_id": "ann", "session_id": "talk", "name": "desk"}
    nested = read(write(tmp_path, [{**trace, "observations": inner}], "nested.json"))
    download = read(write(tmp_path, [{"trace": trace, "observations": inner}], "download.json"))
    observation = {**as_langfuse_blob(0, SAMPLES[0]), "user_id": None, "session_id": None, "trace_name": None}
    files = [write(tmp_path, [observation], "observations.jsonl"), write(tmp_path, [legacy], "traces.jsonl")]
    reader = LogReader(PSEUDONYMS, 0.0)
    joined = [item for path in reader.prepare(files) for item in reader.read(path)]
    assert what(nested) == what(download) == ["call"] * 3 + ["not a chat call: SPAN"]
    assert what(joined) == ["call", "a trace without its observations"]
    for call in (*nested[:3], *download[:3], joined[0]):
        assert (call.client_id, call.agent) == (PSEUDONYMS.of("client", "ann"), "desk")
        assert call.session_id == PSEUDONYMS.session_of("ann", "talk")


def test_langfuse_as_csv_parquet_array_and_page_say_the_same(tmp_path):
    rows = [as_langfuse_blob(number, sample) for number, sample in enumerate(SAMPLES)]
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    for row in rows:
        table.writerow({key: json.dumps(item) if isinstance(item, dict) else item for key, item in row.items()})
    (tmp_path / "a.csv").write_text(text.getvalue(), encoding="utf-8-sig")
    counts = pa.map_(pa.string(), pa.int64())
    arrays = {key: [row[key] for row in rows] for key in rows[0] if key != "tool_definitions"}
    schema = pa.schema(
        [(key, counts if key == "usage_details" else pa.array(items).type) for key, items in arrays.items()]
    )
    arrays["usage_details"] = [list(row["usage_details"].items()) for row in rows]
    pq.write_table(pa.table(arrays, schema=schema), tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.json").write_text(json.dumps({"data": rows, "meta": {"page": 1}}))
    (tmp_path / "e.json").write_text(json.dumps({"data": rows, "meta": {"page": 1}}, indent=2))
    lines = read(write(tmp_path, rows))
    assert what(lines) == ["call"] * 3
    for name in ("a.csv", "c.json", "d.json", "e.json"):
        assert read(tmp_path / name) == lines
    # Where no tools are known, none was left out, and nothing tells that the turn has ended.
    without_tools = [
        call.model_copy(
            update={"request": {k: v for k, v in call.request.items() if k != "tools"}, "faces_person": False}
        )
        for call in lines
    ]
    assert read(tmp_path / "b.parquet") == without_tools


def test_the_client_is_whom_the_command_line_says(tmp_path):
    record = as_litellm(0, SAMPLES[0])
    record["metadata"]["user_api_key_end_user_id"] = "bob"
    path = write(tmp_path, [record, {**as_litellm(1, SAMPLES[1]), "metadata": {}}])

    def clients(**rules) -> tuple[list[str], int, str]:
        reader = LogReader(PSEUDONYMS, 0.0, rules=ReadRules(**rules))
        calls = list(reader.read(path))
        return [call.client_id for call in calls], reader.num_client_fallbacks, calls[0].agent

    ann, bob, acme = (PSEUDONYMS.of("client", name) for name in ("ann", "bob", "acme"))
    assert clients() == ([ann, ann], 0, "desk")
    assert clients(client="acme", agent="till") == ([acme, acme], 0, "till")
    assert clients(client_field="metadata.user_api_key_end_user_id") == ([bob, ann], 1, "desk")
    assert clients(client_field="no.such.field")[1] == 2


def test_a_field_of_otel_is_looked_up_by_the_name_of_its_attribute(tmp_path):
    path = write(tmp_path, [as_otel(0, SAMPLES[0])])
    for field, client in (("user.id", "ann"), ("resource.service.name", "desk")):
        (call,) = read(path, rules=ReadRules(client_field=field))
        assert call.client_id == PSEUDONYMS.of("client", client)


@pytest.mark.parametrize("source", TIMED)
def test_a_format_is_told_by_content_and_agrees_with_the_one_named(tmp_path, source):
    path = write(tmp_path, [TIMED[source](0, SAMPLES[0])], "anything.log")
    reader = LogReader(PSEUDONYMS, 0.0)
    reader.prepare([path])
    name = {"o": "otel", "m": "otel", "s": "litellm"}.get(source[0]) or source.split()[0]
    assert reader.format_of(path) == ("litellm" if source == "litellm" else name)
    assert read(path, format=reader.format_of(path)) == read(path)


@pytest.mark.parametrize("content", ["", "\n\n", "plain words\n", '{"some": "json"}', "[1, 2]", "\x00\x01\xff"])
def test_a_file_of_no_known_format_is_refused_with_the_next_command(tmp_path, content):
    path = tmp_path / "log.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match="allowed: understudy, openai, otel, litellm, langfuse; next: .*--format"):
        read(path)


@pytest.mark.parametrize("said", ['{"intent": "x"}', '[{"type": "flight"}]', '"quoted"', '{"content": "x"}', "[1, 2]"])
def test_an_answer_that_is_json_stays_the_text_it_is(tmp_path, said):
    sample = {**SAMPLES[2], "message": {"role": "assistant", "content": said}}
    blob = {**as_langfuse_blob(0, sample), "output": said, "input": "Count to ten."}
    langfuse = {**as_langfuse_api(0, sample), "output": said}
    litellm = {**as_litellm(0, sample), "response": said}
    old = {**common_attributes(sample), "gen_ai.prompt": "Count to ten.", "gen_ai.completion": said}
    records = [blob, langfuse, litellm, otlp(span(0, old)), as_openllmetry(0, sample), as_message_events(0, sample)]
    for index, record in enumerate(records):
        (call,) = read(write(tmp_path, [record], f"{index}.jsonl"))
        assert (call.message["content"], call.request["messages"]) == (said, sample["request"]["messages"])
