"""Teaches a small base, or an adapter of one, a few examples in this process: what a test needs are its answers, not how it
came to them."""

import pathlib
from typing import Any

from training.batches import Rows
from training.finetune import FinetuneConfig
from training.methods import build_model
from training.objective import answer_loss

BATCH_SIZE, LEARNING_RATE, ADAPTER_LEARNING_RATE = 12, 1e-3, 4e-3


def teach(base: pathlib.Path, rows_path: pathlib.Path, pad_token_id: int, num_steps: int) -> None:
    """Train all weights of the base in folder `base` on a saved dataset and save them there."""
    model = build_model({"base_path": str(base), "method": "full"})
    _learn(model, rows_path, pad_token_id, num_steps, LEARNING_RATE)
    model.save_pretrained(base)


def teach_adapter(
    base: pathlib.Path,
    rows_path: pathlib.Path,
    pad_token_id: int,
    shape: FinetuneConfig,
    start: pathlib.Path,
    folder: pathlib.Path,
    num_steps: int,
) -> pathlib.Path:
    """Train on from the adapter in `start`, on a saved dataset, and save it in `folder`, which is returned."""
    settings = shape.model_dump(include={"method", "lora_rank", "lora_alpha", "lora_targets"})
    model = build_model({**settings, "base_path": str(base), "start_path": str(start)})
    _learn(model, rows_path, pad_token_id, num_steps, ADAPTER_LEARNING_RATE)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def _learn(model: Any, rows_path: pathlib.Path, pad_token_id: int, num_steps: int, learning_rate: float) -> None:
    import torch

    rows = Rows(str(rows_path), {"batch_size": BATCH_SIZE, "seed": 0, "pad_token_id": pad_token_id}, 0, 1)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=learning_rate)
    for step in range(num_steps):
        answer_loss(model, rows.batch(step), "cpu").backward()
        optimizer.step()
        optimizer.zero_grad()
