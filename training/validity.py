"""Which captured calls can become examples, and why the others cannot: one bad call never stops a conversion.

What passes here goes through every later stage: its signature can be read, its prompt can be rendered or is refused
with InputError, its answer can be written as a specialist would say it and be graded. Parts that are not text are
well formed; no specialist is asked them. Knows nothing of splits or tasks. Details name places and never quote a call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from cluster.answers import to_text
from cluster.errors import InputError
from cluster.faces import ends_turn
from cluster.prompts import ROLE_TOKENS
from cluster.records import AgentCall

BY_SPECIALIST = "answered by a specialist"
AUDIT_MISSING = "audit missing"
"""Drawn into the reference stream and answered by a specialist; the LLM's answer to it was lost."""
NO_ANSWER = "no answer"
FACES_PERSON = "answer faces a person"
TOO_DEEP = "nested too deeply"
MALFORMED_REQUEST = "malformed request"
MALFORMED_ANSWER = "malformed answer"
MAX_NESTING = 100
"""Objects and lists inside one another in a request or answer; more would exhaust the interpreter's stack."""


class Problem(NamedTuple):
    """Why a call cannot become an example."""

    reason: str
    """Few fixed words, so that calls can be counted by it."""
    detail: str | None = None
    """Where it is wrong, for quarantine/; None where nothing is wrong with the call itself."""


def find_problem(call: AgentCall, *, keep_faces_person: bool, max_prompt_chars: int) -> Problem | None:
    """Why nothing may be learned from `call`, or None."""
    reason = _find_reason(call, keep_faces_person)
    if reason is not None:
        return Problem(reason)
    if _is_too_deep(call):
        return Problem(TOO_DEEP, f"more than {MAX_NESTING} levels")
    wrong = find_request_fault(call.request)
    if wrong is not None:
        return Problem(MALFORMED_REQUEST, wrong)
    message = call.message
    if message is None:
        return Problem(MALFORMED_ANSWER, "choices.0.message: allowed is an object")
    if not (message.get("content") or message.get("tool_calls")):
        return Problem(NO_ANSWER)
    try:
        text = to_text(message)
    except InputError as error:
        return Problem(MALFORMED_ANSWER, str(error).split(";")[0])
    if not text.strip():
        return Problem(NO_ANSWER)
    num_chars = _num_prompt_chars(call.request)
    if num_chars > max_prompt_chars:
        return Problem(f"prompt longer than {max_prompt_chars} characters", f"{num_chars} characters")
    return None


def find_request_fault(request: dict[str, Any]) -> str | None:
    """The first field of a chat.completions body that later stages could not read, and what is allowed there."""
    return next(_request_faults(request), None)


def _find_reason(call: AgentCall, keep_faces_person: bool) -> str | None:
    if call.served_by == "specialist":
        return AUDIT_MISSING if call.is_reference else BY_SPECIALIST
    if call.status >= 400:
        return "call failed"
    if not (call.response or {}).get("choices"):
        return NO_ANSWER
    if call.message is not None and call.finish_reason in ("length", "content_filter"):
        return "answer cut off"
    # Where only the answer tells that a turn has ended, serving asks the specialist and may keep a tool call that the
    # LLM would not have made: such a call stays among the held-out ones, and leaves train alone (training/facts.py).
    if call.faces_person and not keep_faces_person and not ends_turn(call.request, call.message):
        return FACES_PERSON
    return None


def _is_too_deep(call: AgentCall) -> bool:
    level: list[Any] = [call.request, call.response]
    for _ in range(MAX_NESTING):
        items = (item for value in level for item in (value.values() if isinstance(value, dict) else value or ()))
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _num_prompt_chars(request: dict[str, Any]) -> int:
    asked = {field: request[field] for field in ("messages", "tools", "functions") if request.get(field)}
    return len(json.dumps(asked, ensure_ascii=False, separators=(",", ":")))


def _request_faults(request: dict[str, Any]) -> Iterator[str]:
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        yield "messages: allowed is a list of at least one object"
        return
    for number, message in enumerate(messages):
        yield from (f"messages.{number}{fault}" for fault in _message_faults(message))
    for field in ("tools", "functions"):
        tools = request.get(field)
        if not isinstance(tools, list | None) or not all(map(_is_tool, tools or ())):
            yield f"{field}: allowed is a list of objects with a name and a schema"
    if not _is_response_format(request.get("response_format")):
        yield "response_format: allowed is an object with a type"
    if not _is_tool_choice(request.get("tool_choice")):
        yield "tool_choice: allowed is a text or an object that names a function"


def _message_faults(message: Any) -> Iterator[str]:
    if not isinstance(message, dict):
        yield ": allowed is an object"
        return
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or role not in ROLE_TOKENS:
        yield f".role: allowed: {', '.join(ROLE_TOKENS)}"
    if not isinstance(content, str | list | None) or (isinstance(content, list) and not all(map(_is_part, content))):
        yield ".content: allowed is a text, a list of parts or null"
    if not isinstance(calls, list | None) or not all(map(_is_call, calls or ())):
        yield ".tool_calls: allowed is a list of objects with a function"


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    return isinstance(part.get("text"), str) if part["type"] == "text" else isinstance(part.get("text"), str | None)


def _is_call(call: Any) -> bool:
    """A call of a custom tool has no function."""
    return isinstance(call, dict) and isinstance(call.get("function", {}), dict)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else ""
    if not isinstance(function, dict | None):
        return False
    named = tool if function is None else function
    return isinstance(named.get("name"), str | None) and isinstance(named.get("parameters"), dict | bool | None)


def _is_response_format(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("type"), str | None):
        return False
    schema = value.get("json_schema")
    return schema is None or (isinstance(schema, dict) and isinstance(schema.get("schema"), dict | bool | None))


def _is_tool_choice(value: Any) -> bool:
    if not isinstance(value, dict) or "function" not in value:
        return isinstance(value, dict | str | None)
    return isinstance(value["function"], dict) and isinstance(value["function"].get("name"), str)
