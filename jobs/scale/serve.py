"""Replicas x adapters x concurrency -> throughput, latency, adapter loads (`understudy scale serve`).

The graph of serving/app.py under load over HTTP. One or two vLLM engines are real: an untrained base with adapters that cost
what trained ones do. More replicas are simulated: the same gateway before stubs that take as long for an answer as the real
engine was measured to, and as long for an adapter as given. Strong scaling keeps the clients, weak scaling gives each
replica as many. All of it shares this machine's cores with the clients, so the simulated part shows what the graph and its
choice of replicas do, and where one gateway is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import pathlib
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.store import Store
from jobs.bench.graph_tax import CONFIG, make_base, request_of, wait_for_specialists
from jobs.bench.http_load import Reply, http_request, load, spread_ms
from jobs.bench.processes import free_port, module, server
from jobs.bench.stage import make_key, publish_stage, task_request
from jobs.bench.stub_graph import APP, LOAD_S, StubEngine, bind_stub_graph
from jobs.scale.cells import Cell, CellBook, Measured, measure_here
from jobs.scale.charts import Axes, Dot, draw_lines
from jobs.scale.laboratory import Laboratory
from jobs.scale.report import Findings
from serving.app import ServeArgs, build

_SHAPE = {"hidden_size": 256, "intermediate_size": 640, "layers": 6, "heads": 4, "vocab_size": 2_048}
"""Of the real engine's base."""
_REAL_ADAPTERS = 4
_ASSUMED_PACE = (0.08, 0.01)
"""Seconds of an answer, and for each other one in flight, where no engine is measured."""
_SLOTS = 16
"""Answers that a stub gives at a time; the others wait."""
_MAX_SECONDS = 60.0
_HEAD = [
    "engine",
    "replicas",
    "adapters",
    "calls",
    "clients",
    "requests/s",
    "p50 ms",
    "p99 ms",
    "adapter loads",
    "efficiency",
]


class _Endpoint(NamedTuple):
    """A graph that listens."""

    url: str
    key: str


def run(lab: Laboratory) -> Findings:
    """Load real engines, take their pace, load the simulated ones."""
    book = CellBook(lab.out)
    real = _measure_real(lab, book) if _has_vllm() else []
    pace = pace_of(real) or _ASSUMED_PACE
    simulated = _measure_simulated(lab, book, pace)
    rows = [*_rows(real), *_rows(simulated)]
    measured = "measured on the real engine" if pace_of(real) else "assumed, as no engine could be measured"
    return Findings(
        sentence=_sentence(rows, bool(real)),
        head=_HEAD,
        rows=rows,
        laws={"pace": {"answer_s": pace[0], "s_per_other_in_flight": pace[1], "from": measured}},
        records=[{**one.cell.parameters, **one.result, "cell": one.cell.key} for one in [*real, *simulated]],
        pictures=[_draw(rows, "strong"), _draw(rows, "weak")],
        notes=[
            "vllm: real engines with an untrained base of 5M parameters, 16 tokens an answer; every answer is escalated to a fake LLM "
            "too, because an untrained base never ends its answers."
            if real
            else "vLLM is not installed here: nothing of it was measured.",
            f"simulated: stubs that take {pace[0]:.3f} s for an answer and {pace[1]:.4f} s more for each other one in flight ({measured}), "
            f"at most {_SLOTS} at a time, and {LOAD_S} s for an adapter that is not resident.",
            "Efficiency: requests a second over those of one replica with the same adapters and calls, by replicas; weak scaling only.",
            "Clients, gateway and engines share this machine's cores.",
        ],
        is_simulated=True,
    )


def pace_of(measured: Sequence[Measured]) -> tuple[float, float] | None:
    """Seconds of an answer alone, and for each other in flight, of one engine; None where it was not asked by one and many."""
    medians = {
        one.cell.parameters["clients"]: one.result["p50_ms"] / 1e3
        for one in measured
        if one.cell.parameters["replicas"] == 1 and one.cell.parameters["adapters"] > 1
    }
    if len(medians) < 2:
        return None
    few, many = min(medians), max(medians)
    per_other = max(0.0, (medians[many] - medians[few]) / (many - few))
    return max(0.001, medians[few] - (few - 1) * per_other), per_other


def draw_adapters(num_adapters: int, spread: str, count: int) -> list[int]:
    """Whose call is the next: each alike, or the k-th 1 / k as often as the first (Zipf).

    Example:
        >>> draw_adapters(1, "zipf", 3)
        [0, 0, 0]
    """
    weights = [1.0 if spread == "uniform" else 1 / (k + 1) for k in range(num_adapters)]
    return random.Random(f"{num_adapters}:{spread}").choices(range(num_adapters), weights, k=count)


def _has_vllm() -> bool:
    import importlib.util

    return importlib.util.find_spec("vllm") is not None


