"""Teaches a small base a few examples in this process: what a test needs of it are its answers, not how it came to them."""

import pathlib

from training.batches import Rows
from training.methods import build_model
from training.objective import answer_loss

BATCH_SIZE, LEARNING_RATE = 12, 1e-3


def teach(base: pathlib.Path, rows_path: pathlib.Path, pad_token_id: int, num_steps: int) -> None:
    """Train all weights of the base in folder `base` on a saved dataset and save them there."""
    import torch

    rows = Rows(str(rows_path), {"batch_size": BATCH_SIZE, "seed": 0, "pad_token_id": pad_token_id}, 0, 1)
    model = build_model({"base_path": str(base), "method": "full"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(num_steps):
        answer_loss(model, rows.batch(step), "cpu").backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)
