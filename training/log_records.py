"""One logged call, in the words every source is put into -> AgentCall, or the reason why it cannot be one.

The words are those of a `*.calls.jsonl` line: {"id", "request", "response"} and optionally source, agent, client,
session, step, ts, latency_ms, cost_usd, status, error, label, label_kind, outcome, faces_person. A call that the source
says has failed (status from 400 up) may lack its response. Knows no source and no file.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from typing import Any, NamedTuple

from cluster.access import Pseudonyms
from cluster.faces import FacesConfig, faces_person
from cluster.records import AgentCall, Record, Usage
from training.log_files import Unusable, parse_json

MAX_TS = 253_402_300_800.0
"""Start of the year 10000 in seconds since the epoch; milliseconds since the epoch lie above it."""
MAX_COUNT = 2**63 - 1
GOLD_MODEL = "gold-annotation"
"""Model name of answers written by people instead of an LLM."""
REQUEST_FIELDS = (
    *("model", "messages", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
    *("response_format", "temperature", "top_p", "n", "stop", "seed", "max_tokens", "max_completion_tokens"),
    *("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "reasoning_effort"),
    *("verbosity", "modalities", "service_tier", "stream", "stream_options"),
)
"""Fields of a chat request that a source's own record may carry; who asked (user, metadata) is none of them."""
_WORD = re.compile(r"[\w.:/-]{1,80}", re.ASCII)


class ReadRules(Record):
    """What the person who ingests says of the calls; None leaves it to the source."""

    client: str | None = None
    """One client for all calls."""
    client_field: str | None = None
    """Dotted path of the client in the source's record; where it is absent the source's own client is taken."""
    agent: str | None = None
    faces: FacesConfig = FacesConfig()
    """Which answers went straight to a person, where a record does not say itself."""


class Place(NamedTuple):
    """Where a value stands: the file's name without its folder, and the position in it."""

    name: str
    position: int


class Logged(NamedTuple):
    """One call in the common words, beside the record it came from, which `client_field` is looked up in."""

    record: dict[str, Any]
    raw: Any


class Skipped(NamedTuple):
    """A record that is sound and yet no chat call; counted by its reason."""

    reason: str


class Built(NamedTuple):
    call: AgentCall
    is_untimed: bool
    """The source has no time for it."""
    fell_back: bool
    """`client_field` is absent in its record."""


def build_call(logged: Logged, pseudonyms: Pseudonyms, ts: float, rules: ReadRules) -> Built:
    """The call with its client and session as pseudonyms.

    Args:
        ts: seconds since the epoch for a record without a time of its own.

    Raises:
        Unusable: names the first field that is wrong.
    """
    record = logged.record
    call_id = get(record, "id", str)
    if not call_id:
        raise Unusable("no id", "id: missing")
    request = get(record, "request", dict) or {}
    check_messages(request)
    status = _status_of(record)
    response = get(record, "response", dict) if status >= 400 else _check_response(get(record, "response", dict))
    source = get(record, "source", str) or "unknown"
    agent = rules.agent or get(record, "agent", str) or source
    client, fell_back = _client_of(logged, get(record, "client", str) or source, rules)
    call = AgentCall(
        call_id=call_id,
        ts=_get_number(record, "ts", ts, MAX_TS),
        client_id=pseudonyms.of("client", client),
        agent=agent,
        session_id=pseudonyms.session_of(client, get(record, "session", str) or call_id),
        step=get(record, "step", int) or 0,
        request=request,
        response=response,
        usage=_usage_of(response or {}),
        latency_ms=_get_number(record, "latency_ms", None),
        cost_usd=_get_number(record, "cost_usd", None),
        served_by="gold" if (response or {}).get("model") == GOLD_MODEL else "llm",
        status=status,
        error=error_class(error) if (error := get(record, "error", str)) else None,
        outcome=get(record, "outcome", dict),
        label=get(record, "label", str),
        label_kind=get(record, "label_kind", str),
    )
    call = call.model_copy(update={"faces_person": _faces_person(record, call, rules.faces)})
    return Built(call, is_untimed=record.get("ts") is None, fell_back=fell_back)


def _faces_person(record: dict[str, Any], call: AgentCall, faces: FacesConfig) -> bool:
    """Whether the answer went straight to a person: as the record itself says, else as the rule has it.

    What a person wrote as the right answer was spoken to nobody.
    """
    said = get(record, "faces_person", bool)
    if said is not None or call.served_by == "gold":
        return bool(said)
    return faces_person(call.request, call.message, agent=call.agent, config=faces)


def _client_of(logged: Logged, natural: str, rules: ReadRules) -> tuple[str, bool]:
    if rules.client is not None:
        return rules.client, False
    if rules.client_field is None:
        return natural, False
    found = look_up(logged.raw, rules.client_field)
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    return (found, False) if isinstance(found, str) and found else (natural, True)


def look_up(value: Any, path: str) -> Any:
    """What stands at a dotted path; a key may hold dots itself, and text that is JSON is looked into.

    Example:
        >>> look_up({"a": {"user.id": "x"}, "b": '{"c": 1}'}, "a.user.id"), look_up({"b": '{"c": 1}'}, "b.c")
        ('x', 1)
    """
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = parse_json(value)
        except Unusable:
            return None
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:length])
        if head in value:
            found = look_up(value[head], ".".join(parts[length:]))
            if found is not None:
                return found
    return None


def check_messages(request: dict[str, Any]) -> None:
    """Raises Unusable where there is nothing that could be asked."""
    messages = get(request, "messages", list, "request.")
    if not messages:
        raise Unusable("no messages", "request.messages: missing or empty")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unusable("wrong type", f"request.messages[{index}]: needs an object with a role")


