"""A request's JSON schema, or its tools -> what vLLM's grammar holds a specialist's answer to, token by token.

Without it an answer outside the schema is written to its end, refused, and asked of the LLM. Compact prompts are left
out: their answers point at words by copy tokens, which no grammar of text knows. Source: vLLM's structured outputs
(vllm.sampling_params.StructuredOutputsParams), xgrammar's structural tags, OpenAI API reference, response_format and tools.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.answers import CALL_BEGIN, CALL_END
from cluster.prompts import PromptFormat

_MAX_SCHEMA_CHARS = 2**15
"""A larger one takes an engine, whose other answers wait, too long to make a grammar of."""
_ANY_OBJECT = {"type": "object"}


def constraint_of(request: dict[str, Any], prompt_format: PromptFormat) -> dict[str, Any] | None:
    """Arguments of StructuredOutputsParams; None where the request has neither schema nor tools, or its answer is free text.

    Example:
        >>> chat = PromptFormat(kind="chat", answer_kind="json", max_prompt_tokens=9)
        >>> constraint_of({"response_format": {"type": "json_object"}}, chat)
        {'json_object': True}
    """
    if prompt_format.kind != "chat":
        return None
    if prompt_format.answer_kind == "tool_call":
        return _of_calls(request)
    return _of_json(request.get("response_format")) if prompt_format.answer_kind == "json" else None


def _of_json(form: Any) -> dict[str, Any] | None:
    if not isinstance(form, dict):
        return None
    if form.get("type") == "json_object":
        return {"json_object": True}
    inner = form.get("json_schema")
    schema = inner.get("schema") if form.get("type") == "json_schema" and isinstance(inner, dict) else None
    is_usual = isinstance(schema, dict) and len(json.dumps(schema)) <= _MAX_SCHEMA_CHARS
    return {"json": schema} if is_usual else None


def _of_calls(request: dict[str, Any]) -> dict[str, Any] | None:
    """As `cluster.answers.to_text` writes them: calls of the tools that are offered, or of the one that is named."""
    tools = request.get("tools")
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    choice = request.get("tool_choice")
    named = (
        choice["function"].get("name")
        if isinstance(choice, dict) and isinstance(choice.get("function"), dict)
        else None
    )
    offered = [one for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)]
    offered = [one for one in offered if named in (None, one["name"])]
    if not offered:
        return None
    is_alone = request.get("parallel_tool_calls") is False
    text = _structural_tag([_tag(one, one.get("parameters")) for one in offered], is_alone)
    if len(text) > _MAX_SCHEMA_CHARS:
        text = _structural_tag([_tag(one, None) for one in offered], is_alone)
    return {"structural_tag": text} if len(text) <= _MAX_SCHEMA_CHARS else None


def _structural_tag(tags: list[dict[str, Any]], is_alone: bool) -> str:
    calls = {"type": "tags_with_separator", "tags": tags, "separator": "\n", "at_least_one": True}
    return json.dumps({"type": "structural_tag", "format": {**calls, "stop_after_first": is_alone}})


def _tag(function: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """One call. A specialist gives arguments in the order that its teacher gave them, which is the schema's only where the
    tool is `strict`; what an unordered grammar leaves open (keys that lack or come twice) is checked afterwards."""
    name = json.dumps(function["name"], ensure_ascii=False)
    return {
        "type": "tag",
        "begin": f'{CALL_BEGIN}{{"name":{name},"arguments":',
        "content": {
            "type": "json_schema",
            "json_schema": parameters if isinstance(parameters, dict) and parameters else _ANY_OBJECT,
            "any_order": function.get("strict") is not True,
        },
        "end": f"}}{CALL_END}",
    }
