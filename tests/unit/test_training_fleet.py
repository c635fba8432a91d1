"""A fleet of fine-tunes: order, isolation, room for serving, and how far its plan is from the best."""

import itertools
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import RunYielded, TrainingError
from cluster.resources import LimitsConfig, Node, Part
from training.fleet import FleetConfig, FleetRun, lower_bound_s, num_places, plan_fleet, run_fleet

ONE_CPU = Part(name="fine-tune", phase="finetune", cpus=1)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_a_plan_runs_everything_once_and_stays_within_grahams_bound_of_the_best(seconds, places):
    runs = {f"run-{number}": float(value) for number, value in enumerate(seconds)}
    plan = plan_fleet(runs, places)
    assert sorted(itertools.chain(*plan.places)) == sorted(runs)
    assert plan.makespan_s == max(sum(runs[name] for name in place) for place in plan.places)
    best = min(
        max(sum(value for value, own in zip(seconds, choice, strict=True) if own == place) for place in range(places))
        for choice in itertools.product(range(places), repeat=len(seconds))
    )
    assert plan.lower_bound_s <= best <= plan.makespan_s <= (4 / 3 - 1 / (3 * places)) * best + 1e-9


def test_no_schedule_is_shorter_than_the_longest_run_or_an_even_spread():
    assert lower_bound_s([5, 1, 1], 3) == 5
    assert lower_bound_s([2, 2, 2], 2) == 3
    assert lower_bound_s([], 2) == 0


def test_the_largest_run_starts_first_and_a_failure_stops_no_other():
    started, done = [], []

    def run(name):
        started.append(name)
        if name == "bad":
            raise TrainingError("no example")
        return name.upper()

    runs = {
        name: FleetRun(size, lambda name=name: run(name)) for name, size in {"small": 1, "bad": 5, "large": 9}.items()
    }
    found = run_fleet(runs, 1, lambda *facts: done.append(facts), poll_s=0.01)
    assert started == ["large", "bad", "small"]
    assert found.results == {"large": "LARGE", "small": "SMALL"}
    assert found.errors == {"bad": "TrainingError: no example"}
    assert done == [("large", "LARGE", None), ("bad", None, "TrainingError: no example"), ("small", "SMALL", None)]
    assert found.report.num_places == 1 and found.report.num_yields == 0
    assert found.report.lower_bound_s == pytest.approx(sum(found.report.run_s.values()))
    assert found.report.makespan_s >= found.report.lower_bound_s


class Steps:
    """A run of many steps that yields between them, as a training loop does."""

    def __init__(self, num_steps):
        self.left, self.asked, self.at_step = num_steps, threading.Event(), threading.Event()
        self.go_on = threading.Semaphore(0)
        self.starts = 0

    def start(self):
        self.starts += 1
        self.asked.clear()
        while self.left:
            self.at_step.set()
            assert self.go_on.acquire(timeout=10)
            if self.asked.is_set():
                raise RunYielded("asked to")
            self.left -= 1
        return self.starts


def test_the_smallest_run_makes_room_for_serving_and_goes_on_where_it_stopped():
    large, small = Steps(3), Steps(3)
    wanted = []

    def serving():
        """Serving wants one place once both run, until the small run has stopped."""
        if large.starts and small.starts == 1 and small.at_step.is_set() and small.left == 3:
            if not wanted:
                small.go_on.release()  # one step, so that there is something to go on from
        if small.left == 2 and len(wanted) < 3:
            wanted.append(1)
            small.go_on.release()  # it now sees that it was asked
            return 1
        large.go_on.release()
        if len(wanted) >= 3:
            small.go_on.release()
        return 0

    runs = {"large": FleetRun(9, large.start, large.asked.set), "small": FleetRun(1, small.start, small.asked.set)}
    done = []
    found = run_fleet(runs, 2, lambda name, *_: done.append(name), serving, poll_s=0.01)
    assert found.results == {"large": 1, "small": 2}, "only the small run started again"
    assert found.report.num_yields == 1 and small.left == 0 and sorted(done) == ["large", "small"]


def test_a_run_that_forgot_that_it_was_asked_is_asked_again():
    asked_twice, starts, asks = threading.Event(), [], []

    def start():
        starts.append(1)
        if len(starts) == 1:
            assert asked_twice.wait(10)
            raise RunYielded("asked to")
        return "done"

    def ask():
        asks.append(1)
        if len(asks) == 2:
            asked_twice.set()

    def wanted():
        return int(len(starts) == 1 and not asked_twice.is_set())

    found = run_fleet({"run": FleetRun(1, start, ask)}, 1, lambda *_: None, wanted, poll_s=0.01)
    assert found.results == {"run": "done"} and found.report.num_yields == 1 and len(starts) == 2


def test_places_follow_the_recipe_or_the_nodes_or_what_a_cluster_may_grow_to():
    nodes = [Node(cpus=3, gpus=0), Node(cpus=1.5, gpus=2)]
    pair = Part(name="fine-tune", phase="finetune", cpus=1, workers=2)
    on_gpu = Part(name="fine-tune", phase="finetune", cpus=0.5, gpus=1)
    none = LimitsConfig()
    assert num_places(FleetConfig(max_parallel=7), ONE_CPU, nodes, none) == 7
    assert num_places(FleetConfig(), ONE_CPU, nodes, none) == 4, "half a CPU of the second node is no place"
    assert num_places(FleetConfig(), pair, nodes, none) == 2
    assert num_places(FleetConfig(), on_gpu, nodes, none) == 2
    assert num_places(FleetConfig(), ONE_CPU, nodes, LimitsConfig(cpus=16)) == 16
    assert num_places(FleetConfig(), on_gpu, nodes, LimitsConfig(gpus=8)) == 8
    assert num_places(FleetConfig(), ONE_CPU, [], none) == 1
