"""What is known of one task, counted from calls, feedback, audits, marks and earlier refinements: training/refine.py's facts.

Training does not know serving, and serving not training: the steward's evidence is read here and handed over as numbers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster import registry
from cluster.calls import read_call_columns
from cluster.errors import StoreError
from cluster.feedback import Feedback, read_feedback
from cluster.forgotten import FORGOTTEN_FOLDER
from cluster.records import Example, Record, Release, Specialist, Split, TaskSpec
from cluster.store import Store
from jobs.forget import RETRAIN_FOLDER
from jobs.recipe import Recipe
from serving.steward import DEMOTED, State, load_state
from training.finetune import FinetuneConfig
from training.ledger import CalibrationLedger
from training.probe import at_rank
from training.refine import REFINEMENTS_FOLDER, RETIRED, TRAINED, Decision, RefineConfig, TaskFacts
from training.snapshot import read_rows
from training.trace_checks import Checked

SECONDS_PER_DAY = 86_400.0
RESULT_SUFFIX = ".result.json"
_COLUMNS = ["call_id", "ts", "client_id", "session_id", "task_id", "action", "route"]
_SHAPE = ("method", "lora_rank", "lora_alpha", "lora_targets")
"""Fields of a fine-tune that must be the same for one adapter to go on from another."""
_UNFIT = "the prompt does not fit"
_BACKGROUND = ("audit", "shadow")
"""What is asked off the path is nobody's call."""


class Outcome(Record):
    """What became of one task of a plan."""

    decision: Decision
    specialist: str | None
    """The one before."""
    num_calls: int
    """Of the task when the plan was made."""
    released: str | None
    """The new one; None where it was refused, or nothing was trained."""
    reason: str


class Result(Record):
    """What running a plan did."""

    plan: str
    release: str
    """That it made, or that was served where nothing changed."""
    outcomes: dict[str, Outcome]


class Asked(NamedTuple):
    """A captured call's metadata."""

    call_id: str
    ts: float
    session_id: str
    client_id: str
    action: str | None
    specialist: str | None
    reason: str
    is_named: bool
    """By its client; such calls tell of answers and not of what the router sends."""


class Known(NamedTuple):
    """What a store knows of its traffic, beside the examples."""

    newest_ts: float
    times: dict[str, float]
    """call id -> seconds since the epoch."""
    asked: dict[str, list[Asked]]
    """task_id -> calls that were routed to it, each once."""
    scores: dict[str, float]
    """call id -> the latest score that its client or a curator gave it."""
    state: State
    results: list[Result]
    forgotten_bases: frozenset[str]


def read_known(store: Store, config: RefineConfig) -> Known:
    """Read metadata, feedback and the steward's state."""
    rows = {row["call_id"]: row for row in read_call_columns(store, _COLUMNS).to_pylist()}
    asked: dict[str, list[Asked]] = defaultdict(list)
    for row in sorted(rows.values(), key=lambda one: (one["ts"], one["call_id"])):
        if row["task_id"] is not None and row["action"] not in _BACKGROUND:
            route = json.loads(row["route"])
            facts = (row["call_id"], row["ts"], row["session_id"], row["client_id"], row["action"])
            how = (route.get("specialist"), route.get("reason") or "", bool(route.get("is_named")))
            asked[row["task_id"]].append(Asked(*facts, *how))
    records = [store.read_json(path) for path in store.list(FORGOTTEN_FOLDER, ".json")]
    return Known(
        newest_ts=max((row["ts"] for row in rows.values()), default=0.0),
        times={call_id: row["ts"] for call_id, row in rows.items()},
        asked=dict(asked),
        scores=_scores(rows, read_feedback(store)),
        state=load_state(store),
        results=read_results(store),
        forgotten_bases=frozenset(base for record in records for base in record["seen"]["bases"]),
    )


def read_results(store: Store) -> list[Result]:
    """What earlier refinements did, by their names."""
    paths = store.list(REFINEMENTS_FOLDER, RESULT_SUFFIX)
    return [Result.model_validate(store.read_json(path)) for path in paths]


