"""Examples -> Hugging Face `datasets`: tokenised once, written as memory-mapped Arrow, shared by all runs on a node.

A row is one conversation turn to learn: `input_ids` is prompt then answer, `num_prompt` how many of them are prompt
and carry no loss. Compact answers point at prompt words (training/copying.py); chat answers are spelled out.
"""

from __future__ import annotations

import pathlib
from typing import Any

from cluster.answers import to_text
from cluster.errors import InputError
from cluster.prompts import PromptFormat, encode_answer, render_prompt
from cluster.records import Example, Record
from training.copying import CopyRule, fit_copy_rule, point


class DatasetFacts(Record):
    """What a run needs to know of its data."""

    num_rows: int
    num_skipped: int
    """Examples whose prompt is longer than the base model's context allows."""
    max_answer_tokens: int
    """Longest answer of the train split, with the end token."""


def build_dataset(
    examples: list[Example], prompt_format: PromptFormat, tokenizer: Any, rule: CopyRule | None = None
) -> tuple[list[dict[str, Any]], CopyRule | None, int]:
    """Tokenise examples.

    Args:
        rule: the copy rule of the train split; None fits one (compact format only).

    Returns:
        (rows, copy rule, number of examples skipped because their prompt is too long).
    """
    rendered = []
    for example in examples:
        try:
            rendered.append((render_prompt(example.request, prompt_format, tokenizer), example.target))
        except InputError:
            continue
    if prompt_format.kind == "compact" and rule is None:
        rule = fit_copy_rule(prompt_format.answer_kind, rendered)
    rows = []
    for prompt, target in rendered:
        if prompt_format.kind == "compact":
            answer = encode_answer(point(target, prompt, rule), tokenizer)
        else:
            answer = [*tokenizer.encode(to_text(target), add_special_tokens=False), tokenizer.eos_token_id]
        rows.append({"input_ids": [*prompt.ids, *answer], "num_prompt": len(prompt.ids)})
    return rows, rule, len(examples) - len(rendered)


def save_dataset(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """Write rows as a memory-mapped Arrow dataset."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


def longest_answer(rows: list[dict[str, Any]]) -> int:
    return max((len(row["input_ids"]) - row["num_prompt"] for row in rows), default=1)
