"""Arms side by side: what is right by gold, what it costs, and what a random router and an oracle do with the same calls."""

import asyncio
import math
from collections import Counter
from typing import Any

import pytest
from fakes import engine_answer

from cluster.engine import EngineAnswer
from cluster.errors import InputError
from cluster.faces import FacesConfig
from cluster.judging import Judge
from cluster.prompts import PromptFormat
from cluster.records import Example, TaskSpec, TextGrader, Usage
from cluster.store import Store
from jobs.recipe import load_recipe
from jobs.validate import AnswerRate, rates_of, save_agreements, validate_candidates
from training.arm_tables import notes_of, tables_of
from training.arms import GATED_ARM, SPECIALIST_ARM, Answered, count_routed, make_arm
from training.evaluation import Candidate, Evaluation, evaluate, evaluate_all, gain_over_base
from training.gate import GateConfig, Outcome
from training.ledger import CalibrationLedger
from training.regression import noninferiority_p
from training.worth import Rates, Worth, weigh

TASK = TaskSpec(
    task_id="t",
    name="intent",
    signature="s",
    kind="label",
    reference="llm",
    num_calls=1,
    share_calls=1.0,
    share_cost=1.0,
    num_examples={},
)
PRICED = Rates(replica_usd_per_hour=3.6, tokens_per_s=1000.0, prompt_usd_per_million=10.0)
"""At full use a specialist's token costs one millionth of a dollar."""


def make_example(number: int, gold: str | None = None, llm: str = "yes", split: str = "test") -> Example:
    return Example(
        example_id=f"{split}{number}",
        split=split,
        session_id=f"{split}{number}",
        ts=float(number),
        request={
            "model": "m",
            "messages": [{"role": "system", "content": "Say."}, {"role": "user", "content": f"{number}"}],
        },
        target={"role": "assistant", "content": llm},
        reference="llm",
        source_call_ids=(f"{split}{number}",),
        usage=Usage(prompt_tokens=100, completion_tokens=1),
        gold=gold,
    )


def answered(confidence: float, agrees: bool, is_gold: bool | None = None) -> Answered:
    return Answered(Outcome(confidence=confidence, agrees=agrees, session_id="s"), is_gold, 9, 1)


def evaluated(answers: list[Answered], test: list[Example], gate: Any) -> Evaluation:
    """An evaluation of these answers alone, with a gate that is open at .5."""
    arms = (
        make_arm("untrained base", [answered(0.9, False, False)] * len(test), test, TASK, 0.0),
        make_arm("specialist", answers, test, TASK, 0.0),
        make_arm("specialist + gate", answers, test, TASK, 0.5),
    )
    routed, truth = count_routed(answers, test, TASK, 0.5)
    return Evaluation(task_id="t", gate=gate, arms=arms, routed=routed, truth=truth, curve=())


@pytest.fixture
def gate() -> Any:
    from training.gate import refused_gate

    facts = {"num_calibration": 1, "epsilon": 0.05, "delta": 0.05, "reference": "llm", "population": "p"}
    return refused_gate("none", fingerprint="f", **facts)


def worth_of(evaluation: Evaluation, rates: Rates = PRICED, margin: float = 0.02) -> Worth:
    found = weigh(evaluation, rates, margin)
    assert found is not None
    return found


def test_costs_are_those_of_tokens_seconds_and_escalations(gate) -> None:
    answers = [*[answered(0.9, True)] * 70, *[answered(0.9, False)] * 5, *[answered(0.1, True)] * 10]
    answers += [answered(0.1, False)] * 15
    found = worth_of(evaluated(answers, [make_example(k) for k in range(100)], gate))
    llm, base, specialist, gated = found.costs
    assert (llm.num_right, base.num_right, specialist.num_right, gated.num_right) == (100, 0, 80, 95)
    assert llm.usd_per_right == pytest.approx([0.001] * 3), "100 prompt tokens at 10 USD a million"
    assert specialist.usd_per_call == pytest.approx([50e-6, 20e-6, 10e-6]), "10 tokens each"
    assert specialist.usd_per_right == pytest.approx([62.5e-6, 25e-6, 12.5e-6])
    assert gated.usd_per_call == pytest.approx([300e-6, 270e-6, 260e-6]), "a quarter goes to the LLM as well"
    assert base.usd_per_right == (None, None, None), "nothing right has no price"
    assert found.truth == "llm" and found.noninferiority == ()