def specialist_of(store: Store, release: Release, task_id: str) -> Specialist | None:
    """The specialist that serves a task, or that served it until it was withdrawn or retired."""
    current = release.specialists.get(task_id)
    is_past = release.refused.get(task_id, "").startswith((DEMOTED, RETIRED))
    while current is None and is_past and release.previous is not None:
        release = registry.load_release(store, release.previous)
        current = release.specialists.get(task_id)
    return current


def learned_calls(store: Store, adapter: str) -> set[str]:
    """Ids of the calls in the train split that an adapter was trained on, and those it went on from; of any task."""
    found: set[str] = set()
    while adapter:
        meta = store.manifest(adapter)
        try:
            rows = read_rows(store, meta["snapshot"], "train", ["source_call_ids"])
            found |= {call_id for calls in rows["source_call_ids"].to_pylist() for call_id in calls}
        except StoreError:
            pass  # The snapshot is gone: its examples count as new.
        adapter = (meta.get("start") or {}).get("adapter", "")
    return found


def fresh_of(examples: Sequence[Example], spent: frozenset[str]) -> list[Example]:
    """Those of sessions of which no gate has met a call."""
    used = {example.session_id for example in examples if example.example_id in spent}
    return [example for example in examples if example.session_id not in used]


def training_for(recipe: Recipe, store: Store, adapter: str) -> FinetuneConfig:
    """The recipe's fine-tune at the rank of an adapter."""
    return at_rank(recipe.finetune, store.manifest(adapter)["config"]["lora_rank"])


def facts_of(
    recipe: Recipe,
    store: Store,
    release: Release,
    known: Known,
    ledger: CalibrationLedger,
    task: TaskSpec,
    checked: Checked,
    held: Mapping[Split, Sequence[Example]],
    since_ts: float,
) -> TaskFacts:
    """Count what is known of a task.

    Args:
        checked: its train examples, looked at.
        held: all its examples.
    """
    calibration = held["calibration"]
    one = specialist_of(store, release, task.task_id)
    asked = known.asked.get(task.task_id, [])
    every = {call.call_id for call in asked}
    every |= {name for split in held.values() for example in split for name in example.source_call_ids}
    ids = {name for name in every if known.times.get(name, 0.0) >= since_ts}
    spent_ids = [example.example_id for example in calibration]
    facts: dict[str, Any] = {
        "kind": task.kind,
        "num_calls": task.num_calls,
        "num_recent": len(ids),
        "num_expected": _expected([known.times.get(name, since_ts) for name in every - ids], since_ts, recipe.refine),
        "refused": release.refused.get(task.task_id),
        "quarantined": checked.counts,
        "num_repeated": checked.num_repeated,
        "num_contradicted": checked.num_contradicted,
        "num_new": len(checked.kept),
        "num_sessions": len({example.session_id for example in calibration}),
        "num_fresh_sessions": len(
            {example.session_id for example in fresh_of(calibration, ledger.spent_by(ledger.entries))}
        ),
        "round": ledger.round_of("", spent_ids),
    }
    own_name = one.name if one else None
    tried = [
        (found, result.release)
        for result in known.results
        if (found := result.outcomes.get(task.task_id)) and found.decision in TRAINED and found.specialist == own_name
        # One that has seen a client who was forgotten since is not to be waited for.
        if found.released is None or not _is_marked(store, found.released)
    ]
    if tried:
        last, made = max(tried, key=lambda pair: pair[0].num_calls)
        facts["num_calls_trained"] = last.num_calls
        facts["waiting"] = f"{last.released} in release {made[:12]}" if last.released else None
    if one is None:
        return TaskFacts(**facts)
    facts["num_failed"] = sum(found.released is None for found, _ in tried)
    learned = learned_calls(store, one.adapter)
    is_learned = [not learned.isdisjoint(example.source_call_ids) for example in checked.kept]
    facts |= {"num_learned": sum(is_learned), "num_new": len(is_learned) - sum(is_learned)}
    return TaskFacts(**facts, **_specialist_facts(recipe, store, release, known, one, asked, since_ts))


