"""The graph of serving/app.py with some replicas, on this machine or on the cluster that a job runs on, and load for it.

On this machine each graph has a Ray of its own, and the gateway listens itself. On a cluster Ray Serve's proxies listen, and
no other Ray Serve may run there: it would be ended with this one. The LLM is one that costs nothing, on the loopback of
every host, so that no experiment spends money or leaves a port open to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.errors import ConfigError
from cluster.session import connect, joins_cluster, let_ingress_listen, serve_is_running
from cluster.store import Store
from jobs.bench.http_load import Reply, http_request, load, spread_ms
from jobs.bench.mixed_adapters import count_loads
from jobs.bench.processes import free_port
from jobs.bench.stage import make_key
from serving.app import ServeArgs

APP = "understudy-scale"
ASKED = ("accept", "escalate")
"""What is told of calls that a specialist was asked."""
_MAX_SECONDS = 60.0
_ENGINES = ("specialists-", "stub-engine")
"""What the names of engines' deployments begin with (serving/specialist.py, jobs/bench/stub_graph.py)."""
_GAP_S = 0.001
"""Between the pieces of the fake LLM's streams."""


class Endpoint(NamedTuple):
    """A graph that listens."""

    url: str
    key: str
    engines: tuple[str, ...]
    """Its engines' deployments."""
    replicas: int
    """Of each of them."""


@contextlib.contextmanager
def scratch_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that all nodes see and that is gone with the block: on a cluster in OUT, which is to be such a one."""
    if joins_cluster():
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="understudy-scale-", dir=out if joins_cluster() else None) as scratch:
        yield pathlib.Path(scratch)


@contextlib.contextmanager
def listening(
    store: Store, args: Mapping[str, Any], replicas: int, bind: Callable[[ServeArgs], Any], cpus: int
) -> Iterator[Endpoint]:
    """Run a graph as long as the block.

    Args:
        args: of ServeArgs, without an upstream.
        bind: makes the graph.
        cpus: of a Ray of its own on this machine, which may promise more than there are.

    Raises:
        ConfigError: Ray Serve runs on the cluster already.
    """
    from ray import serve

    port, is_local = free_port(), not joins_cluster()
    if is_local:
        let_ingress_listen(port)
    with _connected(cpus):
        if serve_is_running():
            raise ConfigError(
                "scale serve: Ray Serve runs on this cluster already, and would share its machines with the load; next: stop "
                "it (`serve shutdown`), or another cluster"
            )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": free_port() if is_local else port})
            with _fake_llm() as llm:
                served = ServeArgs.model_validate({**args, "store": store.uri, "upstream": [{"base_url": llm}]})
                serve.run(bind(served), name=APP, route_prefix="/")
                engines = [name for name in serve.status().applications[APP].deployments if name.startswith(_ENGINES)]
                yield Endpoint(f"http://127.0.0.1:{port}", make_key(store), tuple(engines), replicas)
        finally:
            serve.shutdown()


@contextlib.contextmanager
def _connected(cpus: int) -> Iterator[None]:
    import ray

    connect(num_cpus=cpus)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _fake_llm() -> Iterator[str]:
    """An LLM on the loopback of every host of the connected cluster, at the one address."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class FakeLLM:
        """Listens as long as it lives."""

        async def listen(self, port: int) -> None:
            from jobs.bench import fake_llm

            self._server = await fake_llm.listen(_GAP_S, port)

    port, actors = free_port(), []
    try:
        # By host, of which one may have several nodes.
        hosts = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node in hosts.values():
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            actors.append(ray.remote(FakeLLM).options(num_cpus=0, scheduling_strategy=place).remote())
        ray.get([actor.listen.remote(port) for actor in actors])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for actor in actors:
            ray.kill(actor)


def load_graph(
    end: Endpoint, asked: Sequence[Mapping[str, Any]], clients: int, allowed: Sequence[str] | None
) -> dict[str, Any]:
    """Ask all requests, each once, and say what became of them.

    Args:
        allowed: what must become of each, as the answer's headers tell it; None takes any answer, some by specialists.

    Raises:
        RuntimeError: something else became of one, or no specialist was asked: then nothing was measured.
    """
    requests = [http_request(end.url, json.dumps(one).encode(), end.key) for one in asked]
    routes: dict[str, int] = {}

    def checked(_: int, reply: Reply) -> str | None:
        route = reply.headers.get("x-understudy-route", "none")
        routes[route] = routes.get(route, 0) + 1
        reason = reply.headers.get("x-understudy-reason")
        return None if reply.status == 200 and route in (allowed or [route]) else f"{reply.status}, {route}: {reason}"

    before = _num_loads(end)
    turn = asyncio.run(
        load(end.url, requests, checked, concurrency=clients, max_requests=len(asked), max_seconds=_MAX_SECONDS)
    )
    if turn.errors:
        raise RuntimeError(f"{len(turn.errors)} of {len(asked)} answers not as they must be; {turn.errors[0]}")
    if not routes.keys() & set(ASKED):
        raise RuntimeError(f"no specialist was asked: {routes}")
    found = {"requests_per_s": round(len(turn.whole_ms) / turn.seconds, 2), **spread_ms(turn.whole_ms)}
    loads = _num_loads(end) - before
    told = f"{found['requests_per_s']} requests/s, p50 {found['p50_ms']:.0f} ms, p99 {found['p99_ms']:.0f} ms, {loads} loads"
    return {**found, "adapter_loads": loads, "answered": len(turn.whole_ms), "routes": routes, "told": told}


def _num_loads(end: Endpoint) -> int:
    from ray import serve

    return sum(count_loads(serve.get_deployment_handle(name, APP), end.replicas) for name in end.engines)