def _measure_real(lab: Laboratory, book: CellBook) -> list[Measured]:
    num = lab.pick(quick=24, small=96)
    parameters = [
        {
            "engine": "vllm",
            "replicas": r,
            "adapters": a,
            "spread": s,
            "clients": c,
            "scaling": "strong",
            "requests": num,
        }
        for r in lab.pick(quick=(1,), small=(1, 2))
        for a, s in lab.pick(
            quick=((_REAL_ADAPTERS, "uniform"),),
            small=((1, "uniform"), (_REAL_ADAPTERS, "uniform"), (_REAL_ADAPTERS, "zipf")),
        )
        for c in lab.pick(quick=(1, 8), small=(1, 4, 8))
    ]
    cells = lab.cells("serve", "untrained base", parameters)
    with tempfile.TemporaryDirectory(prefix="understudy-scale-") as scratch:
        folder, store = pathlib.Path(scratch), None
        found = []
        for replicas, own in _by_replicas(cells):
            if all(book.read(cell) for cell in own):
                found += measure_here(own, dict, book, lab.say)
                continue
            if store is None:
                store = Store(str(folder / "store"))
                make_base(store, folder, _SHAPE, _REAL_ADAPTERS)
            args = _args(store, {**CONFIG, "max_adapters": _REAL_ADAPTERS}, replicas)
            with _listening(store, args, folder, replicas) as end:
                asyncio.run(wait_for_specialists(end.url, end.key))
                found += measure_here(own, lambda p, end=end: _load(end, p), book, lab.say)
        return found


def _measure_simulated(lab: Laboratory, book: CellBook, pace: tuple[float, float]) -> list[Measured]:
    numbers = lab.pick(quick=(1, 4), small=(1, 2, 4, 8, 16))
    adapters = lab.pick(quick=((8, "uniform"),), small=((8, "uniform"), (64, "uniform"), (64, "zipf")))
    each, strong = 8, lab.pick(quick=16, small=32)
    parameters = [
        {
            "engine": "simulated",
            "replicas": r,
            "adapters": a,
            "spread": s,
            "clients": c,
            "scaling": kind,
            "pace": list(pace),
        }
        for r in numbers
        for a, s in adapters
        for kind, c in (("strong", strong), ("weak", each * r))
    ]
    cells = lab.cells("serve", "stub", [{**p, "requests": 12 * p["clients"]} for p in parameters])
    most = max(a for a, _ in adapters)
    found = []
    for replicas, own in _by_replicas(cells):
        if all(book.read(cell) for cell in own):
            found += measure_here(own, dict, book, lab.say)
            continue
        with tempfile.TemporaryDirectory(prefix="understudy-scale-") as scratch:
            folder = pathlib.Path(scratch)
            store = Store(str(folder / "store"))
            tasks = {f"task-{k}": (f"adapters/t50-{k}", 0.5, task_request(f"task-{k}", 0)) for k in range(most)}
            publish_stage(store, "scale", tasks)
            args = _args(store, {"max_adapters": most}, replicas)
            with _listening(store, args, folder, replicas, pace) as end:
                found += measure_here(own, lambda p, end=end, r=replicas: _load(end, p, r), book, lab.say)
    return found


def _by_replicas(cells: Sequence[Cell]) -> list[tuple[int, list[Cell]]]:
    grouped = itertools.groupby(cells, key=lambda cell: cell.parameters["replicas"])
    return [(replicas, list(own)) for replicas, own in grouped]


def _args(store: Store, specialists: Mapping[str, Any], replicas: int) -> dict[str, Any]:
    own = {**specialists, "min_replicas": replicas, "max_replicas": replicas}
    return {"store": store.uri, "specialists": own, "audit": {"share": 0.0}}


@contextlib.contextmanager
def _listening(
    store: Store, args: dict[str, Any], folder: pathlib.Path, replicas: int, pace: tuple[float, float] | None = None
) -> Iterator[_Endpoint]:
    """The graph on a Ray of its own: with vLLM, or with stubs of a pace."""
    import ray
    from ray import serve

    from cluster.session import connect, let_ingress_listen

    port = free_port()
    let_ingress_listen(port)
    with server(module("jobs.bench.fake_llm"), folder / "llm.log") as (_, llm):
        served = ServeArgs.model_validate({**args, "upstream": [{"base_url": f"{llm}/v1"}]})
        connect(num_cpus=replicas + 1 if pace is None else 2)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
            graph = build(served) if pace is None else bind_stub_graph(served, replicas, paced_engine(*pace))
            serve.run(graph, name=APP, route_prefix="/")
            yield _Endpoint(f"http://127.0.0.1:{port}", make_key(store))
        finally:
            serve.shutdown()
            ray.shutdown()


