"""OpenAI's own files: fine-tuning lines, batches, pairs and stored completions, read back as the calls they were made of."""

import pytest
from foreign_logs import (
    PSEUDONYMS,
    SAMPLES,
    START,
    TOOL,
    check_same,
    completion,
    read_records,
    shared_samples,
    what,
    write,
)

from training.formats import LogReader
from training.log_records import Skipped


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
