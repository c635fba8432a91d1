"""The deployment that looks after one store: the steward, which moves CURRENT, and the keeper of late engines, which follows it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from cluster.errors import ReleaseError
from cluster.session import listen_on_node_alone
from cluster.store import Store
from cluster.telemetry import Meter, configure_logging
from cluster.tracing import TelemetryConfig
from serving.late_engines import EngineApps, EngineKeeper, ServeApps
from serving.specialist_config import SpecialistConfig
from serving.steward import Steward, StewardConfig


def build_steward(
    store_uri: str,
    config: StewardConfig,
    specialists: SpecialistConfig,
    telemetry: TelemetryConfig,
    built: Iterable[str],
) -> Any:
    """Bind the steward as a Ray Serve deployment of one replica that holds no CPU; it keeps late engines too.

    Args:
        built: models whose engines the graph has.
    """
    from ray import serve

    deployment = serve.deployment(
        StewardReplica, name="steward", num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1
    )
    apps = ServeApps(store_uri, specialists, telemetry)
    return deployment.bind(store_uri, config.model_dump(mode="json"), apps, sorted(built))


class StewardReplica:
    """A steward and a keeper of late engines, in a thread each."""

    def __init__(self, store_uri: str, config: dict[str, Any], apps: EngineApps, built: Iterable[str]) -> None:
        self._stop = threading.Event()
        configure_logging()
        listen_on_node_alone()
        steward = Steward(Store(store_uri), StewardConfig.model_validate(config), Meter(export=True))
        keeper = EngineKeeper(Store(store_uri), frozenset(built), apps)
        self._threads = [
            threading.Thread(target=run, args=(self._stop,), daemon=True, name=name)
            for name, run in (("steward", steward.run), ("engine keeper", keeper.run))
        ]
        for thread in self._threads:
            thread.start()

    def check_health(self) -> None:
        """Raises ReleaseError where a thread has ended, and Serve starts another replica."""
        for thread in self._threads:
            if not thread.is_alive():
                raise ReleaseError(f"{thread.name}: its thread has ended; its log tells why")

    def __del__(self) -> None:
        self._stop.set()