def paced_engine(answer_s: float, other_s: float) -> type[StubEngine]:
    """A stub that takes as long as an engine does: so many seconds, more with others in flight, at most 16 at a time."""

    class PacedEngine(StubEngine):
        """Answers late."""

        def __init__(self, max_adapters: int) -> None:
            super().__init__(max_adapters)
            self._slots = asyncio.Semaphore(_SLOTS)
            self._in_flight = 0

        async def answer(self, adapter: Any, *others: Any, **options: Any) -> Any:
            async with self._slots:
                self._in_flight += 1
                try:
                    await asyncio.sleep(answer_s + other_s * (self._in_flight - 1))
                    return await super().answer(adapter, *others, **options)
                finally:
                    self._in_flight -= 1

    return PacedEngine


def _load(end: _Endpoint, parameters: Mapping[str, Any], num_stubs: int = 0) -> dict[str, Any]:
    num = parameters["requests"]
    drawn = draw_adapters(parameters["adapters"], parameters["spread"], num)
    # Odd numbers: a stub is sure of its answers to them.
    asked = [task_request(f"task-{a}", 2 * k + 1) if num_stubs else request_of(a, k) for k, a in enumerate(drawn)]
    requests = [http_request(end.url, json.dumps(one).encode(), end.key) for one in asked]
    loads_before = _num_loads(num_stubs)

    def checked(_: int, reply: Reply) -> str | None:
        # Else no specialist was asked, and nothing was measured.
        route = reply.headers.get("x-understudy-route")
        wanted = ("accept",) if num_stubs else ("accept", "escalate")
        return None if reply.status == 200 and route in wanted else f"{reply.status}, {route}"

    turn = asyncio.run(
        load(end.url, requests, checked, concurrency=parameters["clients"], max_requests=num, max_seconds=_MAX_SECONDS)
    )
    if turn.errors:
        raise RuntimeError(f"{len(turn.errors)} of {num} answers not as they must be; {turn.errors[0]}")
    found = {"requests_per_s": round(len(turn.whole_ms) / turn.seconds, 2), **spread_ms(turn.whole_ms)}
    loads = _num_loads(num_stubs) - loads_before if num_stubs else None
    told = f"{found['requests_per_s']} requests/s, p50 {found['p50_ms']:.0f} ms, p99 {found['p99_ms']:.0f} ms"
    return {**found, "adapter_loads": loads, "told": told}


def _num_loads(num_stubs: int) -> int:
    """Adapters loaded by all stubs so far; Serve says of none which one it asks, so they are asked until all have told."""
    from ray import serve

    if not num_stubs:
        return 0
    handle = serve.get_deployment_handle("stub-engine", APP)
    told: dict[int, int] = {}
    for _ in range(50):
        answers = [handle.facts.remote() for _ in range(2 * num_stubs)]
        for answer in answers:
            facts = answer.result(timeout_s=10.0)
            told[facts["pid"]] = facts["num_loads"]
        if len(told) == num_stubs:
            break
    return sum(told.values())


def _rows(measured: Sequence[Measured]) -> list[list[Any]]:
    alone = {}
    for one in measured:
        p = one.cell.parameters
        if p["replicas"] == 1:
            alone[p["adapters"], p["spread"], p["scaling"]] = one.result["requests_per_s"]
    rows = []
    for one in measured:
        p, r = one.cell.parameters, one.result
        base = alone.get((p["adapters"], p["spread"], p["scaling"]))
        efficiency = round(r["requests_per_s"] / (p["replicas"] * base), 3) if base and p["scaling"] == "weak" else None
        told = [p["engine"], p["replicas"], p["adapters"], f"{p['spread']}, {p['scaling']}", p["clients"]]
        rows.append([*told, r["requests_per_s"], r["p50_ms"], r["p99_ms"], r["adapter_loads"], efficiency])
    return rows


def _draw(rows: Sequence[Sequence[Any]], scaling: str) -> str:
    series: dict[str, list[Dot]] = {}
    for row in rows:
        spread, kind = row[3].split(", ")
        if kind == scaling:
            name = f"{row[0]}, {row[2]} adapters {spread}" + (f", {row[4]} clients" if row[0] == "vllm" else "")
            series.setdefault(name, []).append(Dot(row[1], row[5]))
    clients = "the same clients for all" if scaling == "strong" else "as many clients for each replica"
    caption = f"{scaling.capitalize()} scaling: requests a second by replicas, {clients}."
    return draw_lines(series, Axes("replicas", "requests/s", is_x_log=True), caption)


def _sentence(rows: Sequence[Sequence[Any]], has_real: bool) -> str:
    weak = [row for row in rows if row[0] == "simulated" and row[9] is not None]
    most = max(row[1] for row in weak)
    low, high = (pick(row[9] for row in weak if row[1] == most) for pick in (min, max))
    real = [row for row in rows if row[0] == "vllm"]
    told = ""
    if has_real:
        best = max(real, key=lambda row: row[5])
        told = f"Real engines answer up to {best[5]:.1f} requests/s ({best[1]} replicas, {best[2]} adapters, {best[4]} clients); "
    return (
        f"{told}{most} simulated replicas keep {low:.0%} to {high:.0%} of one replica's throughput each under weak scaling, behind one "
        "gateway."
    )
