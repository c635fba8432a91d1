"""A scaling experiment that is killed: what it had measured stays, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from jobs.scale import laboratory

pytestmark = pytest.mark.integration

DEVICES, LEVELS = ("lamp", "heater", "fan", "radio"), ("low", "medium", "high")


def write_calls(path: pathlib.Path, count: int) -> None:
    rng = random.Random(0)
    lines = []
    for number in range(count):
        device, level = rng.choice(DEVICES), rng.choice(LEVELS)
        messages = [
            {"role": "system", "content": "Turn the command into JSON with device and level."},
            {"role": "user", "content": f"please put the {device} on {level}, this is number {number}"},
        ]
        answer = {"role": "assistant", "content": json.dumps({"device": device, "level": level})}
        request = {"messages": messages, "response_format": {"type": "json_object"}}
        response = {"choices": [{"message": answer, "finish_reason": "stop"}]}
        lines.append(
            json.dumps({"id": f"c{number}", "session": f"s{number}", "request": request, "response": response})
        )
    path.write_text("\n".join(lines))


def dying(flag: pathlib.Path) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    """train_cell, whose process is killed at one cell as long as `flag` is not there. Nested, so that Ray sends its code."""
    from jobs.scale.trial import train_cell

    def train(bench: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        if parameters["seed"] == 1 and parameters["examples"] > 50 and not flag.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return train_cell(bench, parameters)

    return train


def test_a_killed_experiment_goes_on_where_it_stopped(
    ray_cluster: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_calls(tmp_path / "calls.jsonl", 260)
    flag, out = tmp_path / "flag", tmp_path / "lab"
    monkeypatch.setattr(laboratory, "train_cell", dying(flag))
    words = [
        "scale",
        "data",
        "--quick",
        "--out",
        str(out),
        "--calls",
        str(tmp_path / "calls.jsonl"),
        "gate.epsilon=0.1",
    ]

    assert main(words) == 1
    assert "cells failed, first " in capsys.readouterr().err
    before = {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert before and not (out / "report.html").exists()

    flag.touch()
    assert main(words) == 0
    told = capsys.readouterr()
    after = {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert len(after) > len(before) and {name: after[name] for name in before} == before
    assert f"{len(after)} cells, {len(before)} of them measured before" in told.err
    assert not (out / "material").exists(), "examples are left behind"

    laws = json.loads((out / "laws.json").read_text())
    assert laws["found"] == told.out.splitlines()[-2] and "the data stops at " in laws["found"]
    assert "1 of 1 tasks reach 90% agreement within the data (from " in laws["found"]
    rows = pq.read_table(out / "cells.parquet").to_pylist()
    assert len(rows) == len(after) and {row["seed"] for row in rows} == {0, 1}
    assert {row["task"].endswith("(10 answers)") for row in rows} == {True}
    assert all(row["agreement"] > 0.9 for row in rows if row["examples"] > 100), "ten answers were not learned"
    page = (out / "report.html").read_text()
    assert "<svg" in page and "number 1" not in page
    one = json.loads(next((out / "cells").glob("*.json")).read_text())
    assert one["provenance"]["hardware"]["cores"] and one["cell"]["parameters"]["seed"] in (0, 1)
