"""Which calls a specialist may be asked, and which of its answers may be kept whatever its confidence.

The gateway decides by it what a client gets, and validation by it what a gate's calls are: so that the calls a gate was
certified on are those it lets through. Knows nothing of routes, thresholds or time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.acceptance import deformed_reason
from cluster.answers import check
from cluster.engine import Engine, EngineAnswer
from cluster.faces import FACES_REASON, Facing
from cluster.prompts import PromptFormat

REJECTED_REASON = "confidence below threshold, known early"
"""Of an answer that the engine gave up."""
_UNLESS_PLAIN: dict[str, tuple[Any, ...]] = {
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
"""Field of a request -> the values with which a greedy answer in text or tool calls is all it asks for."""


def unservable_reason(request: Mapping[str, Any], max_temperature: float, facing: Facing) -> str | None:
    """Why no specialist may be asked for this request, or None.

    A specialist gives one greedy answer in text or tool calls: whatever asks for more goes to the LLM.
    """
    if facing.bars_call:
        return FACES_REASON
    for name, plain in _UNLESS_PLAIN.items():
        if request.get(name) not in plain:
            return f"{name} is set"
    temperature = request.get("temperature")
    if isinstance(temperature, int | float) and temperature > max_temperature:
        return "temperature above gateway.max_temperature"
    if any(_has_media(message) for message in request["messages"]):
        return "a message part is not text"
    return None


def invalid_reason(
    answer: EngineAnswer, prompt_format: PromptFormat, request: Mapping[str, Any], facing: Facing
) -> str | None:
    """Why an answer must not be kept whatever its confidence, or None."""
    if answer.finish_reason == "rejected":
        return REJECTED_REASON
    if answer.finish_reason == "length":
        return "the answer was cut"
    if answer.message is None:
        return "the answer is not of the task's kind"
    if any(answer.completion_tokens > limit for limit in _token_limits(request)):
        return "the answer is longer than the request allows"
    if facing.bars_answer(request, answer.message):
        return FACES_REASON
    return check(answer.message, prompt_format.answer_kind, dict(request)) or deformed_reason(
        answer.text, request, prompt_format.answer_form
    )


async def ask_engine(
    engine: Engine,
    adapter: str | None,
    prompt_format: PromptFormat,
    request: dict[str, Any],
    max_answer_tokens: int,
    facing: Facing,
    stop_below: float = 0.0,
) -> tuple[EngineAnswer, str | None]:
    """Ask a request that is servable; the answer, and why it must not be kept (None: its confidence decides).

    Args:
        stop_below: the gate's threshold where it is known: it changes when an answer is refused, never whether.

    Raises:
        InputError: the prompt is not for this specialist.
        EngineError: the engine failed.
    """
    # What the request's own limit cuts is refused as an answer beyond that limit is.
    num_tokens = max(1, min([max_answer_tokens, *_token_limits(request)]))
    answer = await engine.answer(adapter, prompt_format, request, num_tokens, stop_below=stop_below)
    return answer, invalid_reason(answer, prompt_format, request, facing)


def _token_limits(request: Mapping[str, Any]) -> list[int]:
    limits = (request.get("max_completion_tokens"), request.get("max_tokens"))
    return [limit for limit in limits if isinstance(limit, int)]


def _has_media(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(
        not isinstance(part, dict) or part.get("type") != "text" for part in content
    )
