"""POST /v1/feedback -> Feedback in the store: what somebody thought of a call or a conversation, afterwards.

Checks what comes, puts pseudonyms in the place of names as capture does, and queues the row. Whether the call exists,
and is the client's own, is seen where feedback is joined to calls (cluster/feedback.py).
"""

from __future__ import annotations

import math
import time
import uuid
from typing import Any

from cluster.access import Identity, Pseudonyms
from cluster.feedback import Feedback, write_feedback
from cluster.store import Store
from cluster.telemetry import Meter
from serving.backlog import Backlog
from serving.openai_wire import Denied

MAX_FEEDBACK_BYTES = 2**18
_FIELDS = ("call_id", "session_id", "score", "label", "text")
_MAX_CHARS = {"call_id": 200, "session_id": 1_000, "label": 1_000, "text": 20_000}


class FeedbackBox:
    """Takes feedback. Belongs to one event loop."""

    def __init__(self, store: Store, pseudonyms: Pseudonyms, meter: Meter) -> None:
        self.backlog: Backlog[Feedback] = Backlog(lambda rows: write_feedback(store, rows), "feedback")
        self._pseudonyms, self._meter = pseudonyms, meter

    def take(self, identity: Identity, body: dict[str, Any]) -> str:
        """Queue one feedback; returns its id.

        An agent names a session as it did in x-session-id. A curator, who has none, names one as it is stored.

        Raises:
            Denied: 400, naming the field; 503, too much is waiting to be written.
        """
        _check(body)
        session = body.get("session_id")
        if session is not None and identity.role != "curator":
            session = self._pseudonyms.session_of(identity.client, session)
        score = body.get("score")
        row = Feedback(
            feedback_id=uuid.uuid4().hex,
            ts=time.time(),
            client_id=self._pseudonyms.of("client", identity.client),
            call_id=body.get("call_id"),
            session_id=session,
            is_curated=identity.role in ("curator", "admin"),
            score=None if score is None else float(score),
            label=body.get("label"),
            text=body.get("text"),
        )
        if not self.backlog.put(row):
            raise Denied(
                503, "Too much feedback waits to be written; try again later", "server_error", "busy", headers=_RETRY
            )
        self._meter.count("understudy_feedback_total", role=identity.role)
        return row.feedback_id


_RETRY = {"retry-after": "5"}


def _check(body: dict[str, Any]) -> None:
    for name in body:
        if name not in _FIELDS:
            raise _wrong(name[:60], f"unknown field; allowed are {', '.join(_FIELDS)}")
    for name, most in _MAX_CHARS.items():
        value = body.get(name)
        if value is not None and not (isinstance(value, str) and 1 <= len(value) <= most):
            raise _wrong(name, f"allowed is a text of 1 to {most} characters, or null")
    score = body.get("score")
    if score is not None and not _is_finite(score):
        raise _wrong("score", "allowed is a finite number, or null")
    if (body.get("call_id") is None) == (body.get("session_id") is None):
        raise _wrong("call_id", "allowed is exactly one of call_id (x-understudy-call-id of the reply) and session_id")
    if all(body.get(name) is None for name in ("score", "label", "text")):
        raise _wrong("score", "allowed is at least one of score, label and text")


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _wrong(field: str, rule: str) -> Denied:
    return Denied(400, f"{field}: {rule}", code="invalid_feedback", param=field)
