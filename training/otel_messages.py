"""Chat content of one OpenTelemetry span -> chat.completions messages, from whichever convention wrote it.

1. `gen_ai.input.messages`, `gen_ai.output.messages`, `gen_ai.system_instructions`, `gen_ai.tool.definitions`, on the
   span or on its event `gen_ai.client.inference.operation.details` (semantic-conventions-genai v0.1.0:
   docs/gen-ai/client-inference.md, model/gen-ai/gen-ai-{input,output}-messages.json, gen-ai-tool-definitions.json);
2. `gen_ai.prompt.N.role`, `gen_ai.completion.N.tool_calls.K.name`, `llm.request.functions.N.*`, one attribute for each
   leaf (traceloop/openllmetry, opentelemetry-semantic-conventions-ai 0.5.1);
3. one event for each message: `gen_ai.user.message` ... `gen_ai.choice` (semantic-conventions v1.36.0 and before), its
   body in the event's attributes or as JSON in `gen_ai.event.content`;
4. `gen_ai.prompt` and `gen_ai.completion`, JSON in an attribute or in the events `gen_ai.content.prompt` and
   `gen_ai.content.completion` (v1.27 and before).
Attributes come decoded. Knows nothing of OTLP.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from training.log_files import Unusable
from training.log_records import from_json_text

_DETAILS_EVENT = "gen_ai.client.inference.operation.details"
_ROLE_OF_EVENT = {f"gen_ai.{role}.message": role for role in ("system", "user", "assistant", "tool")}
_FINISH_REASONS = {"tool_call": "tool_calls", "tool_use": "tool_calls", "end_turn": "stop", "max_tokens": "length"}
"""The conventions' own word, and those of other vendors, in OpenAI's."""

_PARTS = ("text", "image_url", "input_audio", "file", "refusal")
_NUMBER = re.compile(r"\d{1,6}", re.ASCII)


class Event(NamedTuple):
    name: str
    attributes: dict[str, Any]


class Chat(NamedTuple):
    """What was asked and what came back; empty where the span holds no content."""

    messages: list[Any]
    answers: list[tuple[Any, str | None]]
    """Message and finish reason of each choice."""
    tools: list[Any]


def read_chat(attributes: dict[str, Any], events: list[Event]) -> Chat:
    """The chat in one span; each part from the newest convention that has it.

    Raises:
        Unusable: a part of a message that a chat request has no place for.
    """
    details = next((event.attributes for event in events if event.name == _DETAILS_EVENT), {})
    found = {**details, **attributes}
    chats = (_structured(found), _indexed(attributes), _from_events(events), _in_one_text(attributes, events))
    return Chat(*(next((part for part in parts if part), []) for parts in zip(*chats, strict=True)))


def _structured(attributes: dict[str, Any]) -> Chat:
    messages: list[Any] = []
    instructions = from_json_text(attributes.get("gen_ai.system_instructions"))
    if instructions:
        parts = instructions if isinstance(instructions, list) else [{"type": "text", "content": instructions}]
        messages += _from_parts({"role": "system", "parts": parts})
    for message in _list(attributes.get("gen_ai.input.messages")):
        messages += _from_parts(message)
    answers = []
    for message in _list(attributes.get("gen_ai.output.messages")):
        given = message.get("finish_reason") if isinstance(message, dict) else None
        answers += [(answer, _finish(given)) for answer in _from_parts(message)]
    tools = [_as_tool(tool) for tool in _list(attributes.get("gen_ai.tool.definitions"))]
    return Chat(messages, answers, tools)


def _list(value: Any) -> list[Any]:
    value = from_json_text(value)
    return value if isinstance(value, list) else []


def _from_parts(message: Any) -> list[Any]:
    """One message of the conventions as messages of a chat: each tool result is one of its own."""
    if not isinstance(message, dict) or not isinstance(message.get("parts"), list):
        return [message]
    role, content, calls, results, thoughts = message.get("role"), [], [], [], []
    for part in message["parts"]:
        part = part if isinstance(part, dict) else {"type": "text", "content": part}
        kind = part.get("type")
        if kind == "text":
            content.append({"type": "text", "text": part.get("content")})
        elif kind == "tool_call":
            calls.append(_as_call(part.get("id"), part.get("name"), part.get("arguments")))
        elif kind == "tool_call_response":
            result = part["response"] if "response" in part else part.get("result")
            results.append({"role": "tool", "tool_call_id": part.get("id"), "content": _as_content(result)})
        elif kind == "reasoning":
            thoughts.append(part.get("content"))
        elif kind in ("uri", "blob") and part.get("modality") == "image":
            data = f"data:{part.get('mime_type') or 'image/png'};base64,{part.get('content')}"
            content.append({"type": "image_url", "image_url": {"url": part.get("uri", data)}})
        else:
            raise Unusable("unsupported part", "messages: a part that a chat request has no place for")
    if results and not content and not calls:
        return results
    is_text = len(content) == 1 and content[0]["type"] == "text"
    plain: dict[str, Any] = {"role": role, "content": content[0]["text"] if is_text else content or None}
    plain |= {"name": message["name"]} if message.get("name") else {}
    plain |= {"tool_calls": calls} if calls else {}
    plain |= {"reasoning_content": "\n".join(str(thought) for thought in thoughts)} if thoughts else {}
    return [*results, plain]


def _as_content(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _as_call(call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def _as_tool(tool: Any) -> Any:
    """A definition of the conventions nested as a chat request has it; one that is nested already as it is."""
    tool = from_json_text(tool)
    if not isinstance(tool, dict) or "function" in tool or tool.get("type", "function") != "function":
        return tool
    described = {key: from_json_text(value) if key == "parameters" else value for key, value in tool.items()}
    return {"type": "function", "function": {key: value for key, value in described.items() if key != "type"}}


def _finish(reason: Any) -> str | None:
    return _FINISH_REASONS.get(reason, reason) if isinstance(reason, str) and reason else None


def _indexed(attributes: dict[str, Any]) -> Chat:
    asked = _unflatten(attributes, "gen_ai.prompt.")
    said = _unflatten(attributes, "gen_ai.completion.")
    tools = [_as_tool({"type": "function", **tool}) for tool in _unflatten(attributes, "llm.request.functions.")]
    answers = [(_plain(message, "assistant"), _finish(message.get("finish_reason"))) for message in said]
    return Chat([_plain(message, "user") for message in asked], answers, tools)


def _unflatten(attributes: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """`PREFIX0.role`, `PREFIX0.tool_calls.1.name` ... as objects in the order of their numbers."""
    found: dict[int, dict[str, Any]] = {}
    for key, value in attributes.items():
        head, _, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or not _NUMBER.fullmatch(head) or not rest:
            continue
        item = found.setdefault(int(head), {})
        field, _, inner = rest.partition(".")
        number, _, leaf = inner.partition(".")
        if field == "tool_calls" and _NUMBER.fullmatch(number) and leaf:
            item.setdefault(field, {}).setdefault(int(number), {})[leaf.removeprefix("function.")] = value
        elif field != "tool_calls":
            item[rest] = value
    return [found[number] for number in sorted(found)]


def _plain(item: dict[str, Any], default_role: str) -> dict[str, Any]:
    """One unflattened message."""
    message: dict[str, Any] = {"role": item.get("role") or default_role, "content": _content(item.get("content"))}
    calls = item.get("tool_calls")
    if isinstance(calls, dict):
        leaves = [calls[number] for number in sorted(calls)]
        message["tool_calls"] = [_as_call(leaf.get("id"), leaf.get("name"), leaf.get("arguments")) for leaf in leaves]
    return message | {key: item[key] for key in ("tool_call_id", "name", "refusal") if item.get(key)}


def _content(value: Any) -> Any:
    """Content that is a list of a chat's parts was written as JSON; any other text is what was said."""
    parts = from_json_text(value)
    is_parts = isinstance(parts, list) and parts and all(isinstance(p, dict) and p.get("type") in _PARTS for p in parts)
    return parts if is_parts else value


