"""Each kind of kill once, by the benchmark's own trials: a worker, a node, a driver, and a node of a run that may shrink.

In a process of its own, because it brings a cluster of several nodes.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from jobs.bench.faults import KINDS

pytestmark = pytest.mark.integration


def test_a_run_survives_every_kind_of_kill(tmp_path: pathlib.Path) -> None:
    command = [
        sys.executable,
        "-m",
        "jobs.bench.faults",
        "--trials",
        str(len(KINDS)),
        "--json",
        str(tmp_path / "found"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found").read_text())
    assert (found["kill_trials"], found["kill_recovered"]) == (3, 3), run.stderr[-3000:]
    assert {trial["kind"] for trial in found["trials"]} == set(KINDS)
    assert found["kill_max_loss_diff"] == 0
    assert found["kill_max_steps_repeated"] <= found["checkpoint_every"]
    # Sums over two workers and over one are rounded otherwise.
    assert found["elastic"] is not None and found["elastic"]["max_loss_diff"] < 1e-4, run.stderr[-3000:]
