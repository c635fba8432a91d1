"""What it costs when engines have less room than there are adapters, and which choice of replicas then helps. Needs vLLM.

One engine: the same mixed calls with every adapter resident and in one batch, with fewer adapters in a batch (vLLM's
max_loras), and with fewer resident (max_cpu_loras), where an adapter that is asked again is read again. Two engines: more
adapters than each has room for, and more than both, under Ray Serve's own way to choose a replica and under ours
(serving/replica_choice.py), each adapter as often as another or a few of them mostly (Zipf). Calls go through Serve's
handles as a gateway's do, not over HTTP: a gateway takes no release that one replica has no room for. The base is an
untrained one of 5M parameters. Loads are those that calls waited for, as the replicas count them.

    python -m jobs.bench.adapter_room [--quick] [--part room together beyond] [--json PATH]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster.session import check_alone, connect
from cluster.store import Store
from jobs import provenance
from jobs.bench.graph_tax import (
    BASE,
    CONFIG,
    FORMAT,
    NUM_TOKENS,
    ROUTERS,
    SMALL,
    adapter_of,
    make_base,
    others_cpu,
    request_of,
)
from jobs.bench.http_load import spread_ms
from jobs.bench.mixed_adapters import count_loads, draw_adapters
from serving.specialist import ServeEngine, build_specialists, deployment_name
from serving.specialist_config import SpecialistConfig

PARTS = ("room", "together", "beyond")
SPREADS = ("uniform", "zipf")
_APP = "adapter-room"
_NUM_ADAPTERS = 16
_CONCURRENCY = 8
_NUM_CALLS, _NUM_QUICK = 160, 16
_REPETITIONS = 2
ROOMS = {
    "all": (_NUM_ADAPTERS, _NUM_ADAPTERS),
    "batch_of_4": (_NUM_ADAPTERS, 4),
    "batch_of_1": (_NUM_ADAPTERS, 1),
    "resident_8": (8, 8),
}
"""How many of the adapters are resident in one engine, and how many one batch may mix."""
RESIDENT = {"together": 8, "beyond": 4}
"""By part, how many each of two engines has room for: together all, or half of them."""
_RATIOS = ("requests_per_s", "cpu_ms", "p50_ms", "p99_ms")


def measure_adapter_room(
    say: Callable[[str], object], parts: Sequence[str] = PARTS, quick: bool = False
) -> dict[str, Any]:
    """Start engines with each room and ask them all alike. Starts and ends a Ray of its own.

    Returns:
        `room`: by name of ROOMS what was measured, and under `vs_all` its ratio to everything resident in one batch;
        `together`, `beyond`: by spread what two engines did under each router, and `adapter_vs_default`, our router's ratio
        to Serve's.
    """
    check_alone("adapter_room")
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch, _cluster():
        store = Store(f"{scratch}/store")
        facts = make_base(store, pathlib.Path(scratch), SMALL, _NUM_ADAPTERS)
        num = _NUM_QUICK if quick else _NUM_CALLS
        sizes = {"adapters": _NUM_ADAPTERS, "calls": num, "clients": _CONCURRENCY}
        found: dict[str, Any] = {"facts": {"parameters": facts["parameters"], "answer_tokens": NUM_TOKENS, **sizes}}
        if "room" in parts:
            rooms = {name: _ask_all(store, room, ROUTERS[0], 1, num, say)["uniform"] for name, room in ROOMS.items()}
            found["room"] = {name: {**one, "vs_all": ratios(one, rooms["all"])} for name, one in rooms.items()}
        for part in (one for one in RESIDENT if one in parts):
            found[part] = _compare_choices(store, RESIDENT[part], num, 1 if quick else _REPETITIONS, say)
    return found


def _compare_choices(
    store: Store, resident: int, num: int, repetitions: int, say: Callable[[str], object]
) -> dict[str, Any]:
    """Each router on two engines, one after the other and again, so that a slow minute falls on both."""
    runs: dict[str, list[dict[str, Any]]] = {router: [] for router in ROUTERS}
    for _ in range(repetitions):
        for router, own in runs.items():
            own.append(_ask_all(store, (resident, resident), router, 2, num, say))
    return {
        spread: compare_runs({router: [one[spread] for one in own] for router, own in runs.items()})
        for spread in SPREADS
    }


def compare_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The median of each number by router, all repetitions, and our router's ratio to Serve's."""
    medians = {
        router: {key: round(statistics.median(one[key] for one in own), 3) for key in (*_RATIOS, "loads")}
        for router, own in runs.items()
    }
    default, ours = (medians[router] for router in ROUTERS)
    return {
        **medians,
        "adapter_vs_default": ratios(ours, default),
        "runs": {router: list(own) for router, own in runs.items()},
    }


