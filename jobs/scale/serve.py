"""Replicas x adapters x concurrency -> throughput, latency, adapter loads (`understudy scale serve`).

The graph of serving/app.py under load over HTTP. One or two replicas are real: vLLM with an untrained base, whose adapters
cost what trained ones do, or with what a store serves, asked the calls that its agents made. More replicas are simulated:
the same gateway before stubs that take as long for an answer as the real engine was measured to, and as long for an
adapter as given. Strong scaling keeps the clients, weak scaling gives each replica as many. On one machine all of it shares
the cores with the clients, so the simulated part shows what the graph and its choice of replicas do, and where one
gateway is full.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.errors import ConfigError
from cluster.store import Store, content_hash
from jobs.bench.graph_tax import CONFIG, PATIENT, SMALL, make_base, request_of, wait_for_specialists
from jobs.bench.mixed_adapters import draw_adapters
from jobs.bench.stage import publish_stage, task_request
from jobs.bench.stub_graph import LOAD_S, StubEngine, bind_stub_graph
from jobs.scale.cells import Cell, CellBook, Measured, measure_here
from jobs.scale.charts import Axes, Dot, draw_lines
from jobs.scale.laboratory import Laboratory
from jobs.scale.own_release import copy_release, read_own
from jobs.scale.report import Findings
from jobs.scale.served_graph import ASKED, Endpoint, listening, load_graph, scratch_folder
from serving.app import build

REAL, SIMULATED = "real: vLLM", "simulated"
_REAL_ADAPTERS = 4
_EACH = 8
"""Clients for each replica under weak scaling."""
_ASSUMED_PACE = (0.08, 0.01)
"""Seconds of an answer, and for each other one in flight, where no engine is measured."""
_SLOTS = 16
"""Answers that a stub gives at a time; the others wait."""
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


class _Subject(NamedTuple):
    """What real engines are asked, and how they come to serve it."""

    name: str
    data: str
    """Hash of what is asked."""
    num_adapters: int
    num_engines: int
    """Deployments, one for each base or merged model."""
    prepare: Callable[[Store, pathlib.Path], object]
    specialists: Mapping[str, Any]
    request: Callable[[int, int], Mapping[str, Any]]
    """Number of an adapter's task, number of the call -> the request."""
    allowed: Sequence[str] | None
    """As load_graph takes it."""


