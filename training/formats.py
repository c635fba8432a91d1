"""Log files -> AgentCalls: lines of `*.calls.jsonl(.gz)` and `*.sessions.jsonl(.gz)`, streamed.

A call line holds {"id", "request", "response"} and optionally agent, session, client, step, ts, latency_ms, cost_usd,
label, label_kind, outcome, faces_person. A session line holds its messages once plus "calls": [{"id", "step", "at"}];
such a call is messages[:at] -> messages[at]. Every record becomes a call or a quarantine row, one bad line never stops
the rest, and a broken gzip keeps what was readable before the break was noticed. A record without `ts` gets the time of
the import plus one millisecond for each call before it: this keeps the order and says nothing of when it happened.
"""

from __future__ import annotations

import gzip
import json
import math
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from cluster.access import Pseudonyms
from cluster.errors import InputError
from cluster.quarantine import QuarantineRow
from cluster.records import AgentCall, Usage

ALLOWED_SUFFIXES = (".calls.jsonl", ".calls.jsonl.gz", ".sessions.jsonl", ".sessions.jsonl.gz")
MAX_TS = 253_402_300_800.0
"""Start of the year 10000 in seconds since the epoch; milliseconds since the epoch lie above it."""
MAX_LINE_BYTES = 64 * 1024 * 1024
GOLD_MODEL = "gold-annotation"
"""Model name of answers written by people instead of an LLM."""


class LogReader:
    """Reads log files one after another; remembers the ids it has seen, over all of them."""

    def __init__(self, pseudonyms: Pseudonyms, start_ts: float) -> None:
        """
        Args:
            start_ts: seconds since the epoch given to the first call that has no time of its own.
        """
        self._pseudonyms = pseudonyms
        self._start_ts = start_ts
        self._seen: set[str] = set()
        self._num_calls = 0

    def read(self, path: pathlib.Path) -> Iterator[AgentCall | QuarantineRow]:
        """Yield each record of one file as a call or as a quarantine row, in the file's order.

        Raises:
            InputError: `path` is missing, a folder, or has another extension. Raised at once, not at the first item.
        """
        check_path(path)
        return self._read(path)

    def _read(self, path: pathlib.Path) -> Iterator[AgentCall | QuarantineRow]:
        source = str(path)
        for line, content in _iterate_lines(path):
            try:
                if isinstance(content, _Unusable):
                    raise content
                records = _to_records(content)
            except _Unusable as problem:
                yield problem.to_row(source, line)
                continue
            for record in records:
                yield self._to_call(record, source, line)

    def _to_call(self, record: dict[str, Any], source: str, line: int) -> AgentCall | QuarantineRow:
        try:
            call = _build_call(record, self._pseudonyms, self._start_ts + self._num_calls / 1000)
            if call.call_id in self._seen:
                raise _Unusable("duplicate id", f"id {call.call_id}")
        except _Unusable as problem:
            return problem.to_row(source, line)
        self._seen.add(call.call_id)
        self._num_calls += 1
        return call


def check_path(path: pathlib.Path) -> None:
    """Raises InputError where `path` cannot be a log file."""
    allowed = f"allowed: a file ending in {', '.join(ALLOWED_SUFFIXES)}"
    if path.is_dir():
        raise InputError(f"{path}: is a folder; {allowed}; next: understudy ingest {path}/NAME.calls.jsonl.gz")
    if not path.is_file():
        raise InputError(f"{path}: no such file; {allowed}; next: ls {path.parent}")
    if not path.name.endswith(ALLOWED_SUFFIXES):
        raise InputError(
            f"{path}: unknown extension; {allowed}; next: rename it to {path.name.split('.')[0]}.calls.jsonl"
        )


