"""Stored calls and their tasks -> how much of each agent's calls, tokens and money a release moves, with intervals.

Reads metadata alone; audits and shadows are no traffic. Of a task with an open gate the calibration calls say which share is
kept; a task that stays, and a call of no task, moves nothing. Tokens and money are weighed by task: within one, kept calls are
taken to cost what its calls cost on average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.calls import read_call_columns
from cluster.records import Split
from cluster.store import Store
from training.evaluation import Evaluation
from training.replaceability import Moved, SiteFacts, replaceability
from training.snapshot import read_rows
from training.splits import SPLITS

NO_TASK = "belongs to no task"
_MICRO = 1_000_000
"""Money is weighed in millionths of a dollar, because weights are whole numbers."""


class _Volume(NamedTuple):
    num_calls: int = 0
    num_tokens: int = 0
    micro_usd: int = 0

    def plus(self, other: _Volume) -> _Volume:
        return _Volume(*(mine + its for mine, its in zip(self, other, strict=True)))


def measure_moved(
    store: Store,
    snapshot: str,
    assignment: Mapping[str, str | None],
    evaluations: Sequence[Evaluation],
    refused: Mapping[str, str],
) -> Moved:
    """Weigh what gates keep by the calls that were captured.

    Args:
        assignment: example_id -> task_id, None for those of no task.
        refused: task_id -> reason; a reason here outweighs an open gate.
    """
    volumes = _volumes(store, _tasks_by_split(store, snapshot, assignment))
    gates = {one.task_id: one.gate for one in evaluations if one.gate.is_open and one.task_id not in refused}

    def facts(agent: str, task: str | None, weight: int) -> SiteFacts:
        gate = gates.get(task or "")
        if gate is None:
            return SiteFacts(agent, task or "-", weight, stays=refused.get(task or "", NO_TASK))
        return SiteFacts(agent, task or "-", weight, num_measured=gate.num_calibration, num_kept=gate.num_accepted)

    totals = {}
    for place, name in enumerate(("calls", "tokens", "money")):
        by_task: dict[str | None, int] = defaultdict(int)
        for (_, task), volume in volumes.items():
            by_task[task] += volume[place]
        if sum(by_task.values()):
            (totals[name],) = replaceability(facts("all agents", task, weight) for task, weight in by_task.items())
    agents = replaceability(facts(agent, task, volume.num_calls) for (agent, task), volume in volumes.items())
    return Moved(totals=totals, agents=tuple(agents))


def _tasks_by_split(
    store: Store, snapshot: str, assignment: Mapping[str, str | None]
) -> dict[Split, dict[str, str | None]]:
    """Split -> call_id -> its task, None where discovery found none; calls that no split has are in none."""
    found: dict[Split, dict[str, str | None]] = {}
    for split in SPLITS:
        rows = read_rows(store, snapshot, split, ["example_id", "source_call_ids"])
        pairs = zip(rows["example_id"].to_pylist(), rows["source_call_ids"].to_pylist(), strict=True)
        found[split] = {call: assignment.get(example) for example, calls in pairs for call in calls}
    return found


def _volumes(store: Store, by_split: Mapping[Split, Mapping[str, str | None]]) -> dict[tuple[str, str | None], _Volume]:
    """(agent, task) -> what was captured of it; a call id stored twice counts once.

    Curation thins out train, so what it left out of a train session is taken to be as the agent's held-out calls are.
    """
    names = [
        "call_id",
        "client_id",
        "session_id",
        "agent",
        "prompt_tokens",
        "completion_tokens",
        "cost_usd",
        "audit_of",
    ]
    rows = {row["call_id"]: row for row in read_call_columns(store, names).to_pylist() if row["audit_of"] is None}
    task_of = {call: task for its in by_split.values() for call, task in its.items()}
    train = {_session(rows[call]) for call in by_split["train"] if call in rows}
    held_out = {_session(rows[call]) for call in task_of if call in rows} - train
    found: dict[tuple[str, str | None], _Volume] = defaultdict(_Volume)
    mix: dict[str, dict[str | None, int]] = defaultdict(lambda: defaultdict(int))
    left: dict[str, _Volume] = defaultdict(_Volume)
    for call_id, row in rows.items():
        agent, task, own = row["agent"] or "unnamed agent", task_of.get(call_id), _volume(row)
        if call_id not in task_of and _session(row) in train:
            left[agent] = left[agent].plus(own)
            continue
        found[agent, task] = found[agent, task].plus(own)
        mix[agent][task] += _session(row) in held_out
    for agent, volume in left.items():
        known = mix[agent] if any(mix[agent].values()) else {None: 1}
        whole = sum(known.values())
        for task, part in known.items():
            found[agent, task] = found[agent, task].plus(_Volume(*(round(one * part / whole) for one in volume)))
    return found


def _session(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["client_id"], row["session_id"]


def _volume(row: Mapping[str, Any]) -> _Volume:
    tokens = (row["prompt_tokens"] or 0) + (row["completion_tokens"] or 0)
    return _Volume(1, tokens, round((row["cost_usd"] or 0.0) * _MICRO))
