"""training/formats.py: every record of a log becomes a call or a quarantine row, whatever is wrong with it."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.access import Pseudonyms
from cluster.errors import InputError
from cluster.quarantine import QuarantineRow
from cluster.records import AgentCall
from training import log_files
from training.formats import LogReader

PSEUDONYMS = Pseudonyms(b"k" * 32)


def make_record(index: int = 0, **fields) -> dict:
    values = {
        "id": f"r{index}",
        "source": "desk-logs",
        "agent": "desk",
        "session": f"s{index}",
        "step": 2,
        "request": {"model": "big", "messages": [{"role": "user", "content": f"question {index}"}]},
        "response": {"model": "big", "choices": [{"message": {"role": "assistant", "content": "SECRET"}}]},
    }
    return {key: value for key, value in {**values, **fields}.items() if value != "ABSENT"}


def read(path) -> list[AgentCall | QuarantineRow]:
    return list(LogReader(PSEUDONYMS, 1000.0).read(path))


def read_lines(tmp_path, *lines: bytes | dict) -> list[AgentCall | QuarantineRow]:
    path = tmp_path / "log.calls.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return read(path)


def reasons(items) -> list[str | None]:
    return [item.reason if isinstance(item, QuarantineRow) else None for item in items]


def test_a_call_line_becomes_a_call_with_pseudonyms(tmp_path):
    record = make_record(latency_ms=12, label="greet", label_kind="gold", outcome={"reward": 1})
    record["response"]["usage"] = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    (call,) = read_lines(tmp_path, record)
    assert (call.call_id, call.agent, call.step, call.label, call.latency_ms) == ("r0", "desk", 2, "greet", 12.0)
    assert (call.usage.prompt_tokens, call.usage.completion_tokens) == (3, 4)
    assert (call.request, call.response, call.outcome) == (record["request"], record["response"], {"reward": 1})
    assert call.session_id == PSEUDONYMS.session_of("desk-logs", "s0")
    assert call.client_id == PSEUDONYMS.of("client", "desk-logs")
    assert call.served_by == "llm"


def test_the_same_session_id_of_two_clients_is_two_sessions(tmp_path):
    records = [make_record(i, session="1", client=client) for i, client in enumerate(("a", "b", "a"))]
    first, second, third = read_lines(tmp_path, *records)
    assert first.session_id == third.session_id != second.session_id


def test_gold_annotations_are_marked_as_written_by_people(tmp_path):
    record = make_record()
    record["response"]["model"] = "gold-annotation"
    assert read_lines(tmp_path, record)[0].served_by == "gold"


def test_a_session_line_is_unrolled(tmp_path):
    messages = [
        {"role": "system", "content": "help"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "done"},
    ]
    refs = [
        {"id": "a", "step": 0, "at": 2},
        {"id": "b", "step": 1, "at": 4, "usage": {"prompt_tokens": 9}, "label": "end"},
    ]
    session = {"agent": "desk", "session": "s", "outcome": {"reward": 0.0}, "request": {"model": "big", "tools": []}}
    path = tmp_path / "log.sessions.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({**session, "messages": messages, "calls": refs}).encode()))
    first, second = read(path)
    assert first.request == {"model": "big", "tools": [], "messages": messages[:2]}
    assert (first.message, first.response["choices"][0]["finish_reason"]) == (messages[2], "tool_calls")
    assert (second.message, second.request["messages"], second.label) == (messages[4], messages[:4], "end")
    assert second.usage.prompt_tokens == 9
    assert first.session_id == second.session_id


def test_calls_without_a_time_keep_their_order_and_one_with_a_time_keeps_its_own(tmp_path):
    calls = read_lines(tmp_path, make_record(0), make_record(1, ts=5.5), make_record(2))
    assert [call.ts for call in calls] == [1000.0, 5.5, 1000.002]


def test_a_huge_prompt_is_taken_whole(tmp_path):
    request = {"messages": [{"role": "user", "content": "x" * 300_000}]}
    (call,) = read_lines(tmp_path, make_record(request=request))
    assert call.request == request


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "r1", "request": {"mess', "not JSON"),
        (b'{"id": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b'{"id": "\\ud800"}', "not UTF-8"),
        (b"[1]", "wrong type"),
        (make_record(id="ABSENT"), "no id"),
        (make_record(id=7), "wrong type"),
        (make_record(request="ABSENT"), "no messages"),
        (make_record(request={"messages": []}), "no messages"),
        (make_record(request={"messages": "SECRET"}), "wrong type"),
        (make_record(request={"messages": ["SECRET"]}), "wrong type"),
        (make_record(response="ABSENT"), "no response"),
        (make_record(response={"choices": []}), "no response"),
        (make_record(response={"choices": [{"text": "SECRET"}]}), "no response"),
        (make_record(response=["SECRET"]), "wrong type"),
        (make_record(step="1"), "wrong type"),
        (make_record(step=True), "wrong type"),
        (make_record(latency_ms="fast"), "wrong type"),
        (make_record(ts=1_700_000_000_000), "wrong type"),
        (make_record(outcome="SECRET"), "wrong type"),
        (make_record(label=["SECRET"]), "wrong type"),
        ({"session": "s", "calls": []}, "no calls"),
        ({"session": "s", "calls": "SECRET"}, "wrong type"),
        ({"session": "s", "calls": [{"id": "c", "at": 1}]}, "no messages"),
        ({"messages": [{"role": "user"}], "calls": [{"id": "c", "at": 1}]}, "no response"),
        ({"messages": [{"role": "user"}], "calls": [{"id": "c", "at": -1}]}, "no messages"),
        ({"messages": [{"role": "user"}], "calls": [{"id": "c"}]}, "no messages"),
        ({"messages": [{"role": "user"}], "calls": ["SECRET"]}, "no id"),
    ],
)
def test_a_bad_line_is_quarantined_without_its_content_and_stops_nothing(tmp_path, line, reason):
    before, row, after = read_lines(tmp_path, make_record(90), line, make_record(91))
    assert reasons([before, row, after]) == [None, reason, None]
    assert row.line == 2
    assert "SECRET" not in row.reason + row.detail


def test_a_duplicate_id_is_quarantined_over_all_files_of_a_reader(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.calls.jsonl").write_text(json.dumps(make_record()))
    reader = LogReader(PSEUDONYMS, 0.0)
    items = [item for name in ("a", "b") for item in reader.read(tmp_path / f"{name}.calls.jsonl")]
    assert reasons(items) == [None, "duplicate id"]


def test_a_line_longer_than_the_limit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(log_files, "MAX_LINE_BYTES", 1000)
    long = make_record(1, label="x" * 5000)
    assert reasons(read_lines(tmp_path, make_record(0), long, make_record(2))) == [None, "line too long", None]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no gzip"])
def test_a_corrupt_gzip_keeps_what_was_readable_and_says_where_it_broke(tmp_path, damage):
    lines = [json.dumps(make_record(index, label=str(hash(index) * 7919 % 10**9))) for index in range(3000)]
    data = bytearray(gzip.compress("\n".join(lines).encode()))
    if damage == "truncated":
        data = data[: len(data) * 2 // 3]
    elif damage == "flipped":
        middle = len(data) * 2 // 3
        data[middle : middle + 40] = bytes(40)
    else:
        data = bytearray(b"plain text")
    path = tmp_path / "log.calls.jsonl.gz"
    path.write_bytes(data)
    *items, row = read(path)
    assert (row.reason, row.line) == ("corrupt file", len(items) + 1)
    num_intact = 0 if damage == "no gzip" else 1000
    assert [item.call_id for item in items[:num_intact]] == [f"r{index}" for index in range(num_intact)]


@pytest.mark.parametrize("name", ["", "missing.calls.jsonl", "log.csv"])
def test_a_path_that_cannot_be_a_log_names_path_allowed_and_next_command(tmp_path, name):
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(InputError, match="allowed: .*; next: ") as caught:
        LogReader(PSEUDONYMS, 0.0).read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


GOOD_OR_BAD = st.sampled_from(["good", "truncated", "no messages", "no response", "duplicate", "session"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(GOOD_OR_BAD, max_size=12))
def test_every_record_is_a_call_or_a_row(tmp_path_factory, kinds):
    lines, expected = [], []
    for index, kind in enumerate(kinds):
        record = make_record(index)
        if kind == "truncated":
            lines.append(json.dumps(record)[:-3])
        elif kind == "session":
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            refs = [{"id": f"{index}/0", "at": 1}, {"id": f"{index}/1", "at": 2}]
            lines.append(json.dumps({"messages": messages, "calls": refs}))
        else:
            record.update({"no messages": {"request": {}}, "no response": {"response": None}}.get(kind, {}))
            record.update({"id": "same"} if kind == "duplicate" else {})
            lines.append(json.dumps(record))
        expected += (
            [True, False]
            if kind == "session"
            else [kind == "good" or (kind == "duplicate" and "duplicate" not in kinds[:index])]
        )
    path = tmp_path_factory.mktemp("logs") / "log.calls.jsonl"
    path.write_text("\n".join(lines))
    assert [isinstance(item, AgentCall) for item in read(path)] == expected