def ratios(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """One's speeds and costs over another's, and adapter loads, of which there may be none, as their difference."""
    told = {key: round(one[key] / other[key], 3) for key in _RATIOS}
    return {**told, "more_loads": one["loads"] - other["loads"]}


def _ask_all(
    store: Store, sizes: tuple[int, int], router: str, replicas: int, num: int, say: Callable[[str], object]
) -> dict[str, dict[str, Any]]:
    """Engines with this room, and what they did with calls of each spread after as many that nobody counts."""
    resident, at_once = sizes
    room = {"max_adapters": resident, "max_batch_adapters": at_once, "request_router": router}
    config = SpecialistConfig.model_validate({**CONFIG, **room, "min_replicas": replicas, "max_replicas": replicas})
    found = {}
    with _running(store, config) as handle:
        for spread in SPREADS if replicas > 1 else SPREADS[:1]:
            found[spread] = asyncio.run(_ask_twice(handle, draw_adapters(_NUM_ADAPTERS, spread, 2 * num), replicas))
            say(f"{replicas} engines, {resident} resident, {at_once} at once, {router}, {spread}: {found[spread]}")
    return found


async def _ask_twice(handle: Any, drawn: Sequence[int], replicas: int) -> dict[str, Any]:
    """What the second half of the calls took and loaded; the first half warms up."""
    engine, num = ServeEngine(handle), len(drawn) // 2
    # Until a first answer it says at once that no replica is up.
    await engine.load(adapter_of(drawn[0]))
    await _ask(engine, drawn[:num], 0)
    loads, cpu = await asyncio.to_thread(count_loads, handle, replicas), others_cpu()
    began = time.perf_counter()
    took_ms = await _ask(engine, drawn[num:], num)
    seconds, cpu = time.perf_counter() - began, others_cpu() - cpu
    loads = await asyncio.to_thread(count_loads, handle, replicas) - loads
    return {
        "requests_per_s": round(num / seconds, 3),
        "cpu_ms": round(cpu / num, 1),
        **spread_ms(took_ms),
        "loads": loads,
    }


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """A Ray Serve of its own; it is gone with the block."""
    import ray
    from ray import serve

    # A place for each engine, also where there are fewer cores.
    connect(num_cpus=2)
    try:
        serve.start(proxy_location="Disabled")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@contextlib.contextmanager
def _running(store: Store, config: SpecialistConfig) -> Iterator[Any]:
    """A handle of the engines, which run as long as the block."""
    from ray import serve

    serve.run(build_specialists(BASE, config, store.uri), name=_APP, route_prefix=None)
    try:
        yield serve.get_deployment_handle(deployment_name(BASE), _APP)
    finally:
        serve.delete(_APP)


async def _ask(engine: ServeEngine, drawn: Sequence[int], start: int) -> list[float]:
    """Milliseconds of each call of _CONCURRENCY clients that ask without a pause."""
    calls, took_ms = iter(enumerate(drawn, start)), []

    async def client() -> None:
        for number, adapter in calls:
            began = time.perf_counter()
            answer = await engine.answer(adapter_of(adapter), FORMAT, request_of(adapter, number), NUM_TOKENS)
            assert answer.completion_tokens == NUM_TOKENS or answer.finish_reason == "stop", answer.finish_reason
            took_ms.append((time.perf_counter() - began) * 1e3)

    await asyncio.gather(*(client() for _ in range(_CONCURRENCY)))
    return took_ms


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(prog="jobs.bench.adapter_room", description="less room than there are adapters")
    parser.add_argument("--quick", action="store_true", help="show that it runs; measures nothing")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    options = parser.parse_args()
    say = functools.partial(print, file=sys.stderr, flush=True)
    found = measure_adapter_room(say, options.part, options.quick)
    text = json.dumps({**found, "quick": options.quick, "machine": provenance.machine()}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
