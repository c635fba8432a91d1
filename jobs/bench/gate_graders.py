"""How often the grader of tool calls is wrong: on calls that people accept, and on calls that were made wrong.

Of every call of a file with `gold_alternatives` one accepted call is drawn (a value for each argument, left out where
that is accepted, keys and calls in another order, whole numbers as 2.0) and one wrong one made of it: another function, a
needed argument left out, or a value that is not accepted.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import random
from collections.abc import Mapping
from typing import Any

from cluster.answers import grade

_OMITTED = ""
KINDS = ("function", "missing argument", "value outside")


def measure_graders(path: pathlib.Path) -> dict[str, Any]:
    """Shares of accepted calls refused and of wrong calls accepted; {} for a file without accepted alternatives."""
    refused, accepted, num_right, num_wrong = 0, 0, 0, 0
    by_kind = dict.fromkeys(KINDS, 0)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for number, line in enumerate(lines):
            record = json.loads(line)
            alternatives = record.get("gold_alternatives")
            if not alternatives:
                continue
            request = record["request"]
            draw = random.Random(f"graders {number}")
            right = draw_accepted(alternatives, draw)
            num_right += 1
            refused += not _agrees(right, alternatives, request)
            wrong = make_wrong(right, alternatives, request, KINDS[number % 3], draw)
            if wrong is not None:
                num_wrong += 1
                by_kind[KINDS[number % 3]] += 1
                accepted += _agrees(wrong, alternatives, request)
    if not num_right:
        return {}
    rates = {"refused_rate": refused / num_right, "accepted_rate": accepted / max(1, num_wrong)}
    return {**rates, "accepted_calls": num_right, "wrong_calls": num_wrong, "wrong_by_kind": by_kind}


def draw_accepted(alternatives: list[Mapping[str, Any]], draw: random.Random) -> list[dict[str, Any]]:
    """Calls that are accepted, in some order."""
    calls = [
        {"name": name, "arguments": _draw_object(accepted, draw)}
        for one in alternatives
        for name, accepted in one.items()
    ]
    draw.shuffle(calls)
    return calls


def make_wrong(
    calls: list[dict[str, Any]],
    alternatives: list[Mapping[str, Any]],
    request: Mapping[str, Any],
    kind: str,
    draw: random.Random,
) -> list[dict[str, Any]] | None:
    """The calls with one mistake; None where there is no argument to make it at."""
    wrong = json.loads(json.dumps(calls))
    target = draw.choice(wrong)
    # Of several calls of one function another one might accept what this one does not.
    accepted = [one[target["name"]] for one in alternatives if target["name"] in one]
    if kind == "function":
        offered = [tool["function"]["name"] for tool in request["tools"] if tool["function"]["name"] != target["name"]]
        target["name"] = draw.choice(offered) if offered else target["name"] + "_all"
        return wrong
    defaults = _defaults(request, target["name"])
    keys = [
        key for key in target["arguments"] if all(_is_needed(one.get(key, []), defaults.get(key)) for one in accepted)
    ]
    if not keys:
        return None
    key = draw.choice(sorted(keys))
    if kind == "missing argument":
        del target["arguments"][key]
    else:
        target["arguments"][key] = _outside(target["arguments"][key])
    return wrong


def _agrees(calls: list[dict[str, Any]], alternatives: list[Any], request: dict[str, Any]) -> bool:
    said = [{"function": {"name": one["name"], "arguments": json.dumps(one["arguments"])}} for one in calls]
    return grade({"tool_calls": said}, {}, "tool_call", request, alternatives).agrees


def _draw_object(accepted: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    drawn = {}
    for key in draw.sample(sorted(accepted), len(accepted)):
        options = accepted[key] if isinstance(accepted[key], list) else [accepted[key]]
        if not options:
            continue
        option = draw.choice(options)
        if option != _OMITTED or options == [_OMITTED]:
            drawn[key] = _draw_value(option, draw)
    return drawn


def _draw_value(option: Any, draw: random.Random) -> Any:
    if isinstance(option, dict):
        return _draw_object(option, draw)
    if isinstance(option, list):
        return [_draw_value(one, draw) for one in option]
    is_whole = isinstance(option, int) and not isinstance(option, bool) and abs(option) < 2**53
    return float(option) if is_whole and draw.random() < 0.5 else option


def _defaults(request: Mapping[str, Any], name: str) -> dict[str, Any]:
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in request["tools"]}
    return {key: one.get("default") for key, one in (schemas.get(name, {}).get("properties") or {}).items()}


def _is_needed(options: Any, default: Any) -> bool:
    return isinstance(options, list) and bool(options) and _OMITTED not in options and default not in options


def _outside(value: Any) -> Any:
    """A value far from this one and its neighbours."""
    if isinstance(value, bool):
        return str(value) + " or not"
    if isinstance(value, int | float):
        return value * 7 + 12345
    if isinstance(value, str):
        return f"not {value[::-1]} x"
    return (
        [*value, "one more"] if isinstance(value, list) else {**value, "one_more": 1} if isinstance(value, dict) else 1
    )
