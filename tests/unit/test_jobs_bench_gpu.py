"""jobs/bench/gpu_training.py at a small size on a CPU, in a process of its own: it joins a process group."""

import json
import pathlib
import subprocess
import sys

import pytest
from shared_data import DATA, NO_DATA

from jobs.bench.gpu_training import _flops_per_token
from training.catalog import ScratchModel

SHAPE = {"layers": 2, "hidden_size": 64, "heads": 4, "intermediate_size": 160, "vocab_size": 2048}


@pytest.mark.skipif(not DATA.exists(), reason=NO_DATA)
def test_every_way_trains_and_is_measured(tmp_path: pathlib.Path) -> None:
    words = ["--size", "tiny", "--steps", "2", "--tasks", "2", "--json", str(tmp_path / "found.json")]
    run = subprocess.run([sys.executable, "-m", "jobs.bench.gpu_training", *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    tiny = found["sizes"]["tiny"]
    assert set(tiny["ways"]) == {"solo", "multi_lora", "trainer"}
    for way in tiny["ways"].values():
        assert way["tokens_per_s"] > 0 and 0 < way["mfu"] < 1 and way["adapters_per_hour"] > 0
    ratio = tiny["ways"]["multi_lora"]["adapters_per_hour"] / tiny["ways"]["solo"]["adapters_per_hour"]
    assert tiny["multi_lora_over_solo"] == pytest.approx(ratio)


def test_operations_are_those_of_the_weights_and_of_attention() -> None:
    entry = ScratchModel(kind="scratch", name="one", context_window_tokens=64, **SHAPE)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 160 + 2 * 64) + 64
    assert _flops_per_token(entry, 0.0) == 4 * weights
    assert _flops_per_token(entry, 10.0) - _flops_per_token(entry, 0.0) == 12 * 2 * 64 * 10
