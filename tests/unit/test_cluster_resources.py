"""cluster/resources.py and jobs/plan.py: what can never start is named with its field, its value and what is allowed."""

import pytest

from cluster import resources
from cluster.errors import ConfigError
from cluster.resources import LimitsConfig, Node, check_fits
from jobs.plan import plan_conversion, plan_serving
from jobs.recipe import load_recipe

TWO_CORES = [Node(cpus=2, gpus=0)]
FREE = LimitsConfig()
BASE = "select.base=scratch-small"


def problem_of(words: list[str], nodes: list[Node], limits: LimitsConfig = FREE) -> str:
    with pytest.raises(ConfigError) as caught:
        check_fits(plan_conversion(load_recipe([BASE, *words])), nodes, limits, "the cluster")
    return str(caught.value)


def test_the_shipped_recipes_fit_two_cores():
    for recipe in ("demo", "local"):
        check_fits(plan_conversion(load_recipe([f"recipe={recipe}"])), TWO_CORES, FREE, "the cluster")


def test_gateways_that_never_fit_are_named():
    recipe = load_recipe([BASE, "gateway.min_replicas=3", "gateway.max_replicas=3"])
    with pytest.raises(ConfigError, match=r"gateway\.min_replicas=3.*at most 2"):
        check_fits(plan_serving(recipe, 0), TWO_CORES, FREE, "the cluster")


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("finetune.gpus_per_worker=1", ("finetune.gpus_per_worker=1", "no GPU", "finetune.gpus_per_worker=0")),
        ("specialists.device=gpu", ("specialists.device=gpu", "no GPU", "specialists.device=cpu")),
        ("fleet.max_parallel=3", ("fleet.max_parallel=3", "3 CPUs", "the cluster has 2", "at most 2")),
        ("pretrain.cpus_per_worker=4.0", ("pretrain.cpus_per_worker=4", "largest node of the cluster has 2 CPUs")),
        ("pretrain.num_workers=3", ("pretrain.num_workers=3", "at most 2")),
        ("specialists.min_replicas=5 specialists.max_replicas=5", ("specialists.min_replicas=5", "at most 2")),
    ],
)
def test_what_never_fits_is_named(word, parts):
    message = problem_of(word.split(), TWO_CORES)
    assert [part for part in parts if part not in message] == []
    assert "RAY_ADDRESS=ADDRESS" in message


def test_a_worker_must_fit_one_node_and_not_only_their_sum():
    nodes = [Node(cpus=4, gpus=0), Node(cpus=4, gpus=0)]
    words = ["fleet.max_parallel=1", "finetune.cpus_per_worker=6.0"]
    assert "the largest node of the cluster has 4 CPUs" in problem_of(words, nodes)


def test_limits_stand_for_a_cluster_that_grows():
    words = ["fleet.max_parallel=8", "finetune.gpus_per_worker=1"]
    assert "limits.gpus" in problem_of(words, TWO_CORES)
    check_fits(plan_conversion(load_recipe([BASE, *words])), TWO_CORES, LimitsConfig(cpus=8, gpus=8), "the cluster")
    assert "at most 4" in problem_of(words, TWO_CORES, LimitsConfig(cpus=8, gpus=4))


def test_the_parts_of_one_phase_are_added_up():
    parts = plan_serving(load_recipe([]), num_bases=2)
    check_fits(parts, [Node(cpus=3, gpus=0)], FREE, "the cluster")
    with pytest.raises(ConfigError, match=r"serve: 3 CPUs wanted at the same time \(gateway 1, specialists 2\)"):
        check_fits(parts, TWO_CORES, FREE, "the cluster")


def test_a_loaded_base_needs_no_training_and_no_release_needs_no_engine():
    assert [part.phase for part in plan_conversion(load_recipe(["select.base=org/name"]))] == ["finetune", "validate"]
    assert [part.name for part in plan_serving(load_recipe([]), num_bases=0)] == ["gateway"]


def test_gpus_are_hidden_by_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resources.local_nodes()[0].gpus == 0
