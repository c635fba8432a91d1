"""How long a step takes: what is timed runs for every kind of training, and what is timed smaller is counted up."""

import pytest
import torch

from training import pace
from training.catalog import find_entry
from training.finetune import FinetuneConfig
from training.memory import estimate_shape, shape_of_scratch
from training.pace import step_seconds


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_small_base_s_step_is_timed_and_leaves_the_threads_as_they_were(method):
    config = FinetuneConfig(method=method, batch_size=2, cpus_per_worker=2.0)
    threads = torch.get_num_threads()
    assert 0 < step_seconds(shape_of_scratch(find_entry("scratch-tiny"), config), config, 12.0, 2.0) < 60
    assert torch.get_num_threads() == threads


def test_what_is_too_large_to_be_timed_is_counted_up_by_its_operations(monkeypatch):
    monkeypatch.setattr(pace, "_timed", lambda run: 1.0)
    config = FinetuneConfig(batch_size=64)
    small = shape_of_scratch(find_entry("scratch-tiny"), config)
    # A layer each, logits, optimiser: nothing of it had to be timed smaller.
    assert step_seconds(small, config, 8.0, 1.0) == small.layers + 2
    large = estimate_shape(3_000_000_000, config)
    found = step_seconds(large, config, 256.0, 1.0)
    width = (large.hidden_size / 1024) ** 2
    assert found > large.layers * width * 64 / 4, "a part of the batch, at a part of the width"
    recomputed = config.model_copy(update={"gradient_checkpointing": True})
    assert step_seconds(small, recomputed, 8.0, 1.0) == pytest.approx(small.layers * 4 / 3 + 2)
