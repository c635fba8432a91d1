"""Evidence -> CURRENT: demotes a specialist whose risk is above its promise, and moves new ones from shadow to live.

The only automatic writer of CURRENT, one process per store. It never edits a release: it publishes one derived from the
served one, in which a task is refused or at another stage, and promotes it, provided that the served one is still the one it
judged and a person has not frozen the store. A demoted specialist stays rejected: promoted again, it is demoted again, and
its task waits for another one. Every change is an event with its evidence. State: steward/state.json, replaced whole after
every step that counted something and before anything is changed, so that a killed steward decides the same again.

The level is a specialist's own: at most `alpha` of those whose risk never exceeds epsilon are ever demoted.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from pydantic import Field

from cluster import registry
from cluster.config import Config
from cluster.errors import ReleaseError, UnderstudyError
from cluster.events import Cause
from cluster.records import Record, Release, Rollout
from cluster.store import Store
from cluster.telemetry import Meter, log_event
from serving.drift import AUDIT_SHARES_FILE, Asked, Drift, observe, read_audit_shares
from serving.evidence import CallReader, Cursor, Evidence, advance, at_stage, begin, count

STATE_FILE = "steward/state.json"
DEMOTED = "demoted: "
"""What the reason begins with where a task is refused because its specialist was withdrawn."""


class StewardConfig(Config):
    """How sure the steward must be, and how often it looks."""

    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Probability with which a specialist that keeps its promise is ever demoted; also that with which one that breaks
    it is moved on to the next stage."""
    interval_s: float = Field(default=10.0, gt=0)
    """Seconds between two looks at what was captured."""
    session_idle_s: float = Field(default=300.0, ge=0)
    """Seconds without a comparison after which a conversation is over and counts; evidence is so much late."""
    raised_audit_share: float = Field(default=0.2, ge=0, le=1)
    """Share of a task's calls that is audited while its escalations or confidences are not what they were at first; 0
    leaves it at `audit.share`."""


class State(Record):
    """What outlives the process."""

    cursor: Cursor = Cursor()
    evidence: dict[str, Evidence] = {}
    """By specialist, also of those that are served no more: a demoted one stays known."""
    drift: dict[str, Drift] = {}
    """By specialist of the served release."""


class Change(Record):
    """What is to be done with one task of the served release."""

    task_id: str
    refused: str | None = None
    """Why its specialist is to be withdrawn."""
    rollout: Rollout | None = None
    """Where it is not withdrawn: its next stage; None is live."""


def judge(task_id: str, evidence: Evidence, rollout: Rollout | None) -> Change | None:
    """What the evidence asks for: withdraw, move to the next stage, or nothing."""
    risk = evidence.risk
    if risk.is_rejected:
        reason = (
            f"{DEMOTED}{risk.num_disagreements:g} of {risk.num_observed} audited conversations differ from the LLM, evidence "
            f"{risk.peak:.3g} against at most {risk.epsilon:g} (needs {1 / risk.alpha:g}); retrain it"
        )
        return Change(task_id=task_id, refused=reason)
    if rollout is None or not evidence.safety.is_rejected:
        return None
    next_stage = rollout.model_copy(update={"stage": "canary"}) if rollout.stage == "shadow" else None
    return Change(task_id=task_id, rollout=next_stage)


