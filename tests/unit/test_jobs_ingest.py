"""jobs/ingest.py: logs end in calls/ or quarantine/, the counts add up, and a second import changes nothing."""

import gzip
import json
import os
import pathlib

import pytest
from shared_data import DATA, NO_DATA

from cluster.access import Pseudonyms
from cluster.calls import read_calls
from cluster.errors import InputError
from cluster.forgotten import mark_forgotten
from cluster.quarantine import read_quarantine
from cluster.store import Store
from jobs import ingest as module
from jobs.ingest import ingest
from training.log_records import ReadRules

PSEUDONYMS = Pseudonyms(b"k" * 32)


def write_log(path: pathlib.Path, num_calls: int, *bad_lines: str) -> pathlib.Path:
    records = [
        {
            "id": f"{path.name}-{index}",
            "session": f"s{index % 3}",
            "request": {"messages": [{"role": "user", "content": f"q{index}"}]},
            "response": {"choices": [{"message": {"role": "assistant", "content": "a"}}]},
        }
        for index in range(num_calls)
    ]
    path.write_text("\n".join([*map(json.dumps, records), *bad_lines]))
    return path


def test_counts_add_up_and_rows_say_where(tmp_path):
    store = Store(str(tmp_path / "store"))
    good, bad = write_log(tmp_path / "a.calls.jsonl", 5), write_log(tmp_path / "b.calls.jsonl", 2, "{", '{"id": "x"}')
    counts = ingest(store, [good, bad], PSEUDONYMS)
    assert (counts.num_records, counts.ingested, counts.quarantined, counts.already_present) == (9, 7, 2, 0)
    assert counts.by_file[str(bad)].quarantined == 2
    rows = read_quarantine(store)
    assert [(row.source, row.line, row.reason) for row in rows] == [
        (str(bad), 3, "not JSON"),
        (str(bad), 4, "no messages"),
    ]
    assert len(read_calls(store)) == 7


def test_ingesting_again_changes_nothing(tmp_path):
    store = Store(str(tmp_path / "store"))
    log = write_log(tmp_path / "a.calls.jsonl", 5, "{")
    ingest(store, [log], PSEUDONYMS)
    calls, files = read_calls(store), store.list("")
    counts = ingest(store, [log], PSEUDONYMS)
    assert (counts.ingested, counts.already_present, counts.quarantined) == (0, 5, 1)
    assert (read_calls(store), store.list("")) == (calls, files)


def test_a_grown_log_adds_only_what_is_new(tmp_path):
    store = Store(str(tmp_path / "store"))
    ingest(store, [write_log(tmp_path / "a.calls.jsonl", 3)], PSEUDONYMS)
    counts = ingest(store, [write_log(tmp_path / "a.calls.jsonl", 5)], PSEUDONYMS)
    assert (counts.ingested, counts.already_present) == (2, 3)
    assert len(read_calls(store)) == 5


def test_a_wrong_path_stops_before_anything_is_written(tmp_path):
    store = Store(str(tmp_path / "store"))
    with pytest.raises(InputError):
        ingest(store, [write_log(tmp_path / "a.calls.jsonl", 3), tmp_path / "missing.calls.jsonl"], PSEUDONYMS)
    assert store.list("") == []


def test_parts_are_bounded_and_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_CALLS_PER_PART", 2)
    store, told = Store(str(tmp_path / "store")), []
    log = write_log(tmp_path / "a.calls.jsonl", 5)
    ingest(store, [str(log)], PSEUDONYMS, progress=lambda *words: told.append(words), clock=lambda: 0.0)
    assert len(store.list("calls", ".parquet")) == 3
    assert [words[:2] for words in told] == [(str(log), 2), (str(log), 4), (str(log), 5)]
    assert told[-1][2] == log.stat().st_size
    assert [call.ts for call in read_calls(store)] == [0.0, 0.001, 0.002, 0.003, 0.004]


def test_real_logs_are_read_without_loss(tmp_path):
    if not DATA.is_dir():
        pytest.skip(NO_DATA)
    files = [DATA / "agents/tau2_usersim_gpt4o.sessions.jsonl.gz", DATA / "agents/http_otel.calls.jsonl.gz"]
    counts = ingest(Store(str(tmp_path)), files, PSEUDONYMS)
    assert (counts.ingested, counts.quarantined) == (271 + 30, 0)
    records = [json.loads(line) for line in gzip.open(files[1], "rt", encoding="utf-8")]
    stored = {call.call_id: call for call in read_calls(Store(str(tmp_path)))}
    assert all(stored[record["id"]].request == record["request"] for record in records)


def test_a_run_that_was_killed_is_continued_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_CALLS_PER_PART", 2)
    store = Store(str(tmp_path / "store"))
    lines = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(7)
    ]
    log = tmp_path / "examples.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)))

    def die(file, num_records, num_bytes):
        if num_records == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(store, [log], PSEUDONYMS, progress=die)
    assert len(read_calls(store)) == 4
    counts = ingest(store, [log], PSEUDONYMS)
    assert (counts.ingested, counts.already_present) == (3, 4)
    assert sorted(call.request["messages"][0]["content"] for call in read_calls(store)) == [f"q{n}" for n in range(7)]


