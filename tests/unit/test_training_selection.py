"""Which measured candidate becomes the base, what is recorded of the others, and what is refused before any probe."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import validate
from cluster.errors import ConfigError
from cluster.records import Example, TaskSpec
from cluster.store import Store
from training.candidates import (
    BaseCandidate,
    FewShot,
    Scope,
    estimate_prompt_tokens,
    estimated_p99,
    missed_needs,
    p99,
    show_shots,
)
from training.catalog import FoundModel, Needs, find_entry
from training.finetune import FinetuneConfig
from training.probe import Contender, ProbePlan, ProbeResult, Rung, spread
from training.probe_loop import score_for_halving
from training.scratch import PretrainConfig
from training.selection import SelectConfig, choose, decide, record_results, select_base

NEEDS = Needs(p99_prompt_tokens=9, needs_tool_use=False, allowed_licenses=None, memory_gib=1.0, max_model_tokens=64)
NAMES = ("scratch-tiny", "scratch-small", "scratch-medium")


def measured(name: str, parameters: int, *scores: float, **changes: object) -> BaseCandidate:
    rungs = tuple(Rung(num_steps=k, score=s, task_scores={"t": s}, seconds=1.0) for k, s in enumerate(scores))
    fields = {"name": name, "status": "measured", "reason": "", "parameters": parameters, "rungs": rungs}
    return BaseCandidate.model_validate({**fields, **changes})


def config_for(*names: str, **changes: object) -> SelectConfig:
    return validate(SelectConfig, {"candidates": names, "probe_steps": 4, **changes})


def make_task(**changes: object) -> TaskSpec:
    fields = {"task_id": "t", "name": "t", "signature": "s", "kind": "json", "reference": "llm"}
    numbers = {"num_calls": 4, "share_calls": 1.0, "share_cost": 1.0, "num_examples": {"train": 2}}
    return TaskSpec.model_validate({**fields, **numbers, **changes})


def make_example(text: str) -> Example:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    target = {"role": "assistant", "content": "{}"}
    fields = {"split": "train", "session_id": "s", "ts": 1.0, "reference": "llm", "source_call_ids": ("c",)}
    return Example(example_id=text, request={"messages": messages}, target=target, **fields)


def make_scope(*texts: str, **changes: object) -> Scope:
    examples = {"t": [make_example(text) for text in texts]}
    task = make_task(static_lines=("Be brief.",))
    scope = Scope([task], {"train": examples, "validation": examples}, 1024, 768, 12.0)
    return scope._replace(**changes)


def select(tmp_path, config: SelectConfig, scope: Scope):
    return select_base(Store(str(tmp_path)), "one", config, scope, PretrainConfig(), FinetuneConfig(), tmp_path)


def test_the_smallest_within_the_tolerance_of_the_best_is_chosen():
    small, middle, large = measured("a", 1, 0.5, 0.80), measured("b", 2, 0.5, 0.88), measured("c", 3, 0.5, 0.90)
    assert choose([large, middle, small], 0.02).candidate == middle
    assert choose([large, middle, small], 0.10).candidate == small
    assert choose([large, middle, small], 0.0).candidate == large


def test_the_smallest_that_reaches_the_target_is_chosen_though_others_are_better():
    small, middle, large = measured("a", 1, 0.70), measured("b", 2, 0.88), measured("c", 3, 0.99)
    choice = choose([large, middle, small], 0.02, 0.85)
    assert choice.candidate == middle and choice.rule == "the smallest that reaches the target 0.85"


def test_a_target_that_none_reaches_falls_back_and_says_so():
    choice = choose([measured("a", 1, 0.70), measured("b", 2, 0.71)], 0.02, 0.95)
    assert choice.candidate.name == "a"
    assert choice.rule == "the smallest within 0.02 of the best, 0.710, because none reaches the target 0.95"


def make_plan(name: str, rank: int | None, count: int) -> ProbePlan:
    entry = FoundModel(name=name, parameters=10, context_window_tokens=64, has_tool_use=False)
    contender = Contender(name, entry, "/base", None, {}, 9, 12, {}, {"t": 3})
    return ProbePlan(contender, rank, count)


def make_result(*scores: float, error: str | None = None, few_shot: float | None = None) -> ProbeResult:
    rungs = tuple(Rung(num_steps=k, score=s, task_scores={"t": s}, seconds=1.0) for k, s in enumerate(scores))
    return ProbeResult(rungs, error, None if few_shot is None else {"t": few_shot})


def test_a_base_is_as_good_as_its_best_probe_and_keeps_all_of_them():
    plans = [make_plan("base", 16, 200), make_plan("base", 4, 200), make_plan("base", 4, 50)]
    results = [make_result(0.1, 0.9, few_shot=0.3), make_result(0.1, 0.91), make_result(0.1)]
    (found,) = record_results(plans, results)
    assert found.status == "measured" and found.rungs == results[1].rungs
    assert [(p.lora_rank, p.num_examples, p.rungs[-1].score) for p in found.probes] == [
        (16, 200, 0.9),
        (4, 200, 0.91),
        (4, 50, 0.1),
    ]
    assert found.few_shot == FewShot(score=0.3, task_scores={"t": 0.3}, num_shots={"t": 3})
    assert (found.p99_prompt_tokens, found.p99_call_tokens) == (9, 12)


def test_one_failed_probe_does_not_lose_a_base_and_all_failed_do():
    plans = [make_plan("base", 4, 200), make_plan("base", 16, 200)]
    (found,) = record_results(plans, [make_result(error="probe failed: x"), make_result(0.1, 0.5)])
    assert found.status == "measured" and found.probes[0].error == "probe failed: x"
    (lost,) = record_results(plans, [make_result(error="probe failed: x")] * 2)
    assert (lost.status, lost.reason) == ("unavailable", "probe failed: x")


def test_the_lowest_rank_and_then_the_fewest_examples_that_are_good_enough_are_chosen():
    plans = [make_plan("scratch-tiny", rank, count) for rank in (4, 16) for count in (200, 50)]
    results = [make_result(0.1, score) for score in (0.90, 0.89, 0.91, 0.90)]
    selection = decide(config_for("scratch-tiny"), NEEDS, record_results(plans, results), "key")
    assert (selection.lora_rank, selection.num_examples) == (4, 50)


def test_shots_stand_behind_the_instructions_and_before_the_question():
    shown = show_shots(make_example("question"), [make_example("first"), make_example("second")])
    said = [(message["role"], message["content"]) for message in shown.request["messages"]]
    assert said == [
        ("system", "Be brief."),
        ("user", "first"),
        ("assistant", "{}"),
        ("user", "second"),
        ("assistant", "{}"),
        ("user", "question"),
    ]
    assert (
        make_example("question").request["messages"] == shown.request["messages"][:1] + shown.request["messages"][-1:]
    )


def test_prompt_and_answer_together_must_fit_the_window():
    scope = make_scope("word " * 20)
    lengths = estimated_p99(scope, is_scratch=False)
    assert lengths == {"p99_prompt_tokens": 28, "p99_call_tokens": 29}
    needs = NEEDS.model_copy(update={**lengths, "max_model_tokens": 0})
    entry = FoundModel(name="f", parameters=10, context_window_tokens=28, has_tool_use=False)
    assert missed_needs(entry, needs) == "prompt and answer p99 29 tokens > context window 28"


def test_equal_sizes_give_the_better_and_then_the_earlier_one():
    assert choose([measured("a", 1, 0.8), measured("b", 1, 0.81)], 0.02).candidate.name == "b"
    assert choose([measured("a", 1, 0.8), measured("b", 1, 0.8)], 0.02).candidate.name == "a"


def test_a_candidate_that_halving_stopped_is_not_compared_at_other_steps():
    assert choose([measured("a", 1, 0.9), measured("b", 2, 0.1, 0.7)], 0.02).candidate.name == "b"


def test_no_right_answer_from_anyone_chooses_nothing():
    assert choose([measured("a", 1, 0.0), measured("b", 2, 0.0)], 0.5) is None
    with pytest.raises(ConfigError, match="(?s)scratch-tiny: measured: not one .*raise select.probe_steps"):
        decide(config_for("scratch-tiny"), NEEDS, [measured("scratch-tiny", 1, 0.0)], "key")


def test_every_candidate_is_recorded_in_the_recipes_order_with_its_reason():
    found = [
        BaseCandidate(name="org/absent", status="unavailable", reason="no hub"),
        BaseCandidate(name="qwen3-8b", status="rejected", reason="too large"),
        measured("scratch-medium", 3, 0.1, 0.2, 0.95),
        measured("scratch-tiny", 1, 0.1),
        measured("scratch-small", 2, 0.1, 0.2, 0.94),
    ]
    names = ("qwen3-8b", "org/absent", *NAMES)
    selection = decide(config_for(*names), NEEDS, found, "key")
    assert (selection.base, selection.is_scratch) == ("scratch-small", True)
    assert [(one.name, one.status) for one in selection.candidates] == [
        ("qwen3-8b", "rejected"),
        ("org/absent", "unavailable"),
        ("scratch-tiny", "measured"),
        ("scratch-small", "chosen"),
        ("scratch-medium", "measured"),
    ]
    reasons = {one.name: one.reason for one in selection.candidates}
    assert reasons["org/absent"] == "no hub" and reasons["qwen3-8b"] == "too large"
    assert reasons["scratch-tiny"].endswith("stopped there, behind the others")
    assert reasons["scratch-small"] == "score 0.940 after 2 steps; the smallest within 0.02 of the best, 0.950"
    assert reasons["scratch-medium"].endswith("good enough, but not smaller than the chosen one")


def test_nothing_measured_lists_every_reason():
    lost = [
        BaseCandidate(name="org/a", status="unavailable", reason="no hub"),
        BaseCandidate(name="org/b", status="rejected", reason="too large"),
    ]
    with pytest.raises(ConfigError, match="(?s)org/a: unavailable: no hub.*org/b: rejected: too large"):
        decide(config_for("org/a", "org/b"), NEEDS, lost, "key")


CANDIDATES = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5, 0.52, 0.9, 1.0])), min_size=1, max_size=6
)


@given(CANDIDATES, st.floats(0, 0.9))
def test_the_chosen_one_is_good_enough_and_no_smaller_one_is(pairs, tolerance):
    candidates = [measured(str(k), size, score) for k, (size, score) in enumerate(pairs)]
    choice = choose(candidates, tolerance)
    best = max(score for _, score in pairs)
    if best == 0.0:
        assert choice is None
        return
    chosen = choice.candidate
    assert chosen.rungs[-1].score >= best - tolerance - 1e-9
    smaller = [one for one in candidates if one.parameters < chosen.parameters]
    assert all(one.rungs[-1].score < best - tolerance for one in smaller)


def test_halving_ranks_the_smaller_of_two_near_equals_first_and_ties_those_that_know_nothing():
    assert score_for_halving(0.90, 0.0) > score_for_halving(0.91, 0.02)
    assert score_for_halving(0.90, 0.0) < score_for_halving(0.95, 0.02)
    assert score_for_halving(0.0, 0.0) == score_for_halving(0.0, 0.02)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=400))
def test_p99_is_the_smallest_value_that_99_in_100_do_not_exceed(values):
    found = p99(values)
    assert found in values
    assert sum(value <= found for value in values) >= 0.99 * len(values)
    assert sum(value < found for value in values) < 0.99 * len(values)


def test_p99_of_nothing_is_0():
    assert p99([]) == 0


@given(st.lists(st.integers()), st.integers(0, 20))
def test_spread_keeps_the_order_and_at_most_the_limit(items, limit):
    kept = spread(list(enumerate(items)), limit)
    assert len(kept) == min(len(items), limit) and kept == sorted(kept, key=lambda pair: pair[0])


def test_estimated_prompt_counts_tools_for_a_chat_and_only_the_variable_text_for_a_scratch_base():
    request = make_example("1234 5678").request
    assert estimate_prompt_tokens(request) == 5
    assert estimate_prompt_tokens({**request, "tools": [{"type": "function"}]}) == 10
    assert estimate_prompt_tokens(request, ("Be brief.",)) == 3


def test_a_fixed_base_is_recorded_as_named_and_not_measured(tmp_path):
    selection = select(tmp_path, SelectConfig(base="scratch-tiny"), make_scope("one", "two"))
    assert (selection.base, selection.is_scratch) == ("scratch-tiny", True)
    (candidate,) = selection.candidates
    assert (candidate.status, candidate.is_p99_estimated) == ("chosen", True)
    assert candidate.reason == "named by the recipe; nothing was measured"
    assert Store(str(tmp_path)).read_json("tasks/selection-one.json") == selection.model_dump(mode="json")


def test_a_fixed_base_with_too_long_prompts_is_recorded_and_not_refused(tmp_path):
    selection = select(tmp_path, SelectConfig(base="scratch-tiny"), make_scope("word " * 2000))
    assert "misses: prompt p99 2500 tokens > context window 1024" in selection.candidates[0].reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_tokens": 2048}, "specialists.max_model_tokens 2048 > context window 1024"),
        ({"machine_gib": 0.003}, r"weights 0.001 GiB in bf16 > budget 0.001 GiB"),
    ],
)
def test_a_fixed_base_that_cannot_be_run_at_all_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"select.base='scratch-tiny': {message}"):
        select(tmp_path, SelectConfig(base="scratch-tiny"), make_scope("one", **changes))


def test_candidates_of_which_none_fits_are_refused_before_any_probe(tmp_path):
    config = config_for("scratch-tiny", "qwen3-8b")
    with pytest.raises(ConfigError, match="(?s)scratch-tiny: rejected: .*qwen3-8b: rejected: weights 15.256"):
        select(tmp_path, config, make_scope("one", "two", max_model_tokens=2048))


def test_repeated_candidates_and_steps_that_do_not_quarter_are_refused():
    with pytest.raises(ConfigError, match="repeated: qwen3-8b"):
        config_for("qwen3-8b", "qwen3-8b")
    with pytest.raises(ConfigError, match="probe_steps: got 30"):
        config_for("qwen3-8b", probe_steps=30)


def test_a_catalog_name_and_a_hub_id_of_the_catalog_are_one_entry_and_a_folder_is_none(tmp_path):
    assert find_entry("qwen3-8b") == find_entry("Qwen/Qwen3-8B") is not None
    assert find_entry("org/other") is None
    (tmp_path / "config.json").write_text("{}")
    assert find_entry(str(tmp_path)) is None
    with pytest.raises(ConfigError, match="nearest"):
        find_entry("qwen3-8bb")
