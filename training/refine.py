"""S6: what is known of every task -> what is to be done with it, in words and numbers: refinements/DATE-HASH.json.

keep: what stands stays, a specialist with its gate or the LLM. retrain: the specialist's base again, from its adapter's
weights where these may be used. reselect: another choice of base (S4), then training from an untrained adapter. new: the same
for a task without a specialist. retire: the task goes back to the LLM. Nothing here is released: every candidate meets the
gate and, where it would replace one that serves, training/regression.py. A plan is a file that a person may edit and then run.

Pure: reads no store and no clock, so equal facts give equal plans.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from cluster.config import Config
from cluster.errors import InputError
from cluster.records import AnswerKind, Record, Stage
from cluster.store import content_hash
from training.gate import clopper_pearson_interval, minimum_calls
from training.identity import TaskEvent
from training.ledger import share_of_round

REFINEMENTS_FOLDER = "refinements"
Decision = Literal["keep", "retrain", "reselect", "retire", "new"]
RETIRED = "retired: "
"""What the reason begins with where a task is refused because it was dying."""
TRAINED: tuple[Decision, ...] = ("retrain", "reselect", "new")
_MIN_REPEATED = 20
"""Repeated calls below which contradictions say nothing of a task."""
_MIN_EXPECTED = 5.0
"""Calls that must have been missed before a task is dying: chance misses as many once in 150 times."""
_MIN_GROWTH = 0.1
"""Share by which a task's calls must grow before what was trained and is not served is trained again: a nightly refinement
would else do it every night."""
_SURE = 0.998
"""Level of the intervals that shares are compared by: many tasks are looked at, often."""


class RefineConfig(Config):
    """When a specialist is trained again, and how; a plan holds the values it was made with."""

    recent_days: float = Field(default=7.0, gt=0)
    """Days before the newest stored call that count as now: a task without a call in them is dying."""
    min_evidence: float = Field(default=5.0, gt=1)
    """e-value of the audits against a specialist from which it is retrained; 1 / steward.alpha (20) withdraws it."""
    more_escalated: float = Field(default=0.1, ge=0, le=1)
    """How much more of its recent calls than its gate foretold a specialist may hand to the LLM before it is retrained."""
    bad_score: float = 0.5
    """Feedback below this score says that an answer was bad. Retrained is where that is surely more frequent for the
    specialist's answers than for the LLM's."""
    min_new_examples: int = Field(default=20, ge=1)
    """Fewest train examples that a specialist has not learned from yet for which it is retrained."""
    replay_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of a retraining's examples that the specialist has learned from before, against forgetting; fewer where there
    are no more."""
    learning_rate_factor: float = Field(default=0.5, gt=0, le=1)
    """Times finetune.learning_rate, where training goes on from an adapter's weights."""
    max_contradicted: float = Field(default=0.2, ge=0, le=1)
    """Share of a task's repeated calls that the LLM may answer otherwise than most times; above it nothing is trained."""
    max_moved: float = Field(default=0.01, ge=0, lt=1)
    """Share of a task's calls that another route model may add or take before its gate is about other calls than it was
    certified on, and it must be trained again or the route model stays."""
    margin: float = Field(default=0.05, gt=0, lt=1)
    """By less than this a new specialist may answer wrongly more, or rightly less, of all calls than the one it replaces."""
    level: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance that a new specialist which is worse by the whole margin passes one of these tests."""


class TaskFacts(Record):
    """What one task's decision rests on; counts, no content."""

    kind: AnswerKind
    num_calls: int
    num_recent: int
    """Calls in the last `recent_days`."""
    num_expected: float = 0.0
    """So many were to come in these days, as often as they came before."""
    specialist: str | None = None
    """The one that serves it, or that served it until it was withdrawn."""
    stage: Stage | None = None
    """None where no specialist serves it."""
    refused: str | None = None
    """Why the served release has no specialist for it."""
    is_withdrawn: bool = False
    """By the steward, on audits."""
    num_compared: float = 0
    num_disagreements: float = 0
    e_value: float = 1.0
    """Against "at most epsilon differ", of the audits."""
    drift_suspected: bool = False
    num_asked: int = 0
    """Recent calls that its specialist accepted or escalated."""
    num_escalated: int = 0
    num_unfit: int = 0
    """Of the escalated ones, those whose prompt is too long for it."""
    num_fallen_back: int = 0
    """Recent calls that errors or timeouts took from it; told and no reason to train."""
    coverage: float | None = None
    """What its gate foretold."""
    num_scored: int = 0
    """Recent calls with feedback that its specialist answered."""
    num_bad: int = 0
    num_scored_llm: int = 0
    num_bad_llm: int = 0
    has_forgotten_client: bool = False
    """Its adapter has seen a client that asked to be forgotten."""
    base_has_forgotten_client: bool = False
    other_shape: str | None = None
    """Why the recipe's training cannot go on from its adapter's weights."""
    num_failed: int = 0
    """Refinements that retrained it in vain."""
    num_calls_trained: int = 0
    """Calls that the task had when a refinement last trained it without its being served since."""
    waiting: str | None = None
    """Specialist and release that it made then and that nobody serves; None where it was in vain."""
    moved_share: float = 0.0
    """Of its calls that the refitted route model adds or takes."""
    num_new: int = 0
    """Train examples that may be learned and that its specialist has not seen."""
    num_learned: int = 0
    """Those that it has."""
    quarantined: dict[str, int] = {}
    """Reason -> train examples that are not learned (training/trace_checks.py)."""
    num_repeated: int = 0
    num_contradicted: int = 0
    num_sessions: int = 0
    """Of its calibration calls."""
    num_fresh_sessions: int = 0
    """Those that no gate has met."""
    round: int = 0
    """What the ledger counts where the others are used again."""
    blocked: str | None = None
    """What else keeps a conversion from learning it."""