def test_a_random_router_of_the_same_cost_is_worse_and_the_oracle_better(gate) -> None:
    answers = [*[answered(0.9, True)] * 70, *[answered(0.9, False)] * 5, *[answered(0.1, True)] * 10]
    answers += [answered(0.1, False)] * 15
    found = worth_of(evaluated(answers, [make_example(k) for k in range(100)], gate))
    control, regret = found.control, found.regret
    assert control is not None and regret is not None
    share = control.share_sent
    assert share * 20e-6 + (1 - share) * 1e-3 == pytest.approx(270e-6), "it costs what the gate costs"
    assert control.random_right == pytest.approx(1 - 0.2 * share) and control.gate_right == 0.95
    low, high = control.interval
    assert 0 < low < control.gate_right - control.random_right < high
    assert (regret.needless, regret.wrong, regret.oracle_to_llm, regret.gate_to_llm) == (0.1, 0.05, 0.2, 0.25)
    assert regret.oracle_right == 1.0 and regret.usd_per_call == pytest.approx(0.05 * 1e-3)
    free = worth_of(evaluated(answers, [make_example(k) for k in range(100)], gate), Rates()).control
    assert free is not None and (free.matched_by, free.share_sent) == ("calls", 0.75)


def test_a_confidence_that_knows_nothing_gains_nothing_over_the_lot(gate) -> None:
    answers = [answered(0.9 if k % 2 else 0.1, k % 10 > 1) for k in range(400)]
    found = worth_of(evaluated(answers, [make_example(k) for k in range(400)], gate), Rates())
    assert found.control is not None and found.control.interval[0] <= 0 <= found.control.interval[1]


def test_what_is_not_priced_is_not_free_and_the_notes_say_what_to_set(gate) -> None:
    bare = [make_example(k).model_copy(update={"usage": Usage()}) for k in range(20)]
    found = worth_of(evaluated([answered(0.9, True)] * 20, bare, gate), Rates(tokens_per_s=50.0))
    assert all(one.usd_per_right == (None, None, None) for one in found.costs)
    told = " ".join(notes_of(found))
    for field in ("prices.replica_usd_per_hour", "upstream.0.prompt_usd_per_million", "50 tokens a second"):
        assert field in told
    captured = [example.model_copy(update={"cost_usd": 0.5}) for example in bare]
    assert worth_of(evaluated([answered(0.9, True)] * 20, captured, gate), Rates()).costs[0].usd_per_right[0] == 0.5


def test_gold_decides_what_is_right_and_the_llm_is_judged_by_it_too(gate) -> None:
    """The LLM errs in a tenth of the calls; the specialist errs with it, and in some more where it is unsure."""
    test = [make_example(k, gold="no" if k < 20 else "yes") for k in range(200)]
    answers = [answered(0.9, True, k >= 20) if k < 190 else answered(0.1, False, False) for k in range(200)]
    found = worth_of(evaluated(answers, test, gate), margin=0.03)
    assert found.truth == "gold" and [one.num_right for one in found.costs] == [180, 0, 170, 180]
    by_arm = {one.name: one for one in found.noninferiority}
    assert by_arm["specialist + gate"].holds and by_arm["specialist + gate"].arm_share == 0.9
    assert not by_arm["specialist"].holds and not by_arm["untrained base"].holds
    assert by_arm["specialist"].p_value == noninferiority_p(0, 10, 200, 0.03)
    captions = [table.caption for table in tables_of(evaluated(answers, test, gate), found)]
    assert any("Non-inferior" in caption for caption in captions)


def test_gold_of_some_calls_judges_those_and_the_llm_stays_the_reference(gate) -> None:
    test = [make_example(k, gold="yes" if k < 30 else None) for k in range(60)]
    answers = [answered(0.9, True, True if k < 30 else None) for k in range(60)]
    found = worth_of(evaluated(answers, test, gate))
    assert found.truth == "llm" and {one.num_calls for one in found.noninferiority} == {30}