def _from_events(events: list[Event]) -> Chat:
    messages, answers = [], []
    for event in events:
        body = from_json_text(event.attributes.get("gen_ai.event.content"))
        body = body if isinstance(body, dict) else event.attributes
        role = _ROLE_OF_EVENT.get(event.name)
        if role:
            messages.append(_event_message(body, role))
        elif event.name == "gen_ai.choice":
            inner = from_json_text(body.get("message"))
            answer = _event_message(inner if isinstance(inner, dict) else body, "assistant")
            answers.append((answer, _finish(body.get("finish_reason"))))
    return Chat(messages, answers, [])


def _event_message(body: dict[str, Any], role: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": body.get("role") or role, "content": _content(body.get("content"))}
    calls = _list(body.get("tool_calls"))
    if calls:
        message["tool_calls"] = [_with_text_arguments(call) for call in calls]
    call_id = body.get("tool_call_id") or body.get("id")
    return message | ({"tool_call_id": call_id} if role == "tool" and call_id else {})


def _with_text_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return {**call, **_as_call(call.get("id"), function.get("name"), function.get("arguments"))}


def _in_one_text(attributes: dict[str, Any], events: list[Event]) -> Chat:
    kept = dict(attributes)
    for event in events:
        if event.name in ("gen_ai.content.prompt", "gen_ai.content.completion"):
            kept = {**event.attributes, **kept}
    return Chat(
        [message for item in _as_messages(kept.get("gen_ai.prompt"), "user") for message in _from_parts(item)],
        [
            (message, _finish(item.get("finish_reason")))
            for item in _as_messages(kept.get("gen_ai.completion"), "assistant")
            for message in _from_parts(item)
        ],
        [],
    )


def _as_messages(value: Any, role: str) -> list[Any]:
    """Messages written as JSON, or one text; JSON without a role is what was said."""
    found = from_json_text(value)
    if isinstance(found, dict):
        found = found.get("messages", [found])
    if isinstance(found, list) and found and all(isinstance(item, dict) and "role" in item for item in found):
        return found
    return [{"role": role, "content": value}] if isinstance(value, str) and value else []
