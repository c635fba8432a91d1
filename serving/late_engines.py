"""Engines of models that came after the graph was built: each a Ray Serve application of its own, in step with CURRENT.

    CURRENT -> EngineKeeper (serving/steward_replica.py) -> application engines-STORE-MODEL
            -> EngineSearch (serving/engine_search.py) of every gateway

The graph has engines for the release that it was built with. A later one may be the first, on another base, or have a task's
newly merged weights: their engines start beside the graph, because a graph that is deployed again starts its gateways anew.
An engine ends a minute after neither the served release nor the one that a rollback would serve names its model. Until one
is up, and where the cluster has no room for it, the LLM answers. Where an endpoint is taken out of a Ray Serve that goes on,
its late engines stay until somebody ends them (`serve.delete` of the applications whose names begin with engines-).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

from cluster import registry
from cluster.errors import EngineError, ReleaseError, UnderstudyError
from cluster.store import Store
from cluster.telemetry import log_event
from cluster.tracing import TelemetryConfig
from serving.engine_options import NO_INGRESS
from serving.specialist import build_specialists
from serving.specialist_config import SpecialistConfig

_INTERVAL_S = 2.0
_RETRY_S = 30.0
"""After a step that failed: a start that cannot succeed costs a process each time."""
_GRACE_S = 60.0
"""How long an engine that no release needs stays."""
AppState = Literal["starting", "up", "ending", "failed"]
_STATES: dict[str, AppState] = {"RUNNING": "up", "UNHEALTHY": "up", "DELETING": "ending", "DEPLOY_FAILED": "failed"}
"""Ray Serve's states of an application; all others are on the way to one of these."""


def apps_prefix(store_uri: str) -> str:
    """What the names of a store's engine applications begin with: two endpoints of one cluster keep theirs apart."""
    return f"engines-{_short_hash(store_uri)}-"


def engine_app(store_uri: str, model: str) -> str:
    """Name of the Serve application of one late model's engine."""
    return apps_prefix(store_uri) + _short_hash(model)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class EngineApps(Protocol):
    """Where late engines run. What goes wrong with one is an EngineError."""

    def states(self) -> dict[str, AppState]:
        """By name, the applications there are of this store."""

    def start(self, app: str, model: str) -> None:
        """Begin to start one, also one that failed; it may be up long after this returns."""

    def end(self, app: str) -> None:
        """Begin to end one; calls in flight finish."""


class EngineKeeper:
    """Starts and ends late engines. Not for two processes at once."""

    def __init__(
        self,
        store: Store,
        built: frozenset[str],
        apps: EngineApps,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            built: models whose engines are part of the graph.
        """
        self._store, self._built, self._apps, self._clock = store, built, apps, clock
        self._settled: str | None = None
        """The served release, once what it needs is up and nothing else is left."""
        self._unneeded_since: dict[str, float] = {}
        self._wait_until = 0.0
        self._failure: str | None = None

    def step(self) -> None:
        """Look once; asks nobody where CURRENT is as it was and all is settled.

        Raises:
            EngineError: Serve could not start one, or does not answer.
            ReleaseError: CURRENT cannot be read.
            StoreError: nor can the store. The next step tries again.
        """
        sha = registry.current_sha(self._store)
        if sha is None or sha == self._settled:
            return
        wanted = registry.load_release(self._store, sha).models() - self._built
        states = self._apps.states()
        kept = {engine_app(self._store.uri, model) for model in (wanted | self._models_before()) - self._built}
        self._end_unneeded({app: state for app, state in states.items() if app not in kept})
        errors = [error for model in sorted(wanted) if (error := self._see_to(model, states)) is not None]
        if errors:
            raise errors[0]
        is_up = all(states.get(engine_app(self._store.uri, model)) == "up" for model in wanted)
        if is_up and not self._unneeded_since:
            self._settled = sha

    def _see_to(self, model: str, states: Mapping[str, AppState]) -> UnderstudyError | OSError | None:
        """Start the engine of a model that has none; what went wrong, so that the others are started all the same."""
        app = engine_app(self._store.uri, model)
        state = states.get(app)
        if state in ("starting", "up", "ending"):
            # One that ends is started again once it is gone.
            return None
        try:
            self._apps.start(app, model)
        except (UnderstudyError, OSError) as error:
            return error
        log_event("engine_started", app=app, model=model)
        return EngineError(f"{app}: Ray Serve could not start it; its log tells why") if state == "failed" else None

    def _end_unneeded(self, states: Mapping[str, AppState]) -> None:
        """Gateways may serve for a while what CURRENT named a moment ago."""
        now = self._clock()
        self._unneeded_since = {app: self._unneeded_since.get(app, now) for app in sorted(states)}
        for app, since in self._unneeded_since.items():
            if states[app] != "ending" and now - since >= _GRACE_S:
                self._apps.end(app)
                log_event("engine_ended", app=app)

    def _models_before(self) -> set[str]:
        before = registry.previous_sha(self._store)
        try:
            return registry.load_release(self._store, before).models() if before else set()
        except ReleaseError:
            # No rollback can serve it either.
            return set()

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop; what fails is logged once and tried again after a while."""
        while not stop.is_set():
            if self._clock() >= self._wait_until:
                try:
                    self.step()
                    self._failure = None
                except (UnderstudyError, OSError, ValueError) as error:
                    self._note_failure(error)
            stop.wait(_INTERVAL_S)

    def _note_failure(self, error: Exception) -> None:
        self._wait_until = self._clock() + _RETRY_S
        reason = f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"
        if reason != self._failure:
            self._failure = reason
            log_event("engine_not_started", logging.ERROR, error=reason)


class ServeApps:
    """On the Ray Serve that this process is part of."""

    def __init__(self, store_uri: str, config: SpecialistConfig, telemetry: TelemetryConfig) -> None:
        self._store_uri, self._config, self._telemetry = store_uri, config, telemetry

    def states(self) -> dict[str, AppState]:
        from ray import serve

        with _as_engine_errors():
            applications = serve.status().applications
        prefix = apps_prefix(self._store_uri)
        found = {name: one.status for name, one in applications.items() if name.startswith(prefix)}
        return {name: _STATES.get(status.value, "starting") for name, status in found.items()}

    def start(self, app: str, model: str) -> None:
        import ray

        # In a process that ends with it: what describes an engine imports the engine, which nothing here needs. Under
        # HAProxy Serve would let no application's only deployment choose among its replicas.
        options = {"num_cpus": 0, "max_calls": 1, "max_retries": 0, "runtime_env": {"env_vars": NO_INGRESS}}
        starting = ray.remote(**options)(_start_app)
        with _as_engine_errors():
            ray.get(starting.remote(app, model, self._config, self._store_uri, self._telemetry))

    def end(self, app: str) -> None:
        from ray import serve

        with _as_engine_errors():
            serve.delete(app, _blocking=False)


@contextlib.contextmanager
def _as_engine_errors() -> Iterator[None]:
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (RayError, RayServeException) as error:
        # Of what a task raised, the last line says what it was; the others are where.
        raise EngineError(str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__) from None


def _start_app(app: str, model: str, config: SpecialistConfig, store_uri: str, telemetry: TelemetryConfig) -> None:
    from ray import serve

    bound: Any = build_specialists(model, config, store_uri, telemetry, serves_release=True)
    serve.run_many(
        [serve.RunTarget(bound, name=app, route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
