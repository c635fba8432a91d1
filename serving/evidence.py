"""Comparisons that gateways captured -> what is known of each specialist: counts, e-values, the sessions counted.

A comparison is an audit (the LLM asked about a kept answer) or a shadow (a specialist asked about a call that the LLM
answered); its outcome stands in the metadata, so no content and no key is needed. A session counts once for a specialist, with
the share of its compared answers that disagree, once it is over: calls of one conversation tell of
each other, and the first one compared would be an early step the oftener the more is audited, which is another population
than the gate's. Read again after a restart, or from a part that a compaction has moved, a comparison counts once. Pure but for
`CallReader`; decides nothing (serving/steward.py does).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.calls import read_new_columns
from cluster.records import Record, Specialist, Stage
from cluster.sequential import RiskTest, SafetyTest, confidence_sequence
from cluster.store import Store
from serving.drift import Asked

LATE_S = 3600.0
"""A comparison this much older than the newest one is not counted any more: the ids of younger ones are remembered."""
_MAX_SESSIONS = 5_000
"""Sessions that were counted, remembered of each specialist, the latest; one that goes on longer counts again."""
KEPT = "would be kept"
"""Reason of a shadow whose answer reaches the threshold."""
_COMPARED = ("audit", "shadow")
_ASKED = ("accept", "escalate")
_COLUMNS = ["call_id", "ts", "session_id", "action", "route"]


class Comparison(NamedTuple):
    """One answer of a specialist beside the LLM's."""

    call_id: str
    ts: float
    session_id: str
    action: str
    """`audit`: the client has the specialist's answer; `shadow`: the LLM's."""
    specialist: str
    """Its name, TASK_ID@SHA."""
    agrees: bool | None
    """None where the specialist's answer would not be kept."""


class Cursor(Record):
    """Which comparisons were counted: all older than `newest_ts` - LATE_S, and those in `seen`."""

    newest_ts: float = 0.0
    seen: dict[str, float] = {}
    """Id of a comparison -> its time."""


class Compared(Record):
    """What was compared so far in a session that is not over."""

    newest_ts: float
    """When the newest comparison was made; one of a clock that runs ahead counts as made when it was read."""
    num: int = 0
    num_wrong: int = 0
    num_at_stage: int = 0
    num_wrong_at_stage: int = 0

    def plus(self, one: Comparison, *, is_of_stage: bool, now: float) -> Compared:
        is_wrong = not one.agrees
        return Compared(
            newest_ts=max(self.newest_ts, min(one.ts, now)),
            num=self.num + 1,
            num_wrong=self.num_wrong + is_wrong,
            num_at_stage=self.num_at_stage + is_of_stage,
            num_wrong_at_stage=self.num_wrong_at_stage + (is_of_stage and is_wrong),
        )


class Evidence(Record):
    """What is known of one specialist."""

    risk: RiskTest
    """Over all stages: what is kept, or would be."""
    stage: Stage
    stage_since: float
    """When the specialist was first seen at this stage, in seconds since the epoch."""
    safety: SafetyTest
    """Over this stage's own comparisons: shadows in its shadow stage, audits afterwards."""
    num_unkept: int = 0
    """Shadows of answers that would not be kept."""
    num_repeated: int = 0
    """Comparisons not counted, because their session was over."""
    open: dict[str, Compared] = {}
    """By digest of a session that is not over."""
    sessions: tuple[str, ...] = ()
    """Digests of those that were counted, the latest last."""

    def facts(self) -> dict[str, Any]:
        """What an event and a person are told."""
        risk, alpha = self.risk, self.risk.alpha
        lower, upper = confidence_sequence(risk.num_disagreements, risk.num_observed, alpha)
        return {
            "stage": self.stage,
            "epsilon": risk.epsilon,
            "alpha": alpha,
            "num_compared": risk.num_observed,
            "num_disagreements": risk.num_disagreements,
            "interval": [lower, upper],
            "e_value_risk": risk.e_value,
            "peak_risk": risk.peak,
            "num_compared_at_stage": self.safety.num_observed,
            "num_disagreements_at_stage": self.safety.num_disagreements,
            "e_value_safety": self.safety.e_value,
            "num_unkept": self.num_unkept,
            "num_repeated": self.num_repeated,
        }


