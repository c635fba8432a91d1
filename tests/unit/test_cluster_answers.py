"""Answers survive the way through text, are compared by value, and are refused for what the request itself forbids."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.answers import check, grade, json_value, kind_of, to_message, to_text
from cluster.errors import InputError

TEXTS = st.text(max_size=12) | st.sampled_from(
    ['"\\', "</tool_call>", "<tool_call>", "\n```", "\ud800", "e\u0301 \U0001f3ad", "true"]
)
SCALARS = TEXTS | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=8)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
CALLS = st.lists(st.tuples(st.sampled_from(["search", "book", "pay"]), OBJECTS), min_size=1, max_size=3)

BOOK = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "nights": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
REQUEST = {"messages": [], "tools": [{"type": "function", "function": {"name": "book", "parameters": BOOK}}]}


def calling(*calls: tuple[str, object]) -> dict:
    functions = [{"name": name, "arguments": a if isinstance(a, str) else json.dumps(a)} for name, a in calls]
    tool_calls = [{"id": f"call_{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}


def saying(content: object) -> dict:
    return {"role": "assistant", "content": content}


def asking(schema: dict | None = None) -> dict:
    if schema is None:
        return {"messages": [], "response_format": {"type": "json_object"}}
    return {"messages": [], "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


@given(CALLS)
def test_tool_calls_survive_the_way_through_text(calls):
    message = calling(*calls)
    text = to_text(message)
    answer = to_message(text, "tool_call")
    assert grade(answer, message, "tool_call", {}).agrees
    assert to_text(answer) == text
    assert text.encode()
    assert len({call["id"] for call in answer["tool_calls"]}) == len(calls)


@given(
    OBJECTS | st.lists(VALUES, max_size=3),
    st.sampled_from(["{}", "```json\n{}\n```", " {}\n"]),
    st.sampled_from([None, 2]),
)
def test_json_survives_the_way_through_text(value, form, indent):
    message = saying(form.replace("{}", json.dumps(value, indent=indent)))
    answer = to_message(to_text(message), "json")
    assert kind_of(message, {}) == "json"
    assert grade(answer, message, "json", {}).agrees
    assert json_value(answer["content"]) == value
    assert answer["content"].startswith("`") == form.startswith("`")


@given(st.text(min_size=1).filter(str.strip) | OBJECTS.map(lambda v: json.dumps(v, indent=1)))
def test_text_survives_the_way_through_text(content):
    message = saying(content)
    assert grade(to_message(to_text(message), "text"), message, "text", {}).agrees


@given(CALLS, CALLS, st.randoms())
def test_grading_tool_calls_is_symmetric_and_ignores_their_order(left, right, random):
    one, other = calling(*left), calling(*right)
    forward = grade(one, other, "tool_call", {})
    assert forward == grade(other, one, "tool_call", {})
    assert forward.agrees == (forward.score == 1.0) == all(forward.fields.values())
    random.shuffle(left)
    assert grade(calling(*left), other, "tool_call", {}) == forward


@given(OBJECTS | st.lists(VALUES, max_size=2), OBJECTS | st.lists(VALUES, max_size=2))
def test_grading_json_is_symmetric(left, right):
    one, other = saying(json.dumps(left)), saying(json.dumps(right))
    forward = grade(one, other, "json", {})
    assert forward == grade(other, one, "json", {})
    assert forward.agrees == (forward.score == 1.0) == all(forward.fields.values())


@given(st.text())
def test_whatever_a_model_says_is_read_without_an_error(text):
    for said in (text, f"<tool_call>{text}</tool_call>", "{" + text):
        for kind in ("tool_call", "json", "label", "text"):
            message = to_message(said, kind)
            assert message is None or to_message(to_text(message), kind) is not None


def test_the_text_of_tool_calls_is_compact_hermes_without_the_prose_beside_them():
    message = calling(("book", '{ "city": "K\u00f6ln",  "nights": 2 }'), ("ping", "")) | {"content": "Let me see."}
    assert to_text(message) == (
        '<tool_call>{"name":"book","arguments":{"city":"K\u00f6ln","nights":2}}</tool_call>\n'
        '<tool_call>{"name":"ping","arguments":{}}</tool_call>'
    )


def test_json_content_becomes_compact_in_its_own_key_order_and_other_content_stays():
    assert to_text(saying('{ "b": 1,\n "a": [1, 2] }')) == '{"b":1,"a":[1,2]}'
    assert to_text(saying('```json\n{ "b": 1 }\n```')) == '```json\n{"b":1}\n```'
    assert to_text(saying("  two  words\n")) == "  two  words\n"
    assert to_text(saying([{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}])) == "two parts"


@pytest.mark.parametrize(
    "message",
    [calling(("book", "[1]")), calling(("book", "{oops")), calling(("", "{}")), saying([{"type": "image_url"}])],
)
def test_a_message_without_a_text_form_is_an_input_error(message):
    with pytest.raises(InputError, match="drop this message"):
        to_text(message)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! <tool_call>{}</tool_call>",
        "<tool_call>3</tool_call>",
        '<tool_call>{"name":"book","arguments":{}}',
        '<tool_call>{"name":"book","arguments":{}}</tool_call> done',
        '<tool_call>{"name":"book","arguments":"{}"}</tool_call>',
        '<tool_call>{"name":"book","arguments":{},"id":1}</tool_call>',
        '<tool_call>{"name":"book","arguments":{"x":NaN}}</tool_call>',
    ],
)
def test_text_that_is_not_only_whole_tool_calls_is_no_tool_call(text):
    assert to_message(text, "tool_call") is None


@pytest.mark.parametrize(
    "text",
    ["[" * 5000 + "]" * 5000, "[" * 65 + "]" * 65, "[1e400]", "[Infinity]", "[1] [2]", "3", "[" + "1" * 5000 + "]"],
)
def test_json_that_is_too_deep_not_finite_or_not_one_object_or_array_is_refused(text):
    assert json_value(text) is None
    assert to_message(text, "json") is None


def test_json_may_be_nested_64_deep():
    assert json_value("[" * 64 + "1" + "]" * 64) is not None


def test_labels_are_stripped_and_single_lines():
    assert to_message(" card arrival\n", "label") == saying("card arrival")
    assert to_message("one\ntwo", "label") is None
    assert to_message(" \n", "label") is None


@pytest.mark.parametrize(
    ("message", "request_", "kind"),
    [
        (calling(("book", {})), {}, "tool_call"),
        (saying('{"a": 1}'), {}, "json"),
        (saying("```json\n[1]\n```"), {}, "json"),
        (saying("not yet"), asking(), "json"),
        (saying("refund_request"), {}, "label"),
        (saying("42"), {}, "label"),
        (saying("x" * 41), {}, "text"),
        (saying("two words"), {}, "text"),
        (saying(None), {}, "text"),
    ],
)
def test_kind_of_an_answer(message, request_, kind):
    assert kind_of(message, request_) == kind


def test_tool_calls_agree_by_name_and_canonical_arguments():
    reference = calling(("book", {"city": "Rome", "nights": 2}))
    same = grade(calling(("book", '{"nights": 2.0, "city": "Rome"}')), reference, "tool_call", REQUEST)
    assert same.agrees and same.fields == {"book": True, "book.city": True, "book.nights": True}
    wrong = grade(calling(("book", {"city": "Rome", "nights": 3})), reference, "tool_call", REQUEST)
    assert not wrong.agrees and wrong.score == pytest.approx(2 / 3) and wrong.fields["book.nights"] is False
    assert not grade(calling(("pay", {"city": "Rome", "nights": 2})), reference, "tool_call", REQUEST).agrees


@pytest.mark.parametrize(
    ("left", "right"),
    [(1, True), (0, False), ("1", 1), (None, ""), ([1, 2], [2, 1]), ({}, {"a": None}), (2**53, 2**53 + 1)],
)
def test_values_of_different_meaning_disagree(left, right):
    assert not grade(calling(("f", {"x": left})), calling(("f", {"x": right})), "tool_call", {}).agrees
    assert not grade(saying(json.dumps([left])), saying(json.dumps([right])), "json", {}).agrees


def test_a_call_made_twice_is_not_the_same_as_once():
    once, twice = calling(("pay", {"eur": 5})), calling(("pay", {"eur": 5}), ("pay", {"eur": 5}))
    assert not grade(twice, once, "tool_call", {}).agrees
    assert grade(twice, once, "tool_call", {}).fields["pay"] is False


def test_nothing_agrees_with_a_missing_answer_or_a_reference_of_another_kind():
    for kind, reference in (
        ("tool_call", calling(("f", {}))),
        ("json", saying("{}")),
        ("label", saying("a")),
        ("text", saying("a b")),
    ):
        assert not grade(None, reference, kind, {}).agrees
    assert not grade(saying("hello"), saying("hello"), "tool_call", {}).agrees
    assert not grade(saying("hello"), saying("hello"), "json", {}).agrees
    assert not grade(saying(""), saying(""), "text", {}).agrees


def test_labels_agree_whatever_their_case_and_text_whatever_its_whitespace():
    assert grade(saying(" Refund\n"), saying("refund"), "label", {}).agrees
    assert grade(saying("refunds"), saying("refund"), "label", {}).score == 0.0
    assert grade(saying("a  b\nc"), saying("a b c"), "text", {}).agrees
    assert not grade(saying("A b c"), saying("a b c"), "text", {}).agrees


def test_the_score_of_a_text_grows_with_what_it_shares_with_the_reference():
    reference = saying("the order ships on Monday")
    near, far, apart = (
        grade(saying(t), reference, "text", {}).score for t in ("the order ships on Sunday", "an order", "QQQQ")
    )
    assert 1 > near > far > apart == 0.0


def test_a_fence_agrees_except_where_response_format_forbids_it():
    fenced, bare = saying('```json\n{"a":1}\n```'), saying('{"a":1}')
    assert grade(fenced, bare, "json", {}).agrees
    assert not grade(fenced, bare, "json", asking()).agrees


@pytest.mark.parametrize(
    ("message", "change", "reason"),
    [
        (calling(("book", {"city": "Rome"})), {}, None),
        (calling(("book", {"city": "Rome"})), {"tools": []}, "not offered"),
        (calling(("pay", {})), {}, "not offered"),
        (calling(("book", {"nights": 2})), {}, "violates /required"),
        (calling(("book", {"city": 7})), {}, "violates /properties/city/type"),
        (calling(("book", {"city": "Rome", "vip": True})), {}, "violates /additionalProperties"),
        (calling(("book", "{oops")), {}, "not a JSON object"),
        (saying("Which city?"), {}, "no tool call"),
        (None, {}, "does not read as tool_call"),
        (calling(("book", {"city": "Rome"})), {"tool_choice": "none"}, "tool_choice is none"),
        (
            calling(("book", {"city": "Rome"})),
            {"tool_choice": {"type": "function", "function": {"name": "pay"}}},
            "pay",
        ),
        (calling(*[("book", {"city": "Rome"})] * 2), {"parallel_tool_calls": False}, "more than one"),
        (calling(*[("book", {"city": "Rome"})] * 2), {}, None),
    ],
)
def test_why_a_tool_call_must_not_be_kept(message, change, reason):
    assert matches(check(message, "tool_call", REQUEST | change), reason)


@pytest.mark.parametrize(
    ("message", "kind", "request_", "reason"),
    [
        (saying("fine thanks"), "text", {}, None),
        (saying(" \n"), "text", {}, "no text"),
        (saying(None) | {"refusal": "I cannot"}, "text", {}, "refusal"),
        (calling(("book", {})), "text", REQUEST, "tool call where text"),
        (saying("hi"), "text", REQUEST | {"tool_choice": "required"}, "required"),
        (saying("hi"), "text", REQUEST | {"tool_choice": {"type": "function", "function": {"name": "book"}}}, "names"),
        (saying("a\nb"), "label", {}, "does not read as label"),
        (saying("{oops"), "json", {}, "does not read as json"),
        (saying("```json\n{}\n```"), "json", {}, None),
        (saying("```json\n{}\n```"), "json", asking(), "response_format json_object"),
        (saying("[]"), "json", asking(), "response_format json_object"),
        (saying('{"city": "Rome"}'), "json", asking(BOOK), None),
        (saying('{"city": 3}'), "json", asking(BOOK), "/properties/city/type"),
        (saying("plain"), "label", asking(), "response_format json_object"),
    ],
)
def test_why_content_must_not_be_kept(message, kind, request_, reason):
    assert matches(check(message, kind, request_), reason)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "http://127.0.0.1:9/schema"}, "cannot be applied"),
        ({"$ref": "#"}, "cannot be applied"),
        ({"properties": {"city": {"type": "any"}}}, "is not valid"),
        ({"properties": {"city": {"pattern": "("}}}, "is not valid"),
        ({"properties": {"city": {"multipleOf": 0.1}}}, "cannot be applied"),
    ],
)
def test_a_schema_that_cannot_be_used_accepts_nothing(schema, reason):
    content = json.dumps({"city": 10**400 if "multipleOf" in str(schema) else "Rome"})
    assert matches(check(saying(content), "json", asking(schema)), reason)


def test_a_schema_that_points_at_a_file_is_not_read(tmp_path):
    (tmp_path / "anything.json").write_text("{}")
    schema = {"$ref": (tmp_path / "anything.json").as_uri()}
    assert matches(check(saying("{}"), "json", asking(schema)), "cannot be applied")


@given(OBJECTS)
def test_reasons_never_quote_the_answer(arguments):
    marked = {f"secret{key}": value for key, value in arguments.items()} | {"city": "secret", "nights": "secret"}
    for message, kind in ((calling(("book", marked)), "tool_call"), (calling(("secret", marked)), "tool_call")):
        assert "secret" not in check(message, kind, REQUEST)


def matches(found: str | None, expected: str | None) -> bool:
    return found is None if expected is None else found is not None and expected in found
