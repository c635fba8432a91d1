"""What may be asked of a specialist and what is kept, with plain values."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import REQUEST, engine_answer, make_specialist
from hypothesis import given
from hypothesis import strategies as st

from cluster.records import RouteDecision
from cluster.route_model import RouteGuess
from serving import policy


def _before(request: dict[str, Any], task_id: str | None = "triage") -> Any:
    specialist = make_specialist()
    return policy.decide_before(
        RouteGuess(task_id=task_id, reason="signature"),
        request,
        specialists={"triage": specialist},
        refused={"other": "too few examples"},
        release="r1",
        max_temperature=1.0,
    )


def test_plain_request_of_a_task_goes_to_its_specialist() -> None:
    assert _before(REQUEST) == make_specialist()


@pytest.mark.parametrize(
    ("task_id", "reason"), [(None, "signature"), ("other", "too few examples"), ("unheard of", "no specialist")]
)
def test_without_a_specialist_the_reason_is_given(task_id: str | None, reason: str) -> None:
    decision = _before(REQUEST, task_id)
    assert (decision.action, decision.reason, decision.task_id) == ("llm", reason, task_id)


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 2},
        {"logprobs": True},
        {"top_logprobs": 3},
        {"stop": ["x"]},
        {"tool_choice": "none"},
        {"tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"temperature": 1.5},
        {"audio": {"voice": "a"}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ],
)
def test_what_a_specialist_cannot_do_goes_to_the_llm(extra: dict[str, Any]) -> None:
    decision = _before({**REQUEST, **extra})
    assert isinstance(decision, RouteDecision) and decision.action == "llm"


@pytest.mark.parametrize(
    "extra",
    [
        {"tool_choice": "required"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"n": 1, "logprobs": False, "temperature": 1.0, "stop": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    ],
)
def test_what_a_specialist_can_do_is_asked_of_it(extra: dict[str, Any]) -> None:
    assert policy.unservable_reason({**REQUEST, **extra}, 1.0) is None


@given(st.floats(allow_nan=True), st.floats(0, 1))
def test_only_a_confidence_at_or_above_the_threshold_is_accepted(confidence: float, threshold: float) -> None:
    specialist = make_specialist(threshold=threshold)
    decision = policy.decide_after(engine_answer("refund", confidence), specialist, None, release="r1")
    assert (decision.action == "accept") == (confidence >= threshold)


def test_cut_invalid_and_ungated_answers_escalate() -> None:
    sure = engine_answer("refund", 1.0)
    decisions = [
        policy.decide_after(engine_answer("refund", 1.0, "length"), make_specialist(), None, release="r1"),
        policy.decide_after(sure.model_copy(update={"message": None}), make_specialist(), None, release="r1"),
        policy.decide_after(sure, make_specialist(), "not JSON", release="r1"),
        policy.decide_after(sure, make_specialist(threshold=None), None, release="r1"),
    ]
    assert [decision.action for decision in decisions] == ["escalate"] * 4
    assert len({decision.reason for decision in decisions}) == 4


def test_answer_longer_than_the_request_allows_is_a_broken_limit() -> None:
    answer = engine_answer("refund", 1.0)
    assert policy.limit_reason(answer, {"max_tokens": 1})
    assert policy.limit_reason(answer, {"max_completion_tokens": 2, "max_tokens": None}) is None
