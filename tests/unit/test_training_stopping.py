"""stopping.py and diagnosis.py: which checkpoint is released, when a run stops, and what is said of one that gives up."""

import errno
import json
import math
import pickle
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import TrainingError
from training.diagnosis import (
    Diagnosis,
    Diverged,
    check_loss,
    is_out_of_memory,
    naming_a_full_disk,
    read_diagnosis,
    smaller_micro_batch,
    write_diagnosis,
)
from training.stopping import best_point, is_patience_over


def curve_of(*agreements: float) -> list[dict]:
    """Checkpoints with points between them that nothing was graded at."""
    curve = []
    for step, agreement in enumerate(agreements, 1):
        curve.append({"step": 2 * step - 1, "loss": 1.0})
        curve.append({"step": 2 * step, "loss": 1.0, "agreement": agreement, "validation_loss": 1 / step})
    return curve


def test_agreement_decides_and_not_loss():
    curve = curve_of(0.5, 0.9, 0.7)
    assert best_point(curve)["step"] == 4, "the loss went on falling"
    assert best_point(curve_of(0.5, 0.9, 0.9))["step"] == 6, "of equals the lower loss"
    assert best_point([{"step": 1, "loss": 2.0}]) is None


@pytest.mark.parametrize(
    ("agreements", "patience", "stops"),
    [
        ((0.5, 0.6, 0.6), 0, False),
        ((0.5, 0.9, 0.7), 1, True),
        ((0.5, 0.9, 0.7), 2, False),
        ((0.5, 0.9, 0.7, 0.8), 2, True),
        ((0.5, 0.9, 0.7, 0.95), 2, False),
        ((), 1, False),
    ],
)
def test_patience_counts_checkpoints_since_the_best(agreements, patience, stops):
    assert is_patience_over(curve_of(*agreements), patience) is stops


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=8), st.integers(1, 3))
def test_a_resumed_run_stops_where_the_undisturbed_one_does(agreements, patience):
    stops = [is_patience_over(curve_of(*agreements[:n]), patience) for n in range(1, len(agreements) + 1)]
    again = json.loads(json.dumps(curve_of(*agreements)))
    assert is_patience_over(again, patience) == stops[-1]


def test_a_sound_loss_goes_on():
    check_loss("step 8: the loss", 1.5, 1e-3, [2.0])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_diagnosis_names_step_rate_and_the_losses_before(loss):
    with pytest.raises(Diverged) as caught:
        check_loss("step 8: the loss", loss, 2e-3, [9.0, 5.0, 4.0, 3.0, 2.0, 8.0])
    text = str(caught.value)
    assert text.startswith(f"step 8: the loss is {loss} at learning rate 0.002; losses before: 5, 4, 3, 2, 8;")
    assert "finetune.learning_rate (such as 0.0002)" in text


def test_each_attempt_that_lacked_memory_halves_the_micro_batch(tmp_path):
    import torch

    path = tmp_path / "run.diagnosis"
    assert smaller_micro_batch(path, 12) == 12 and read_diagnosis(path) is None
    sizes = []
    for _ in range(5):
        size = smaller_micro_batch(path, 12)
        sizes.append(size)
        write_diagnosis(path, Diagnosis(kind="out_of_memory", message="full", micro_batch_size=size))
    assert sizes == [12, 6, 3, 1, 1]
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float64)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("shapes differ"))


def test_a_full_disk_is_named_with_folder_and_bytes(tmp_path):
    with pytest.raises(TrainingError) as caught, naming_a_full_disk(tmp_path, 12_345_678):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert f"checkpoint of 12,345,678 bytes in {tmp_path}: the disk is full (" in str(caught.value)
    assert "work=/PATH" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_torch_says_no_word_of_the_disk_that_is_full(tmp_path, monkeypatch):
    def write() -> None:
        # What torch.save raised when its disk was full.
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with pytest.raises(RuntimeError) as caught, naming_a_full_disk(tmp_path):
        write()
    assert not isinstance(caught.value, TrainingError), "there is room in this folder: another error is not renamed"
    usage = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(TrainingError, match="the disk is full .4,096 bytes free"), naming_a_full_disk(tmp_path):
        write()
