"""Stored calls and their tasks -> how much of each agent's calls, tokens and money a release moves, with intervals.

Reads metadata alone; audits and shadows are no traffic. Of a task with an open gate the calibration calls say which share is
kept; a task that stays, and a call of no task, moves nothing. Tokens and money are weighed by task: within one, kept calls are
taken to cost what its calls cost on average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cluster.calls import read_call_columns
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
    volumes = _volumes(store, _task_of_call(store, snapshot, assignment))
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


def _task_of_call(store: Store, snapshot: str, assignment: Mapping[str, str | None]) -> dict[str, str]:
    found = {}
    for split in SPLITS:
        rows = read_rows(store, snapshot, split, ["example_id", "source_call_ids"])
        for example_id, call_ids in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True):
            task = assignment.get(example_id)
            if task is not None:
                found.update(dict.fromkeys(call_ids, task))
    return found


def _volumes(store: Store, task_of: Mapping[str, str]) -> dict[tuple[str, str | None], _Volume]:
    """(agent, task) -> what was captured of it; a call id stored twice counts once."""
    names = ["call_id", "agent", "prompt_tokens", "completion_tokens", "cost_usd", "audit_of"]
    rows = {row["call_id"]: row for row in read_call_columns(store, names).to_pylist() if row["audit_of"] is None}
    found: dict[tuple[str, str | None], _Volume] = {}
    for call_id, row in rows.items():
        key = (row["agent"] or "unnamed agent", task_of.get(call_id))
        one = found.get(key, _Volume())
        tokens = (row["prompt_tokens"] or 0) + (row["completion_tokens"] or 0)
        usd = round((row["cost_usd"] or 0.0) * _MICRO)
        found[key] = _Volume(one.num_calls + 1, one.num_tokens + tokens, one.micro_usd + usd)
    return found
