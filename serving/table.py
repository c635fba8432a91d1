"""CURRENT -> what this gateway serves: one immutable snapshot of release, route model and open, loaded specialists.

Polled once a second. Every adapter of a release is resident in its engine before the release is swapped in, so no
request pays for a load; a request keeps the snapshot it started with, so old and new adapters must fit together. Two
releases are resident at most: a third one's adapters are loaded when no request keeps the one before the served, and
engines then let go of what has waited longest. A specialist whose gate does not hold for the engine that runs, or whose adapter does not load, is left out with the
reason, and its calls go to the LLM; so is one whose engine is not up, until it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster import registry
from cluster.engine import Engine
from cluster.errors import EngineError, ReleaseError, UnderstudyError
from cluster.records import Release, Rollout, Specialist
from cluster.route_model import RouteModel
from cluster.store import Store
from cluster.telemetry import log_event
from serving.drift import read_audit_shares
from serving.engine_search import EngineSearch
from serving.policy import LLM_MODEL, MODEL_PREFIX

POLL_INTERVAL_S = 1.0
_RELEASE_WAIT_S = 30.0
"""Longest wait for requests that keep an old release; past it what they still need may be loaded once more."""
_RELEASE_CHECK_S = 0.05
_ENGINE_WAIT_S = 30.0
"""Longest wait for an engine of the served release while the next one is loaded."""


@dataclass(frozen=True)
class Snapshot:
    """One release as this gateway can serve it."""

    release: str | None = None
    """Name of the release; None where nothing was ever promoted."""
    created_ts: float = 0.0
    """When the release was made."""
    route_model: RouteModel | None = None
    specialists: Mapping[str, Specialist] = field(default_factory=dict)
    """Those that may be asked, by task; all resident."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Why the release's other specialists are not asked, by task."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why the release has no specialist for a task, or this gateway skips it, by task."""
    rollout: Mapping[str, Rollout] = field(default_factory=dict)
    """Stages of the specialists that are not live, by task."""


def model_entries(snapshot: Snapshot, *, has_llm: bool) -> list[dict[str, Any]]:
    """What may be asked for by name, as OpenAI's model list shows it; a call that names none of it is routed.

    Args:
        has_llm: whether the LLM can be asked for as LLM_MODEL.
    """
    names = [LLM_MODEL] if has_llm else []
    names += [MODEL_PREFIX + task for task in sorted(snapshot.specialists)]
    created = int(snapshot.created_ts)
    return [{"id": name, "object": "model", "created": created, "owned_by": "understudy"} for name in names]


def crowded_base(specialists: Iterable[Specialist], max_adapters: int) -> tuple[str, int] | None:
    """A base model whose specialists have more adapters than `max_adapters`, and how many; None where all fit."""
    adapters: dict[str, set[str]] = {}
    for one in specialists:
        if one.gate.is_open and one.lora:
            adapters.setdefault(one.base, set()).add(one.lora)
    return next(((base, len(found)) for base, found in adapters.items() if len(found) > max_adapters), None)


class ServingTable:
    """Follows CURRENT. Belongs to one event loop; the snapshot may be read from anywhere."""

    def __init__(
        self, store: Store, engines: Mapping[str, Engine], max_adapters: int, search: EngineSearch | None = None
    ) -> None:
        """Serve nothing yet; `engines` are by store path of their model, with room for `max_adapters` each, and `search`
        adds to them."""
        self.store, self._engines, self._max_adapters, self._search = store, engines, max_adapters, search
        self._missing: set[str] = set()
        """Models of the release looked at last that no engine serves."""
        self._is_settled = True
        """Whether the snapshot is what the last look made."""
        self._snapshot = Snapshot()
        self._audit_shares: dict[str, float] = {}
        self._previous: weakref.ref[Snapshot] | None = None
        """The snapshot before; alive as long as a request keeps it."""
        self._failures: dict[str, str] = {}
        """What of could not be read -> why, as it was logged last."""

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def audit_shares(self) -> Mapping[str, float]:
        """Shares of kept answers to audit besides the reference stream, by task whose traffic looks otherwise than before."""
        return self._audit_shares

    async def refresh(self) -> None:
        """Poll once: swap in the current release if it is another one and loads; else keep the snapshot and log why."""
        try:
            self._audit_shares = await asyncio.to_thread(read_audit_shares, self.store)
            self._failures.pop("audit shares", None)
        except (UnderstudyError, OSError, ValueError) as error:
            self._log_failure("audit shares", error)
        try:
            sha = await asyncio.to_thread(registry.current_sha, self.store)
            self._look_for_engines()
            if sha == self._snapshot.release and self._is_settled and not self._missing & self._engines.keys():
                self._failures.pop("release", None)
                return
            self._is_settled = False
            snapshot = Snapshot() if sha is None else await self._load()
        except (UnderstudyError, OSError, ValueError) as error:
            self._log_failure("release", error)
            return
        self._previous = weakref.ref(self._snapshot)
        if self._search:
            asked = (*self._snapshot.specialists.values(), *snapshot.specialists.values())
            self._search.keep({one.model for one in asked} | self._missing)
        self._snapshot, self._is_settled = snapshot, True
        self._failures.pop("release", None)
        log_event(
            "release_served",
            release=snapshot.release,
            num_specialists=len(snapshot.specialists),
            skipped=dict(snapshot.skipped),
        )

    async def run(self) -> None:
        """Poll until cancelled. No failure ends it, whatever an engine's handle raises."""
        while True:
            (outcome,) = await asyncio.gather(self.refresh(), return_exceptions=True)
            if isinstance(outcome, BaseException):
                self._log_failure("poll", outcome)
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _load(self) -> Snapshot:
        """The current release with its adapters resident."""
        found = await asyncio.to_thread(registry.current, self.store)
        if found is None:
            return Snapshot()
        sha, release = found
        if self._search:
            # An engine that the served release does not ask may have ended since: it has to be found again.
            self._search.keep({one.model for one in self._snapshot.specialists.values()} | self._missing)
        route_model = await asyncio.to_thread(RouteModel.load, self.store, release.route_model)
        skipped = await self._skipped(release)
        self._look_for_engines()
        self._check_room(sha, [one for task, one in release.specialists.items() if task not in skipped])
        await self._wait_for_previous()
        # Engines let go of what has waited longest: that must not be an adapter of the served release.
        for served in self._snapshot.specialists.values():
            # Nor may one that has gone with its engine keep the next release from being served.
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(_ENGINE_WAIT_S):
                    await self._make_resident(served)
        specialists = {}
        for task, specialist in release.specialists.items():
            if task in skipped:
                continue
            try:
                await self._make_resident(specialist)
                specialists[task] = specialist
            except EngineError as error:
                skipped[task] = "adapter does not load"
                log_event("adapter_not_loaded", logging.ERROR, specialist=specialist.name, error=str(error))
        refused = {**release.refused, **skipped}
        return Snapshot(sha, release.created_ts, route_model, specialists, skipped, refused, release.rollout)

    def _look_for_engines(self) -> None:
        if self._search:
            self._search.look_for(self._missing)

    async def _make_resident(self, specialist: Specialist) -> None:
        """Raises EngineError where the adapter does not load; a merged one came with its engine."""
        if specialist.lora:
            await self._engines[specialist.model].load(specialist.lora)

    async def _wait_for_previous(self) -> None:
        """Wait until no request keeps the release before the served one."""
        for _ in range(round(_RELEASE_WAIT_S / _RELEASE_CHECK_S)):
            if self._previous is None or self._previous() is None:
                return
            await asyncio.sleep(_RELEASE_CHECK_S)
        log_event("old_release_in_use", logging.WARNING, serving=self._snapshot.release)

    def _check_room(self, sha: str, specialists: list[Specialist]) -> None:
        crowded = crowded_base([*self._snapshot.specialists.values(), *specialists], self._max_adapters)
        if crowded:
            raise ReleaseError(
                f"release {sha[:12]}: with the served one {crowded[1]} adapters on base {crowded[0]}; allowed: "
                f"specialists.max_adapters={self._max_adapters}; next: start `understudy serve` again, which makes room for "
                "twice the served release where the recipe names no number, or raise it"
            )

    async def _skipped(self, release: Release) -> dict[str, str]:
        skipped: dict[str, str] = {}
        fingerprints: dict[str, str] = {}
        self._missing = release.models() - self._engines.keys()
        for task, specialist in release.specialists.items():
            engine = self._engines.get(specialist.model)
            if not specialist.gate.is_open:
                skipped[task] = f"gate refused: {specialist.gate.refused or 'no threshold'}"
            elif engine is None:
                skipped[task] = "no engine serves its model yet"
            else:
                if specialist.model not in fingerprints:
                    fingerprints[specialist.model] = await engine.fingerprint()
                if specialist.gate.fingerprint != fingerprints[specialist.model]:
                    skipped[task] = "the gate was certified on another engine"
        return skipped

    def _log_failure(self, what: str, error: BaseException) -> None:
        """Log a failure once, not at every poll."""
        reason = f"{what}: {type(error).__name__}: {error}"
        if reason != self._failures.get(what):
            self._failures[what] = reason
            log_event("release_not_loaded", logging.ERROR, serving=self._snapshot.release, error=reason)
