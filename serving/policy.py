"""Pure decisions of the request path: which calls a specialist may be asked, and whether its answer is kept.

Turns a routed request into a specialist or a reason to leave the call to the LLM, and an answer into accept or
escalate. Knows nothing of time, networks or counters; every function can be tested with plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from cluster.engine import EngineAnswer
from cluster.records import RouteDecision, Specialist


class Guess(Protocol):
    """What the route model says about one request."""

    task_id: str | None
    reason: str


def decide_before(
    guess: Guess,
    request: Mapping[str, Any],
    *,
    specialists: Mapping[str, Specialist],
    refused: Mapping[str, str],
    release: str,
    max_temperature: float,
) -> Specialist | RouteDecision:
    """The specialist to ask, or the decision that the LLM answers without one being asked.

    Args:
        specialists: those that are open and loaded, by task.
        refused: why the other tasks of the release have none.
    """
    if guess.task_id is None:
        return RouteDecision(action="llm", reason=guess.reason, release=release)
    specialist = specialists.get(guess.task_id)
    reason = unservable_reason(request, max_temperature) if specialist else refused.get(guess.task_id, "no specialist")
    if specialist and reason is None:
        return specialist
    name = specialist.name if specialist else None
    return RouteDecision(action="llm", reason=reason, task_id=guess.task_id, specialist=name, release=release)


def decide_after(
    answer: EngineAnswer, specialist: Specialist, invalid_reason: str | None, *, release: str
) -> RouteDecision:
    """Accept or escalate one answer.

    Args:
        invalid_reason: what is wrong with the answer whatever its confidence; None where nothing is.
    """
    threshold = specialist.gate.threshold
    reason = None
    if answer.finish_reason == "length":
        reason = "the answer was cut"
    elif answer.message is None:
        reason = "the answer is not of the task's kind"
    elif invalid_reason is not None:
        reason = invalid_reason
    # Written so that a confidence that is no number escalates.
    elif threshold is None or not answer.confidence >= threshold:
        reason = "confidence below threshold"
    return RouteDecision(
        action="accept" if reason is None else "escalate",
        reason=reason or "confident",
        task_id=specialist.task_id,
        specialist=specialist.name,
        confidence=answer.confidence,
        release=release,
    )


def fall_back(specialist: Specialist, reason: str, *, release: str) -> RouteDecision:
    """The decision after an error or a timeout of `specialist`."""
    return RouteDecision(
        action="fall_back", reason=reason, task_id=specialist.task_id, specialist=specialist.name, release=release
    )


def unservable_reason(request: Mapping[str, Any], max_temperature: float) -> str | None:
    """Why no specialist may be asked for this request, or None.

    A specialist gives one greedy answer in text or tool calls: whatever asks for more goes to the LLM.
    """
    unless_plain = {
        "n": (None, 1),
        "logprobs": (None, False),
        "top_logprobs": (None, 0),
        "logit_bias": (None, {}),
        "stop": (None, []),
        "tool_choice": (None, "auto", "required"),
        "function_call": (None, "auto"),
        "functions": (None, []),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "web_search_options": (None,),
    }
    for name, plain in unless_plain.items():
        if request.get(name) not in plain:
            return f"{name} is set"
    temperature = request.get("temperature")
    if isinstance(temperature, int | float) and temperature > max_temperature:
        return "temperature above gateway.max_temperature"
    if any(_has_media(message) for message in request["messages"]):
        return "a message part is not text"
    return None


def limit_reason(answer: EngineAnswer, request: Mapping[str, Any]) -> str | None:
    """How an answer breaks a limit of the request that validity of its content does not cover, or None."""
    limits = [request.get("max_completion_tokens"), request.get("max_tokens")]
    if any(isinstance(limit, int) and answer.completion_tokens > limit for limit in limits):
        return "the answer is longer than the request allows"
    num_calls = len((answer.message or {}).get("tool_calls") or ())
    if num_calls > 1 and request.get("parallel_tool_calls") is False:
        return "parallel tool calls, which the request rules out"
    return None


def _has_media(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(part.get("type") != "text" for part in content)
