"""Understudy's own logs: lines of `*.calls.jsonl` and `*.sessions.jsonl`, in whatever file they stand.

A call line holds {"id", "request", "response"} and optionally agent, session, client, step, ts, latency_ms, cost_usd,
label, label_kind, outcome, status, error, faces_person. A session line holds its messages once plus "calls": [{"id",
"step", "at"}]; such a call is messages[:at] -> messages[at]. Knows no other source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.log_files import Unusable
from training.log_records import Logged, Place, completion, get

_SHARED = ("agent", "client", "source", "session", "outcome", "faces_person")
"""What a session line says once for all its calls."""


class UnderstudySource:
    """Call lines and session lines."""

    name = "understudy"

    def recognises(self, value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        is_session = isinstance(value.get("calls"), list) and isinstance(value.get("messages"), list)
        return is_session or (
            isinstance(value.get("id"), str) and isinstance(value.get("request"), dict) and "response" in value
        )

    def is_lookup(self, value: Any) -> bool:
        return False

    def read(self, value: Any, place: Place) -> Iterator[Logged]:
        """Raises Unusable where the line as a whole is none of both."""
        if not isinstance(value, dict):
            raise Unusable("wrong type", f"line: {type(value).__name__}, needs object")
        if "calls" not in value:
            yield Logged(value, value)
            return
        refs = get(value, "calls", list)
        if not refs:
            raise Unusable("no calls", "session with an empty list of calls")
        rest = {key: item for key, item in value.items() if key not in ("calls", "messages")}
        for ref in refs:
            ref = ref if isinstance(ref, dict) else {}
            yield Logged(_unroll(value, ref), {**rest, **ref})


def _unroll(session: dict[str, Any], ref: dict[str, Any]) -> dict[str, Any]:
    """One call of a session as a call record; what is wrong with it is left for `build_call` to find."""
    shared = {key: session[key] for key in _SHARED if key in session}
    messages, at = session.get("messages"), ref.get("at")
    request, response = session.get("request", {}), None
    if isinstance(messages, list) and type(at) is int and isinstance(request, dict):
        request = {**request, "messages": messages[: max(at, 0)]}
        if 0 <= at < len(messages) and isinstance(messages[at], dict):
            response = completion(messages[at], model=request.get("model"), finish_reason=ref.get("finish_reason"))
            response = {**response, "usage": ref["usage"]} if "usage" in ref else response
    return {**shared, **ref, "request": request, "response": response}
