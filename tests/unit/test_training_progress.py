"""A run's progress reaches the one who waits, and a run that dies leaves no bar behind."""

import json
import threading

import pytest

from training.progress import describe_progress, show_progress, write_progress


def test_progress_is_replaced_whole(tmp_path):
    path = tmp_path / "run.progress"
    for step in (1, 2):
        write_progress(path, {"step": step, "loss": 0.5})
    assert json.loads(path.read_text()) == {"step": 2, "loss": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["run.progress"]


def test_the_watcher_ends_with_its_run_even_where_nothing_was_ever_written(tmp_path):
    with pytest.raises(RuntimeError, match="died"), show_progress(tmp_path / "absent", "t", 10):
        raise RuntimeError("died")
    assert not [thread.name for thread in threading.enumerate() if "progress of t" in thread.name]


def test_the_bar_tells_what_is_known():
    facts = {"step": 10, "loss": 0.25, "tokens_per_s": 12345.6, "communication_share": 0.125, "agreement": 0.9}
    assert describe_progress(facts) == "loss 0.250, tokens/s 12,346, waiting 12%, agreement 90.0%"
    assert describe_progress({"step": 1, "loss": 1.0}) == "loss 1.000"
