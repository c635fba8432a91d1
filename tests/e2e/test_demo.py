"""The demo from end to end, with its numbers."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.e2e
def test_demo_reaches_its_numbers(tmp_path):
    summary_path = tmp_path / "summary.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "jobs", "demo", "--out", str(tmp_path / "demo"), "--summary", str(summary_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    summary = json.loads(summary_path.read_text())
    assert summary["tasks_released"] >= 3
    assert summary["tasks_refused"] >= 1
    assert summary["calls"] >= 400
    assert summary["share_off_llm"] >= 0.5
    assert summary["agreement_accepted"] >= 0.95
    assert summary["client_errors"] == 0
