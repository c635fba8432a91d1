"""jobs/ingest.py: logs end in calls/ or quarantine/, the counts add up, and a second import changes nothing."""

import gzip
import json
import os
import pathlib

import pytest

from cluster.access import Pseudonyms
from cluster.calls import read_calls
from cluster.errors import InputError
from cluster.quarantine import read_quarantine
from cluster.store import Store
from jobs import ingest as module
from jobs.ingest import ingest

PSEUDONYMS = Pseudonyms(b"k" * 32)
DATA = pathlib.Path(os.environ.get("UNDERSTUDY_DATA", pathlib.Path(__file__).parents[2] / "../shared/data"))


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
        pytest.skip("shared data not found")
    files = [DATA / "agents/tau2_usersim_gpt4o.sessions.jsonl.gz", DATA / "agents/http_otel.calls.jsonl.gz"]
    counts = ingest(Store(str(tmp_path)), files, PSEUDONYMS)
    assert (counts.ingested, counts.quarantined) == (271 + 30, 0)
    records = [json.loads(line) for line in gzip.open(files[1], "rt", encoding="utf-8")]
    stored = {call.call_id: call for call in read_calls(Store(str(tmp_path)))}
    assert all(stored[record["id"]].request == record["request"] for record in records)
