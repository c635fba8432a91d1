"""cluster/tool_values.py: one call said in two ways is one value, and several ways of being right are told from being wrong."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from shared_data import DATA, NO_DATA

from cluster.answers import grade
from cluster.tool_values import fill_defaults, match_alternatives
from jobs.bench.gate_graders import KINDS, draw_accepted, make_wrong, measure_graders

SCHEMA = {
    "type": "object",
    "required": ["city"],
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "default": 3},
        "unit": {"type": "string"},
        "stars": {"type": "array", "items": {"type": "integer"}},
    },
}
REQUEST: dict[str, Any] = {
    "messages": [{"role": "user", "content": "weather"}],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}],
}
ACCEPTED = [{"weather": {"city": ["Paris", "Paris, France"], "days": [3, 4], "unit": ["", "C"], "stars": ["", [4, 5]]}}]


def call(name: str = "weather", **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def message(*calls: dict[str, Any]) -> dict[str, Any]:
    said = [{"function": {"name": one["name"], "arguments": json.dumps(one["arguments"])}} for one in calls]
    return {"role": "assistant", "content": None, "tool_calls": said}


def agrees(*calls: dict[str, Any], alternatives: Any = ACCEPTED) -> bool:
    return all(match_alternatives(calls, alternatives, REQUEST).values())


def test_defaults_and_optional_nulls_are_what_the_tool_understands() -> None:
    said = [call(city="Paris"), call(city="Paris", unit=None, days=3.0), call(city="Paris", days=None)]
    first, second, third = fill_defaults(said, REQUEST)
    assert first["arguments"] == third["arguments"] == {"days": 3, "city": "Paris"}
    assert second["arguments"] == {"days": 3.0, "city": "Paris"}
    unknown = [call("other", a=None), call(city=None)]
    assert fill_defaults(unknown, REQUEST)[0] == unknown[0]
    assert fill_defaults(unknown, REQUEST)[1]["arguments"]["city"] is None, "a required argument is never left out"


def test_grades_see_defaults_but_no_other_value() -> None:
    reference = message(call(city="Paris", days=3))
    assert grade(message(call(city="Paris")), reference, "tool_call", REQUEST).agrees
    assert not grade(message(call(city="Paris", days=4)), reference, "tool_call", REQUEST).agrees
    # An answer that breaks the schema is no better for meaning the same.
    assert not grade(message(call(city="Paris", unit=None)), reference, "tool_call", REQUEST).agrees


@pytest.mark.parametrize(
    "said",
    [
        call(city="Paris", days=3),
        call(days=4.0, city="paris,france"),
        call(city="Paris"),
        call(city="Paris", unit="C", stars=[4, 5.0]),
        call(city="Paris", unit="c"),
    ],
)
def test_what_is_accepted(said: dict[str, Any]) -> None:
    assert agrees(said)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        (call("forecast", city="Paris"), {"forecast", "weather"}),
        (call(days=3), {"weather.city"}),
        (call(city="Rome"), {"weather.city"}),
        (call(city="Paris", days=5), {"weather.days"}),
        (call(city="Paris", days="3"), {"weather.days"}),
        (call(city="Paris", stars=[5, 4]), {"weather.stars"}),
        (call(city="Paris", hour=1), {"weather.hour"}),
    ],
)
def test_what_is_wrong_and_where(said: dict[str, Any], wrong: set[str]) -> None:
    fields = match_alternatives([said], ACCEPTED, REQUEST)
    assert {name for name, is_right in fields.items() if not is_right} == wrong
    found = grade(message(said), {}, "tool_call", REQUEST, ACCEPTED)
    assert not found.agrees and found.score < 1 and found.fields == fields


def test_calls_are_a_set_and_each_accepted_one_is_used_once() -> None:
    wide, narrow = {"weather": {"city": ["Paris", "Rome"]}}, {"weather": {"city": ["Paris"]}}
    paris, rome = call(city="Paris"), call(city="Rome")
    for alternatives, calls in itertools.product(
        itertools.permutations([wide, narrow]), itertools.permutations([paris, rome])
    ):
        assert agrees(*calls, alternatives=alternatives)
    assert not agrees(rome, rome, alternatives=[wide, narrow])
    assert not agrees(paris, alternatives=[wide, narrow]) and not agrees(
        paris, paris, paris, alternatives=[wide, narrow]
    )


def test_objects_accept_values_inside() -> None:
    nested = [
        {"weather": {"city": [{"name": ["Paris", "Lutetia"], "zip": ["", 75000]}], "days": [[{"n": [1]}, {"n": [2]}]]}}
    ]
    assert agrees(call(city={"name": "Lutetia"}, days=[{"n": 1}, {"n": 2}]), alternatives=nested)
    assert agrees(call(city={"name": "Paris", "zip": 75000.0}, days=[{"n": 1}, {"n": 2}]), alternatives=nested)
    assert not agrees(call(city={"name": "Paris", "zip": 1}, days=[{"n": 1}, {"n": 2}]), alternatives=nested)
    assert not agrees(call(city={"name": "Paris"}, days=[{"n": 2}, {"n": 1}]), alternatives=nested)
    assert not agrees(call(city={"name": "Paris", "hour": 1}, days=[{"n": 1}, {"n": 2}]), alternatives=nested)


def test_no_call_is_right_where_none_is_accepted_alone() -> None:
    assert grade(message(), {}, "tool_call", REQUEST, []).agrees
    assert not grade(message(call(city="Paris")), {}, "tool_call", REQUEST, []).agrees
    assert not grade({"role": "assistant", "content": "no"}, {}, "tool_call", REQUEST, ACCEPTED).agrees


def test_wrong_calls_of_the_benchmark_are_wrong() -> None:
    import random

    for seed, kind in itertools.product(range(30), KINDS):
        draw = random.Random(seed)
        right = draw_accepted(ACCEPTED, draw)
        assert agrees(*right)
        wrong = make_wrong(right, ACCEPTED, REQUEST, kind, draw)
        assert wrong is not None and wrong != right and not agrees(*wrong)


@pytest.mark.skipif(not DATA.is_dir(), reason=NO_DATA)
def test_both_error_rates_on_human_alternatives_are_small() -> None:
    found = measure_graders(DATA / "fc" / "bfcl.calls.jsonl.gz")
    assert found["accepted_calls"] > 1_500 and found["wrong_calls"] > 1_500
    assert found["refused_rate"] <= 0.01 and found["accepted_rate"] <= 0.01
