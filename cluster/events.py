"""What was done to the releases of a store, by whom and on what evidence: one small JSON file an event, never changed.

events/TIME-KIND-ID.json, in order of time by name. Written by cluster/registry.py under the same lock as CURRENT, just
before it: where a process dies between the two, the event tells of a change that never came, and no change is ever without
its event. Holds counts and names, never content.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any, Literal

from cluster.records import Record
from cluster.store import Store
from cluster.telemetry import log_event

EVENTS_FOLDER = "events"
EventKind = Literal["promote", "roll_back", "demote", "advance", "canary", "freeze", "unfreeze"]


class Cause(Record):
    """Why CURRENT is written."""

    kind: EventKind = "promote"
    by: Literal["person", "steward"] = "person"
    evidence: dict[str, Any] = {}
    """task_id -> what was counted; empty where a person decided."""


class Event(Cause):
    """One change."""

    ts: float
    """Seconds since the epoch, UTC."""
    release: str | None = None
    """What is served from then on."""
    before: str | None = None
    """What was served until then."""


def write_event(store: Store, cause: Cause, *, release: str | None, before: str | None) -> Event:
    """Write down a change that is about to be made."""
    # In nanoseconds: two changes of one millisecond would be told in the order of their kinds.
    now_ns = time.time_ns()
    event = Event(**cause.model_dump(), ts=now_ns / 1e9, release=release, before=before)
    name = f"{now_ns:019d}-{event.kind}-{uuid.uuid4().hex[:8]}"
    store.write_json(f"{EVENTS_FOLDER}/{name}.json", event.model_dump(mode="json"))
    return event


def read_events(store: Store, newest: int | None = None) -> list[Event]:
    """All events, or so many of the newest (at least 1), the oldest first; a file that is no event is logged and left out."""
    paths = store.list(EVENTS_FOLDER, ".json")
    found = []
    for path in paths[-newest:] if newest else paths:
        try:
            found.append(Event.model_validate(store.read_json(path)))
        except ValueError as error:
            log_event("event_not_readable", logging.WARNING, path=path, error=type(error).__name__)
    return found
