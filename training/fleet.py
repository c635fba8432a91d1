"""Many fine-tunes at once on one cluster: longest first, failures isolated, and room made where serving needs it.

Ray schedules the workers; this decides which run starts when a place is free. A place is what one run takes
(`finetune.num_workers` workers). Longest first is list scheduling (Graham 1969, "Bounds on multiprocessing timing
anomalies"): at most 4/3 - 1/(3m) of the shortest makespan on m places. A run that is asked to yield writes a checkpoint,
stops, and continues from there when a place is free again.
"""

from __future__ import annotations

import concurrent.futures
import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import Field

from cluster.config import Config
from cluster.errors import RunYielded
from cluster.records import Record
from cluster.resources import LimitsConfig, Node, Part, num_groups_that_fit

ResultT = TypeVar("ResultT")
_POLL_S = 2.0


class FleetConfig(Config):
    """How many fine-tunes share the cluster."""

    max_parallel: int | None = Field(default=None, ge=1)
    """Fine-tunes at a time, each of `finetune.num_workers` workers; None takes as many as the cluster has room for."""
    mode: Literal["solo", "multi_lora"] = "solo"
    """solo: a run for each task. multi_lora: as many runs as fit at a time, each with its share of the tasks as adapters
    side by side over one base (finetune.zero_stage 0 or 3): the same adapters, without a start of processes for each."""


class FleetRun(NamedTuple, Generic[ResultT]):
    """One fine-tune of a fleet."""

    size: float
    """Expected work; only the order matters."""
    start: Callable[[], ResultT]
    """Runs to the end, and again from where it stopped. Raises RunYielded where it stopped because it was asked to."""
    ask_to_yield: Callable[[], object] = lambda: None
    """Returns at once; the run stops at its next step."""


class FleetReport(Record):
    """How long a fleet took, against the least that its places allow."""

    num_places: int
    makespan_s: float
    lower_bound_s: float
    """The longest run, or all runs spread evenly, whichever is more."""
    run_s: dict[str, float]
    """Seconds that each run held a place, over all its starts."""
    num_yields: int = 0


class FleetResult(NamedTuple, Generic[ResultT]):
    """What became of every run."""

    results: dict[str, ResultT]
    errors: dict[str, str]
    report: FleetReport


class FleetPlan(Record):
    """A fleet that is only thought through."""

    places: tuple[tuple[str, ...], ...]
    """Runs of each place, in their order."""
    makespan_s: float
    lower_bound_s: float


def num_places(config: FleetConfig, run: Part, nodes: Sequence[Node], limits: LimitsConfig) -> int:
    """Runs at a time: what the recipe says, else what fits the nodes, or what the cluster may grow to; at least 1."""
    if config.max_parallel is not None:
        return config.max_parallel
    if limits.cpus is not None or limits.gpus is not None:
        cpus = sum(node.cpus for node in nodes) if limits.cpus is None else limits.cpus
        gpus = sum(node.gpus for node in nodes) if limits.gpus is None else limits.gpus
        nodes = [Node(cpus=cpus, gpus=gpus)]
    return max(1, num_groups_that_fit(run, nodes))