def _specialist_facts(
    recipe: Recipe,
    store: Store,
    release: Release,
    known: Known,
    one: Specialist,
    asked: Sequence[Asked],
    since_ts: float,
) -> dict[str, Any]:
    task_id = one.task_id
    facts: dict[str, Any] = {
        "specialist": one.name,
        "stage": release.stage_of(task_id) if task_id in release.specialists else None,
        "is_withdrawn": release.refused.get(task_id, "").startswith(DEMOTED),
        "coverage": one.gate.coverage,
        "has_forgotten_client": _is_marked(store, one.name),
        "base_has_forgotten_client": one.base in known.forgotten_bases,
        "other_shape": _other_shape(recipe, store, one.adapter),
    }
    evidence = known.state.evidence.get(one.name)
    if evidence is not None:
        facts |= {
            "num_compared": evidence.risk.num_observed,
            "num_disagreements": evidence.risk.num_disagreements,
            "e_value": evidence.risk.e_value,
        }
    drift = known.state.drift.get(one.name)
    facts["drift_suspected"] = drift is not None and drift.is_suspected
    recent = [call for call in asked if call.ts >= since_ts]
    own = [call for call in recent if call.specialist == one.name]
    accepted = [call for call in own if call.action == "accept"]
    sent = [call for call in own if not call.is_named]
    escalated = [call for call in sent if call.action == "escalate"]
    of_llm = [call for call in recent if call.action in ("llm", "escalate", "fall_back")]
    bad = recipe.refine.bad_score
    scored, scored_llm = (
        [known.scores[call.call_id] for call in calls if call.call_id in known.scores] for calls in (accepted, of_llm)
    )
    return facts | {
        "num_asked": sum(call.action == "accept" for call in sent) + len(escalated),
        "num_escalated": len(escalated),
        "num_unfit": sum(call.reason == _UNFIT for call in escalated),
        "num_fallen_back": sum(call.action == "fall_back" for call in own),
        "num_scored": len(scored),
        "num_bad": sum(score < bad for score in scored),
        "num_scored_llm": len(scored_llm),
        "num_bad_llm": sum(score < bad for score in scored_llm),
    }


def _is_marked(store: Store, specialist: str) -> bool:
    """Whether a specialist has seen a client that asked to be forgotten."""
    return store.exists(f"{RETRAIN_FOLDER}/{specialist}.json")


def _other_shape(recipe: Recipe, store: Store, adapter: str) -> str | None:
    before = store.manifest(adapter)["config"]
    now = training_for(recipe, store, adapter).model_dump(mode="json")
    changed = [f"finetune.{name} was {before[name]}, is {now[name]}" for name in _SHAPE if before[name] != now[name]]
    return "; ".join(changed) or None


def _expected(earlier: Sequence[float], since_ts: float, config: RefineConfig) -> float:
    """Calls that were to come in the recent days, as often as these came from the first of them until then."""
    days = (since_ts - min(earlier, default=since_ts)) / SECONDS_PER_DAY
    # A task that began a moment ago tells nothing of how often it comes.
    return len(earlier) * config.recent_days / max(days, config.recent_days)


def _scores(rows: Mapping[str, dict[str, Any]], feedback: Sequence[Feedback]) -> dict[str, float]:
    """The latest score of each call, from whom may judge it; a conversation's own counts for its calls without one."""
    by_session: dict[str, list[Feedback]] = defaultdict(list)
    by_call: dict[str, list[Feedback]] = defaultdict(list)
    for given in sorted(feedback, key=lambda one: (one.ts, one.feedback_id)):
        if given.score is not None and given.call_id is not None:
            by_call[given.call_id].append(given)
        elif given.score is not None and given.session_id is not None:
            by_session[given.session_id].append(given)
    found: dict[str, float] = {}
    for call_id, row in rows.items():
        for given in (*by_session.get(row["session_id"], ()), *by_call.get(call_id, ())):
            if given.is_curated or given.client_id == row["client_id"]:
                found[call_id] = given.score or 0.0
    return found