def test_gold_without_an_llm_has_no_llm_to_beside(gate) -> None:
    task = TASK.model_copy(update={"reference": "gold"})
    test = [make_example(k) for k in range(10)]
    answers = [answered(0.9, True)] * 10
    arm = make_arm("specialist + gate", answers, test, task, 0.5)
    routed, truth = count_routed(answers, test, task, 0.5)
    found = weigh(Evaluation(task_id="t", gate=gate, arms=(arm,), routed=routed, truth=truth, curve=()), PRICED, 0.02)
    assert found is not None and found.control is None and found.regret is None and found.costs[0].num_right is None


class _Learner:
    """An engine whose base errs unless examples stand in its prompt; whose adapter is right; and whose window is small."""

    def __init__(self, max_messages: int) -> None:
        self.max_messages, self.shown = max_messages, Counter()

    async def fingerprint(self) -> str:
        return "f"

    async def load(self, adapter: str) -> None:
        pass

    async def answer(self, adapter, prompt_format, request, max_answer_tokens, stop_below=0.0) -> EngineAnswer:
        num_shots = (len(request["messages"]) - 2) // 2
        self.shown[num_shots] += adapter is None
        if len(request["messages"]) > self.max_messages:
            raise InputError("prompt: too long")
        return engine_answer("yes" if adapter or num_shots else "no", 0.99)


@pytest.mark.parametrize(("max_messages", "num_shots"), [(20, 3), (6, 2), (3, 0)])
def test_the_base_is_asked_bare_and_with_as_many_examples_as_fit(tmp_path, max_messages, num_shots) -> None:
    engine = _Learner(max_messages)
    candidate = Candidate(
        task=TASK,
        base="b",
        base_arm="scratch base (has seen the tasks)",
        adapter="a",
        prompt_format=PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=99),
        max_answer_tokens=8,
    )
    splits = {s: [make_example(k, split=s) for k in range(80)] for s in ("train", "validation", "calibration", "test")}
    rate = AnswerRate(clock=iter(range(10_000)).__next__)
    rate.begin()
    ledger = CalibrationLedger(Store(str(tmp_path)))
    facts = (GateConfig(), 0.05, ledger, 1.0, FacesConfig(), asyncio.Semaphore(8), rate.add)
    found = asyncio.run(evaluate(candidate, engine, splits, *facts))
    arms = {arm.name: arm for arm in found.arms}
    few = [name for name in arms if name.endswith("shown")]
    assert arms["scratch base (has seen the tasks)"].disagreement == 1.0 and arms["specialist"].disagreement == 0.0
    assert few == ([f"scratch base (has seen the tasks), {num_shots} examples shown"] if num_shots else [])
    assert all(arms[name].disagreement == 0.0 for name in few)
    assert sum(group.num_calls for group in found.routed) == 80 and found.truth == "llm"
    assert rate.tokens_per_s is not None and math.isfinite(rate.tokens_per_s)


def test_a_merged_specialist_is_asked_without_adapter_and_not_compared_with_a_base_that_its_engine_has_not(
    tmp_path,
) -> None:
    asked: set[str | None] = set()

    class Merged(_Learner):
        async def load(self, adapter: str) -> None:
            raise AssertionError("a merged model has no adapter to load")

        async def answer(self, adapter, *args, **options):
            asked.add(adapter)
            return await super().answer("a", *args, **options)

    candidate = Candidate(
        task=TASK, base="b", base_arm="untrained base", adapter="a", merged="merged/t/1", max_answer_tokens=8,
        prompt_format=PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=99),
    )  # fmt: skip
    splits = {s: [make_example(k, split=s) for k in range(120)] for s in ("train", "validation", "calibration", "test")}
    ledger = CalibrationLedger(Store(str(tmp_path)))
    (found,) = asyncio.run(
        evaluate_all([candidate], Merged(20), {"t": splits}, GateConfig(), 0.05, ledger, max_temperature=1.0,
                     faces=FacesConfig())
    )  # fmt: skip
    assert asked == {None} and found.gate.is_open
    assert [arm.name for arm in found.arms] == [SPECIALIST_ARM, GATED_ARM] and gain_over_base(found) is None