def start_order(sizes: Mapping[str, float]) -> list[str]:
    """The order in which runs start: the largest first, of equal ones the first by name."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def plan_fleet(seconds: Mapping[str, float], num_places: int, sizes: Mapping[str, float] | None = None) -> FleetPlan:
    """Which place runs what, where every run takes the seconds given.

    Args:
        sizes: what is expected of the runs before their seconds are known, and orders them; None: they are known.

    Example:
        >>> plan_fleet({"a": 3, "b": 2, "c": 2, "d": 1}, 2).makespan_s
        4.0
    """
    places: list[list[str]] = [[] for _ in range(num_places)]
    free = [(0.0, number) for number in range(num_places)]
    for name in start_order(seconds if sizes is None else sizes):
        at, number = heapq.heappop(free)
        places[number].append(name)
        heapq.heappush(free, (at + seconds[name], number))
    return FleetPlan(
        places=tuple(map(tuple, places)),
        makespan_s=max(at for at, _ in free),
        lower_bound_s=lower_bound_s(seconds.values(), num_places),
    )


def lower_bound_s(seconds: Iterable[float], num_places: int) -> float:
    """No schedule of these runs on so many equal places is shorter."""
    each = list(seconds)
    return max(max(each, default=0.0), sum(each) / num_places)


def run_fleet(
    runs: Mapping[str, FleetRun[ResultT]],
    num_places: int,
    on_done: Callable[[str, ResultT | None, str | None], Any],
    wanted_by_serving: Callable[[], int] = lambda: 0,
    poll_s: float = _POLL_S,
) -> FleetResult[ResultT]:
    """Run every fine-tune, the largest first. One run's failure never stops the others.

    Args:
        on_done: called once per run with (name, result, error).
        wanted_by_serving: places that Ray Serve waits for; so many runs are asked to yield, the smallest first, and
            none starts in their stead while it does.
        poll_s: seconds between two looks at `wanted_by_serving`.
    """
    fleet = _Fleet(dict(runs), num_places, on_done)
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(num_places) as pool:
        while not fleet.is_over():
            fleet.make_room(wanted_by_serving())
            fleet.start_runs(pool)
            fleet.settle(poll_s)
    report = FleetReport(
        num_places=num_places,
        makespan_s=time.monotonic() - begin,
        lower_bound_s=lower_bound_s(fleet.run_s.values(), num_places),
        run_s=fleet.run_s,
        num_yields=fleet.num_yields,
    )
    return FleetResult(fleet.results, fleet.errors, report)


class _Fleet(Generic[ResultT]):
    """What waits, what runs and what is over. Used by one thread."""

    def __init__(
        self,
        runs: dict[str, FleetRun[ResultT]],
        num_places: int,
        on_done: Callable[[str, ResultT | None, str | None], Any],
    ) -> None:
        self._runs, self._num_places, self._on_done = runs, num_places, on_done
        self._waiting = start_order({name: run.size for name, run in runs.items()})
        self._running: dict[concurrent.futures.Future[ResultT], tuple[str, float]] = {}
        self._yielding: set[str] = set()
        self._room = num_places
        self.results: dict[str, ResultT] = {}
        self.errors: dict[str, str] = {}
        self.run_s: dict[str, float] = dict.fromkeys(runs, 0.0)
        self.num_yields = 0

    def is_over(self) -> bool:
        return not self._waiting and not self._running

    def make_room(self, num_wanted: int) -> None:
        """Ask as many runs to yield as hold places that serving waits for."""
        self._room = max(0, self._num_places - num_wanted)
        names = [name for name, _ in self._running.values() if name not in self._yielding]
        surplus = len(self._running) - len(self._yielding) - self._room
        # The longest runs decide when the fleet is done, so they are the last to stop.
        self._yielding |= set(sorted(names, key=lambda name: (self._runs[name].size, name))[: max(0, surplus)])
        for name in self._yielding:
            # Again at every look: a run that was only starting forgets what it was asked before.
            self._runs[name].ask_to_yield()

    def start_runs(self, pool: concurrent.futures.Executor) -> None:
        while self._waiting and len(self._running) < self._room:
            name = self._waiting.pop(0)
            self._running[pool.submit(self._runs[name].start)] = (name, time.monotonic())

    def settle(self, timeout_s: float) -> None:
        """Wait for a run to end, or for the time to look again."""
        if not self._running:
            time.sleep(timeout_s)
        done, _ = concurrent.futures.wait(self._running, timeout_s, concurrent.futures.FIRST_COMPLETED)
        for future in done:
            name, since = self._running.pop(future)
            self.run_s[name] += time.monotonic() - since
            self._yielding.discard(name)
            try:
                self.results[name] = future.result()
            except RunYielded:
                self.num_yields += 1
                self._waiting.insert(0, name)
                continue
            except Exception as error:  # the fleet's edge: whatever failed, the other runs go on
                self.errors[name] = f"{type(error).__name__}: {error}"
            self._on_done(name, self.results.get(name), self.errors.get(name))
