"""Which requests hold a specialist's answer to a grammar."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.prompts import PromptFormat
from serving.constraint import constraint_of

CHAT = PromptFormat(kind="chat", answer_kind="json", max_prompt_tokens=9)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def _form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def test_a_schema_and_any_json_object_are_held_to() -> None:
    assert constraint_of(_form(SCHEMA), CHAT) == {"json": SCHEMA}
    assert constraint_of(_form({}), CHAT) == {"json": {}}
    assert constraint_of({"response_format": {"type": "json_object"}}, CHAT) == {"json_object": True}


@pytest.mark.parametrize(
    "request_", [{}, {"response_format": None}, {"response_format": {"type": "text"}}, _form("x"), _form(None),
                 {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "json_schema", "json_schema": []}},
                 _form({"enum": ["x" * 40_000]})],
)  # fmt: skip
def test_what_has_no_usual_schema_is_held_to_nothing(request_: dict[str, Any]) -> None:
    assert constraint_of(request_, CHAT) is None


@pytest.mark.parametrize("change", [{"kind": "compact"}, {"answer_kind": "label"}, {"answer_kind": "tool_call"}])
def test_answers_that_are_no_json_text_are_held_to_nothing(change: dict[str, Any]) -> None:
    assert constraint_of(_form(SCHEMA), CHAT.model_copy(update=change)) is None
