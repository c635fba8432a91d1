"""understudy bench curate: what is missing is told before minutes of work; the speed part counts what it says."""

from __future__ import annotations

import json
import pathlib

import pytest

from jobs.__main__ import main
from jobs.bench.curate_speed import measure_curate


def test_without_data_it_says_where_data_may_be(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("UNDERSTUDY_DATA", str(tmp_path))
    assert main(["bench", "curate"]) == 2
    error = capsys.readouterr().err
    assert "templates_x_tau" in error and "--pii" in error and "UNDERSTUDY_DATA" in error


@pytest.mark.parametrize("name", ["", "no/such/folder.json"])
def test_an_output_that_cannot_be_written_is_told_first(tmp_path, capsys, name):
    for bench in ("curate", "discover"):
        assert main(["bench", bench, "--json", str(tmp_path / name)]) == 2
        assert "--json" in capsys.readouterr().err


def test_calls_a_second_and_memory_are_those_of_a_run_of_its_own(tmp_path: pathlib.Path):
    path = tmp_path / "a.calls.jsonl"
    records = [
        {
            "id": f"c{number}",
            "request": {"messages": [{"role": "user", "content": f"Where is parcel {number} of street {number % 7}?"}]},
            "response": {"choices": [{"message": {"role": "assistant", "content": "On its way."}}]},
        }
        for number in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    numbers = measure_curate([path], sizes=(30, 60))
    assert [row["calls"] for row in numbers["growth"]] == [30, 60]
    assert all(row["calls_per_s_core"] > 0 and row["peak_rss_mib"] > 50 for row in numbers["growth"])
