"""Foreign records with anything in any place: each becomes a call that can be stored, a row or a skip; nothing is raised."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.access import Pseudonyms
from cluster.calls import read_calls, write_calls
from cluster.quarantine import QuarantineRow
from cluster.records import AgentCall
from cluster.store import Store
from training.formats import LogReader
from training.log_records import ReadRules, Skipped

MESSAGES = [{"role": "user", "content": "q"}]
ANSWER = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
COMPLETION = {"id": "x", "choices": [{"message": ANSWER, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}


def attribute(key, text):
    return {"key": key, "value": {"stringValue": text}}


SPAN = {
    "traceId": "a",
    "spanId": "b",
    "startTimeUnixNano": "1760000000000000000",
    "status": {"code": 0},
    "attributes": [
        attribute("gen_ai.operation.name", "chat"),
        attribute("gen_ai.input.messages", json.dumps([{"role": "user", "parts": [{"type": "text", "content": "q"}]}])),
        {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "5"}},
        attribute("gen_ai.completion.0.content", "a"),
        attribute("gen_ai.completion.0.tool_calls", "no calls"),
        attribute("gen_ai.completion.0.tool_calls.0.name", "f"),
        attribute(f"gen_ai.completion.{'9' * 5000}.content", "far"),
        {"key": "gen_ai.response.finish_reasons", "value": {"arrayValue": {"values": [{"stringValue": "stop"}]}}},
    ],
    "events": [{"name": "gen_ai.user.message", "attributes": [attribute("gen_ai.event.content", '{"content": "q"}')]}],
}
RECORDS = {
    "otel": {"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [{"spans": [SPAN]}]}]},
    "litellm": {
        "id": "a",
        "call_type": "completion",
        "startTime": 1.0,
        "endTime": 2.0,
        "metadata": {"user_api_key_alias": "k"},
        "messages": MESSAGES,
        "response": COMPLETION,
        "model_parameters": {"temperature": 0},
        "status": "success",
        "error_information": {"error_code": "400"},
        "response_cost": 0.1,
    },
    "langfuse": {
        "id": "a",
        "traceId": "t",
        "type": "GENERATION",
        "startTime": "2026-01-01T00:00:00Z",
        "input": {"messages": MESSAGES, "tools": []},
        "output": ANSWER,
        "usageDetails": {"input": 1, "output": 2},
        "toolDefinitions": {"f": "{}"},
        "costDetails": {"total": 0.1},
        "level": "DEFAULT",
    },
    "openai": {"custom_id": "a", "id": "b", "response": {"status_code": 200, "body": COMPLETION}, "error": None},
    "openai pair": {"id": "a", "request": {"messages": MESSAGES, "metadata": {"a": "b"}}, "response": COMPLETION},
    "openai example": {"messages": [*MESSAGES, {**ANSWER, "weight": 1}], "tools": []},
    "understudy": {"id": "a", "request": {"messages": MESSAGES}, "response": COMPLETION, "step": 1, "outcome": {}},
}
ANYTHING = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        2**63,
        2**70,
        1.5,
        1e300,
        "",
        "x",
        "{",
        "[]",
        "{}",
        "[1]",
        "9" * 40,
        [],
        [1],
        [[]],
        [{}],
        {},
        {"a": 1},
    ]
)


def places(value, at=()):
    """Every path in a value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def replaced(value, at, new):
    value = copy.deepcopy(value)
    if not at:
        return new
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return value


@pytest.mark.parametrize("name", RECORDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything_in_any_place_of_a_record_is_told_apart(tmp_path_factory, name, data):
    record = RECORDS[name]
    for _ in range(data.draw(st.integers(1, 2))):
        record = replaced(record, data.draw(st.sampled_from(list(places(record)))), data.draw(ANYTHING))
    folder = tmp_path_factory.mktemp("logs")
    path = folder / "a.jsonl"
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}}
    lines = [asked, record] if name == "openai" else [record]
    path.write_text("\n".join(map(json.dumps, lines)))
    rules = ReadRules(client_field="metadata.a")
    reader = LogReader(Pseudonyms(b"k" * 32), 0.0, format=name.split()[0], rules=rules)
    items = list(reader.read(path))
    assert all(isinstance(item, AgentCall | QuarantineRow | Skipped) for item in items)
    calls = [item for item in items if isinstance(item, AgentCall)]
    store = Store(str(folder / "store"))
    write_calls(store, calls)
    assert read_calls(store) == sorted(calls, key=lambda call: call.ts)


@pytest.mark.parametrize("name", RECORDS)
def test_the_records_that_are_changed_are_good_as_they_stand(tmp_path, name):
    path = tmp_path / "a.jsonl"
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}}
    path.write_text("\n".join(map(json.dumps, [asked, RECORDS[name]] if name == "openai" else [RECORDS[name]])))
    items = list(LogReader(Pseudonyms(b"k" * 32), 0.0).read(path))
    assert len([item for item in items if isinstance(item, AgentCall)]) == 1
