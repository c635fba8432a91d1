"""training/forecast.py: probes of one base -> agreement, coverage and money after the full training."""

import pytest

from cluster.records import Example, TaskSpec
from training.candidates import ProbeRun, Scope
from training.forecast import describe, forecast
from training.probe import Rung

SCORED = 100


def make_task(task_id: str, num_calls: int) -> TaskSpec:
    fields = {"task_id": task_id, "name": task_id, "signature": "s", "kind": "json", "reference": "llm"}
    return TaskSpec(**fields, num_calls=num_calls, share_calls=0.5, share_cost=0.5, num_examples={})


def make_examples(count: int, cost_usd: float | None) -> list[Example]:
    fields = {"split": "train", "session_id": "s", "ts": 0.0, "reference": "llm", "source_call_ids": ()}
    request, target = {"messages": [{"role": "user", "content": "a"}]}, {"role": "assistant", "content": "{}"}
    return [
        Example(example_id=str(k), request=request, target=target, cost_usd=cost_usd, **fields) for k in range(count)
    ]


def make_scope(num_train: int = 1600, cost_usd: float | None = 0.01) -> Scope:
    tasks = [make_task("a", 900), make_task("b", 100)]
    train = {task.task_id: make_examples(num_train, cost_usd) for task in tasks}
    return Scope(tasks, {"train": train, "validation": {}}, 1024, 768, 1.0)


def make_rung(num_steps: int, share: float, coverage: float | None = None) -> Rung:
    both = {"a": share, "b": share}
    kept = {"a": coverage or share, "b": coverage or share}
    return Rung(num_steps=num_steps, score=share, task_scores=both, task_coverage=kept, seconds=1.0)


def make_probe(num_examples: int, *rungs: Rung) -> ProbeRun:
    return ProbeRun(lora_rank=8, num_examples=num_examples, rungs=rungs)


PROBES = [make_probe(n, make_rung(0, 0.0), make_rung(60, share)) for n, share in ((50, 0.5), (200, 0.7), (800, 0.82))]
COUNTS = {"a": SCORED, "b": SCORED}


def test_more_examples_are_foretold_from_numbers_of_examples():
    found = forecast(PROBES, make_scope(), COUNTS, 300)
    assert found.unit == "examples" and [one.size for one in found.tasks] == [1600.0, 1600.0]
    assert 0.82 < found.agreement.value < 0.95
    assert found.coverage.low < found.coverage.value < found.coverage.high


def test_cost_falls_with_coverage_and_its_ends_change_places():
    found = forecast(PROBES, make_scope(), COUNTS, 300)
    cost = found.cost_usd_per_1000
    assert cost.before == pytest.approx(10.0)
    assert cost.after.value == pytest.approx(10.0 * (1 - found.coverage.value))
    assert cost.after.low == pytest.approx(10.0 * (1 - found.coverage.high))
    assert "per 1,000 calls $10 ->" in describe(found)


def test_unpriced_calls_leave_the_cost_unknown():
    found = forecast(PROBES, make_scope(cost_usd=None), COUNTS, 300)
    assert found.cost_usd_per_1000 is None and "cost unknown" in describe(found)


def test_one_probe_is_carried_on_over_its_steps():
    probe = make_probe(200, make_rung(0, 0.0), make_rung(15, 0.4), make_rung(30, 0.6), make_rung(60, 0.7))
    found = forecast([probe], make_scope(), COUNTS, 300)
    assert found.unit == "steps" and found.tasks[0].size == 300.0
    assert found.agreement.value > 0.7


def test_a_probe_that_halving_stopped_is_left_out():
    stopped = make_probe(50, make_rung(0, 0.0), make_rung(15, 0.1))
    found = forecast([stopped, *PROBES[1:]], make_scope(), COUNTS, 300)
    assert [point.size for point in found.tasks[0].points] == [200.0, 800.0]


def test_a_task_with_fewer_examples_than_probed_counts_what_it_has():
    scope = make_scope(num_train=600)
    assert [point.size for point in forecast(PROBES, scope, COUNTS, 300).tasks[0].points] == [50.0, 200.0, 600.0]


def test_one_size_foretells_nothing():
    assert forecast([make_probe(50, make_rung(0, 0.1), make_rung(60, 0.5))], make_scope(), COUNTS, 300) is None
