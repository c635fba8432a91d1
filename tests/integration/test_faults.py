"""A driver that is killed, and a node of a run that may shrink, by the benchmark's own trials.

A killed worker is in test_finetune, a killed driver of a whole conversion in test_jobs_submit; the benchmark kills each kind
many times. In a process of its own, because it brings a cluster of several nodes.
"""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration


def test_runs_survive_a_killed_driver_and_a_lost_node(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "jobs.bench.faults", "--trials", "1", "--kinds", "driver"]
    run = subprocess.run([*command, "--json", str(tmp_path / "found")], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found").read_text())
    assert (found["kill_trials"], found["kill_recovered"]) == (1, 1), run.stderr[-3000:]
    assert found["kill_max_loss_diff"] == 0
    assert found["kill_max_steps_repeated"] <= found["checkpoint_every"]
    # Sums over two workers and over one are rounded otherwise.
    assert found["elastic"] is not None and found["elastic"]["max_loss_diff"] < 1e-4, run.stderr[-3000:]