class TaskPlan(Record):
    """What is to be done with one task; edit `decision` to have another done."""

    task_id: str
    name: str
    decision: Decision
    reason: str
    is_warm: bool = False
    """retrain: whether it goes on from the adapter's weights."""
    facts: TaskFacts

    @model_validator(mode="after")
    def _check_decision(self) -> TaskPlan:
        if self.decision == "retrain" and self.facts.specialist is None:
            raise ValueError(f"{self.task_id}: no specialist to retrain; allowed: keep, new")
        if self.decision == "retire" and self.facts.stage is None:
            raise ValueError(f"{self.task_id}: nothing serves it; allowed: keep, new, retrain, reselect")
        if self.is_warm and self.decision != "retrain":
            raise ValueError(f"{self.task_id}: is_warm with {self.decision}; allowed: with retrain")
        if self.is_warm and self.facts.has_forgotten_client:
            raise ValueError(f"{self.task_id}: is_warm with weights that have seen a forgotten client; allowed: false")
        return self


class Plan(Record):
    """What is to be done with a store's tasks."""

    date: str
    """Day (UTC) of the newest stored call."""
    release: str
    """The served one; what was done since by its steward is kept."""
    snapshot: str
    """The examples that are learned, certified and tested on."""
    route_model: str
    """Store path, or where the refitted one will be."""
    is_refit: bool
    """Whether the new release routes by a route model that is fitted anew."""
    refit_reason: str
    since_ts: float
    """Seconds since the epoch; what came later is recent."""
    delta: float = Field(gt=0, lt=1)
    """What the served gates leave of gate.delta; shared by all that is trained."""
    config: RefineConfig
    events: tuple[TaskEvent, ...]
    """Births, splits, merges, retirements and changed templates since tasks were last looked for."""
    tasks: tuple[TaskPlan, ...]
    """In order of their ids."""
    spent: tuple[str, ...]
    """Entries of the calibration ledger when the plan was made: what they met is not fresh."""

    @property
    def name(self) -> str:
        """Of its file in the store, without the suffix; an edited plan has another one."""
        return f"{REFINEMENTS_FOLDER}/{self.date}-{content_hash(self.model_dump(mode='json'))[:12]}"

    def trained(self) -> list[TaskPlan]:
        return [task for task in self.tasks if task.decision in TRAINED]


def read_plan(text: str, where: str) -> Plan:
    """A plan from its file's text.

    Raises:
        InputError: names the field, and what is allowed there.
    """
    try:
        return Plan.model_validate_json(text, strict=True)
    except ValidationError as error:
        lines = [
            f"{where}: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False)
        ]
        raise InputError("\n".join([*lines, "next: understudy refine plan"])) from None


def decide(facts: TaskFacts, config: RefineConfig, epsilon: float, delta: float) -> tuple[Decision, str, bool]:
    """(decision, reason, whether training goes on from the adapter's weights) for one task.

    Args:
        epsilon: of the gate it will meet; delta: the level of that gate in its first round.
    """
    if facts.specialist is None:
        return (*_decide_new(facts, config, epsilon, delta), False)
    if facts.num_recent == 0:
        days = f"no call in the last {config.recent_days:g} days, {facts.num_expected:.0f} were to come"
        is_dying = facts.num_expected >= _MIN_EXPECTED
        return ("retire" if facts.stage and is_dying else "keep"), f"{'dying' if is_dying else 'rare'}: {days}", False
    reasons = reasons_to_train(facts, config)
    if not reasons:
        return "keep", "nothing speaks against it", False
    reason = "; ".join(reasons)
    is_cold = facts.has_forgotten_client or facts.other_shape is not None
    hindrance = _hindrance(facts, config, epsilon, delta)
    num_new = facts.num_new + (facts.num_learned if is_cold or facts.num_failed else 0)
    if hindrance is None and num_new < config.min_new_examples:
        hindrance = f"{num_new} new examples, at least {config.min_new_examples} are needed"
    if hindrance:
        return "keep", f"{reason}; not trained: {hindrance}", False
    if facts.base_has_forgotten_client:
        return "reselect", f"{reason}; its base has seen that client too", False
    if facts.num_unfit and _is_above(facts.num_unfit, facts.num_asked, config.more_escalated):
        return "reselect", f"{reason}; {facts.num_unfit} prompts do not fit its base", False
    if facts.num_failed:
        return "reselect", f"{reason}; retrained in vain {facts.num_failed} times", False
    if facts.has_forgotten_client:
        return "retrain", f"{reason}; from an untrained adapter, its weights have seen that client", False
    if facts.other_shape:
        return "retrain", f"{reason}; from an untrained adapter: {facts.other_shape}", False
    return "retrain", reason, True


