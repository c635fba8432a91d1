"""Examples -> Hugging Face `datasets`: tokenised once, written as memory-mapped Arrow, shared by all runs on a node.

A row is one conversation turn to learn: `input_ids` is prompt then answer, `num_prompt` how many of them are prompt
and carry no loss. Compact answers point at prompt words (training/copying.py); chat answers are spelled out.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from cluster.acceptance import AnswerForm, learn_form
from cluster.answers import to_text
from cluster.errors import InputError
from cluster.prompts import Prompt, PromptFormat, encode_answer, render_prompt
from cluster.records import Example, TaskSpec
from training.copying import CopyRule, fit_copy_rule, fit_plain_words, point
from training.stored_logprobs import NO_TARGET, Vocabulary


class TaskData(NamedTuple):
    """One task, tokenised."""

    prompt_format: PromptFormat
    """As given, with what the train split taught about its words and its answers."""
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    num_skipped: int
    """Train examples whose prompt is longer than the format allows, or that cannot be written."""
    stored: Mapping[str, int] = MappingProxyType({})
    """Where log-probabilities of captured answers were asked for: what became of them -> train examples."""


def build_task_data(
    train: list[Example],
    validation: list[Example],
    prompt_format: PromptFormat,
    tokenizer: Any,
    *,
    with_stored: bool = False,
) -> TaskData:
    """Tokenise a task's examples; the copy rule, plain words and the form of answers are fitted on the train split.

    Args:
        with_stored: give train rows the log-probabilities that their answers carry (`top_ids` and `top_logprobs`, a list
            for each token of the answer, empty where nothing is known).
    """
    rule = None
    prompt_format = prompt_format.model_copy(update={"answer_form": _form_of(train)})
    if prompt_format.kind == "compact":
        pairs = _render(train, prompt_format, tokenizer)
        rule = fit_copy_rule(prompt_format.answer_kind, pairs)
        prompt_format = prompt_format.model_copy(update={"plain_words": fit_plain_words(pairs, rule)})
    rows = _build_rows(train, prompt_format, tokenizer, rule)
    held_out = _build_rows(validation, prompt_format, tokenizer, rule)
    data = TaskData(prompt_format, rows, held_out, len(train) - len(rows))
    return _add_stored(data, find_written(train, prompt_format, tokenizer), tokenizer) if with_stored else data


def tokenise_tasks(
    tasks: Sequence[TaskSpec],
    train: Mapping[str, list[Example]],
    validation: Mapping[str, list[Example]],
    tokenizer: Any,
    *,
    is_scratch: bool,
    max_prompt_tokens: int,
    with_stored: bool = False,
    numbers: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, TaskData]:
    """Every task's data in a base's tokens: compact prompts for a scratch base, the base's own chat for the others.

    Args:
        train, validation: task_id -> examples.
        with_stored: see `build_task_data`.
        numbers: task_id -> the task token of a scratch base that stands for it already; the others are counted.
    """
    data = {}
    for place, task in enumerate(tasks):
        number = numbers.get(task.task_id, place)
        prompt_format = PromptFormat(
            kind="compact" if is_scratch else "chat",
            answer_kind=task.kind,
            static_lines=task.static_lines if is_scratch else (),
            task_number=number if is_scratch else 0,
            max_prompt_tokens=max_prompt_tokens,
        )
        split = train[task.task_id], validation[task.task_id]
        data[task.task_id] = build_task_data(*split, prompt_format, tokenizer, with_stored=with_stored)
    return data


def find_written(examples: Sequence[Example], prompt_format: PromptFormat, tokenizer: Any) -> list[Example]:
    """The examples that a task's data has a row of, in the order of the rows.

    Args:
        prompt_format: as the task's data has it.
    """
    return [example for example in examples if _render([example], prompt_format, tokenizer)]


def save_dataset(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """Write rows as a memory-mapped Arrow dataset.

    Raises:
        InputError: there are none.
    """
    import datasets

    if not rows:
        raise InputError(f"dataset {str(folder)!r}: no example; allowed: at least one")

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


def num_answer_tokens(row: dict[str, Any]) -> int:
    """Length of a row's answer, end token included."""
    return len(row["input_ids"]) - row["num_prompt"]


def _form_of(examples: list[Example]) -> AnswerForm | None:
    """What the answers that can be written look like."""
    answered = []
    for example in examples:
        try:
            answered.append((example.request, to_text(example.target)))
        except InputError:
            continue
    return learn_form(answered)


def _add_stored(data: TaskData, examples: list[Example], tokenizer: Any) -> TaskData:
    """Train rows with targets from the log-probabilities of their answers.

    Args:
        examples: of the rows, in their order.
    """
    vocabulary = Vocabulary(tokenizer)
    is_chat = data.prompt_format.kind == "chat"
    counts: Counter[str] = Counter()
    rows = []
    for row, example in zip(data.train, examples, strict=True):
        answer = row["input_ids"][row["num_prompt"] :]
        # A compact answer points at words instead of spelling them, so its tokens are never the LLM's.
        found = vocabulary.map_answer(example.logprobs, answer) if example.logprobs and is_chat else None
        counts["used" if found else "of other tokens" if example.logprobs else "not told"] += 1
        targets = found or [NO_TARGET] * len(answer)
        rows.append({**row, "top_ids": [one.ids for one in targets], "top_logprobs": [one.logprobs for one in targets]})
    # Without any the columns would have no type.
    return data._replace(train=rows if counts["used"] else data.train, stored=dict(counts))


def _build_rows(
    examples: list[Example], prompt_format: PromptFormat, tokenizer: Any, rule: CopyRule | None
) -> list[dict[str, Any]]:
    rows = []
    for prompt, target in _render(examples, prompt_format, tokenizer):
        if rule is None:
            answer = [*tokenizer.encode(to_text(target), add_special_tokens=False), tokenizer.eos_token_id]
        else:
            answer = encode_answer(point(target, prompt, rule), tokenizer)
        rows.append({"input_ids": [*prompt.ids, *answer], "num_prompt": len(prompt.ids)})
    return rows


def _render(
    examples: list[Example], prompt_format: PromptFormat, tokenizer: Any
) -> list[tuple[Prompt, dict[str, Any]]]:
    """(prompt, target) of the examples whose prompt fits and whose target can be written."""
    rendered = []
    for example in examples:
        try:
            to_text(example.target)
            rendered.append((render_prompt(example.request, prompt_format, tokenizer), example.target))
        except InputError:
            continue
    return rendered
