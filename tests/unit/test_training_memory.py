"""memory.py and multi_memory.py: the arithmetic against what torch really holds, and what is refused with which numbers."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import PAD, make_rows, save_tiny_base

from cluster.errors import ConfigError
from training.dataset import save_dataset
from training.finetune import FinetuneConfig
from training.memory import Load, ModelShape, predict_memory, shape_of
from training.methods import build_model
from training.multi_finetune import AdapterTask, adapter_settings, load_of
from training.multi_loop import ManyRun
from training.multi_lora import join_batches
from training.multi_memory import AdapterLoad, plan_many, predict_many
from training.objective import answer_loss
from training.packing import collate_padded

GIB = 2**30
ROWS, TOKENS, ANSWER = 4, 64, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    return save_tiny_base(tmp_path_factory.mktemp("base"), **shape)


def kept_by_autograd(run: Callable[[], Any], weights: list[torch.Tensor]) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for the backward pass, weights left out."""
    known = {one.untyped_storage().data_ptr() for one in weights}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run()  # noqa: F841  the graph must live until it was counted
    return sum(storage.nbytes() for storage in kept.values())


def full_batch(examples: int = ROWS) -> dict[str, Any]:
    return collate_padded([[2 + k % 50 for k in range(TOKENS)]] * examples, [TOKENS - ANSWER] * examples, PAD)


@pytest.mark.parametrize(("method", "recomputes"), [("lora", False), ("full", False), ("lora", True)])
def test_activations_are_what_autograd_keeps(base: pathlib.Path, method: str, recomputes: bool) -> None:
    config = FinetuneConfig(method=method, gradient_checkpointing=recomputes, gpus_per_worker=1)
    model = build_model({**config.model_dump(mode="json"), "base_path": str(base)}).train()
    kept = kept_by_autograd(lambda: answer_loss(model, full_batch(), "cpu"), list(model.parameters()))
    load = Load(examples=ROWS, row_tokens=TOKENS, answer_tokens=ANSWER)
    predicted = predict_memory(shape_of(base, config), config, load, stage=0)
    expected = predicted.activations
    if recomputes:
        # One layer's activations live only in the backward pass.
        whole = predict_memory(shape_of(base, FinetuneConfig()), FinetuneConfig(gpus_per_worker=1), load, stage=0)
        expected -= whole.activations // 3
    assert kept == pytest.approx(expected + predicted.logits // 2, rel=0.2)


def many(base: pathlib.Path, folder: pathlib.Path, sizes: list[tuple[int, int]]) -> tuple[list[AdapterTask], ManyRun]:
    """A run of adapters of (rank, examples a batch), before its first step."""
    tasks = []
    for number, (rank, examples) in enumerate(sizes):
        save_dataset(make_rows(12, seed=number), folder / str(number))
        config = FinetuneConfig(lora_rank=rank, batch_size=examples, num_steps=2, checkpoint_every=1, warmup_steps=0)
        tasks.append(AdapterTask(f"task{number}", config, folder / str(number), folder / str(number)))
    settings = {
        "adapters": [adapter_settings(task, PAD) for task in tasks],
        "base_path": str(base),
        "zero_stage": 0,
        "bf16": False,
        "tokens_per_pass": 10_000,
        "progress_path": str(folder / "progress"),
        "yield_path": str(folder / "yield"),
    }
    return tasks, ManyRun(settings, torch.device("cpu"), 0, 1)


def test_a_run_of_many_adapters_keeps_what_is_foretold(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tasks, run = many(base, tmp_path, [(8, 4), (4, 2)])
    weights = [*run._model._base.parameters(), *(m for one in run.members for f in one.factors.values() for m in f[:2])]
    batch = join_batches({0: full_batch(4), 1: full_batch(2)}, "cpu")
    kept = kept_by_autograd(lambda: torch.stack(run._model.losses(batch)).sum(), weights)
    loads = [AdapterLoad(name="a", trainable=1, examples=n, row_tokens=TOKENS, answer_tokens=ANSWER) for n in (4, 2)]
    on_gpu = FinetuneConfig(gpus_per_worker=1)
    shape = shape_of(base, on_gpu)
    together = predict_many(shape, on_gpu, loads, stage=0, tokens_per_pass=10_000)
    assert kept == pytest.approx(together.activations + together.logits // 2, rel=0.15)
    apart = predict_many(shape, on_gpu, loads, stage=0, tokens_per_pass=TOKENS * 4)
    assert apart.activations == pytest.approx(together.activations * 4 / 6, rel=0.01), "the larger pass alone counts"


def test_the_state_of_adapters_is_counted_to_the_byte(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tasks, run = many(base, tmp_path, [(8, 4), (3, 2)])
    run.train(lambda metrics, folder: None)
    held = sum(
        tensor.numel() * tensor.element_size()
        for member in run.members
        for tensor in (*member.state()[0].values(), member._weights.grad)
    )
    loads = [load_of(task, base) for task in tasks]
    none = FinetuneConfig(gpus_per_worker=1)
    with_them = predict_many(shape_of(base, none), none, loads, stage=0, tokens_per_pass=10_000)
    parameters = shape_of(base, none).parameters
    assert with_them.weights + with_them.gradients + with_them.optimizer - 4 * parameters == held
    assert all("released" in member.state()[0] for member in run.members)


SEVEN_B = ModelShape(
    parameters=7_000_000_000, trainable=0, layers=32, hidden_size=4096, intermediate_size=11008, vocab_size=32_000
)
ON_GPU = FinetuneConfig(gpus_per_worker=1, bf16=True, num_workers=2)


def adapters(count: int, examples: int = 16) -> list[AdapterLoad]:
    fields = {"trainable": 20_000_000, "examples": examples, "row_tokens": 512, "answer_tokens": 64}
    return [AdapterLoad(name=f"task{number}", **fields) for number in range(count)]


def test_smaller_passes_come_before_a_sharded_base_and_what_fits_fits() -> None:
    plans = [plan_many(SEVEN_B, ON_GPU, adapters(4), gib * GIB, 65536) for gib in (300, 80, 56)]
    assert [plan.stage for plan in plans] == [0, 0, 3]
    assert plans[0].tokens_per_pass == 65536 > plans[1].tokens_per_pass >= 16 * 512
    for plan, gib in zip(plans, (300, 80, 56), strict=True):
        assert plan.memory.total <= 0.9 * gib * GIB


def test_a_run_without_room_is_refused_with_the_numbers_and_what_would_fit() -> None:
    config = ON_GPU.model_copy(update={"zero_stage": 0})
    with pytest.raises(ConfigError) as caught:
        plan_many(SEVEN_B, config, adapters(3), 24 * GIB, 65536)
    text = str(caught.value)
    assert "task0, task1, task2" in text and "a device has 24.000 GiB" in text and "weights 13." in text
    assert "finetune.batch_size=8" in text and "fewer of these tasks" in text and "zero_stage=3" in text
    least = float(text.split("a device of ")[1].split()[0])
    assert plan_many(SEVEN_B, config, adapters(3), int((least + 0.1) * GIB), 65536).memory.total
    with pytest.raises(ConfigError) as caught:
        plan_many(SEVEN_B, FinetuneConfig(), adapters(1, examples=1), GIB, 4096)
    assert "fewer of these" not in str(caught.value) and "batch_size" not in str(caught.value)
