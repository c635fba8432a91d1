"""Specialists that scale: up under load, down to the minimum after it, and from none at all; with how long each took.

The graph is the real one on Ray Serve, and its specialists have the options of a recipe's (serving/specialist.py) with
none to three replicas. In the place of vLLM stands a paced engine, which is none: each answer takes a fixed time of which
nothing is spent computing, so that replicas do not take each other's CPU on a small machine, and each start takes a
fixed time. What is measured is Ray Serve's scaling, and that no client sees any of it; how fast an engine starts or
answers is not.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

from cluster.engine import EngineAnswer
from cluster.store import Store
from jobs.bench.http_load import Reply, http_request, load
from jobs.bench.processes import module, server
from jobs.bench.stage import make_key, publish_stage, task_request
from jobs.bench.stub_graph import APP, StubEngine, stub_endpoint
from serving.app import ServeArgs
from serving.specialist import deployment_options
from serving.specialist_config import SpecialistConfig

ENGINE = "paced-engine"
SERVICE_S, START_S = 0.1, 2.0
"""What an answer and the start of a replica take."""
NUM_AT_ONCE = 4
"""Answers that a replica works on at once; autoscaling aims at half of it."""
MOST = 3
"""Replicas at most."""
_CONCURRENCY = 16
_DOWNSCALE_S, _QUICK_S = 4.0, 1.0
_LIMIT_S = 60.0
"""Of each wait for Serve."""
_AT_PEAK, _AT_PEAK_QUICK = 4, 1
"""Seconds of load once all replicas are up."""


class PacedEngine(StubEngine):
    """A stub whose answers and start take a fixed time."""

    def __init__(self, config: SpecialistConfig) -> None:
        super().__init__(config.num_resident)
        self._places = asyncio.Semaphore(config.max_num_seqs)
        # As a replica does whose engine reads its weights: nothing is answered before.
        time.sleep(START_S)

    async def answer(self, *args: Any, **options: Any) -> EngineAnswer:
        async with self._places:
            await asyncio.sleep(SERVICE_S)
            return await super().answer(*args, **options)


def measure_autoscale(say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Load the graph until all replicas are up, leave it alone until none is, and ask it again.

    Args:
        quick: replicas go sooner, and little is asked: shows that it runs.

    Returns:
        `autoscale_up_s`: from the first call of the load until all three replicas run; `autoscale_down_s`: from its last
        call until none does; `cold_start_s`: from the first call after that until a specialist answers one, while the
        LLM answers; each None where it was not seen within a minute. `autoscale_client_errors`: calls that were not
        answered as they should be, over all. `replicas`: [seconds, running] at every change. `simulated` is true.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch:
        folder = pathlib.Path(scratch)
        store = Store(str(folder / "store"))
        key = make_key(store)
        publish_stage(store, "autoscale", {"triage": ("adapters/t50-triage", 0.5, task_request("triage", 0))})
        scale = {"min_replicas": 0, "max_replicas": MOST, "max_num_seqs": NUM_AT_ONCE, "upscale_delay_s": 1.0}
        scale |= {"downscale_delay_s": _QUICK_S if quick else _DOWNSCALE_S}
        with server(module("jobs.bench.fake_llm"), folder / "llm.log") as (_, llm):
            args = {"store": store.uri, "upstream": [{"base_url": f"{llm}/v1"}], "specialists": scale}
            with stub_endpoint(ServeArgs.model_validate(args), _bind_paced) as url:
                say(f"{url}: serving")
                found = asyncio.run(_run(url, key, quick, say))
    engine = {"engine": "paced", "simulated": True, "service_s": SERVICE_S, "start_s": START_S}
    return {**found, **engine, "specialists": scale, "concurrency": _CONCURRENCY}


def _bind_paced(args: ServeArgs) -> Any:
    from ray import serve

    config = args.specialists
    return serve.deployment(PacedEngine, name=ENGINE, **deployment_options(config)).bind(config)


class Replicas:
    """How many replicas of the engine run, looked at a few times a second."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.changes: list[tuple[float, int]] = []
        """(seconds, number running), one for each change."""

    @property
    def num(self) -> int:
        return self.changes[-1][1] if self.changes else 0

    def note(self, num: int) -> None:
        """Take what a look has shown."""
        if not self.changes or self.num != num:
            self.changes.append((round(time.perf_counter() - self._began, 1), num))

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            self.note(await asyncio.to_thread(_num_running))
            await asyncio.sleep(0.2)

    async def wait_for(self, num: int) -> float | None:
        """Seconds until so many run; None where they do not within a minute."""
        begin = time.perf_counter()
        while self.num != num:
            if time.perf_counter() - begin > _LIMIT_S:
                return None
            await asyncio.sleep(0.05)
        return round(time.perf_counter() - begin, 1)