def _check_response(response: dict[str, Any] | None) -> dict[str, Any]:
    choices = get(response or {}, "choices", list, "response.")
    if not choices:
        raise Unusable("no response", "response.choices: missing or empty")
    choice = choices[0]
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise Unusable("no response", "response.choices[0].message: missing or no object")
    assert response is not None
    return response


def _status_of(record: dict[str, Any]) -> int:
    status = get(record, "status", int)
    if status is None:
        return 200
    if not 100 <= status <= 599:
        raise Unusable("out of range", "status: needs an HTTP status from 100 to 599")
    return status


def _usage_of(response: dict[str, Any]) -> Usage:
    usage = get(response, "usage", dict, "response.") or {}
    return Usage(
        prompt_tokens=get(usage, "prompt_tokens", int, "response.usage."),
        completion_tokens=get(usage, "completion_tokens", int, "response.usage."),
    )


def get(values: dict[str, Any], key: str, kind: type, where: str = "") -> Any:
    """The value, or None where it is absent or null; a boolean is no integer, and an integer is a count.

    Raises:
        Unusable: another type, or an integer below 0 or above MAX_COUNT, which no column could hold.
    """
    value = values.get(key)
    if value is None:
        return None
    if type(value) is not kind:
        raise Unusable("wrong type", f"{where}{key}: {type(value).__name__}, needs {kind.__name__}")
    if kind is int and not 0 <= value <= MAX_COUNT:
        raise Unusable("out of range", f"{where}{key}: needs an integer from 0 to {MAX_COUNT}")
    return value


def _get_number(values: dict[str, Any], key: str, default: float | None, bound: float = 2.0**53) -> float | None:
    """A finite number in [0, bound), or `default` where it is absent or null."""
    value = values.get(key)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < bound:
        raise Unusable("wrong type", f"{key}: {type(value).__name__}, needs a number from 0 to {bound:.0f}")
    return float(value)


def content_id(source: str, place: Place, value: Any) -> str:
    """Id of a record that has none: the same for the same content at the same position of a file of the same name."""
    text = json.dumps([place.name, place.position, value], sort_keys=True, default=str)
    return f"{source}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:32]}"


def as_text(value: Any) -> str | None:
    """Text that is not empty, or None; a number as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def first_text(*values: Any) -> str | None:
    """The first of them that is text."""
    return next((text for value in values if (text := as_text(value)) is not None), None)


def as_count(value: Any) -> Any:
    """A whole number that came as a float or as text, as an integer; anything else as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,30}", value, re.ASCII) else value


def as_number(value: Any) -> Any:
    """A number that came as text; empty text as None; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value) if value.strip() else None
    except ValueError:
        return value
    return number if number is None or math.isfinite(number) else value


def as_object(value: Any) -> dict[str, Any]:
    """An object, also one that came as JSON text; empty where it is none."""
    value = from_json_text(value)
    return value if isinstance(value, dict) else {}


def from_json_text(value: Any) -> Any:
    """Text that is a JSON object, array or quoted text as what it says; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[", '"'):
        try:
            return parse_json(value)
        except Unusable:
            return value
    return value


def as_seconds(value: Any) -> Any:
    """ISO 8601 text, a datetime or a number as seconds since the epoch; a time without a zone is UTC."""
    if isinstance(value, str):
        if as_number(value) != value:
            return as_number(value)
        try:
            value = datetime.datetime.fromisoformat(value.strip())
        except ValueError:
            raise Unusable("wrong type", "time: needs seconds since the epoch or ISO 8601") from None
    if isinstance(value, datetime.datetime):
        zoned = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
        return zoned.timestamp()
    return value


def milliseconds_between(start: Any, end: Any) -> float | None:
    """From two times in seconds; None where one is absent, no time, or they are out of order."""
    is_given = all(isinstance(time, int | float) and 0 <= time < MAX_TS for time in (start, end))
    return (end - start) * 1000.0 if is_given and end >= start else None


def error_class(*values: Any) -> str:
    """The first that is one short word, such as RateLimitError; never a sentence, which may quote what was said."""
    return next((text for value in values if (text := as_text(value)) and _WORD.fullmatch(text)), "error")


def error_status(*values: Any) -> int:
    """The first that is an HTTP status of an error, else 500."""
    codes = (as_count(value) for value in values)
    return next((code for code in codes if type(code) is int and 400 <= code <= 599), 500)


def count_answers(request: dict[str, Any]) -> int:
    """Step in its session of a call whose source does not number them: how many answers its prompt holds already."""
    messages = request.get("messages")
    messages = messages if isinstance(messages, list) else []
    return sum(isinstance(message, dict) and message.get("role") == "assistant" for message in messages)


def completion(message: Any, *, model: Any = None, finish_reason: Any = None, usage: Any = None) -> dict[str, Any]:
    """A chat.completion body around one message."""
    is_call = isinstance(message, dict) and message.get("tool_calls")
    choice = {"index": 0, "message": message, "finish_reason": finish_reason or ("tool_calls" if is_call else "stop")}
    body: dict[str, Any] = {"object": "chat.completion", "model": model, "choices": [choice]}
    return {**body, "usage": usage} if usage else body


def usage_of(prompt_tokens: Any, completion_tokens: Any) -> dict[str, Any]:
    """A usage object of what is given."""
    given = {"prompt_tokens": as_count(prompt_tokens), "completion_tokens": as_count(completion_tokens)}
    return {name: count for name, count in given.items() if count is not None}