def test_a_rate_over_several_engines_leaves_out_the_time_between_them() -> None:
    rate = AnswerRate(clock=iter([0, 10, 1000, 1010]).__next__)
    for _ in range(2):
        rate.begin()
        rate.add(
            Answered(Outcome(confidence=1.0, agrees=True, session_id="s"), None, prompt_tokens=90, completion_tokens=10)
        )
    assert rate.tokens_per_s == pytest.approx(200 / 20)


def test_another_judge_of_the_same_calls_is_another_round(tmp_path) -> None:
    """Else a judge could be changed until one of them lets the gate open."""

    async def same(system: str, user: str) -> str:
        return '{"verdict": "same"}'

    candidate = Candidate(
        task=TASK.model_copy(update={"kind": "text"}),
        base="b",
        base_arm="untrained base",
        adapter="a",
        prompt_format=PromptFormat(kind="chat", answer_kind="text", max_prompt_tokens=99),
        max_answer_tokens=8,
        text_grader=TextGrader(name="judge"),
    )
    splits = {s: [make_example(k, split=s) for k in range(120)] for s in ("validation", "calibration", "test")}
    ledger = CalibrationLedger(Store(str(tmp_path)))
    facts = (GateConfig(), 0.05, ledger, 1.0, FacesConfig(), asyncio.Semaphore(8))
    rounds = [
        asyncio.run(evaluate(candidate, _Learner(20), splits, *facts, judge=Judge(same, {}, b"", name))).gate.round
        for name in ("lax", "harsh", "lax")
    ]
    assert rounds == [0, 1, 0]


def test_an_engine_that_waits_for_a_judge_shows_no_speed_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("UPSTREAM_API_KEY", "k")
    candidate = Candidate(
        task=TASK, base="b", base_arm="untrained base", adapter="a", max_answer_tokens=8,
        prompt_format=PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=99),
        text_grader=TextGrader(name="judge"),
    )  # fmt: skip
    by_split = {s: {"t": [make_example(k, split=s) for k in range(3)]} for s in ("validation", "calibration", "test")}
    words = ["upstream.0.base_url=http://127.0.0.1:9/v1", "upstream.0.model=m", "upstream.0.max_attempts=1"]
    recipe = load_recipe([f"store={tmp_path / 'store'}", "evaluation.text_grader=judge", *words])
    rate = AnswerRate()
    validate_candidates(recipe, Store(recipe.store), [candidate], by_split, _Learner(20), 1, rate, lambda line: None)
    assert rates_of(recipe, rate).tokens_per_s is None


def test_a_run_of_validation_measures_its_rate_and_keeps_one_report_however_fast_it_was(tmp_path) -> None:
    candidate = Candidate(
        task=TASK,
        base="b",
        base_arm="untrained base",
        adapter="a",
        prompt_format=PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=99),
        max_answer_tokens=8,
    )
    by_split = {
        s: {"t": [make_example(k, split=s) for k in range(120)]} for s in ("train", "validation", "calibration", "test")
    }
    recipe = load_recipe([f"store={tmp_path / 'store'}", "prices.replica_usd_per_hour=3.6"])
    store, said = Store(recipe.store), []
    reports = set()
    for tick in (1, 7):
        rate = AnswerRate(clock=iter(range(0, 100_000, tick)).__next__)
        (found,) = validate_candidates(recipe, store, [candidate], by_split, _Learner(20), 1, rate, said.append)
        rates = rates_of(recipe, rate)
        assert rates.tokens_per_s == pytest.approx(12 / tick, rel=0.01) and rates.replica_usd_per_hour == 3.6
        save_agreements(recipe, store, "one", [found], rates)
        reports.add(store.read_json("tasks/agreement.json")["t"]["report"])
    assert found.gate.is_open and found.gate.round == 0, "asking the same candidate again spends nothing"
    assert len(reports) == 1 and [arm.name for arm in found.arms][1] == "untrained base, 3 examples shown"
    llm, *_, gated = worth_of(found, rates).costs
    assert llm.usd_per_right == (None, None, None), "its price is not known here"
    # Seven seconds a call on a replica of a tenth of a cent a second, and nothing left to the LLM.
    assert gated.usd_per_right == pytest.approx([0.035, 0.014, 0.007], rel=0.01)
