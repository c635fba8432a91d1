"""training/llm_naming.py: what an LLM proposes as a name stands only where it is short, new and quotes nothing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.records import Example
from training.llm_naming import TaskName, describe_for_naming, read_proposal

LINES = ("Read the booking.", "Return JSON.")


def make_example(user: str, answer: str) -> Example:
    messages = [{"role": "system", "content": "\n".join(LINES)}, {"role": "user", "content": user}]
    return Example(
        example_id="e",
        split="train",
        session_id="s",
        ts=1.0,
        request={"messages": messages},
        target={"role": "assistant", "content": answer},
        reference="llm",
        source_call_ids=("c",),
    )


SHOWN = [
    make_example("Please book a table near the old bridge for Zelda Quimby, order-4711", '{"guest": "Zelda Quimby"}')
]


def read(name: str, description: str, taken=()) -> TaskName | str:
    return read_proposal(json.dumps({"name": name, "description": description}), taken, SHOWN, LINES)


def test_a_good_name_stands_and_is_lower_case_on_one_line():
    found = read(" Table  Bookings", "Reads what a guest wants\nand returns it as JSON.")
    assert found == TaskName(name="table bookings", description="Reads what a guest wants and returns it as JSON.")
    fenced = '```json\n{"name": "table bookings", "description": "Reads bookings."}\n```'
    assert isinstance(read_proposal(fenced, (), SHOWN, LINES), TaskName)


@pytest.mark.parametrize(
    ("name", "description", "reason"),
    [
        ("table bookings", "", "a description"),
        ("table bookings", "x" * 201, "a description"),
        ("table bookings", "Reads \x1b[31m bookings.", "a description"),
        ("a b c d e f", "Reads bookings.", "a name"),
        ("x" * 41, "Reads bookings.", "a name"),
        ("task/1", "Reads bookings.", "a name"),
        ("refunds", "Reads bookings.", "the name of another task"),
        ("table bookings", "Reads order-4711 and others.", "a number or a quotation"),
        ("table bookings", "Reads bookings of Zelda and others.", "a number or a quotation"),
        ("table bookings", "Books near the old bridge for people.", "a number or a quotation"),
    ],
)
def test_a_bad_name_is_not_taken_and_the_reason_quotes_nothing(name, description, reason):
    found = read(name, description, taken={"refunds"})
    assert isinstance(found, str) and found.startswith(reason)
    assert "4711" not in found and "Zelda" not in found


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=80) | st.builds(json.dumps, st.dictionaries(st.sampled_from(["name", "description"]), st.text()))
)
def test_whatever_the_llm_says_is_a_name_within_bounds_or_a_reason(answer):
    found = read_proposal(answer, {"refunds"}, SHOWN, LINES)
    if isinstance(found, TaskName):
        assert found.name == found.name.lower() != "refunds" and 0 < len(found.name) <= 40
        assert 0 < len(found.description) <= 200 and found.description.isprintable()
    else:
        assert found


def test_what_is_shown_is_bounded_and_leaves_the_static_lines_to_the_template():
    long = [make_example("word " * 5000, "yes " * 500)] * 9
    shown = describe_for_naming(["Read the booking.", "<*>"], long, LINES)
    assert len(shown) < 9_200 and shown.count("CALL") == 4
    assert shown.startswith("TEMPLATE\nRead the booking.\n<*>") and shown.count("Read the booking.") == 1
