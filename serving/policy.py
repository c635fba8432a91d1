"""Pure decisions of the request path: which calls a specialist may be asked, and whether its answer is kept.

Turns a routed request into a specialist or a reason to leave the call to the LLM, and an answer into accept or
escalate. Knows nothing of time, networks or counters; every function can be tested with plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from cluster.engine import EngineAnswer
from cluster.faces import Facing
from cluster.records import RouteDecision, Specialist
from cluster.servable import unservable_reason
from serving.openai_wire import Denied

MODEL_PREFIX = "understudy/"
"""What a specialist's name as a model begins with; its task's id follows."""
LLM_MODEL = MODEL_PREFIX + "llm"
"""The model name that asks for the LLM, whichever model its entry in `upstream` names."""
ROUTE_HEADER = "x-understudy-route"
"""In a request, `llm` asks for the LLM and leaves the model to the client; in an answer, what was done."""

GIVEN_UP = "given up while it answered"
"""Reason where nobody waited for a specialist any longer: its call's time was over, or its client had left."""


class Guess(Protocol):
    """What the route model says about one request."""

    task_id: str | None
    reason: str


def named_task(request: Mapping[str, Any], specialists: Mapping[str, Specialist]) -> str | None:
    """The task whose specialist the request asks for as its model, or None where it names another model, or the LLM.

    Raises:
        Denied: 404, no such specialist is served.
    """
    model = request.get("model")
    if not isinstance(model, str) or not model.startswith(MODEL_PREFIX) or model == LLM_MODEL:
        return None
    task_id = model.removeprefix(MODEL_PREFIX)
    if task_id in specialists:
        return task_id
    served = ", ".join(MODEL_PREFIX + task for task in sorted(specialists)) or "no specialist yet"
    raise no_such_model(model, f"{served}, and the LLM's own models (GET /v1/models)")


def no_such_model(model: str, served: str) -> Denied:
    """The error for a model that neither a specialist nor the LLM is."""
    message = f"The model `{model}` does not exist; served are {served}"
    return Denied(404, message, "invalid_request_error", "model_not_found", "model")


def is_for_llm(request: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Whether the client asks for the LLM, so that no specialist is.

    Raises:
        Denied: 400, the header asks for something else.
    """
    route = headers.get(ROUTE_HEADER)
    if route not in (None, "llm"):
        message = f"{ROUTE_HEADER}: allowed is llm; a specialist is asked for as the model {MODEL_PREFIX}TASK_ID"
        raise Denied(400, message, code="invalid_request")
    return route == "llm" or request.get("model") == LLM_MODEL


def decide_before(
    guess: Guess,
    request: Mapping[str, Any],
    *,
    specialists: Mapping[str, Specialist],
    refused: Mapping[str, str],
    release: str,
    max_temperature: float,
    facing: Facing,
) -> Specialist | RouteDecision:
    """The specialist to ask, or the decision that the LLM answers without one being asked.

    Args:
        specialists: those that are open and loaded, by task.
        refused: why the other tasks of the release have none.
    """
    if guess.task_id is None:
        return RouteDecision(action="llm", reason=guess.reason, release=release)
    specialist = specialists.get(guess.task_id)
    if specialist:
        reason = unservable_reason(request, max_temperature, facing)
    else:
        reason = refused.get(guess.task_id, "no specialist")
    if specialist and reason is None:
        return specialist
    name = specialist.name if specialist else None
    return RouteDecision(action="llm", reason=reason, task_id=guess.task_id, specialist=name, release=release)


def decide_after(
    answer: EngineAnswer, specialist: Specialist, invalid_reason: str | None, *, release: str
) -> RouteDecision:
    """Accept or escalate one answer.

    Args:
        invalid_reason: `cluster.servable.invalid_reason` of the answer.
    """
    threshold = specialist.gate.threshold
    reason = invalid_reason
    # Written so that a confidence that is no number escalates.
    if reason is None and (threshold is None or not answer.confidence >= threshold):
        reason = "confidence below threshold"
    return RouteDecision(
        action="accept" if reason is None else "escalate",
        reason=reason or "confident",
        task_id=specialist.task_id,
        specialist=specialist.name,
        confidence=answer.confidence,
        release=release,
    )


def fall_back(
    specialist: Specialist | None, reason: str, *, release: str, action: Literal["fall_back", "escalate"] = "fall_back"
) -> RouteDecision:
    """The decision after an error or a timeout of `specialist`; of none, the router could not take the request."""
    if specialist is None:
        return RouteDecision(action="llm", reason="the request cannot be routed", release=release or None)
    return RouteDecision(
        action=action, reason=reason, task_id=specialist.task_id, specialist=specialist.name, release=release
    )
