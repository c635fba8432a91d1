"""The demo from end to end, run as a user runs it, with the numbers it must reach."""

import json
import subprocess
import sys

import pytest


@pytest.mark.e2e
def test_demo_reaches_its_numbers(tmp_path):
    out, summary_path = tmp_path / "demo", tmp_path / "summary.json"
    run = subprocess.run(
        [sys.executable, "-m", "jobs", "demo", "--out", str(out), "--summary", str(summary_path)],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip().splitlines()[-1] == str(out / "report.html")
    summary = json.loads(summary_path.read_text())
    tasks = {task["name"]: task for task in summary["tasks"]}
    print(json.dumps(summary))
    assert len(tasks) == 5, "one task for each call site"
    assert summary["tasks_released"] >= 3
    reply = next(t for t in summary["tasks"] if t["kind"] == "text" and "small" in t["name"])
    assert not reply["released"] and "agreement too low" in reply["reason"]
    assert summary["calls"] >= 400
    assert summary["share_off_llm"] >= 0.5
    assert summary["agreement_accepted"] >= 0.95
    assert summary["client_errors"] == 0
    assert summary["cost_ratio"] < 1
    assert any(t["gain_over_base"] and t["gain_over_base"][1] > 0 for t in summary["tasks"]), "an adapter gains"
    kept = [task for task in summary["tasks"] if task["released"]]
    assert all(task["bound"] <= 0.03 for task in kept)
    page = (out / "report.html").read_text()
    assert page.count("<img ") >= 2 + len(summary["tasks"]) - 1
    assert all(task["name"] in page for task in summary["tasks"])
