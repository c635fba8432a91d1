"""The foreign formats: records written as each source's own documents say, read back as the calls they were made of."""

import json

import pytest
from foreign_logs import (
    PSEUDONYMS,
    SAMPLES,
    START,
    TIMED,
    as_langfuse_api,
    as_langfuse_blob,
    as_litellm,
    as_message_events,
    as_openllmetry,
    as_otel,
    as_spend_row,
    check_same,
    common_attributes,
    otlp,
    pairs,
    read,
    read_records,
    shared_samples,
    span,
    what,
    write,
)

from cluster.errors import InputError
from cluster.quarantine import QuarantineRow
from cluster.records import AgentCall
from training.formats import LogReader
from training.log_records import ReadRules, Skipped


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