def test_a_dry_run_counts_what_a_run_then_does_and_writes_nothing(tmp_path):
    store = Store(str(tmp_path / "store"))
    log = write_log(tmp_path / "a.calls.jsonl", 5, "{")
    ingest(store, [write_log(tmp_path / "old.calls.jsonl", 2)], PSEUDONYMS)
    before = store.list("")
    paths = [log, tmp_path / "old.calls.jsonl"]
    dry = ingest(store, paths, PSEUDONYMS, clock=lambda: 5.0, dry_run=True)
    assert store.list("") == before
    wet = ingest(store, paths, PSEUDONYMS, clock=lambda: 5.0)
    assert dry.model_copy(update={"quarantine": wet.quarantine}) == wet
    assert (dry.ingested, dry.already_present, dry.quarantine_reasons) == (5, 2, {"not JSON": 1})
    assert (dry.num_clients, dry.num_sessions, dry.untimed, dry.first_ts) == (1, 3, 7, 5.0)


def test_a_folder_is_read_whole_each_file_once_and_no_loop_is_followed(tmp_path):
    folder = tmp_path / "logs"
    (folder / "deep").mkdir(parents=True)
    write_log(folder / "a.calls.jsonl", 2)
    write_log(folder / "deep" / "b.calls.jsonl", 3)
    (folder / "notes.txt").write_text("no log")
    (folder / "empty.json").write_text("")
    (folder / ".hidden.jsonl").write_text("{}")
    (folder / "again.calls.jsonl").symlink_to(folder / "a.calls.jsonl")
    (folder / "loop").symlink_to(folder)
    (folder / "self.jsonl").symlink_to(folder / "self.jsonl")
    counts = ingest(Store(str(tmp_path / "store")), [folder, folder / "a.calls.jsonl"], PSEUDONYMS)
    assert (counts.ingested, counts.quarantined, len(counts.by_file)) == (5, 0, 2)


@pytest.mark.parametrize("kind", ["loop", "fifo", "empty folder", "missing", "unknown", "binary"])
def test_what_is_no_log_is_refused_before_anything_is_written(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "unknown":
        path.write_text('{"some": "thing"}')
    elif kind == "binary":
        path.write_bytes(bytes(range(256)))
    store = Store(str(tmp_path / "store"))
    with pytest.raises(InputError, match="allowed: .*; next: ") as caught:
        ingest(store, [write_log(tmp_path / "a.calls.jsonl", 3), path], PSEUDONYMS)
    assert str(path) in str(caught.value) and store.list("") == []


@pytest.mark.parametrize("field", ["step", "prompt_tokens"])
def test_a_count_that_no_column_could_hold_is_quarantined(tmp_path, field):
    log = write_log(tmp_path / "a.calls.jsonl", 3)
    first, second, third = map(json.loads, log.read_text().splitlines())
    second.update({"step": 2**63} if field == "step" else {})
    second["response"]["usage"] = {"prompt_tokens": 2**63} if field == "prompt_tokens" else {}
    third["response"]["usage"] = {"prompt_tokens": 2**63 - 1}
    log.write_text("\n".join(map(json.dumps, (first, second, third))))
    counts = ingest(Store(str(tmp_path / "store")), [log], PSEUDONYMS)
    assert (counts.ingested, counts.quarantine_reasons) == (2, {"out of range": 1})


def test_an_error_that_is_a_sentence_is_not_stored_where_everybody_reads(tmp_path):
    log = write_log(tmp_path / "a.calls.jsonl", 2)
    first, second = map(json.loads, log.read_text().splitlines())
    first |= {"status": 500, "error": "cannot answer: my name is SECRET", "response": None}
    second |= {"status": 429, "error": "RateLimitError"}
    log.write_text("\n".join(map(json.dumps, (first, second))))
    store = Store(str(tmp_path / "store"))
    assert ingest(store, [log], PSEUDONYMS).failed == 2
    assert [(call.status, call.error) for call in read_calls(store)] == [(500, "error"), (429, "RateLimitError")]


def test_a_forgotten_client_does_not_come_back_with_its_logs(tmp_path):
    store = Store(str(tmp_path / "store"))
    log, other = write_log(tmp_path / "a.calls.jsonl", 3), write_log(tmp_path / "b.calls.jsonl", 2)
    mark_forgotten(store, PSEUDONYMS.of("client", "gone"), 1_000.0, {})
    counts = ingest(store, [log], PSEUDONYMS, rules=ReadRules(client="gone"))
    assert (counts.ingested, counts.skipped, counts.skip_reasons) == (0, 3, {"client is forgotten": 3})
    assert ingest(store, [other], PSEUDONYMS, rules=ReadRules(client="stays")).ingested == 2