class Steward:
    """Looks at one store. Not for two processes at once."""

    def __init__(self, store: Store, config: StewardConfig, meter: Meter | None = None) -> None:
        self._store, self._config, self._meter = store, config, meter or Meter()
        self._reader = CallReader(store)
        self._state: State | None = None
        self._failure: str | None = None

    @property
    def state(self) -> State:
        """Read at its first use, so that what is wrong with it is told by a step and not by a replica that never starts.

        Raises:
            ReleaseError: the stored one is not what a steward wrote.
        """
        if self._state is None:
            self._state = load_state(self._store)
        return self._state

    def step(self, now: float) -> list[Change]:
        """Count what is new, and change what has to be changed.

        Args:
            now: seconds since the epoch.

        Raises:
            ReleaseError: CURRENT cannot be read, or another writer was faster; the next step looks again.
            StoreError: the store cannot be read.
        """
        found = registry.current(self._store)
        if found is None:
            return []
        sha, release = found
        self._count(release, now)
        if registry.is_frozen(self._store):
            return []
        judged = [
            judge(task, self.state.evidence[one.name], release.rollout.get(task))
            for task, one in release.specialists.items()
        ]
        changes = [change for change in judged if change is not None]
        # Withdrawals first and by themselves: no fault of a release with a new stage may hold them up.
        for kind, group in (
            ("demote", [change for change in changes if change.refused]),
            ("advance", [change for change in changes if not change.refused]),
        ):
            if group:
                sha, release = self._apply(sha, release, kind, group)
                self._note_stages(release, now)
        return changes

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop; what fails is logged once and tried again."""
        while not stop.is_set():
            try:
                self.step(time.time())
                self._failure = None
            except (UnderstudyError, OSError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                if reason != self._failure:
                    self._failure = reason
                    log_event("steward_failed", logging.ERROR, error=reason)
            stop.wait(self._config.interval_s)

    def _count(self, release: Release, now: float) -> None:
        compared, asked = self._reader.read(self.state.cursor)
        cursor, fresh = advance(self.state.cursor, compared, now)
        evidence = self._staged(release, now)
        by_name: dict[str, list[Asked]] = {one.name: [] for one in release.specialists.values()}
        for call in asked:
            if call.specialist in by_name:
                by_name[call.specialist].append(call)
        drift = {name: observe(self.state.drift.get(name, Drift()), calls, now) for name, calls in by_name.items()}
        state = State(cursor=cursor, evidence=count(evidence, fresh, now, self._config.session_idle_s), drift=drift)
        self._keep(state)
        self._raise_audits(release)

    def _staged(self, release: Release, now: float) -> dict[str, Evidence]:
        """The evidence, that of the release's specialists at its stages."""
        evidence = dict(self.state.evidence)
        for task, one in release.specialists.items():
            stage, known = release.stage_of(task), evidence.get(one.name)
            evidence[one.name] = at_stage(known, stage, now) if known else begin(one, stage, self._config.alpha, now)
        return evidence

    def _note_stages(self, release: Release, now: float) -> None:
        """At once: where a person goes back before the next step, the stage they go back to begins anew."""
        self._keep(self.state.model_copy(update={"evidence": self._staged(release, now)}))

    def _keep(self, state: State) -> None:
        if state != self.state:
            self._store.write_json(STATE_FILE, state.model_dump(mode="json"))
            self._state = state

    def _raise_audits(self, release: Release) -> None:
        """Tell gateways which tasks to audit more; written where it is another set than before."""
        share, drift = self._config.raised_audit_share, self.state.drift
        wanted = {task: share for task, one in release.specialists.items() if share and drift[one.name].is_suspected}
        if wanted != read_audit_shares(self._store):
            self._store.write_json(AUDIT_SHARES_FILE, wanted)
            log_event("drift_suspected", tasks=sorted(wanted), audit_share=share)

    def _apply(self, sha: str, release: Release, kind: Any, changes: list[Change]) -> tuple[str, Release]:
        refuse = {change.task_id: change.refused for change in changes if change.refused}
        rollout = {change.task_id: change.rollout for change in changes if not change.refused}
        derived = registry.derive(sha, release, refuse=refuse, rollout=rollout)
        facts = {
            change.task_id: {
                "specialist": release.specialists[change.task_id].name,
                "from": release.stage_of(change.task_id),
                "to": "refused" if change.refused else derived.stage_of(change.task_id),
                **self.state.evidence[release.specialists[change.task_id].name].facts(),
            }
            for change in changes
        }
        name = registry.publish_release(self._store, derived)
        registry.promote(self._store, name, expected=sha, cause=Cause(kind=kind, by="steward", evidence=facts))
        for task_id in facts:
            self._meter.count("understudy_release_changes_total", kind=kind, task_id=task_id)
            log_event("release_changed", kind=kind, task_id=task_id, release=name, **facts[task_id])
        return name, derived


def load_state(store: Store) -> State:
    """What the steward of this store knew last; nothing where there was none.

    Raises:
        ReleaseError: the state is not what a steward wrote.
    """
    if not store.exists(STATE_FILE):
        return State()
    try:
        return State.model_validate(store.read_json(STATE_FILE))
    except ValueError:
        raise ReleaseError(
            f"{STATE_FILE} in store {store.uri}: not readable; next: remove it, and evidence is counted again from what is captured"
        ) from None
