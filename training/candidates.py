"""Names of candidates for a base -> those that fit the tasks and can be loaded, and why the others cannot (S4).

A candidate is filtered by what is known of it before anything is fetched, then opened, then filtered again by the prompt
length in its own tokens. Nothing is trained here and no weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from cluster.errors import BaseUnavailableError, ConfigError, InputError
from cluster.prompts import prompt_texts, shown_text, text_of
from cluster.records import Example, Record, Split, TaskSpec
from training.bases import OpenBase, describe_base, open_base
from training.catalog import BaseModelFacts, Needs, ScratchModel, filter_candidates, num_parameters
from training.dataset import TaskData, tokenise_tasks
from training.probe import Contender, Rung, spread
from training.scratch import texts_of, train_tokenizer

_CHARACTERS_PER_TOKEN = 4
"""Rule of thumb for English under a pretrained model's tokenizer; used only until the tokenizer is there."""
_MAX_SAMPLE = 2000
"""Train prompts per task that are measured in tokens; evenly spread over the split."""
_ANY_LENGTH = 2**31


class Scope(NamedTuple):
    """What the specialists are for and what they run on."""

    tasks: Sequence[TaskSpec]
    by_split: Mapping[Split, Mapping[str, list[Example]]]
    """split -> task_id -> examples."""
    max_model_tokens: int
    """What the serving engine is started for."""
    max_prompt_tokens: int
    """Longer prompts go to the LLM whatever the base."""
    machine_gib: float
    """Memory of the device that trains one model."""


class BaseCandidate(Record):
    """What became of one candidate."""

    name: str
    status: Literal["chosen", "measured", "rejected", "unavailable"]
    reason: str
    parameters: int | None = None
    p99_prompt_tokens: int | None = None
    """Of train prompts; None where it was not reached."""
    is_p99_estimated: bool = False
    """Counted as characters / 4, because its tokenizer was not there."""
    rungs: tuple[Rung, ...] = ()
    """Zero-shot first. Scores compare at the same number of steps."""


def examine(
    name: str, entry: BaseModelFacts | None, needs: Needs, scope: Scope, num_validation: int
) -> Contender | BaseCandidate:
    """Filter by what is known, open, count prompts in the candidate's own tokens, filter again."""
    is_scratch = isinstance(entry, ScratchModel)
    facts = {"name": name, "parameters": num_parameters(entry) if entry else None}
    if entry is not None and not is_scratch and (missed := missed_needs(entry, needs)):
        # Before anything is fetched, so its prompt length is the estimate.
        estimate = {"p99_prompt_tokens": needs.p99_prompt_tokens, "is_p99_estimated": True}
        return BaseCandidate(**facts, **estimate, status="rejected", reason=missed)
    opened: OpenBase | None = None
    try:
        if not is_scratch:
            opened = open_base(name)
            entry = entry or describe_base(opened)
    except BaseUnavailableError as error:
        return BaseCandidate(**facts, status="unavailable", reason=str(error))
    assert entry is not None
    tokenizer = opened.tokenizer if opened else _scratch_tokenizer(entry, scope)
    try:
        data = tokenise_sample(name, scope, tokenizer, is_scratch=is_scratch, num_validation=num_validation)
    except ConfigError as error:
        return BaseCandidate(**facts, status="rejected", reason=str(error))
    facts |= {"parameters": num_parameters(entry), "p99_prompt_tokens": measured_p99(data)}
    if missed := missed_needs(entry, needs.model_copy(update={"p99_prompt_tokens": measured_p99(data)})):
        return BaseCandidate(**facts, status="rejected", reason=missed)
    fitting = {task_id: _fitting(one, scope.max_prompt_tokens) for task_id, one in data.items()}
    if not any(one.train for one in fitting.values()):
        reason = f"no train prompt is as short as {scope.max_prompt_tokens} tokens, the most a specialist is asked"
        return BaseCandidate(**facts, status="rejected", reason=reason)
    return Contender(name, entry, opened.location if opened else "", tokenizer, fitting, measured_p99(data))


def tokenise_sample(
    name: str, scope: Scope, tokenizer: Any, *, is_scratch: bool, num_validation: int = 0
) -> dict[str, TaskData]:
    """A sample of every task in the candidate's own tokens, whatever its length.

    Raises:
        ConfigError: the base's chat template refuses the tasks' messages.
    """
    import jinja2

    try:
        return tokenise_tasks(
            scope.tasks,
            {task.task_id: spread(scope.by_split["train"][task.task_id], _MAX_SAMPLE) for task in scope.tasks},
            {task.task_id: spread(scope.by_split["validation"][task.task_id], num_validation) for task in scope.tasks},
            tokenizer,
            is_scratch=is_scratch,
            max_prompt_tokens=_ANY_LENGTH,
        )
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"base model {name!r}: its chat template refuses the tasks' messages ({error}); use another base"
        ) from None


def estimated_p99(scope: Scope, *, is_scratch: bool) -> int:
    """99th percentile of all tasks' train prompts, from their characters."""
    lengths = []
    for task in scope.tasks:
        for example in scope.by_split["train"][task.task_id]:
            try:
                lengths.append(estimate_prompt_tokens(example.request, task.static_lines if is_scratch else None))
            except InputError:
                continue  # a part that is not text: no specialist is asked it
    return p99(lengths)


def measured_p99(data: Mapping[str, TaskData]) -> int:
    """99th percentile of the train prompts in a candidate's own tokens."""
    return p99([row["num_prompt"] for one in data.values() for row in one.train])


def missed_needs(entry: BaseModelFacts, needs: Needs) -> str:
    """Every need that a base misses, with both values; empty where it fits."""
    _, rejections = filter_candidates([entry], needs)
    return "; ".join(rejection.reason for rejection in rejections)


def p99(values: Sequence[int]) -> int:
    """Smallest value that at least 99% of `values` do not exceed; 0 where there are none."""
    ordered = sorted(values)
    return ordered[(99 * len(ordered) + 99) // 100 - 1] if ordered else 0


def estimate_prompt_tokens(request: dict[str, Any], static_lines: Sequence[str] | None = None) -> int:
    """Characters / 4 of what a model reads of a request.

    Args:
        static_lines: of the task, for a scratch base, which is not shown them nor the tools; None for a chat.
    """
    if static_lines is not None:
        characters = sum(len(shown_text(text)) for _, text in prompt_texts(request, static_lines))
    else:
        tools = request.get("tools")
        texts = [*map(text_of, request["messages"]), json.dumps(tools, separators=(",", ":")) if tools else ""]
        characters = sum(map(len, texts))
    return -(-characters // _CHARACTERS_PER_TOKEN)


def _scratch_tokenizer(entry: ScratchModel, scope: Scope) -> Any:
    samples = [(task, spread(scope.by_split["train"][task.task_id], _MAX_SAMPLE)) for task in scope.tasks]
    texts = [text for task, sample in samples for text in texts_of(sample, task.static_lines)]
    return train_tokenizer(texts, entry.vocab_size)


def _fitting(data: TaskData, max_prompt_tokens: int) -> TaskData:
    train, validation = (
        [row for row in rows if row["num_prompt"] <= max_prompt_tokens] for rows in (data.train, data.validation)
    )
    return data._replace(train=train, validation=validation)
