"""Assistant message <-> the text a specialist says; what kind of answer it is, whether it may be kept, whether it agrees.

One implementation for curation, validation, acceptance, shadow and audit, so that what is certified is what is
served. Tool calls are written in the Hermes form, `<tool_call>{"name":...,"arguments":{...}}</tool_call>`, one a line;
prose beside tool calls is left out. JSON is strict (RFC 8259: no NaN, finite numbers) and nested at most 64 deep.
Reasons name places in the request's schemas and never quote an answer, because they are logged.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from cluster.errors import InputError
from cluster.records import AnswerKind, Record, TextGrader
from cluster.store import content_hash
from cluster.text_grading import chrf, similarity
from cluster.tool_values import canonical, fill_defaults, match_alternatives

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
"""Around each tool call in the text that a specialist says."""
_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_DEPTH = 64
_MAX_LABEL_CHARS = 40


class Grade(Record):
    """How an answer compares with the reference."""

    agrees: bool
    score: float
    """In [0, 1]; 1 where it agrees. Tool calls and JSON objects: share of `fields` that are right."""
    fields: dict[str, bool] = Field(default_factory=dict)
    """Tool calls: NAME and NAME.ARGUMENT; JSON objects: top-level keys; other JSON: "value"; empty for labels and text."""


def to_text(message: dict[str, Any]) -> str:
    """Write an assistant message as the text a specialist learns to say.

    Content stays as it is, except a JSON object or array, which becomes compact (inside its ```json fence, if it has one).

    Raises:
        InputError: a tool call without a name or whose arguments are not a JSON object, or content that is not text.
    """
    calls = read_calls(message)
    if calls is None:
        raise InputError(
            "tool_calls: a call without a name or whose arguments are not a JSON object; drop this message"
        )
    if calls:
        return "\n".join(f"{CALL_BEGIN}{_dump(call)}{CALL_END}" for call in calls)
    content = _content(message)
    if content is None:
        raise InputError("content: a part that is not text; drop this message")
    value = json_value(content)
    if value is None:
        return content
    return f"```json\n{_dump(value)}\n```" if _FENCE.fullmatch(content.strip()) else _dump(value)


def to_message(text: str, kind: AnswerKind) -> dict[str, Any] | None:
    """Read what a specialist said as an assistant message; None where it is not an answer of this kind.

    Tool call ids are a hash of the text, so that the same text gives the same message.
    """
    if kind == "tool_call":
        calls = _parse_calls(text)
        return None if calls is None else {"role": "assistant", "content": None, "tool_calls": calls}
    content = text if kind == "text" else text.strip()
    if not content.strip() or (kind == "json" and json_value(content) is None) or (kind == "label" and "\n" in content):
        return None
    return {"role": "assistant", "content": content}


def kind_of(message: dict[str, Any], request: dict[str, Any]) -> AnswerKind:
    """The kind of one answer: a task's kind is its most frequent one.

    A label is one word of at most 40 characters; discovery widens that to closed sets of longer lines.
    """
    if message.get("tool_calls"):
        return "tool_call"
    content = (_content(message) or "").strip()
    if _response_format(request) != "text" or json_value(content) is not None:
        return "json"
    return "label" if content and len(content) <= _MAX_LABEL_CHARS and not re.search(r"\s", content) else "text"


def check(message: dict[str, Any] | None, kind: AnswerKind, request: dict[str, Any]) -> str | None:
    """Why an answer must not be kept, or None: what the request itself says about its answer, nothing about truth."""
    if message is None:
        return f"the answer does not read as {kind}"
    if message.get("refusal"):
        return "the answer is a refusal"
    if kind == "tool_call":
        return _check_calls(message, request)
    if message.get("tool_calls"):
        return f"the answer is a tool call where {kind} is expected"
    choice = request.get("tool_choice")
    if choice == "required" or (isinstance(choice, dict) and "function" in choice):
        return f"no tool call where tool_choice {'is required' if choice == 'required' else 'names a tool'}"
    content = _content(message)
    if not content or not content.strip():
        return "the answer has no text"
    if to_message(content, kind) is None:
        return f"the answer does not read as {kind}"
    return _check_response_format(content, request)


def grade(
    answer: dict[str, Any] | None,
    reference: dict[str, Any],
    kind: AnswerKind,
    request: dict[str, Any],
    alternatives: Sequence[dict[str, Any]] | None = None,
    text_grader: TextGrader | None = None,
) -> Grade:
    """Compare an answer with the reference.

    tool_call: the same calls in any order, each as often, by name and canonical arguments (2 equals 2.0, key order is
    ignored, arguments left out equal their defaults, optional ones that are null equal none). json: by value, a fence is
    ignored. label: exact after strip and casefold. text: exact after whitespace is normalised, its score chrF; or alike enough by `text_grader`, whose similarity is the score. None never agrees, nor does anything with a
    reference that is not of this kind, nor an answer that `check` refuses for this request where it keeps the reference (a
    fence that response_format forbids).

    Args:
        alternatives: for tool calls, all that a person accepts, instead of the reference's values; see
            cluster/tool_values.py.
        text_grader: for text; None and a judge, which nobody asks here, leave it at equality.

    Raises:
        ConfigError: the grader's encoder cannot be loaded.
    """
    if answer is None:
        return Grade(agrees=False, score=0.0)
    if kind == "tool_call" and alternatives is not None:
        return _from_fields(match_alternatives(read_calls(answer) or [], alternatives, request))
    if kind == "tool_call":
        ours, theirs = read_calls(answer), read_calls(reference)
        compared = _grade_calls(ours and fill_defaults(ours, request), theirs and fill_defaults(theirs, request))
    elif kind == "json":
        compared = _grade_json(json_value(_content(answer) or ""), json_value(_content(reference) or ""))
    else:
        compared = _grade_content(_content(answer), _content(reference), kind, text_grader)
    is_worse = compared.agrees and check(answer, kind, request) and not check(reference, kind, request)
    return Grade(agrees=False, score=0.0, fields=compared.fields) if is_worse else compared


def json_value(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or array that is the whole of `text`, bare or in a ```json fence; None where it is not one."""
    stripped = text.strip()
    fenced = _FENCE.fullmatch(stripped)
    inner = fenced.group(1).strip() if fenced else stripped
    if not inner.startswith(("{", "[")):
        return None
    parsed = _decode(inner, 0)
    return parsed[0] if parsed and parsed[1] == len(inner) else None


def read_calls(message: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The message's tool calls as {"name", "arguments"} with parsed arguments; None where one cannot be read."""
    given = message.get("tool_calls") or []
    if not isinstance(given, list):
        return None
    calls = []
    for call in given:
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        name, raw = function.get("name"), function.get("arguments") or "{}"
        text = raw if isinstance(raw, str) else _dump(raw) if _is_shallow(raw) else ""
        arguments = json_value(text)
        if not name or not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        calls.append({"name": name, "arguments": arguments})
    return calls


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in itertools.chain(value, value.values() if isinstance(value, dict) else ()):
            yield from strings_in(item)


def _content(message: dict[str, Any]) -> str | None:
    """The text of a message, parts joined; "" where it has none, None where a part is not text."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or any(not isinstance(part, dict) for part in content):
        return None
    texts = [part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _parse_calls(text: str) -> list[dict[str, Any]] | None:
    """OpenAI tool calls of a text that is nothing but Hermes tool calls. Strings may hold the closing tag."""
    rest, calls = text.strip(), []
    while rest:
        body = rest.removeprefix(CALL_BEGIN).lstrip()
        parsed = _decode(body, 0) if rest.startswith(CALL_BEGIN) else None
        if parsed is None or not _is_call(parsed[0]):
            return None
        after = body[parsed[1] :].lstrip()
        if not after.startswith(CALL_END):
            return None
        rest = after.removeprefix(CALL_END).lstrip()
        function = {"name": parsed[0]["name"], "arguments": _dump(parsed[0]["arguments"])}
        call_id = f"call_{content_hash([len(calls), _dump(function)])[:12]}"
        calls.append({"id": call_id, "type": "function", "function": function})
    return calls or None


def _is_call(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return False
    return isinstance(value["name"], str) and bool(value["name"]) and isinstance(value["arguments"], dict)


def _decode(text: str, begin: int) -> tuple[Any, int] | None:
    """The JSON value at `begin` and where it ends; None where there is none or it is nested too deeply."""
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    return (value, end) if _is_shallow(value) else None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _is_shallow(value: Any) -> bool:
    """True up to 64 levels of nesting: what follows recurses, and a model may say a thousand brackets."""
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        inner = (item for values in level for item in (values.values() if isinstance(values, dict) else values))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return True
    return False


def _dump(value: Any) -> str:
    """Compact JSON in which any text can be encoded as UTF-8: escapes are kept only where a lone surrogate needs them."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value, separators=(",", ":"))


def _response_format(request: dict[str, Any]) -> str:
    return (request.get("response_format") or {}).get("type") or "text"


def _check_calls(message: dict[str, Any], request: dict[str, Any]) -> str | None:
    calls = read_calls(message)
    if not calls:
        return "the answer has no tool call" if calls is not None else "tool call arguments are not a JSON object"
    if len(calls) > 1 and request.get("parallel_tool_calls") is False:
        return "more than one tool call where parallel_tool_calls is false"
    choice = request.get("tool_choice")
    if choice == "none":
        return "a tool call where tool_choice is none"
    forced = choice["function"]["name"] if isinstance(choice, dict) and "function" in choice else None
    functions = [tool.get("function") or {} for tool in request.get("tools") or []]
    offered = {function.get("name"): function for function in functions}
    for call in calls:
        if call["name"] not in offered:
            return "a tool call to a tool that is not offered"
        if forced not in (None, call["name"]):
            return f"a tool call to another tool than tool_choice names, {forced}"
        reason = _violation(call["arguments"], offered[call["name"]].get("parameters"))
        if reason:
            return f"arguments of {call['name']}: {reason}"
    return None


def _check_response_format(content: str, request: dict[str, Any]) -> str | None:
    """A client that set response_format parses the bare content: a fence is refused."""
    response_format = _response_format(request)
    if response_format == "text":
        return None
    value = None if content.strip().startswith("`") else json_value(content)
    if value is None or (response_format == "json_object" and not isinstance(value, dict)):
        return f"the answer is not the JSON that response_format {response_format} asks for"
    if response_format != "json_schema":
        return None
    reason = _violation(value, (request["response_format"].get("json_schema") or {}).get("schema"))
    return f"response_format: {reason}" if reason else None


def _violation(value: Any, schema: dict[str, Any] | None) -> str | None:
    """Where `value` violates a JSON schema, as a path in the schema; an unusable schema accepts nothing."""
    if not schema:
        return None
    import referencing.exceptions

    validator = _validator(json.dumps(schema))
    if validator is None:
        return "the request's JSON schema is not valid"
    try:
        error = next(validator.iter_errors(value), None)
    except (referencing.exceptions.Unresolvable, RecursionError, OverflowError, ValueError, re.error):
        return "the request's JSON schema cannot be applied: a $ref to elsewhere or to itself, or a number out of range"
    return None if error is None else f"violates /{'/'.join(map(str, error.absolute_schema_path))} of its JSON schema"


@functools.lru_cache(maxsize=512)
def _validator(schema_text: str) -> Any:
    """A compiled validator, or None for an invalid schema. Its empty registry keeps a $ref from opening an address."""
    import jsonschema
    import referencing

    schema = json.loads(schema_text)
    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        return None
    try:
        cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        cls.check_schema(schema)
    except (jsonschema.SchemaError, ValueError):
        return None
    return cls(schema, registry=referencing.Registry())


def _grade_calls(answer: list[dict[str, Any]] | None, reference: list[dict[str, Any]] | None) -> Grade:
    if not answer or not reference:
        return Grade(agrees=False, score=0.0)
    fields: dict[str, bool] = {}
    for ours, theirs in _align(answer, reference):
        name = (ours or theirs)["name"]
        fields[name] = fields.get(name, True) and ours is not None and theirs is not None
        if ours and theirs:
            for key, is_right in _same_keys(ours["arguments"], theirs["arguments"]).items():
                fields[f"{name}.{key}"] = fields.get(f"{name}.{key}", True) and is_right
    return _from_fields(fields)


def _align(
    answer: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Pair equal calls first, then the others of one name in canonical order, whichever side they come from."""
    ours, theirs = (Counter(map(canonical, calls)) for calls in (answer, reference))
    shared = ours & theirs
    yield from ((call, call) for call in map(json.loads, shared.elements()))
    left, right = ([json.loads(text) for text in sorted((side - shared).elements())] for side in (ours, theirs))
    for name in sorted({call["name"] for call in left + right}):
        ours_here, theirs_here = ([call for call in side if call["name"] == name] for side in (left, right))
        yield from itertools.zip_longest(ours_here, theirs_here)


def _grade_json(answer: Any, reference: Any) -> Grade:
    if answer is None or reference is None:
        return Grade(agrees=False, score=0.0)
    if isinstance(answer, dict) and isinstance(reference, dict):
        return _from_fields(_same_keys(answer, reference))
    return _from_fields({"value": canonical(answer) == canonical(reference)})


def _same_keys(answer: dict[str, Any], reference: dict[str, Any]) -> dict[str, bool]:
    """For each key of either side, whether both have it with the same value."""
    keys = sorted(answer.keys() | reference.keys())
    return {k: k in answer and k in reference and canonical(answer[k]) == canonical(reference[k]) for k in keys}


def _from_fields(fields: dict[str, bool]) -> Grade:
    right = sum(fields.values())
    return Grade(agrees=right == len(fields), score=right / len(fields) if fields else 1.0, fields=fields)


def _grade_content(
    answer: str | None, reference: str | None, kind: AnswerKind, text_grader: TextGrader | None
) -> Grade:
    """Compare what both say once JSON in them is compact, as `to_text` writes it."""
    if not answer or not reference:
        return Grade(agrees=False, score=0.0)
    ours, theirs = (" ".join(to_text({"content": content}).split()) for content in (answer, reference))
    if kind == "label":
        agrees = ours.casefold() == theirs.casefold()
        return Grade(agrees=agrees, score=float(agrees))
    if ours == theirs:
        return Grade(agrees=True, score=1.0)
    if text_grader is None or text_grader.name in ("exact", "judge"):
        return Grade(agrees=False, score=chrf(ours, theirs))
    score = similarity(ours, theirs, text_grader)
    return Grade(agrees=score >= text_grader.agree_at, score=score)
