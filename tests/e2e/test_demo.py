"""The demo from end to end, run as a user runs it, with the numbers it must reach."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest


def _run_demo(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """One demo as a user runs it. Returns (summary, report page)."""
    out, summary_path = folder / "demo", folder / "summary.json"
    run = subprocess.run(
        [sys.executable, "-m", "jobs", "demo", "--out", str(out), "--summary", str(summary_path)],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip().splitlines()[-1] == str(out / "report.html")
    return json.loads(summary_path.read_text()), (out / "report.html").read_text()


@pytest.mark.e2e
def test_demo_reaches_its_numbers(tmp_path: pathlib.Path) -> None:
    summary, page = _run_demo(tmp_path / "first")
    if summary["tasks_released"] < 3 or summary["share_off_llm"] < 0.5:
        # Some 500 calibration calls of a reference that errs itself: now and then a gate refuses by chance.
        print(f"refused by chance, or worse: {json.dumps(summary)}")
        summary, page = _run_demo(tmp_path / "second")
    print(json.dumps(summary))
    tasks = {task["name"]: task for task in summary["tasks"]}
    assert len(tasks) == 5, "one task for each call site"
    assert summary["tasks_released"] >= 3
    reply = next(t for t in summary["tasks"] if t["kind"] == "text" and "small" in t["name"])
    # At which stage depends on how its few good answers fall among validation and calibration calls.
    assert not reply["released"] and reply["reason"], "its answers agree too rarely or cannot be used"
    assert summary["calls"] >= 400
    assert summary["share_off_llm"] >= 0.5
    assert summary["agreement_accepted"] >= 0.95
    assert summary["client_errors"] == 0
    assert summary["cost_ratio"] < 1
    # The base has learned the same traffic: on so few test calls hardly an adapter's gain can be told from none.
    gains = [task["gain_over_base"] for task in summary["tasks"] if task["released"]]
    assert all(low <= gain <= high and high >= 0 for gain, low, high in gains), "no adapter is worse than its base"
    kept = [task for task in summary["tasks"] if task["released"]]
    assert all(task["bound"] <= 0.03 for task in kept)
    assert page.count("<img ") >= 2 + len(summary["tasks"]) - 1
    assert all(task["name"] in page for task in summary["tasks"])
