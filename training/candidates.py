"""Names of candidates for a base -> those that fit the tasks and can be loaded, and why the others cannot (S4).

A candidate is filtered by what is known of it before anything is fetched, then opened, then filtered again by the prompt
length in its own tokens. Nothing is trained here and no weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from cluster.answers import to_text
from cluster.errors import BaseUnavailableError, ConfigError, InputError
from cluster.prompts import prompt_texts, shown_text, text_of
from cluster.records import Example, Record, Split, TaskSpec
from training.arms import show_shots
from training.bases import OpenBase, describe_base, open_base
from training.catalog import BaseModelFacts, Needs, ScratchModel, filter_candidates, num_parameters
from training.dataset import TaskData, build_task_data, tokenise_tasks
from training.probe import Contender, Rung, spread
from training.scratch import texts_of, train_tokenizer

_CHARACTERS_PER_TOKEN = 4
"""Rule of thumb for English under a pretrained model's tokenizer; used only until the tokenizer is there."""
_MAX_SAMPLE = 2000
"""Train prompts per task that are measured in tokens; evenly spread over the split."""
_ANY_LENGTH = 2**31
_MOST = 0.99
"""Share of prompts that must still fit with examples shown."""


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
    epsilon: float = 0.05
    """Share of accepted answers that the gate lets disagree with the reference."""


class FewShot(Record):
    """The untrained candidate with train examples in its prompt."""

    score: float
    """Mean of `task_scores`."""
    task_scores: dict[str, float]
    num_shots: dict[str, int]
    """task_id -> examples shown; as many as leave room for (nearly) every prompt."""


class ProbeRun(Record):
    """What one probe of a candidate measured."""

    lora_rank: int | None
    """None: trained whole."""
    num_examples: int
    """Train examples per task at most."""
    rungs: tuple[Rung, ...]
    """Zero-shot first."""
    error: str | None = None


class BaseCandidate(Record):
    """What became of one candidate."""

    name: str
    status: Literal["chosen", "measured", "rejected", "unavailable"]
    reason: str
    parameters: int | None = None
    p99_prompt_tokens: int | None = None
    """Of train prompts; None where it was not reached."""
    p99_call_tokens: int | None = None
    """Of train prompts with their answers."""
    is_p99_estimated: bool = False
    """Counted as characters / 4, because its tokenizer was not there."""
    rungs: tuple[Rung, ...] = ()
    """Of its best probe among those that went on longest; zero-shot first. Scores compare at the same number of steps."""
    probes: tuple[ProbeRun, ...] = ()
    few_shot: FewShot | None = None
    """None: not measured, as for a scratch base, which knows nothing before it is trained."""


def examine(
    name: str, entry: BaseModelFacts | None, needs: Needs, scope: Scope, num_validation: int, num_shots: int = 0
) -> Contender | BaseCandidate:
    """Filter by what is known, open, count prompts in the candidate's own tokens, filter again.

    Args:
        num_shots: train examples to show in the prompts of the few-shot arm; 0 makes none.
    """
    is_scratch = isinstance(entry, ScratchModel)
    facts = {"name": name, "parameters": num_parameters(entry) if entry else None}
    if entry is not None and not is_scratch and (missed := missed_needs(entry, needs)):
        # Before anything is fetched, so its prompt length is the estimate.
        estimate = {"p99_prompt_tokens": needs.p99_prompt_tokens, "p99_call_tokens": needs.p99_call_tokens}
        estimate |= {"is_p99_estimated": True}
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
    lengths = measured_p99(data)
    facts |= {"parameters": num_parameters(entry), **lengths}
    if missed := missed_needs(entry, needs.model_copy(update=lengths)):
        return BaseCandidate(**facts, status="rejected", reason=missed)
    fitting = {task_id: _fitting(one, scope.max_prompt_tokens) for task_id, one in data.items()}
    if not any(one.train for one in fitting.values()):
        reason = f"no train prompt is as short as {scope.max_prompt_tokens} tokens, the most a specialist is asked"
        return BaseCandidate(**facts, status="rejected", reason=reason)
    contender = Contender(name, entry, opened.location if opened else "", tokenizer, fitting, **lengths)
    return contender if is_scratch or not num_shots else _with_shots(contender, scope, num_validation, num_shots)


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


def estimated_p99(scope: Scope, *, is_scratch: bool) -> dict[str, int]:
    """99th percentiles over all tasks' train examples of the prompt and of the whole call, from their characters.

    Returns:
        {p99_prompt_tokens, p99_call_tokens}, as `Needs` has them.
    """
    prompts, calls = [], []
    for task in scope.tasks:
        for example in scope.by_split["train"][task.task_id]:
            try:
                answer = -(-len(to_text(example.target)) // _CHARACTERS_PER_TOKEN)
                prompt = estimate_prompt_tokens(example.request, task.static_lines if is_scratch else None)
            except InputError:
                continue  # a part that is not text: no specialist is asked it
            prompts.append(prompt)
            calls.append(prompt + answer)
    return {"p99_prompt_tokens": p99(prompts), "p99_call_tokens": p99(calls)}


def measured_p99(data: Mapping[str, TaskData]) -> dict[str, int]:
    """The same in a candidate's own tokens."""
    rows = [row for one in data.values() for row in one.train]
    prompts, calls = [row["num_prompt"] for row in rows], [len(row["input_ids"]) for row in rows]
    return {"p99_prompt_tokens": p99(prompts), "p99_call_tokens": p99(calls)}


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


def _with_shots(contender: Contender, scope: Scope, num_validation: int, num_shots: int) -> Contender:
    """Add the validation rows of the few-shot arm: of every task the most examples that leave room for its prompts."""
    import jinja2

    rows: dict[str, list[dict[str, Any]]] = {}
    shown: dict[str, int] = {}
    for task_id, data in contender.data.items():
        held_out = spread(scope.by_split["validation"][task_id], num_validation)
        prompt_format = data.prompt_format.model_copy(update={"max_prompt_tokens": scope.max_prompt_tokens})
        for count in range(num_shots, 0, -1):
            shots = spread(scope.by_split["train"][task_id], count)
            examples = [show_shots(example, shots) for example in held_out]
            try:
                fitting = build_task_data([], examples, prompt_format, contender.tokenizer).validation
            except jinja2.TemplateError:
                break  # a template that refuses answers amid the chat: no few-shot arm for this task
            if fitting and len(fitting) >= _MOST * len(data.validation):
                rows[task_id], shown[task_id] = fitting, len(shots)
                break
    return contender._replace(few_shot=rows, num_shots=shown)


def _fitting(data: TaskData, max_prompt_tokens: int) -> TaskData:
    train, validation = (
        [row for row in rows if row["num_prompt"] <= max_prompt_tokens] for rows in (data.train, data.validation)
    )
    return data._replace(train=train, validation=validation)
