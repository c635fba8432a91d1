"""Which requests hold a specialist's answer to a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.answers import check, to_message, to_text
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


@pytest.mark.parametrize("change", [{"kind": "compact"}, {"answer_kind": "label"}, {"answer_kind": "text"}])
def test_answers_that_are_no_json_text_are_held_to_nothing(change: dict[str, Any]) -> None:
    asked = {**_form(SCHEMA), "tools": [WEATHER]}
    assert constraint_of(asked, CHAT.model_copy(update=change)) is None


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
OTHER = {"type": "function", "function": {"name": 'näme "2"'}}
CALLS = PromptFormat(kind="chat", answer_kind="tool_call", max_prompt_tokens=9)


def _text(*calls: tuple[str, Any]) -> str:
    """As a specialist is taught to say them."""
    functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
    return to_text({"role": "assistant", "tool_calls": [{"function": function} for function in functions]})


def _takes(request_: dict[str, Any], text: str) -> bool:
    """Whether an engine that is held to the request's grammar can say this and end."""
    import xgrammar

    constraint = constraint_of(request_, CALLS)
    assert constraint is not None
    grammar = xgrammar.Grammar.from_structural_tag(constraint["structural_tag"])
    letters, end = [bytes([number]) for number in range(256)], 256
    vocabulary = xgrammar.TokenizerInfo([*letters, b"END"], vocab_size=257, stop_token_ids=[end])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(vocabulary, max_threads=1).compile_grammar(grammar))
    return bool(matcher.accept_string(text) and matcher.accept_token(end))


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))
OF_WEATHER = st.permutations([("city", "Bern"), ("days", 3)]).map(dict) | st.builds(dict, city=st.text())
ANY_CALL = st.tuples(st.just("weather"), OF_WEATHER) | st.tuples(
    st.just(OTHER["function"]["name"]), st.dictionaries(st.text(), VALUES, max_size=3)
)


@given(st.lists(ANY_CALL, min_size=1, max_size=3))
def test_whatever_calls_of_offered_tools_a_teacher_makes_can_be_said(calls: list[tuple[str, Any]]) -> None:
    request_, text = {"tools": [WEATHER, OTHER]}, _text(*calls)
    assert check(to_message(text, "tool_call"), "tool_call", request_) is None
    assert _takes(request_, text)


@pytest.mark.parametrize(
    "text", ["", "I cannot.", _text(("nobody", {})), _text(("weather", {"city": 3})), _text(("weather", {"sky": "x"})),
             _text(("weather", {"city": "x"})) + "\nDone.", _text(("weather", {"city": "x"}))[:-1]],
)  # fmt: skip
def test_no_other_text_can_be_said(text: str) -> None:
    assert not _takes({"tools": [WEATHER, OTHER]}, text)


def test_a_choice_of_tool_one_call_and_strict_order_are_held_to() -> None:
    both, one = {"tools": [WEATHER, OTHER]}, ("weather", {"city": "x"})
    named = {**both, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    assert _takes(named, _text(one)) and not _takes(named, _text((OTHER["function"]["name"], {})))
    alone = {**both, "parallel_tool_calls": False}
    assert _takes(alone, _text(one)) and not _takes(alone, _text(one, one)) and _takes(both, _text(one, one))
    swapped = _text(("weather", {"days": 1, "city": "x"}))
    assert _takes(both, swapped) and not _takes({"tools": [STRICT]}, swapped)


def test_a_catalog_of_large_schemas_is_held_to_names_alone() -> None:
    large = {**PARAMETERS, "description": "x" * 2_000}
    tools = [{"type": "function", "function": {"name": f"t{number}", "parameters": large}} for number in range(64)]
    assert _takes({"tools": tools}, _text(("t63", {"anything": 1}))) and not _takes(
        {"tools": tools}, _text(("t64", {}))
    )


def test_a_catalog_of_too_many_tools_is_held_to_nothing() -> None:
    tools = [{"type": "function", "function": {"name": f"t{number}"}} for number in range(400)]
    assert constraint_of({"tools": tools}, CALLS) is None


@pytest.mark.parametrize(
    "request_", [{}, {"tools": None}, {"tools": "x"}, {"tools": [3, {"function": 3}, {"function": {"name": 3}}]},
                 {"tools": [WEATHER], "tool_choice": {"function": {"name": "other"}}}],
)  # fmt: skip
def test_a_request_without_a_tool_that_may_be_called_is_held_to_nothing(request_: dict[str, Any]) -> None:
    assert constraint_of(request_, CALLS) is None