def run(lab: Laboratory) -> Findings:
    """Load real engines, take their pace, load the simulated ones.

    Raises:
        ConfigError: a store is named and there is no vLLM to serve what it has released.
    """
    book = CellBook(lab.out)
    if lab.names_store and not _has_vllm():
        raise ConfigError(
            f"store={lab.recipe.store!r}: what it serves needs vLLM, which is not installed here; next: pip install -r "
            "requirements-cpu.txt, or leave store= out"
        )
    subject = _own(lab) if lab.names_store else _untrained()
    real = _measure_real(lab, book, subject) if _has_vllm() else []
    pace = pace_of(real) or _ASSUMED_PACE
    simulated = _measure_simulated(lab, book, pace)
    rows = [*rows_of(real), *rows_of(simulated)]
    measured = "measured on the real engine" if pace_of(real) else "assumed, as no engine could be measured"
    return Findings(
        sentence=tell(rows),
        head=_HEAD,
        rows=rows,
        laws={"pace": {"answer_s": pace[0], "s_per_other_in_flight": pace[1], "from": measured}},
        records=[
            {
                **one.cell.parameters,
                "is_simulated": one.cell.parameters["engine"] == SIMULATED,
                **one.result,
                "cell": one.cell.key,
            }
            for one in [*real, *simulated]
        ],
        pictures=[_draw(rows, "strong"), _draw(rows, "weak")],
        notes=[
            _note_on(real, subject) if real else "vLLM is not installed here: nothing of it was measured.",
            f"simulated: stubs that take {pace[0]:.3f} s for an answer and {pace[1]:.4f} s more for each other one in flight ({measured}), "
            f"at most {_SLOTS} at a time, and {LOAD_S} s for an adapter that is not resident.",
            "Adapter loads: those that calls waited for; a replica loads an adapter at its first call, if not before.",
            "Efficiency: requests a second over those of one replica with the same adapters and calls, by replicas; weak scaling only.",
            "Clients, gateway and engines share the machine's cores, unless this runs on a cluster of more.",
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


def _has_vllm() -> bool:
    import importlib.util

    return importlib.util.find_spec("vllm") is not None


def _untrained() -> _Subject:
    def prepare(store: Store, folder: pathlib.Path) -> None:
        make_base(store, folder, SMALL, _REAL_ADAPTERS)

    config = {**CONFIG, "max_adapters": _REAL_ADAPTERS}
    return _Subject("untrained base", "untrained base", _REAL_ADAPTERS, 1, prepare, config, request_of, ASKED)


def _own(lab: Laboratory) -> _Subject:
    """What the store serves, most asked tasks first; its recorded calls in turn."""
    source = Store(lab.recipe.store, is_made=False)
    own = read_own(source, lab.recipe.gateway.max_temperature)
    prompts = list(own.prompts.values())
    lab.say(f"release {own.sha[:12]}: {len(prompts)} of {len(own.release.specialists)} specialists have recorded calls")
    return _Subject(
        f"release {own.sha[:12]}",
        content_hash([own.sha, prompts]),
        len(prompts),
        len(own.release.models()),
        lambda store, _: copy_release(source, own, store),
        lab.recipe.specialists.model_dump(mode="json", exclude_unset=True),
        lambda adapter, number: prompts[adapter][number % len(prompts[adapter])],
        None,
    )


def _measure_real(lab: Laboratory, book: CellBook, subject: _Subject) -> list[Measured]:
    num, most = lab.pick(quick=24, small=96), subject.num_adapters
    adapters = dict.fromkeys(
        lab.pick(quick=[(most, "uniform")], small=[(1, "uniform"), (most, "uniform"), (most, "zipf")])
    )
    parameters = [
        {
            "engine": REAL,
            "asked": subject.name,
            "replicas": r,
            "adapters": a,
            "spread": s,
            "clients": c,
            "scaling": kind,
            "requests": max(num, 3 * c),
        }
        for r in (1, 2)
        for a, s in adapters
        for kind, c in (*(("strong", c) for c in lab.pick(quick=(1, 8), small=(1, 4, 8))), ("weak", _EACH * r))
    ]
    cells = lab.cells("serve", subject.data, parameters)
    found, store = [], None
    with scratch_folder(lab.out) as folder:
        for replicas, own in _by_replicas(cells):
            if all(book.read(cell) for cell in own):
                found += measure_here(own, dict, book, lab.say)
                continue
            if store is None:
                store = Store(str(folder / "store"))
                subject.prepare(store, folder)
            args, cpus = _args(subject.specialists, replicas), replicas * subject.num_engines + 1
            with listening(store, args, replicas, build, cpus) as end:
                asyncio.run(wait_for_specialists(end.url, end.key, subject.request(0, 0)))
                found += measure_here(own, functools.partial(_load_real, end, subject), book, lab.say)
    return found


def _load_real(end: Endpoint, subject: _Subject, parameters: Mapping[str, Any]) -> dict[str, Any]:
    drawn = draw_adapters(parameters["adapters"], parameters["spread"], parameters["requests"])
    asked = [subject.request(adapter, number) for number, adapter in enumerate(drawn, first_number(parameters))]
    return load_graph(end, asked, parameters["clients"], subject.allowed)


def first_number(parameters: Mapping[str, Any]) -> int:
    """Of a cell's calls, always of eight digits: an engine that had seen them in another cell would have them in its cache."""
    return 10_000_000 + int(content_hash(dict(parameters))[:6], 16)


def _measure_simulated(lab: Laboratory, book: CellBook, pace: tuple[float, float]) -> list[Measured]:
    numbers = lab.pick(quick=(1, 4), small=(1, 2, 4, 8, 16))
    adapters = lab.pick(quick=((8, "uniform"),), small=((8, "uniform"), (64, "uniform"), (64, "zipf")))
    strong = lab.pick(quick=16, small=32)
    parameters = [
        {
            "engine": SIMULATED,
            "replicas": r,
            "adapters": a,
            "spread": s,
            "clients": c,
            "scaling": kind,
            "pace": list(pace),
        }
        for r in numbers
        for a, s in adapters
        for kind, c in (("strong", strong), ("weak", _EACH * r))
    ]
    cells = lab.cells("serve", "stub", [{**p, "requests": 12 * p["clients"]} for p in parameters])
    most = max(a for a, _ in adapters)
    found = []
    for replicas, own in _by_replicas(cells):
        if all(book.read(cell) for cell in own):
            found += measure_here(own, dict, book, lab.say)
            continue
        with scratch_folder(lab.out) as folder:
            store = Store(str(folder / "store"))
            tasks = {f"task-{k}": (f"adapters/t50-{k}", 0.5, task_request(f"task-{k}", 0)) for k in range(most)}
            publish_stage(store, "scale", tasks)
            bind = functools.partial(bind_stub_graph, num_engines=replicas, engine_class=paced_engine(*pace))
            with listening(store, _args({"max_adapters": most}, replicas), replicas, bind, 2) as end:
                found += measure_here(own, functools.partial(_load_stubs, end), book, lab.say)
    return found


def _load_stubs(end: Endpoint, parameters: Mapping[str, Any]) -> dict[str, Any]:
    drawn = draw_adapters(parameters["adapters"], parameters["spread"], parameters["requests"])
    # Odd numbers: a stub is sure of its answers to them.
    asked = [task_request(f"task-{adapter}", 2 * number + 1) for number, adapter in enumerate(drawn)]
    return load_graph(end, asked, parameters["clients"], ("accept",))


def _by_replicas(cells: Sequence[Cell]) -> list[tuple[int, list[Cell]]]:
    grouped = itertools.groupby(cells, key=lambda cell: cell.parameters["replicas"])
    return [(replicas, list(own)) for replicas, own in grouped]


def _args(specialists: Mapping[str, Any], replicas: int) -> dict[str, Any]:
    own = {**specialists, "min_replicas": replicas, "max_replicas": replicas}
    return {"specialists": own, "audit": {"share": 0.0}, "gateway": PATIENT}


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


def rows_of(measured: Sequence[Measured]) -> list[list[Any]]:
    """The table's rows, in the order of _HEAD; efficiency against one replica of the same kind of engine."""
    alone = {}
    for one in measured:
        p = one.cell.parameters
        if p["replicas"] == 1:
            alone[p["engine"], p["adapters"], p["spread"], p["scaling"]] = one.result["requests_per_s"]
    rows = []
    for one in measured:
        p, r = one.cell.parameters, one.result
        base = alone.get((p["engine"], p["adapters"], p["spread"], p["scaling"]))
        efficiency = round(r["requests_per_s"] / (p["replicas"] * base), 3) if base and p["scaling"] == "weak" else None
        told = [p["engine"], p["replicas"], p["adapters"], f"{p['spread']}, {p['scaling']}", p["clients"]]
        rows.append([*told, r["requests_per_s"], r["p50_ms"], r["p99_ms"], r["adapter_loads"], efficiency])
    return rows


def _note_on(real: Sequence[Measured], subject: _Subject) -> str:
    if subject.allowed:
        return (
            f"{REAL}: engines with an untrained base of 5M parameters, 16 tokens an answer; every answer is escalated to a fake LLM "
            "too, because an untrained base never ends its answers."
        )
    routes = [one.result["routes"] for one in real]
    kept, asked, whole = (
        sum(sum(own.get(n, 0) for n in names or own) for own in routes) for names in (("accept",), ASKED, ())
    )
    return (
        f"{REAL}: {subject.name} in a store of its own, every specialist to all of its calls; of {whole} recorded calls {asked / whole:.0%} "
        f"were asked of a specialist, which kept {kept / whole:.0%}. What it did not keep a fake LLM answered at once, where yours takes its time. Calls that were "
        "asked before are quicker, because the engine has their prompts in its cache."
    )


def _draw(rows: Sequence[Sequence[Any]], scaling: str) -> str:
    series: dict[str, list[Dot]] = {}
    for row in rows:
        spread, kind = row[3].split(", ")
        if kind == scaling:
            # Real cells under strong scaling have several numbers of clients, each a line.
            name = f"{row[0]}, {row[2]} {spread}" + (
                f", {row[4]} clients" if row[0] == REAL and kind == "strong" else ""
            )
            series.setdefault(name, []).append(Dot(row[1], row[5]))
    clients = "the same clients for all" if scaling == "strong" else "as many clients for each replica"
    caption = f"{scaling.capitalize()} scaling: requests a second by replicas, {clients}; adapters and how often each is asked."
    return draw_lines(series, Axes("replicas", "requests/s", is_x_log=True), caption)


def tell(rows: Sequence[Sequence[Any]]) -> str:
    """What was found in one sentence, from the rows of the table."""

    def efficiencies(engine: str) -> tuple[int, float, float]:
        weak = [row for row in rows if row[0] == engine and row[9] is not None]
        most = max(row[1] for row in weak)
        own = [row[9] for row in weak if row[1] == most]
        return most, min(own), max(own)

    most, low, high = efficiencies(SIMULATED)
    real = [row for row in rows if row[0] == REAL]
    told = ""
    if real:
        best, (two, least, _) = max(real, key=lambda row: row[5]), efficiencies(REAL)
        told = (
            f"Real engines answer up to {best[5]:.1f} requests/s ({_many(best[1], 'replica')}, {_many(best[2], 'adapter')}, "
            f"{_many(best[4], 'client')}), and {two} of them keep {least:.0%} or more of one's throughput each; "
        )
    kept = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    return f"{told}{most} simulated replicas keep {kept} of one replica's throughput each under weak scaling, behind one gateway."


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
