"""jobs/bench/train.py: which number of which part stands for it, and which parts may be asked for."""

import pytest

from cluster.errors import ConfigError
from jobs.bench.serve import bench_serve
from jobs.bench.train import bench_train, gather_numbers

PROMISED = {
    *("adapters_per_hour", "loop_only", "max_loss_diff", "max_weight_diff", "negative_control_fails", "packing_ratio"),
    *("scaling", "fleet_over_bound", "kill_trials", "kill_recovered", "kill_max_loss_diff", "memory_prediction_error"),
}


def size(*, fails: bool, runs: dict) -> dict:
    return {"loop_only": {4: 1.0}, "growth": {}, "negative_control_fails": fails, "ratio_to_parallel": {}, "runs": runs}


def run(loss: float, weight: float, **per_hour: float) -> dict:
    return {"max_loss_diff": loss, "max_weight_diff": weight, "adapters_per_hour": per_hour}


def test_every_promised_number_comes_from_its_part():
    short = run(1e-6, 4e-5, parallel=1.0, one_run=2.0, two_runs=3.0, sequential=4.0)
    long = run(2e-6, 1e-5, parallel=10.0, one_run=20.0, two_runs=30.0)
    large = run(5e-6, 1e-6, parallel=0.1, one_run=0.2, two_runs=0.3)
    found = gather_numbers(
        {
            "multi_lora": {
                "2M": size(fails=True, runs={10: short, 250: long}),
                "20M": size(fails=False, runs={6: large}),
            },
            "packing": {"packing_ratio": 1.5, "max_loss_diff": 9.0},
            "memory": {"memory_prediction_error": 0.1},
            "scaling": {"scaling": {"1": {}}, "zero_memory": {}},
            "makespan": {"fleet_over_bound": {"4": 1.1}},
            "faults": {
                "kill_trials": 20,
                "kill_recovered": 19,
                "kill_max_loss_diff": 0.0,
                "trials": [],
                "elastic": None,
            },
        }
    )
    assert found.keys() >= PROMISED
    assert found["adapters_per_hour"] == {
        "sequential": None,
        "parallel": 10.0,
        "multi_lora": 20.0,
        "multi_lora_in_two_runs": 30.0,
    }
    assert (found["max_loss_diff"], found["max_weight_diff"]) == (5e-6, 4e-5), "the worst of all sizes and lengths"
    assert found["negative_control_fails"] is False, "a control that passes anywhere is told"
    assert (found["kill_trials"], found["kill_recovered"], found["packing_ratio"]) == (20, 19, 1.5)
    assert "trials" not in found


def test_a_part_that_is_none_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match="--part speed: no such part; allowed: multi_lora, packing, "):
        bench_train(print, ["packing", "speed"])
    with pytest.raises(ConfigError, match="--part makespan: it takes measured run times"):
        bench_train(print, ["makespan"])


@pytest.mark.parametrize("bench", [bench_train, bench_serve])
def test_a_shared_cluster_is_left_alone(bench, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ConfigError, match="RAY_ADDRESS='127.0.0.1:6379': bench .* next: unset RAY_ADDRESS"):
        bench(print)
