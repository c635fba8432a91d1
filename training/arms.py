"""Ways of answering, side by side on the test split: what each kept, how often it was right, what it read and said.

An arm is asked what serving would ask it, and what serving leaves to the LLM counts as not kept. Of the specialist it is also
counted, call by call, whether its gate kept the answer, whether that was right and whether the LLM's was: from these counts
alone follow costs, the random control and the oracle (training/worth.py). Right means as gold says where every test
call has a gold answer, else as the gate's reference says. Nothing here depends on a price or a clock, so that the same
conversion gives the same report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from cluster.answers import grade, to_message
from cluster.records import Example, Record, Reference, TaskSpec, TextGrader
from training.gate import Outcome, clopper_pearson_interval

SPECIALIST_ARM, GATED_ARM, LLM_ARM = "specialist", "specialist + gate", "LLM"
_INSTRUCTING = ("system", "developer")


class GoldPairs(Record):
    """The arm beside the LLM on the test calls that have a gold answer; what an arm does not keep is the LLM's."""

    both: int
    """Calls of which both answers are right."""
    only_arm: int
    only_llm: int
    neither: int

    @property
    def num_calls(self) -> int:
        return self.both + self.only_arm + self.only_llm + self.neither


class Arm(Record):
    """How one way of answering did on the test split."""

    name: str
    num_calls: int
    coverage: float
    num_kept: int
    num_disagreements: int
    disagreement: float | None
    interval: tuple[float, float]
    """Two-sided 95% Clopper-Pearson interval of `disagreement`."""
    prompt_tokens: int = 0
    """Of all that was asked, kept or not, in the base model's tokens."""
    completion_tokens: int = 0
    against_gold: GoldPairs | None = None
    """None where no test call has a gold answer beside the LLM's."""


class Routed(Record):
    """Test calls that came out alike."""

    is_kept: bool
    """Whether the specialist's gate keeps its answer."""
    is_specialist_right: bool
    is_llm_right: bool | None
    """None where there is no LLM answer: the reference is gold."""
    num_calls: int
    llm_usd: float | None = None
    """What the LLM's answers to them cost when they were captured; None where that is not known of all."""
    llm_prompt_tokens: int | None = None
    llm_completion_tokens: int | None = None


class Answered(NamedTuple):
    """One answer to one call."""

    outcome: Outcome
    is_gold: bool | None = None
    """Whether it is what gold says, kept or not; None where the call has no gold answer beside the LLM's."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def is_gold(message: dict | None, example: Example, task: TaskSpec, grader: TextGrader | None = None) -> bool | None:
    """Whether an answer is what the call's gold answer says; None where it has none that reads as the task's kind.

    Args:
        grader: of free text; a judge is not asked, so that there gold means equality.
    """
    gold = None if example.gold is None or task.reference == "gold" else to_message(example.gold, task.kind)
    return None if gold is None else grade(message, gold, task.kind, example.request, text_grader=grader).agrees


def make_arm(
    name: str,
    answers: Sequence[Answered],
    test: Sequence[Example],
    task: TaskSpec,
    threshold: float,
    grader: TextGrader | None = None,
) -> Arm:
    """Count one way of answering.

    Args:
        answers: to the test calls, in their order.
        threshold: lowest confidence that is kept; at 0 every answer counts, the ones that cannot be used as wrong.
    """
    kept = [one for one in answers if one.outcome.confidence >= threshold]
    wrong = sum(not one.outcome.agrees for one in kept)
    return Arm(
        name=name,
        num_calls=len(answers),
        coverage=len(kept) / len(answers) if answers else 0.0,
        num_kept=len(kept),
        num_disagreements=wrong,
        disagreement=wrong / len(kept) if kept else None,
        interval=clopper_pearson_interval(wrong, len(kept)) if kept else (0.0, 1.0),
        prompt_tokens=sum(one.prompt_tokens for one in answers),
        completion_tokens=sum(one.completion_tokens for one in answers),
        against_gold=_against_gold(answers, test, task, threshold, grader),
    )


def count_routed(
    answers: Sequence[Answered],
    test: Sequence[Example],
    task: TaskSpec,
    threshold: float,
    grader: TextGrader | None = None,
) -> tuple[tuple[Routed, ...], Reference]:
    """The specialist's test calls by how they came out, and what says that an answer is right.

    Args:
        threshold: above 0; infinity keeps none.
    """
    llm = [is_gold(example.target, example, task, grader) for example in test]
    by_gold = bool(test) and all(one is not None for one in llm)
    groups: dict[tuple[bool, bool, bool | None], list[Example]] = {}
    for answer, example, llm_right in zip(answers, test, llm, strict=True):
        is_kept = answer.outcome.confidence >= threshold
        right = bool(answer.is_gold) if by_gold else answer.outcome.agrees
        beside = llm_right if by_gold else None if task.reference == "gold" else True
        groups.setdefault((is_kept, right, beside), []).append(example)
    order = sorted(groups.items(), key=lambda item: tuple(map(str, item[0])))
    truth: Reference = "gold" if by_gold else task.reference
    return tuple(_routed(*key, its) for key, its in order), truth


def show_shots(example: Example, shots: Sequence[Example]) -> Example:
    """The example with others and their answers as turns before it, behind its own instructions."""
    messages = example.request["messages"]
    start = next((k for k, message in enumerate(messages) if message["role"] not in _INSTRUCTING), len(messages))
    turns = []
    for shot in shots:
        said = [message for message in shot.request["messages"] if message["role"] not in _INSTRUCTING]
        turns += [*said, {"role": "assistant", **shot.target}]
    return example.model_copy(
        update={"request": {**example.request, "messages": [*messages[:start], *turns, *messages[start:]]}}
    )


def _against_gold(
    answers: Sequence[Answered], test: Sequence[Example], task: TaskSpec, threshold: float, grader: TextGrader | None
) -> GoldPairs | None:
    counts: Counter[tuple[bool, bool]] = Counter()
    for answer, example in zip(answers, test, strict=True):
        llm_right = is_gold(example.target, example, task, grader)
        if llm_right is None:
            continue
        is_kept = answer.outcome.confidence >= threshold
        counts[bool(answer.is_gold) if is_kept else llm_right, llm_right] += 1
    if not counts:
        return None
    both, only_arm, only_llm, neither = (
        counts[key] for key in ((True, True), (True, False), (False, True), (False, False))
    )
    return GoldPairs(both=both, only_arm=only_arm, only_llm=only_llm, neither=neither)


def _routed(is_kept: bool, is_right: bool, is_llm_right: bool | None, calls: Sequence[Example]) -> Routed:
    def total(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    prompt, completion = (
        total([getattr(call.usage, name) for call in calls]) for name in ("prompt_tokens", "completion_tokens")
    )
    return Routed(
        is_kept=is_kept,
        is_specialist_right=is_right,
        is_llm_right=is_llm_right,
        num_calls=len(calls),
        llm_usd=total([call.cost_usd for call in calls]),
        llm_prompt_tokens=None if prompt is None else int(prompt),
        llm_completion_tokens=None if completion is None else int(completion),
    )
