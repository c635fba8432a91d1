"""A base model trained from scratch: byte-level BPE and a Llama of catalog size, from the train split alone.

For places where no hub can be reached. The base has seen the tasks, so reports name its arm "scratch base (has seen
the tasks)" and show what an adapter gains over it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from cluster.answers import to_text
from cluster.errors import InputError
from cluster.prompts import END_TOKEN, PAD_TOKEN, SPECIAL_TOKENS, prompt_texts, shown_text
from cluster.records import Example
from training.catalog import ScratchModel
from training.dataset import TaskData, num_answer_tokens, save_dataset
from training.finetune import FinetuneConfig, finetune

_PIECES = r"[0-9]| ?\p{L}+[^\p{L}\p{N}\s]*| ?[^\p{L}\p{N}\s]+\p{L}*|\s+"
"""Digits stand alone; a word takes the punctuation behind it, so that JSON's constant parts become few tokens."""


class PretrainConfig(FinetuneConfig):
    """How a base is trained from scratch."""

    method: Literal["full"] = "full"
    """All weights: there is nothing yet to adapt."""
    max_answer_tokens: int = Field(default=96, ge=1)
    """Longer answers are left to their task's own adapter: prose would take most of the base's steps."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with our special tokens. Returns a PreTrainedTokenizerFast."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )


def texts_of(examples: Iterable[Example], static_lines: tuple[str, ...]) -> list[str]:
    """The texts a tokenizer for these examples should know: variable prompt text and answers."""
    texts = []
    for example in examples:
        try:
            said = [shown_text(text) for _, text in prompt_texts(example.request, static_lines)]
            texts += [*said, to_text(example.target)]
        except InputError:
            continue  # a part that is not text: no specialist is asked it
    return texts


def init_model(entry: ScratchModel, tokenizer: Any, folder: pathlib.Path, seed: int) -> None:
    """Write an untrained model of the catalog entry's shape, with its tokenizer, to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=entry.vocab_size,
        hidden_size=entry.hidden_size,
        intermediate_size=entry.intermediate_size,
        num_hidden_layers=entry.layers,
        num_attention_heads=entry.heads,
        num_key_value_heads=entry.heads,
        max_position_embeddings=entry.context_window_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(
    entry: ScratchModel, config: PretrainConfig, tokenizer: Any, data: list[TaskData], work: pathlib.Path
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Train a base of the entry's shape on all tasks' train splits together.

    Args:
        work: folder for the untrained model, the datasets and the checkpoints; a rerun continues from them.

    Returns:
        (folder with model and tokenizer, last metrics).
    """
    init_model(entry, tokenizer, work / "init", config.seed)
    splits = {
        "train": [row for d in data for row in d.train],
        "validation": [row for d in data for row in d.validation],
    }
    for split, rows in splits.items():
        short = [row for row in rows if num_answer_tokens(row) <= config.max_answer_tokens]
        save_dataset(short or rows, work / split)
    model, metrics = finetune(
        "pretrain",
        config,
        base_path=work / "init",
        train_path=work / "train",
        validation_path=work / "validation",
        pad_token_id=tokenizer.pad_token_id,
        storage=work / "runs",
    )
    tokenizer.save_pretrained(model)
    return model, metrics
