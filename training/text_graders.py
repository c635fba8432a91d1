"""How often a grader of free text errs, on pairs whose truth is known; a grader that takes anything for the same is refused.

Shuffled pairs are the LLM's answers to two different calls of the task: where a grader finds them alike it agrees falsely.
Pairs that say the very same are left out, because there it is right. Pairs known to be the same are the LLM's answer beside
gold where gold says the same word for word, else the answer beside itself: a judge that parts them disagrees falsely. Both are
drawn from validation, so that no calibration call is looked at.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pydantic import Field

from cluster.answers import check, grade
from cluster.judging import Judge
from cluster.records import Example, Record, TaskSpec, TextGrader
from training.gate import clopper_pearson_interval

MAX_PAIRS, MAX_JUDGED_PAIRS = 500, 30
_SEED = 0


class GraderErrors(Record):
    """What a grader says of pairs that are known."""

    grader: TextGrader
    num_shuffled: int = Field(ge=0)
    num_false_agreements: int
    false_agreement: tuple[float, float]
    """95% interval of its rate; (0, 1) without a pair."""
    num_same: int = 0
    """Pairs known to be the same that a judge gave a verdict on."""
    num_false_disagreements: int = 0
    num_unjudged: int = 0
    """Of both kinds, those the judge gave no verdict on; they are in none of the other counts."""


class SelfAgreement(Record):
    """How often the LLM says again what it said: no specialist can be asked for more."""

    num_answered: int
    num_agreements: int
    interval: tuple[float, float]
    """95% of the share that agrees."""


async def measure_grader(
    task: TaskSpec, examples: Sequence[Example], grader: TextGrader, judge: Judge | None
) -> GraderErrors:
    """Put the grader before shuffled pairs, a judge before equal ones too.

    Args:
        examples: validation calls as served.
        judge: asked at most 120 questions; None with other graders.
    """
    pairs = _shuffled(task, examples, MAX_JUDGED_PAIRS if judge else MAX_PAIRS)
    agreed = [await agrees(answer.target, call, task, grader, judge) for answer, call in pairs]
    # Without a verdict nothing was measured: a judge that seldom speaks would seem to err seldom.
    wrong, num_told = agreed.count(True), len(agreed) - agreed.count(None)
    found = {"num_shuffled": num_told, "num_false_agreements": wrong}
    found["false_agreement"] = clopper_pearson_interval(wrong, num_told)
    if judge is not None:
        same = [await _knows_same(call, judge) for call in list(examples)[:MAX_JUDGED_PAIRS]]
        found |= {"num_same": len(same) - same.count(None), "num_false_disagreements": same.count(False)}
        found["num_unjudged"] = [*agreed, *same].count(None)
    return GraderErrors(grader=grader, **found)


async def agrees(
    answer: dict | None, call: Example, task: TaskSpec, grader: TextGrader | None, judge: Judge | None
) -> bool | None:
    """Whether an answer agrees with the call's reference, by value or by the grader; None where a judge does not say."""
    compared = grade(answer, call.target, task.kind, call.request, text_grader=grader)
    if compared.agrees or judge is None or answer is None or grader is None or grader.name != "judge":
        return compared.agrees
    if check(call.target, task.kind, call.request):
        # Nothing that text could agree with, such as a tool call or a refusal; a judge finds any text no worse.
        return False
    return await judge.agrees(call.request, _text(answer), _text(call.target))


def refusal_of(errors: GraderErrors, max_false_agreement: float) -> str | None:
    """Why no gate may rest on this grader, or None."""
    rate = errors.num_false_agreements / errors.num_shuffled if errors.num_shuffled else 0.0
    if rate <= max_false_agreement:
        return None
    return (
        f"the grader {errors.grader.name} finds {errors.num_false_agreements} of {errors.num_shuffled} pairs of unrelated "
        f"answers alike ({rate:.1%}), more than evaluation.max_false_agreement={max_false_agreement:g}; raise "
        "evaluation.text_agree_at, or choose another evaluation.text_grader"
    )


def describe_errors(errors: GraderErrors) -> str:
    """One sentence for a report."""
    grader, (low, high) = errors.grader, errors.false_agreement
    at = "" if grader.name in ("exact", "judge") else f" from {grader.agree_at:g}"
    told = (
        f"Free text agrees by {grader.name}{at}. Of {errors.num_shuffled} pairs of unrelated answers it finds "
        f"{errors.num_false_agreements} alike (95% interval {low:.1%} to {high:.1%})"
    )
    if grader.name != "judge":
        return f"{told}."
    return (
        f"{told}; of {errors.num_same} pairs known to be the same it parts {errors.num_false_disagreements}; "
        f"{errors.num_unjudged} got no verdict."
    )


async def _knows_same(call: Example, judge: Judge) -> bool | None:
    text = _text(call.target)
    is_gold = call.gold is not None and " ".join(call.gold.split()) == " ".join(text.split())
    return await judge.agrees(call.request, call.gold if is_gold and call.gold else text, text)


def _shuffled(task: TaskSpec, examples: Sequence[Example], limit: int) -> list[tuple[Example, Example]]:
    """(whose answer, which call) of different calls whose answers differ, each call at most once on either side."""
    order = list(examples)
    random.Random(_SEED).shuffle(order)
    beside = zip(order[1:] + order[:1], order, strict=True)
    return [
        (one, other) for one, other in beside if not grade(one.target, other.target, task.kind, other.request).agrees
    ][:limit]


def _text(message: dict) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
