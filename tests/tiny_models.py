"""A Llama of a few thousand weights and rows for it, for tests of training that start no Ray."""

from __future__ import annotations

import pathlib
import random
from typing import Any

PAD = 0
VOCABULARY = 61
WINDOW = 128


def tiny_settings(**changes: Any) -> dict[str, Any]:
    """What `build_model`, `build_engine` and `Rows` are given."""
    settings = {
        "method": "lora",
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_targets": ["q_proj", "v_proj", "down_proj"],
        "batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 1e-2,
        "zero_stage": 0,
        "bf16": False,
        "seed": 5,
        "pad_token_id": PAD,
    }
    return {**settings, **changes}


def save_tiny_base(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """Write an untrained model; weights wide enough apart that its logits are not all alike."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2} | changes
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=WINDOW,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=PAD,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0, longest: int = 40) -> list[dict[str, Any]]:
    """Rows of random tokens and of random length."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = rng.randint(4, longest)
        ids = [rng.randint(2, VOCABULARY - 1) for _ in range(length)]
        rows.append({"input_ids": ids, "num_prompt": rng.randint(1, length - 1)})
    return rows
