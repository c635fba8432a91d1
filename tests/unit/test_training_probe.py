"""training/probe.py and probe_loop.py: which probes are run, what is said of their cost, how answers are scored."""

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import validate
from cluster.errors import ConfigError
from training.catalog import FoundModel, load_catalog
from training.dataset import TaskData
from training.finetune import FinetuneConfig
from training.grading import Graded, grade
from training.probe import (
    Contender,
    Measuring,
    ProbeConfig,
    ProbeResult,
    Rung,
    at_rank,
    describe_budget,
    plan_curve,
    plan_probes,
    train_flops,
)
from training.probe_loop import coverage_at, score_for_halving
from training.scratch import PretrainConfig

ROWS = [{"input_ids": [1] * 20, "num_prompt": 10}] * 500
LARGE = FoundModel(name="large", parameters=10**9, context_window_tokens=4096, has_tool_use=True)
SMALL = FoundModel(name="small", parameters=10**6, context_window_tokens=4096, has_tool_use=True)


def make_contender(entry: object) -> Contender:
    return Contender(entry.name, entry, "/base", None, {"t": TaskData(None, ROWS, [], 0)}, 10)


def make_measuring(**changes: object) -> Measuring:
    config = validate(ProbeConfig, {"probe_steps": 60, **changes})
    return Measuring(config, PretrainConfig(), FinetuneConfig(), {"t": 4}, 0.05, pathlib.Path("unused"))


def make_result(num_steps: int) -> ProbeResult:
    return ProbeResult((Rung(num_steps=num_steps, score=0.5, task_scores={"t": 0.5}, seconds=1.0),), None)


def test_the_grid_is_every_base_rank_and_count_most_examples_and_then_the_smallest_base_first():
    plans = plan_probes(
        [make_contender(LARGE), make_contender(SMALL)], make_measuring(ranks=(4, 16), example_counts=(50, 200))
    )
    many = [("small", 4, 200), ("small", 16, 200), ("large", 4, 200), ("large", 16, 200)]
    few = [(name, rank, 50) for name, rank, _ in many]
    assert [(p.contender.name, p.lora_rank, p.num_examples) for p in plans] == many + few


def test_a_scratch_base_has_no_ranks_and_one_probe_without_counts():
    plans = plan_probes([make_contender(load_catalog().get("scratch-micro"))], make_measuring(ranks=(4, 16)))
    assert [(plan.lora_rank, plan.num_examples) for plan in plans] == [(None, 500)]


def test_counts_beyond_the_examples_there_are_become_one_probe():
    plans = plan_probes([make_contender(SMALL)], make_measuring(example_counts=(50, 600, 900)))
    assert [plan.num_examples for plan in plans] == [500, 50]


def test_the_budget_is_the_whole_grid():
    measuring = make_measuring(example_counts=(50, 200))
    plans = plan_probes([make_contender(SMALL)], measuring)
    text = describe_budget(plans, measuring)
    assert "2 probes of 1 bases, at most 60 steps each: 120 steps" in text and "at most 1 more" in text
    # 2 probes x 60 steps x 16 examples of 20 tokens, 4 operations for each of a million weights
    assert f"{2 * 60 * 16 * 20 * 4e6:.2g}" in text


def test_a_curve_needs_the_stopped_probes_of_the_chosen_base_and_rank_alone():
    measuring = make_measuring(ranks=(4, 16), example_counts=(50, 200))
    plans = plan_probes([make_contender(SMALL), make_contender(LARGE)], measuring)
    results = [make_result(60 if plan.num_examples == 200 else 15) for plan in plans]
    missing = plan_curve(plans, results, plans[0])
    assert [(p.contender.name, p.lora_rank, p.num_examples) for p in missing] == [("small", 4, 50)]


def test_another_rank_keeps_the_scale_of_the_update():
    config = FinetuneConfig(lora_rank=8, lora_alpha=16.0)
    changed = at_rank(config, 32)
    assert (changed.lora_rank, changed.lora_alpha) == (32, 64.0)
    assert at_rank(config, None) == config


def test_a_frozen_base_costs_less_training_than_a_whole_one():
    assert train_flops(make_contender(SMALL), 10) == 4 * 10**6 * 10
    scratch = load_catalog().get("scratch-micro")
    assert train_flops(make_contender(scratch), 10) == 6 * scratch.parameters * 10


@pytest.mark.parametrize("change", [{"ranks": (4, 4)}, {"example_counts": (0, 5)}])
def test_repeated_or_empty_sizes_are_refused(change):
    with pytest.raises(ConfigError, match="different positive numbers"):
        make_measuring(**change)


def test_at_the_target_halving_ranks_by_size():
    assert score_for_halving(0.97, 0.0, 0.9) > score_for_halving(1.0, 0.02, 0.9)
    assert score_for_halving(0.89, 0.0, 0.9) < score_for_halving(1.0, 0.0, 0.9)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=30), st.floats(0, 0.5))
def test_coverage_keeps_the_longest_confident_head_that_is_right_often_enough(pairs, epsilon):
    graded = Graded([is_right for is_right, _ in pairs], [confidence for _, confidence in pairs])
    coverage = coverage_at(graded, epsilon)
    assert 0 <= coverage <= 1
    ordered = [is_right for is_right, _ in sorted(pairs, key=lambda pair: -pair[1])]
    count = round(coverage * len(ordered))
    assert sum(not is_right for is_right in ordered[:count]) <= epsilon * max(count, 1)
    if pairs and all(graded.is_right):
        assert coverage == 1


def test_a_wrong_answer_is_as_sure_as_its_tokens_up_to_the_first_that_differs():
    torch = pytest.importorskip("torch")
    sure, unsure = [5.0, 0.0, 0.0], [0.2, 0.0, 0.0]
    logits = torch.tensor([[unsure, sure, unsure], [sure, unsure, sure]])
    labels = torch.tensor([[-100, 0, 0], [0, 1, 2]])
    is_right, logprobs = grade(logits, labels)
    expected = torch.log_softmax(torch.tensor([sure, unsure]), dim=1)[:, 0]
    assert is_right.tolist() == [True, False]
    torch.testing.assert_close(logprobs, torch.stack([expected.sum(), expected.sum()]))
