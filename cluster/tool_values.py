"""Tool calls as values: the same call said in two ways is one value, and a call may be right in several ways.

`fill_defaults` writes a call as its tool understands it: an argument left out that has a default has that value, an
optional one that is null is left out. `match_alternatives` compares calls with accepted ones as human-labelled sets
write them (BFCL's `possible_answer`: one {NAME: {ARGUMENT: [accepted values]}} for each call, "" among them where the
argument may be left out, nested in objects). Knows nothing of messages (cluster/answers.py reads them).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Call = dict[str, Any]
"""{"name", "arguments"}."""
_OMITTED = ""
"""Stands among accepted values where the argument may be left out."""
_LOOSE = re.compile(r"[\s,;'\"]+")
"""What people write differently and mean alike in text; more of it would make numbers and codes alike."""


def canonical(value: Any) -> str:
    """Text that is equal exactly for equal JSON values: keys sorted, 2.0 as 2, true apart from 1."""
    return json.dumps(_whole_floats_as_integers(value), sort_keys=True)


def fill_defaults(calls: Sequence[Call], request: Mapping[str, Any]) -> list[Call]:
    """The calls as the request's tools understand them; one of a tool that is not offered stays as it is."""
    schemas = _schemas(request)
    return [{**call, "arguments": _filled(call["arguments"], schemas.get(call["name"], {}))} for call in calls]


def match_alternatives(
    calls: Sequence[Call], alternatives: Sequence[Mapping[str, Mapping[str, Any]]], request: Mapping[str, Any]
) -> dict[str, bool]:
    """For NAME and NAME.ARGUMENT of either side whether it is right; all are where the calls are accepted, in any order."""
    schemas = _schemas(request)
    expected = [(name, accepted) for one in alternatives for name, accepted in one.items()]

    def judge(call: Call, place: int) -> dict[str, bool]:
        name, accepted = expected[place]
        return _judge_arguments(call["arguments"], accepted, schemas.get(name, {}))

    def fits(number: int, place: int) -> bool:
        call = calls[number]
        return call["name"] == expected[place][0] and all(judge(call, place).values())

    pairs = _pair(len(calls), len(expected), fits)
    left = [place for place in range(len(expected)) if place not in pairs.values()]
    fields: dict[str, bool] = {}

    def note(name: str, is_right: bool) -> None:
        fields[name] = fields.get(name, True) and is_right

    for number, call in enumerate(calls):
        place = pairs.get(number)
        if place is None:
            # The first unused call of the same name says which arguments are wrong.
            place = next((one for one in left if expected[one][0] == call["name"]), None)
            if place is not None:
                left.remove(place)
        note(call["name"], place is not None)
        if place is not None:
            for key, is_right in judge(call, place).items():
                note(f"{call['name']}.{key}", is_right)
    for place in left:
        note(expected[place][0], False)
    return fields


def _whole_floats_as_integers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole_floats_as_integers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole_floats_as_integers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _schemas(request: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tool name -> its argument schema, where there is one that is an object."""
    functions = [tool.get("function") for tool in request.get("tools") or [] if isinstance(tool, dict)]
    named = {one.get("name"): one.get("parameters") for one in functions if isinstance(one, dict)}
    return {name: schema for name, schema in named.items() if isinstance(name, str) and isinstance(schema, dict)}


def _properties(schema: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    given = schema.get("properties")
    return {key: one for key, one in given.items() if isinstance(one, dict)} if isinstance(given, dict) else {}


def _filled(arguments: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    properties, required = _properties(schema), schema.get("required") or ()
    kept = {k: v for k, v in arguments.items() if v is not None or k in required or k not in properties}
    defaults = {k: one["default"] for k, one in properties.items() if one.get("default") is not None}
    return {**defaults, **kept}


def _judge_arguments(
    arguments: Mapping[str, Any], accepted: Mapping[str, Any], schema: Mapping[str, Any]
) -> dict[str, bool]:
    """For each argument of either side, whether it is right."""
    properties = _properties(schema)
    found = {}
    for key in sorted(arguments.keys() | accepted.keys()):
        default = properties.get(key, {}).get("default")
        if key not in accepted:
            # Said without need; harmless only where nothing else would have been understood.
            found[key] = default is not None and canonical(arguments[key]) == canonical(default)
        elif key in arguments:
            found[key] = _accepts(arguments[key], accepted[key])
        else:
            found[key] = _OMITTED in _options(accepted[key]) or (
                default is not None and _accepts(default, accepted[key])
            )
    return found


def _options(accepted: Any) -> list[Any]:
    """Accepted values; none at all stand for an empty list or an argument left out."""
    return (accepted or [[], _OMITTED]) if isinstance(accepted, list) else [accepted]


def _accepts(value: Any, accepted: Any) -> bool:
    return any(_is_same(value, option) for option in _options(accepted))


def _is_same(value: Any, option: Any) -> bool:
    """Whether a value is one accepted value; an accepted object has accepted values inside."""
    if isinstance(value, str) and isinstance(option, str):
        return value == option or _LOOSE.sub("", value).casefold() == _LOOSE.sub("", option).casefold() != ""
    if canonical(value) == canonical(option):
        return True
    if isinstance(value, list) and isinstance(option, list):
        return len(value) == len(option) and all(itertools.starmap(_is_same, zip(value, option, strict=True)))
    if isinstance(value, dict) and isinstance(option, dict):
        return all(
            _accepts(value[key], option[key])
            if key in value and key in option
            else _OMITTED in _options(option.get(key))
            for key in value.keys() | option.keys()
        )
    return False


def _pair(num_calls: int, num_expected: int, fits: Any) -> dict[int, int]:
    """A largest matching of calls to accepted ones, by augmenting paths (Kuhn 1955)."""
    taken: dict[int, int] = {}

    def place(number: int, tried: set[int]) -> bool:
        for one in range(num_expected):
            if one not in tried and fits(number, one):
                tried.add(one)
                if one not in taken or place(taken[one], tried):
                    taken[one] = number
                    return True
        return False

    for number in range(num_calls):
        place(number, set())
    return {number: one for one, number in taken.items()}
