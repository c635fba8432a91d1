"""A request's JSON schema -> what vLLM's grammar holds a specialist's answer to, token by token.

Without it an answer outside the schema is written to its end, refused, and asked of the LLM. Compact prompts are left
out: their answers point at words by copy tokens, which no grammar of text knows. Source: vLLM's structured outputs
(vllm.sampling_params.StructuredOutputsParams), OpenAI API reference, response_format.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.prompts import PromptFormat

_MAX_SCHEMA_CHARS = 2**15
"""A larger one takes an engine, whose other answers wait, too long to make a grammar of."""


def constraint_of(request: dict[str, Any], prompt_format: PromptFormat) -> dict[str, Any] | None:
    """Arguments of StructuredOutputsParams; None where the request has no schema, or its answer is no JSON text.

    Example:
        >>> chat = PromptFormat(kind="chat", answer_kind="json", max_prompt_tokens=9)
        >>> constraint_of({"response_format": {"type": "json_object"}}, chat)
        {'json_object': True}
    """
    form = request.get("response_format")
    if prompt_format.kind != "chat" or prompt_format.answer_kind != "json" or not isinstance(form, dict):
        return None
    if form.get("type") == "json_object":
        return {"json_object": True}
    inner = form.get("json_schema")
    schema = inner.get("schema") if form.get("type") == "json_schema" and isinstance(inner, dict) else None
    is_usual = isinstance(schema, dict) and len(json.dumps(schema)) <= _MAX_SCHEMA_CHARS
    return {"json": schema} if is_usual else None
