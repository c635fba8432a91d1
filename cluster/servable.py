"""Which calls a specialist may be asked, and which of its answers may be kept whatever its confidence.

The gateway decides by it what a client gets, and validation by it what a gate's calls are: so that the calls a gate was
certified on are those it lets through. Knows nothing of routes, thresholds or time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cluster.acceptance import deformed_reason
from cluster.answers import check
from cluster.engine import Engine, EngineAnswer
from cluster.faces import FACES_REASON, Facing
from cluster.prompts import PromptFormat

REJECTED_REASON = "confidence below threshold, known early"
"""Of an answer that the engine gave up."""
_COUNT, _NUMBER, _TEXT, _FLAG, _OBJECT = (int,), (int, float), (str,), (bool,), (dict,)
_TAKEN: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("messages", "tools"), (list,)),
    **dict.fromkeys(("model", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), _TEXT),
    **dict.fromkeys(("service_tier", "reasoning_effort", "verbosity"), _TEXT),
    **dict.fromkeys(("response_format", "metadata", "stream_options", "prediction", "prompt_cache_options"), _OBJECT),
    **dict.fromkeys(("stream", "store", "parallel_tool_calls"), _FLAG),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "seed", "top_k"), _COUNT),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), _NUMBER),
    "stop": (str, list),
    "tool_choice": (str, dict),
}
"""Field of a request -> its types: it changes nothing in one greedy answer, or the answer is checked against it."""
_UNLESS_PLAIN: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "function_call": ("auto",),
    "functions": ([],),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
}
"""Field of a request -> the values with which a greedy answer in text or tool calls is all it asks for."""
_RESPONSE_FORMATS = ("text", "json_object", "json_schema")
_MAX_STOPS = 4
_FIELD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def unservable_reason(request: Mapping[str, Any], max_temperature: float, facing: Facing) -> str | None:
    """Why no specialist may be asked for this request, or None.

    A specialist gives one greedy answer in text or tool calls: whatever asks for more goes to the LLM, and so does what
    is not known here or not valid, for the LLM to judge. Source: OpenAI API reference, create chat completion.
    """
    if facing.bars_call:
        return FACES_REASON
    for name, value in request.items():
        if value is not None and (reason := _field_reason(name, value)):
            return reason
    temperature = request.get("temperature")
    if temperature is not None and temperature > max_temperature:
        return "temperature above gateway.max_temperature"
    if any(limit < 1 for limit in _limits(request)):
        return "fewer than one token is allowed"
    if _stops(request) is None:
        return f"stop is not one to {_MAX_STOPS} texts"
    return _tools_reason(request) or _content_reason(request)


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
    if any(answer.completion_tokens > limit for limit in _limits(request)):
        return "the answer is longer than the request allows"
    if any(stop in answer.text for stop in _stops(request) or ()):
        return "a stop sequence is in the answer"
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
    # A longer answer would not be kept: the engine need not finish it.
    limit = min([max_answer_tokens, *_limits(request)])
    answer = await engine.answer(adapter, prompt_format, request, limit, stop_below=stop_below)
    return answer, invalid_reason(answer, prompt_format, request, facing)


def _field_reason(name: str, value: Any) -> str | None:
    if name in _UNLESS_PLAIN:
        # By type as well, because True equals 1.
        is_plain = any(type(value) is type(plain) and value == plain for plain in _UNLESS_PLAIN[name])
        return None if is_plain else f"{name} is set"
    if name not in _TAKEN:
        return f"no specialist knows the field {name if _FIELD.fullmatch(name) else 'of this name'}"
    return None if type(value) in _TAKEN[name] else f"{name} is not of its type"


def _limits(request: Mapping[str, Any]) -> list[int]:
    """How many tokens the answer may have, however often that is said."""
    limits = [request.get("max_completion_tokens"), request.get("max_tokens")]
    return [limit for limit in limits if isinstance(limit, int)]


def _stops(request: Mapping[str, Any]) -> list[str] | None:
    """The stop sequences; None where they are not valid."""
    stop = request.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    is_valid = len(stops) <= _MAX_STOPS and all(isinstance(one, str) and one for one in stops)
    return stops if is_valid else None


def _tools_reason(request: Mapping[str, Any]) -> str | None:
    """Functions alone, and a choice among them that an answer can be checked against."""
    tools = request.get("tools") or []
    if not all(isinstance(tool, dict) and tool.get("type") in (None, "function") for tool in tools):
        return "a tool is not a function"
    functions = [tool.get("function") for tool in tools]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        return "a tool is not a function"
    choice = request.get("tool_choice")
    if choice in (None, "auto", "none", "required"):
        return None
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    is_offered = isinstance(named, dict) and named.get("name") in [function["name"] for function in functions]
    return None if is_offered else "tool_choice is neither auto, none, required nor a tool that is offered"


def _content_reason(request: Mapping[str, Any]) -> str | None:
    if (request.get("response_format") or {}).get("type", "text") not in _RESPONSE_FORMATS:
        return f"response_format is none of {', '.join(_RESPONSE_FORMATS)}"
    return "a message part is not text" if any(map(_has_media, request["messages"])) else None


def _has_media(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    has_other_part = isinstance(content, list) and any(
        not isinstance(part, dict) or part.get("type") != "text" for part in content
    )
    # An answer that was spoken: the LLM keeps its words under this id.
    return has_other_part or message.get("audio") is not None
