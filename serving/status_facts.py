"""A store -> what is on stage and what waits: the served release, every task with its state and evidence, and what changed.

Reads what conversions, the steward and people wrote; writes nothing. What is returned is JSON of names, counts, rates and
reasons: fields are taken one by one, so that a field with content that is added elsewhere does not come along. Knows
nothing of HTTP or of who asks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from cluster import registry
from cluster.conversions import read_conversion
from cluster.errors import ReleaseError, StoreError
from cluster.events import Event, read_events
from cluster.records import Release
from cluster.store import Store
from cluster.telemetry import log_event
from serving.steward import DEMOTED, load_state

_NUM_EVENTS = 20
_NUM_RELEASES = 20
_NUM_SEARCHED = 200
"""Of the newest events, for those of one task."""
_TASKS_FILE = "tasks/identity.json"
"""Names the tasks of the last discovery; training/discover.py writes it."""
_TASK_FIELDS = ("name", "kind", "num_calls", "share_calls", "share_cost", "num_clients", "num_sessions")
_ARM_FIELDS = ("name", "num_calls", "coverage", "num_kept", "num_disagreements", "disagreement", "interval")
_CURVE_FIELDS = ("threshold", "coverage", "disagreement")


def release_facts(store: Store, sha: str, release: Release) -> dict[str, Any]:
    """What is known of a release: {release, previous, is_served, is_frozen, tasks: {task_id: facts}, refused}.

    Raises:
        ReleaseError: the steward's state or CURRENT cannot be read.
    """
    known = load_state(store).evidence
    tasks = {}
    for task, one in sorted(release.specialists.items()):
        evidence = known[one.name].facts() if one.name in known else None
        rollout = release.rollout.get(task)
        tasks[task] = {
            "specialist": one.name,
            "stage": release.stage_of(task),
            "rollout": rollout and rollout.model_dump(),
            "epsilon": one.gate.epsilon,
            "threshold": one.gate.threshold,
            "coverage": one.gate.coverage,
            "evidence": evidence,
        }
    return {
        "release": sha,
        "previous": release.previous,
        "is_served": registry.current_sha(store) == sha,
        "is_frozen": registry.is_frozen(store),
        "tasks": tasks,
        "refused": release.refused,
    }


def overview(store: Store) -> dict[str, Any]:
    """All tasks with their states, the releases, and the last changes.

    Returns:
        {release, created_ts, roll_back_to, is_frozen, frozen_reason, tasks, releases, events, conversion}; tasks are ordered by volume.

    Raises:
        ReleaseError: CURRENT, a release or the steward's state cannot be read.
    """
    found = registry.current(store)
    frozen = _read(store, registry.FROZEN)
    conversion = read_conversion(store)
    return {
        "release": found and found[0],
        "created_ts": found and found[1].created_ts,
        "roll_back_to": registry.previous_sha(store),
        "is_frozen": frozen is not None,
        "frozen_reason": str((frozen or {}).get("reason", "")),
        "tasks": _tasks(store, found),
        "releases": _releases(store, found and found[0]),
        "events": [_event(one) for one in reversed(read_events(store, _NUM_EVENTS))],
        "conversion": conversion and conversion.model_dump(mode="json"),
    }


def task_page(store: Store, task_id: str) -> dict[str, Any] | None:
    """One task with its gate and how each way of answering did; None where there is no such task.

    `task_id` is compared with the names that the store has and never made a path before it is one of them.

    Raises:
        ReleaseError: as `overview`.
    """
    found = registry.current(store)
    task = next((one for one in _tasks(store, found) if one["task_id"] == task_id), None)
    if task is None:
        return None
    release = found and found[1]
    specialist = release.specialists.get(task_id) if release else None
    evaluation = (specialist and _read(store, specialist.report)) or _evaluation_of(store, found, task_id) or {}
    gate = specialist.gate.model_dump(mode="json") if specialist else evaluation.get("gate")
    return {
        **task,
        "gate": gate,
        "base": specialist and specialist.base,
        "adapter": specialist and specialist.adapter,
        "merged": specialist and specialist.merged,
        "report": specialist and specialist.report,
        "arms": [_only(_ARM_FIELDS, arm) for arm in evaluation.get("arms", ())],
        "curve": [_only(_CURVE_FIELDS, point) for point in evaluation.get("curve", ())],
        "changes": [
            _event(one)
            for one in reversed(read_events(store, _NUM_SEARCHED))
            if one.by == "steward" and task_id in one.evidence
        ],
    }


def _tasks(store: Store, found: tuple[str, Release] | None) -> list[dict[str, Any]]:
    release = found[1] if found else None
    discovered = (_read(store, _TASKS_FILE) or {}).get("tasks", {})
    served = release_facts(store, *found)["tasks"] if found else {}
    refused: Mapping[str, str] = release.refused if release else {}
    rows = []
    for task_id in sorted({*discovered, *served, *refused}):
        spec = (_read(store, f"tasks/{task_id}.json") if task_id in discovered else None) or {}
        row = {"task_id": task_id, **dict.fromkeys(_TASK_FIELDS), **_only(_TASK_FIELDS, spec)}
        row |= {"state": "new", "reason": "in no served release yet", "specialist": None, "evidence": None}
        if release and task_id in served:
            gate = release.specialists[task_id].gate
            row |= served[task_id] | {"state": served[task_id]["stage"], "reason": None}
            row |= {"upper_bound": gate.upper_bound, "delta": gate.delta}
        elif task_id in refused:
            reason = refused[task_id]
            row |= {"state": "demoted" if reason.startswith(DEMOTED) else "refused", "reason": reason}
        rows.append(row)
    return sorted(rows, key=lambda row: (-(row["num_calls"] or 0), row["task_id"]))


def _evaluation_of(store: Store, found: tuple[str, Release] | None, task_id: str) -> dict[str, Any] | None:
    """What the conversion behind the served release measured of a task that got no specialist."""
    sha, release = found or (None, None)
    for _ in range(_NUM_RELEASES):
        if sha is None or release is None:
            return None
        if report := _read(store, f"releases/{sha}.report.json"):
            return next((one for one in report.get("evaluations", ()) if one.get("task_id") == task_id), None)
        sha = release.previous
        release = _load_release(store.uri, sha) if sha else None
    return None


def _releases(store: Store, served: str | None) -> list[dict[str, Any]]:
    """The newest releases, the newest first."""
    rows = []
    for sha in registry.release_names(store):
        try:
            release = _load_release(store.uri, sha)
        except ReleaseError as error:
            # One that nobody can serve must not hide the others.
            log_event("release_not_readable", logging.WARNING, release=sha, error=str(error))
            continue
        counts = {"num_specialists": len(release.specialists), "num_refused": len(release.refused)}
        rows.append({"release": sha, "created_ts": release.created_ts, "is_served": sha == served, **counts})
    return sorted(rows, key=lambda row: (-row["created_ts"], row["release"]))[:_NUM_RELEASES]


@functools.lru_cache(maxsize=500)
def _load_release(store_uri: str, sha: str) -> Release:
    """Releases never change; read again at every look they would be most of what is read."""
    return registry.load_release(Store(store_uri), sha)


def _event(event: Event) -> dict[str, Any]:
    tasks = {task: facts for task, facts in event.evidence.items() if isinstance(facts, dict)}
    counted = ("from", "to", "num_compared", "num_disagreements")
    facts = event.model_dump(mode="json", exclude={"evidence"})
    return {**facts, "tasks": {task: _only(counted, one) for task, one in tasks.items()}}


def _read(store: Store, path: str) -> dict[str, Any] | None:
    """None where there is no such file, none any more, or nothing of ours in it."""
    try:
        found = store.read_json(path)
    except (StoreError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _only(names: tuple[str, ...], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in names if name in facts}