class CallReader:
    """Reads what was captured since the last time; remembers the parts it has read while the process lives."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: list[str] = []

    def read(self, cursor: Cursor) -> tuple[list[Comparison], list[Asked]]:
        """Comparisons, and calls that specialists were asked, in parts that are new to this reader; in no order, and some
        may have been read before."""
        table, self._known = read_new_columns(
            self._store, _COLUMNS, set(self._known), max(0.0, cursor.newest_ts - LATE_S), (*_COMPARED, *_ASKED)
        )
        rows = table.to_pylist()
        return (
            [found for row in rows if row["action"] in _COMPARED and (found := _comparison(row)) is not None],
            [found for row in rows if row["action"] in _ASKED and (found := _asked(row)) is not None],
        )


def advance(cursor: Cursor, found: Sequence[Comparison], now: float) -> tuple[Cursor, list[Comparison]]:
    """Move the cursor over what was read.

    Args:
        now: seconds since the epoch; a clock that runs ahead of it must not make others late.

    Returns:
        The comparisons to count, each once, in order of time.
    """
    oldest = cursor.newest_ts - LATE_S
    fresh: dict[str, Comparison] = {}
    for one in found:
        if one.ts > oldest and one.call_id not in cursor.seen:
            fresh.setdefault(one.call_id, one)
    newest = min(now, max([cursor.newest_ts, *(one.ts for one in fresh.values())]))
    seen = {**cursor.seen, **{one.call_id: one.ts for one in fresh.values()}}
    moved = Cursor(
        newest_ts=max(newest, cursor.newest_ts),
        seen={call_id: ts for call_id, ts in seen.items() if ts > newest - LATE_S},
    )
    return moved, sorted(fresh.values(), key=lambda one: (one.ts, one.call_id))


def begin(specialist: Specialist, stage: Stage, alpha: float, now: float) -> Evidence:
    """Nothing known yet."""
    epsilon = specialist.gate.epsilon
    return Evidence(
        risk=RiskTest(epsilon=epsilon, alpha=alpha),
        stage=stage,
        stage_since=now,
        safety=SafetyTest(epsilon=epsilon, alpha=alpha),
    )


def at_stage(evidence: Evidence, stage: Stage, now: float) -> Evidence:
    """The evidence at this stage: another one begins without evidence of safety, and keeps what speaks of the risk."""
    if evidence.stage == stage:
        return evidence
    safety = SafetyTest(epsilon=evidence.safety.epsilon, alpha=evidence.safety.alpha)
    still_open = {
        session: one.model_copy(update={"num_at_stage": 0, "num_wrong_at_stage": 0})
        for session, one in evidence.open.items()
    }
    return evidence.model_copy(update={"stage": stage, "stage_since": now, "safety": safety, "open": still_open})


def count(
    evidence: Mapping[str, Evidence], comparisons: Sequence[Comparison], now: float, idle_s: float
) -> dict[str, Evidence]:
    """The evidence by specialist once it has seen these; of unknown specialists they are left out.

    Args:
        comparisons: in order of time.
        now: seconds since the epoch.
        idle_s: a session in which nothing was compared for so long is over; what is compared in it later does not count.
    """
    by_name: dict[str, list[Comparison]] = {name: [] for name in evidence}
    for one in comparisons:
        if one.specialist in by_name:
            by_name[one.specialist].append(one)
    return {name: _close(_collect(known, by_name[name], now), now - idle_s) for name, known in evidence.items()}


def _collect(evidence: Evidence, comparisons: Sequence[Comparison], now: float) -> Evidence:
    """Put comparisons to their sessions."""
    if not comparisons:
        return evidence
    counted, still_open = set(evidence.sessions), dict(evidence.open)
    own = "shadow" if evidence.stage == "shadow" else "audit"
    num_unkept = num_repeated = 0
    for one in comparisons:
        session = _digest(one.session_id)
        if one.agrees is None:
            num_unkept += 1
        elif session in counted:
            num_repeated += 1
        else:
            is_of_stage = one.action == own and one.ts >= evidence.stage_since
            known = still_open.get(session) or Compared(newest_ts=min(one.ts, now))
            still_open[session] = known.plus(one, is_of_stage=is_of_stage, now=now)
    changed = {
        "num_unkept": evidence.num_unkept + num_unkept,
        "num_repeated": evidence.num_repeated + num_repeated,
    }
    return evidence.model_copy(update={**changed, "open": still_open})


def _close(evidence: Evidence, ended_by: float) -> Evidence:
    """Count the sessions that were over then, in the order of their ends."""
    over = sorted((one.newest_ts, session) for session, one in evidence.open.items() if one.newest_ts <= ended_by)
    if not over:
        return evidence
    ended = [evidence.open[session] for _, session in over]
    names = [session for _, session in over]
    return evidence.model_copy(
        update={
            "risk": evidence.risk.after(one.num_wrong / one.num for one in ended),
            "safety": evidence.safety.after(
                one.num_wrong_at_stage / one.num_at_stage for one in ended if one.num_at_stage
            ),
            "open": {session: one for session, one in evidence.open.items() if session not in set(names)},
            "sessions": (*evidence.sessions, *names)[-_MAX_SESSIONS:],
        }
    )


def _digest(session_id: str) -> str:
    """Short enough to keep thousands of; two sessions alike by chance only cost a comparison."""
    return hashlib.blake2b(session_id.encode(), digest_size=6).hexdigest()


def _comparison(row: dict[str, Any]) -> Comparison | None:
    """None where the outcome is not known: the LLM gave no answer, or the call is of a release before outcomes."""
    route = json.loads(row["route"])
    is_unkept = row["action"] == "shadow" and route.get("reason") != KEPT
    agrees = route.get("agrees")
    if not route.get("specialist") or (agrees is None and not is_unkept):
        return None
    return Comparison(row["call_id"], row["ts"], row["session_id"], row["action"], route["specialist"], agrees)


def _asked(row: dict[str, Any]) -> Asked | None:
    """None where the specialist was asked and gave no answer, such as to a prompt that is too long for it, or where the
    client named it: what clients try by name is not the traffic that drift is about."""
    route = json.loads(row["route"])
    if not route.get("specialist") or route.get("confidence") is None or route.get("is_named"):
        return None
    return Asked(row["ts"], route["specialist"], row["action"] == "escalate", route["confidence"])