class Answers:
    """Who answered, and what was not as it should be."""

    def __init__(self) -> None:
        self.by_route: dict[str, int] = {}
        self.errors: list[str] = []

    def check(self, number: int, reply: Reply) -> str | None:
        """What is wrong with an answer, or None; the request holds an odd mark, which its specialist is sure of."""
        route = reply.headers.get("x-understudy-route", "")
        self.by_route[route] = self.by_route.get(route, 0) + 1
        mark = f"#{2 * number + 1}#".encode()
        return None if reply.status == 200 and mark in reply.body else f"{reply.status}, {route}: {reply.body[:200]!r}"


async def _run(url: str, key: str, quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    replicas, answers = Replicas(), Answers()
    watching = asyncio.create_task(replicas.watch())
    requests = [
        http_request(url, json.dumps(task_request("triage", 2 * number + 1)).encode(), key) for number in range(100)
    ]
    per_second: list[tuple[int, float]] = []

    async def ask(concurrency: int, max_requests: int = 10**9, seconds: float = 1.0) -> float:
        turn = await load(
            url, requests, answers.check, concurrency=concurrency, max_requests=max_requests, max_seconds=seconds
        )
        answers.errors += turn.errors
        return round(len(turn.whole_ms) / turn.seconds, 1)

    async def press() -> None:
        per_second.append((replicas.num, await ask(_CONCURRENCY)))

    try:
        await replicas.wait_for(1)
        rising = asyncio.create_task(replicas.wait_for(MOST))
        while not rising.done():
            await press()
        for _ in range(_AT_PEAK_QUICK if quick else _AT_PEAK):
            await press()
        say(f"{MOST} replicas after {rising.result()} s; [replicas, calls a second]: {per_second}")
        up_s, peak = rising.result(), max(num for _, num in replicas.changes)
        down_s = await replicas.wait_for(0)
        say(f"none after {down_s} s")
        before, begin = dict(answers.by_route), time.perf_counter()
        accepted = answers.by_route.get("accept", 0)
        while answers.by_route.get("accept", 0) == accepted and time.perf_counter() - begin < _LIMIT_S:
            await ask(1, 1)
            await asyncio.sleep(0.1)
        is_up = answers.by_route.get("accept", 0) > accepted
        cold_s = round(time.perf_counter() - begin, 1) if is_up else None
        say(f"a specialist answers {cold_s} s after the first call")
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    meanwhile = {route: num - before.get(route, 0) for route, num in answers.by_route.items()}
    return {
        **{"autoscale_up_s": up_s, "autoscale_down_s": down_s, "cold_start_s": cold_s, "peak_replicas": peak},
        **{"autoscale_client_errors": len(answers.errors), "first_error": next(iter(answers.errors), None)},
        **{"answers_under_load": before, "answers_of_cold_start": meanwhile, "replicas": replicas.changes},
        "calls_per_s": {num: max(rate for at, rate in per_second if at == num) for num, _ in sorted(per_second)},
    }


def _num_running() -> int:
    from ray import serve

    deployment = serve.status().applications[APP].deployments.get(ENGINE)
    return deployment.replica_states.get("RUNNING", 0) if deployment else 0


if __name__ == "__main__":
    import sys

    print(json.dumps(measure_autoscale(lambda text: print(text, file=sys.stderr, flush=True), "--quick" in sys.argv)))