class _Unusable(Exception):
    """A line or record that cannot become a call."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def to_row(self, source: str, line: int) -> QuarantineRow:
        return QuarantineRow(source=source, line=line, reason=self.reason, detail=self.detail)


def _iterate_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes | _Unusable]]:
    """Number and content of each line that is not blank; a line that cannot be read comes as its problem."""
    line = 0
    opened = gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")
    with opened as stream:
        while True:
            line += 1
            try:
                content = _read_line(stream)
            except (OSError, EOFError, zlib.error) as error:
                yield line, _Unusable("corrupt file", f"unreadable from here on: {type(error).__name__}")
                return
            if not content:
                return
            if len(content) > MAX_LINE_BYTES:
                yield line, _Unusable("line too long", f"more than {MAX_LINE_BYTES} bytes")
            elif content.strip():
                yield line, content


def _read_line(stream: BinaryIO | gzip.GzipFile) -> bytes:
    """One line; of a longer one than MAX_LINE_BYTES its beginning, the rest skipped."""
    content = stream.readline(MAX_LINE_BYTES + 1)
    rest = content
    while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
        rest = stream.readline(MAX_LINE_BYTES + 1)
    return content


def _to_records(content: bytes) -> list[dict[str, Any]]:
    """The call records of one line; those of a session are unrolled."""
    value = _parse(content)
    if not isinstance(value, dict):
        raise _Unusable("wrong type", f"line: {type(value).__name__}, needs object")
    if "calls" not in value:
        return [value]
    refs = _get(value, "calls", list)
    if not refs:
        raise _Unusable("no calls", "session with an empty list of calls")
    return [_unroll(value, ref) for ref in refs]


def _parse(content: bytes) -> Any:
    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text or "\\uD" in text:
            # An escaped half of a surrogate pair parses but is no text: nothing could store it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise _Unusable("not UTF-8", f"{error.reason} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise _Unusable("not JSON", f"{error.msg} at column {error.colno} of {len(content)}") from None
    except RecursionError:
        raise _Unusable("not JSON", "nested too deeply") from None
    return value


def _refuse_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is not JSON", "", 0)


def _unroll(session: dict[str, Any], ref: Any) -> dict[str, Any]:
    """One call of a session as a call record; what is wrong with it is left for `_build_call` to find."""
    ref = ref if isinstance(ref, dict) else {}
    shared = {
        key: session[key]
        for key in ("agent", "client", "source", "session", "outcome", "faces_person")
        if key in session
    }
    messages, at = session.get("messages"), ref.get("at")
    request, response = session.get("request", {}), None
    if isinstance(messages, list) and type(at) is int and isinstance(request, dict):
        request = {**request, "messages": messages[: max(at, 0)]}
        if 0 <= at < len(messages) and isinstance(messages[at], dict):
            response = _as_completion(messages[at], ref, request.get("model"))
    return {**shared, **ref, "request": request, "response": response}


def _as_completion(message: dict[str, Any], ref: dict[str, Any], model: Any) -> dict[str, Any]:
    finish = ref.get("finish_reason", "tool_calls" if message.get("tool_calls") else "stop")
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"usage": ref["usage"]} if "usage" in ref else {}
    return {"object": "chat.completion", "model": model, "choices": [choice], **usage}


def _build_call(record: dict[str, Any], pseudonyms: Pseudonyms, ts: float) -> AgentCall:
    """Raises _Unusable naming the first field that is wrong."""
    call_id = _get(record, "id", str)
    if not call_id:
        raise _Unusable("no id", "id: missing")
    request = _get(record, "request", dict) or {}
    _check_messages(request)
    response = _check_response(_get(record, "response", dict))
    source = _get(record, "source", str) or "unknown"
    agent = _get(record, "agent", str) or source
    client = _get(record, "client", str) or source
    return AgentCall(
        call_id=call_id,
        ts=_get_number(record, "ts", ts, MAX_TS),
        client_id=pseudonyms.of("client", client),
        agent=agent,
        session_id=pseudonyms.session_of(client, _get(record, "session", str) or call_id),
        step=_get(record, "step", int) or 0,
        request=request,
        response=response,
        usage=_usage_of(response),
        latency_ms=_get_number(record, "latency_ms", None),
        cost_usd=_get_number(record, "cost_usd", None),
        served_by="gold" if response.get("model") == GOLD_MODEL else "llm",
        outcome=_get(record, "outcome", dict),
        label=_get(record, "label", str),
        label_kind=_get(record, "label_kind", str),
        faces_person=_get(record, "faces_person", bool) or False,
    )


def _check_messages(request: dict[str, Any]) -> None:
    messages = _get(request, "messages", list, "request.")
    if not messages:
        raise _Unusable("no messages", "request.messages: missing or empty")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Unusable("wrong type", f"request.messages[{index}]: needs an object with a role")


def _check_response(response: dict[str, Any] | None) -> dict[str, Any]:
    choices = _get(response or {}, "choices", list, "response.")
    if not choices:
        raise _Unusable("no response", "response.choices: missing or empty")
    choice = choices[0]
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise _Unusable("no response", "response.choices[0].message: missing or no object")
    assert response is not None
    return response


def _usage_of(response: dict[str, Any]) -> Usage:
    usage = _get(response, "usage", dict, "response.") or {}
    return Usage(
        prompt_tokens=_get(usage, "prompt_tokens", int, "response.usage."),
        completion_tokens=_get(usage, "completion_tokens", int, "response.usage."),
    )


def _get(values: dict[str, Any], key: str, kind: type, where: str = "") -> Any:
    """The value, or None where it is absent or null; a boolean is no integer."""
    value = values.get(key)
    if value is None or type(value) is kind:
        return value
    raise _Unusable("wrong type", f"{where}{key}: {type(value).__name__}, needs {kind.__name__}")


def _get_number(values: dict[str, Any], key: str, default: float | None, bound: float = 2.0**53) -> float | None:
    """A finite number in [0, bound), or `default` where it is absent or null."""
    value = values.get(key)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (math.isfinite(value) and 0 <= value < bound)
    ):
        raise _Unusable("wrong type", f"{key}: {type(value).__name__}, needs a number from 0 to {bound:.0f}")
    return float(value)