def reasons_to_train(facts: TaskFacts, config: RefineConfig) -> list[str]:
    """What speaks for training a task's specialist again, each with its numbers; none where all is well."""
    found = []
    compared = f"{facts.num_disagreements:g} of {facts.num_compared:g} audited conversations differ"
    if facts.is_withdrawn:
        found.append(f"withdrawn: {compared}")
    elif facts.stage is None:
        found.append("its calls came back after it was retired")
    elif facts.e_value >= config.min_evidence:
        found.append(f"{compared}, evidence {facts.e_value:.3g}")
    if facts.has_forgotten_client or facts.base_has_forgotten_client:
        found.append("a client that it learned from asked to be forgotten")
    if facts.moved_share > config.max_moved:
        found.append(f"{facts.moved_share:.1%} of its calls are others with the refitted route model")
    if facts.drift_suspected:
        found.append("its traffic is not what it was at first")
    if facts.coverage is not None and _is_above(
        facts.num_escalated, facts.num_asked, 1 - facts.coverage + config.more_escalated
    ):
        found.append(
            f"hands {facts.num_escalated} of {facts.num_asked} recent calls to the LLM, its gate foretold "
            f"{1 - facts.coverage:.0%}"
        )
    if facts.num_scored_llm and _is_above(
        facts.num_bad,
        facts.num_scored,
        clopper_pearson_interval(facts.num_bad_llm, facts.num_scored_llm, _SURE)[1],
    ):
        found.append(
            f"feedback: {facts.num_bad} of {facts.num_scored} of its answers were bad, {facts.num_bad_llm} of "
            f"{facts.num_scored_llm} of the LLM's"
        )
    return found


def sessions_needed(epsilon: float, delta: float, round: int) -> int:
    """Fewest calibration sessions, all kept and all agreeing, that open a gate in this round of the ledger."""
    return minimum_calls(epsilon, delta * share_of_round(round))


def num_replayed(num_new: int, num_learned: int, share: float) -> int:
    """How many learned examples are learned again beside the new ones, so that they make up this share."""
    return min(num_learned, math.floor(num_new * share / (1 - share) + 0.5))


def _decide_new(facts: TaskFacts, config: RefineConfig, epsilon: float, delta: float) -> tuple[Decision, str]:
    stands = f"stays with the LLM: {facts.refused}" if facts.refused else "stays with the LLM"
    if facts.num_recent == 0:
        return "keep", f"{stands}; no call in the last {config.recent_days:g} days"
    needed = sessions_needed(epsilon, delta, 0)
    if facts.num_fresh_sessions < needed:
        few = f"{facts.num_fresh_sessions} fresh calibration sessions, at least {needed} are needed"
        return "keep", f"{stands}; {few}"
    hindrance = _hindrance(facts, config, epsilon, delta)
    if hindrance:
        return "keep", f"{stands}; not trained: {hindrance}"
    tried = f"; was refused: {facts.refused}" if facts.refused else ""
    return "new", f"no specialist yet, {facts.num_calls} calls, {facts.num_fresh_sessions} fresh sessions{tried}"


def _hindrance(facts: TaskFacts, config: RefineConfig, epsilon: float, delta: float) -> str | None:
    """Why training would be in vain, whatever speaks for it."""
    if facts.blocked:
        return facts.blocked
    before = facts.num_calls_trained
    wanted = before + max(config.min_new_examples, math.ceil(_MIN_GROWTH * before))
    if before and facts.num_calls < wanted:
        made = f"{facts.waiting} waits to be served, made" if facts.waiting else "trained in vain"
        return f"{made} at {before} calls, {facts.num_calls} now; tried again from {wanted}"
    if facts.num_repeated >= _MIN_REPEATED and facts.num_contradicted > config.max_contradicted * facts.num_repeated:
        return (
            f"the LLM contradicts itself in {facts.num_contradicted} of {facts.num_repeated} repeated calls, more than "
            f"refine.max_contradicted={config.max_contradicted:g}"
        )
    fresh, again = sessions_needed(epsilon, delta, 0), sessions_needed(epsilon, delta, facts.round)
    if facts.num_fresh_sessions >= fresh or facts.num_sessions >= again:
        return None
    return (
        f"{facts.num_fresh_sessions} fresh calibration sessions and {facts.num_sessions} in all; at least {fresh} or {again} "
        "are needed"
    )


def _is_above(count: int, total: int, share: float) -> bool:
    """Whether a share is surely above another one."""
    return total > 0 and clopper_pearson_interval(count, total, _SURE)[0] > share
