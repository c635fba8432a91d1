"""cluster/signature.py: what a call site keeps constant, and nothing else, decides its signature."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.signature import (
    abstract_line,
    abstract_text,
    last_user_text,
    message_text,
    signature_of,
    template_lines,
    tool_names,
    variable_text,
)

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}


def tool(name: str, description: str = "", parameters: dict = PARAMETERS) -> dict:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def ask(system: str = "Be brief.", user: str = "hello", **fields) -> dict:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"messages": messages, **fields}


@pytest.mark.parametrize(
    ("line", "abstracted"),
    [
        ("Today is Monday, May 15, 2024.", "Today is <*>."),
        ("Mail bob@example.com or see https://example.com/a?b=1", "Mail <*> or see <*>"),
        ("Order A-17 costs 3.50", "Order <*> costs <*>"),
        ('Answer "yes" now', "Answer <*> now"),
        ("Don't guess, it's the user's call", "Don't guess, it's the user's call"),
        ("  two   spaces ", "two spaces"),
    ],
)
def test_literals_become_wildcards(line, abstracted) -> None:
    assert abstract_line(line) == abstracted


@given(st.text(max_size=200))
def test_text_is_abstracted_line_by_line_without_blank_lines(text) -> None:
    lines = abstract_text(text).split("\n")
    assert all(line == line.strip() for line in lines)
    assert abstract_text(f"\n\n{text}\n\n") == abstract_text(text)


@given(st.dates(), st.integers(0, 10**6), st.text(max_size=50))
def test_literals_and_the_user_do_not_change_the_signature(day, number, user) -> None:
    seen = signature_of(ask("It is 2024-01-01.\nTicket 1."))
    assert signature_of(ask(f"It is {day:%Y-%m-%d}.\n\nTicket   {number}.", user)) == seen


@given(st.randoms(use_true_random=False))
def test_order_and_descriptions_of_tools_do_not_change_the_signature(rng: random.Random) -> None:
    tools = [tool("a"), tool("b"), tool("c")]
    seen = signature_of(ask(tools=tools))
    shuffled = [tool(t["function"]["name"], f"text {rng.random()}") for t in rng.sample(tools, 3)]
    assert signature_of(ask(tools=shuffled)) == seen
    assert signature_of(ask(functions=[t["function"] for t in tools])) == seen


def test_words_tools_schemas_and_response_format_change_the_signature() -> None:
    described = {"type": "object", "properties": {"description": {"type": "string"}}}
    requests = [
        ask(),
        ask("Be thorough."),
        {"messages": [{"role": "user", "content": "hello"}]},
        ask(tools=[tool("a")]),
        ask(tools=[tool("b")]),
        ask(tools=[tool("a", parameters=described)]),
        ask(tools=[tool("a", parameters={"type": "object", "properties": {}})]),
        ask(response_format={"type": "json_object"}),
    ]
    assert len({signature_of(request) for request in requests}) == len(requests)


def test_variable_text_is_the_quoted_words_and_the_last_user_message() -> None:
    request = ask('Answer as "pirate".', "first")
    request["messages"] += [{"role": "assistant", "content": "no"}, {"role": "user", "content": "second"}]
    assert variable_text(request) == '"pirate"\nsecond'
    assert last_user_text({"messages": [{"role": "system", "content": "alone"}]}) == "alone"


def test_template_lines_share_the_opening_and_drop_short_lines() -> None:
    first, second = (template_lines(f"Translate to French: {text}\nKeep the tone.\nok") for text in ("a b c", "d e f"))
    assert set(first) & set(second) == {"^translate to french", "Keep the tone."}
    assert "ok" not in first and template_lines(" \n") == []


def test_parts_and_absent_content_are_text() -> None:
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert message_text({"content": parts}) == "see\n[image_url]"
    assert message_text({"content": None}) == ""
    assert tool_names(ask(tools=[tool("b"), tool("a")])) == ("a", "b")
