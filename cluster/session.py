"""Connect this process to Ray: join the cluster a job runs on, or start one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from cluster.errors import ConfigError
from cluster.resources import Node

_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
    "RAY_worker_niceness": "0",  # Ray's 15 starves replicas and workers beside any other process
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray warns it will become
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody preempts the one machine, and it costs a process a run
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine unasked
    "OMP_NUM_THREADS": "1",  # runs, replicas and engines share the cores
}
"""Of a cluster on this machine, read when Ray is imported; what the user has set stays."""
_FAST_SERVE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # clients reach the gateway's own process; one event loop a replica
    "RAY_SERVE_PORT_QUARANTINE_S": "0",  # a gateway that is started again listens where the last one did
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # no load balancer has to take note of its end
}
"""Of a Ray Serve on this machine: an eighth of the CPU that its Python proxy takes for a call."""
_PROBE_TIMEOUT_S = 5.0
_NO_PLACE = re.compile(r"has (\d+) replicas that have taken more than \S+ to be scheduled")


def joins_cluster() -> bool:
    """Whether `connect` joins a running cluster; else it starts Ray on this machine."""
    return bool(os.environ.get("RAY_ADDRESS"))


def let_ingress_listen(port: int) -> None:
    """Let the ingress of a Ray Serve that this process starts listen at `port` itself, without a proxy before it.

    Must come before Ray is imported; what the user has set stays. A Ray Serve on a cluster takes its settings from the
    environment of the cluster's nodes, and has HAProxy before many ingresses (RAY_SERVE_ENABLE_HA_PROXY=1).
    """
    ports = {"MIN": port, "MAX": port + 1}
    addresses = {f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT": str(number) for end, number in ports.items()}
    os.environ.update(addresses)
    for name, value in _FAST_SERVE.items():
        os.environ.setdefault(name, value)


def let_ingress_listen_again() -> None:
    """Let this replica listen at once where one that was killed did. Must be called before the replica listens.

    Serve 2.60 binds an ingress's own port without SO_REUSEADDR, so that the connections of a killed one keep the only
    port of `let_ingress_listen` from its successor for a minute, after which Serve has given the port up.
    """
    if "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT" not in os.environ:
        return
    from ray.serve._private import replica

    start = replica.start_asgi_http_server

    async def start_reusing(app: Any, options: Any, **others: Any) -> Any:
        return await start(app, options, **{**others, "enable_so_reuseport": True})

    replica.start_asgi_http_server = start_reusing


def listen_on_node_alone() -> None:
    """Let this replica take calls of other replicas at its node's address only: on a machine of its own that is loopback's.

    Serve 2.60 opens that port on all interfaces, asks for no token there, and unpickles what comes. On a cluster, where
    the address is the network's, RAY_USE_TLS or a network policy keeps strangers out. Must be called before the replica
    listens, by every deployment; outside Ray, where nobody listens so, it does nothing.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    from ray.serve._private import replica

    address = ray.util.get_node_ip_address()
    own = f"[{address}]:0" if ":" in address else f"{address}:0"
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, _: add_port(server, own)


def on_replica_stop(tell: Callable[[], None]) -> None:
    """Have `tell` called, in whatever thread, when Serve begins to stop the replica that this process is; maybe twice.

    Serve 2.60 tells a replica of its end only once no call is in flight, and kills it if that takes too long.
    """
    from ray.serve._private import replica

    stop = replica.Replica.perform_graceful_shutdown

    async def stop_and_tell(self: Any) -> None:
        tell()
        await stop(self)

    replica.Replica.perform_graceful_shutdown = stop_and_tell


def check_alone(what: str) -> None:
    """For what starts and ends a Ray of its own on this machine, and would end what others run on a shared one.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster.
    """
    if joins_cluster():
        raise ConfigError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}: {what} starts and ends a Ray of its own on this machine; next: "
            "unset RAY_ADDRESS"
        )


def prepare_environment() -> None:
    """Set what Ray reads when it is imported: for its Train, and for a cluster on this machine where none is joined."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Workers wait at a checkpoint until the controller has asked for it (training/loop.py).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    for name, value in _LOCAL_ENVIRONMENT.items() if not joins_cluster() else ():
        os.environ.setdefault(name, value)


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster named by RAY_ADDRESS (a Ray job has it set), else start a local one. Idempotent.

    Args:
        num_cpus: CPUs of a local cluster; None takes the machine's.

    Raises:
        ConfigError: there is no cluster at RAY_ADDRESS, or it refuses this process.
    """
    prepare_environment()
    is_local = not joins_cluster()
    if not is_local:
        check_reachable(os.environ["RAY_ADDRESS"])
    import ray

    for name in ("httpx", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if is_local:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)
        return
    try:
        ray.init(address="auto", **options)
    except ConnectionError as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[-1]
        raise ConfigError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}: the cluster does not let this process join: {reason[:300]}; next: "
            "`ray status`, and where it asks for a token export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE, as its nodes have it"
        ) from None


def check_reachable(address: str) -> None:
    """Ray tries for minutes before it says that nobody listens.

    Raises:
        ConfigError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "://" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"RAY_ADDRESS={address!r}: no cluster answers there ({error}); allowed: HOST:PORT of a running cluster; "
            "next: `ray status`, or unset RAY_ADDRESS to run on this machine"
        ) from None


def cluster_nodes() -> list[Node]:
    """The nodes of the connected cluster."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(cpus=one.get("CPU", 0.0), gpus=one.get("GPU", 0.0)) for one in resources]


def serve_is_running() -> bool:
    """Whether the connected cluster has a Ray Serve."""
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def num_replicas_without_place() -> int:
    """Replicas that the cluster's Ray Serve wants and Ray finds no room for; told after half a minute of waiting.

    Source: Serve's own status message, the one public place where a replica that waits for resources differs from one
    that is starting (`SERVE_SLOW_STARTUP_WARNING_S`).
    """
    from ray import serve

    if not serve_is_running():
        return 0
    deployments = [one for app in serve.status().applications.values() for one in app.deployments.values()]
    # The message outlives what it tells of; replicas that are starting do not.
    waiting = [one for one in deployments if one.replica_states.get("STARTING")]
    return sum(int(found[1]) for one in waiting if (found := _NO_PLACE.search(one.message)))


@contextlib.contextmanager
def serve_without_http() -> Iterator[None]:
    """Use the cluster's Ray Serve, or start one that listens nowhere; one that nobody uses is gone afterwards.

    A conversion asks its engine through handles; an HTTP proxy would only take the endpoint's port.
    """
    from ray import serve

    serve.start(proxy_location="Disabled")
    try:
        yield
    finally:
        status = serve.status()
        if not status.applications and not status.proxies:
            serve.shutdown()
