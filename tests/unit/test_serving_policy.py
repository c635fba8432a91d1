"""What may be asked of a specialist and what is kept, with plain values."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import REQUEST, engine_answer, make_specialist
from hypothesis import given
from hypothesis import strategies as st

from cluster.faces import FacesConfig, Facing
from cluster.records import RouteDecision
from cluster.route_model import RouteGuess
from serving import policy
from serving.openai_wire import Denied


def _before(request: dict[str, Any], task_id: str | None = "triage") -> Any:
    specialist = make_specialist()
    return policy.decide_before(
        RouteGuess(task_id=task_id, reason="signature"),
        request,
        specialists={"triage": specialist},
        refused={"other": "too few examples"},
        release="r1",
        max_temperature=1.0,
        facing=Facing(FacesConfig(), None),
    )


def test_plain_request_of_a_task_goes_to_its_specialist() -> None:
    assert _before(REQUEST) == make_specialist()


@pytest.mark.parametrize(
    ("task_id", "reason"), [(None, "signature"), ("other", "too few examples"), ("unheard of", "no specialist")]
)
def test_without_a_specialist_the_reason_is_given(task_id: str | None, reason: str) -> None:
    decision = _before(REQUEST, task_id)
    assert (decision.action, decision.reason, decision.task_id) == ("llm", reason, task_id)


@given(st.floats(allow_nan=True), st.floats(0, 1))
def test_only_a_confidence_at_or_above_the_threshold_is_accepted(confidence: float, threshold: float) -> None:
    specialist = make_specialist(threshold=threshold)
    decision = policy.decide_after(engine_answer("refund", confidence), specialist, None, release="r1")
    assert (decision.action == "accept") == (confidence >= threshold)


def test_a_call_that_no_specialist_may_be_asked_goes_to_the_llm_with_its_task() -> None:
    decision = _before({**REQUEST, "n": 2})
    assert isinstance(decision, RouteDecision)
    assert (decision.action, decision.reason, decision.task_id) == ("llm", "n is set", "triage")


def test_the_llm_is_asked_for_by_its_name_or_by_the_header_and_a_task_of_that_name_is_none() -> None:
    named, specialists = {"model": policy.LLM_MODEL}, {"llm": make_specialist()}
    assert policy.is_for_llm(named, {}) and policy.named_task(named, specialists) is None
    assert policy.is_for_llm({"model": "any"}, {policy.ROUTE_HEADER: "llm"})
    assert not policy.is_for_llm({"model": "understudy/triage"}, {}) and not policy.is_for_llm({"model": ["x"]}, {})
    with pytest.raises(Denied, match="allowed is llm"):
        policy.is_for_llm(REQUEST, {policy.ROUTE_HEADER: "triage"})


def test_invalid_and_ungated_answers_escalate() -> None:
    sure = engine_answer("refund", 1.0)
    decisions = [
        policy.decide_after(sure, make_specialist(), "not JSON", release="r1"),
        policy.decide_after(sure, make_specialist(threshold=None), None, release="r1"),
    ]
    assert [decision.action for decision in decisions] == ["escalate"] * 2
    assert [decision.reason for decision in decisions] == ["not JSON", "confidence below threshold"]
