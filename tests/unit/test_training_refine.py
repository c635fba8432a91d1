"""training/refine.py: what is decided of a task, by which numbers; and plans as files that people edit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from training.refine import (
    Plan,
    RefineConfig,
    TaskFacts,
    TaskPlan,
    decide,
    num_replayed,
    read_plan,
    reasons_to_train,
    sessions_needed,
)

CONFIG, EPSILON, DELTA = RefineConfig(), 0.05, 0.01
WELL: dict[str, Any] = {
    "kind": "json",
    "num_calls": 1_000,
    "num_recent": 200,
    "specialist": "task-a@0123456789ab",
    "stage": "live",
    "coverage": 0.8,
    "num_asked": 200,
    "num_escalated": 40,
    "num_new": 100,
    "num_learned": 300,
    "num_sessions": 400,
    "num_fresh_sessions": 200,
    "round": 1,
}
counts = st.integers(0, 500)


def facts(**changes: Any) -> TaskFacts:
    return TaskFacts(**{**WELL, **changes})


def decided(**changes: Any) -> tuple[str, str, bool]:
    return decide(facts(**changes), CONFIG, EPSILON, DELTA)


def test_a_specialist_that_does_well_is_kept():
    assert decided() == ("keep", "nothing speaks against it", False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_withdrawn": True, "stage": None, "num_compared": 90, "num_disagreements": 20}, "withdrawn: 20 of 90 audited"),
        ({"e_value": 6.5, "num_compared": 30, "num_disagreements": 5}, "5 of 30 audited conversations differ, evidence 6.5"),
        ({"drift_suspected": True}, "its traffic is not what it was"),
        ({"num_escalated": 120}, "hands 120 of 200 recent calls to the LLM, its gate foretold 20%"),
        ({"moved_share": 0.25}, "25.0% of its calls are others"),
        ({"num_scored": 60, "num_bad": 30, "num_scored_llm": 60, "num_bad_llm": 2}, "30 of 60 of its answers were bad, 2 of 60"),
    ],
)  # fmt: skip
def test_what_speaks_against_it_retrains_it_from_its_own_weights(changes, said):
    decision, reason, is_warm = decided(**changes)
    assert (decision, is_warm) == ("retrain", True) and said in reason


@pytest.mark.parametrize(
    "changes",
    [{"num_fallen_back": 200}, {"num_escalated": 60}, {"e_value": 4.9}, {"num_scored": 3, "num_bad": 2, "num_scored_llm": 9}],
)  # fmt: skip
def test_trouble_that_training_does_not_mend_and_chance_retrain_nothing(changes):
    assert decided(**changes)[0] == "keep"


def test_weights_that_have_seen_a_forgotten_client_are_not_gone_on_from():
    forgotten = decided(has_forgotten_client=True, num_new=0)
    assert (forgotten[0], forgotten[2]) == ("retrain", False) and "untrained adapter" in forgotten[1]
    assert decided(has_forgotten_client=True, base_has_forgotten_client=True)[::2] == ("reselect", False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_failed": 1}, "retrained in vain 1 times"),
        ({"num_escalated": 150, "num_unfit": 140}, "140 prompts do not fit its base"),
    ],
)
def test_where_another_training_on_the_same_base_would_be_in_vain_the_base_is_chosen_again(changes, said):
    decision, reason, _ = decided(drift_suspected=True, **changes)
    assert decision == "reselect" and said in reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_new": 19}, "19 new examples, at least 20 are needed"),
        ({"num_repeated": 100, "num_contradicted": 21}, "contradicts itself in 21 of 100"),
        ({"num_fresh_sessions": 90, "num_sessions": 100}, "90 fresh calibration sessions and 100 in all"),
        ({"blocked": "too few clients"}, "too few clients"),
        ({"num_failed": 1, "num_calls_trained": 910}, "in vain at 910 calls, 1000 now; tried again from 1001"),
        ({"waiting": "a@1 in release 2", "num_calls_trained": 910}, "a@1 in release 2 waits to be served, made at 910"),
    ],
)
def test_what_training_could_not_mend_is_told_and_not_trained(changes, said):
    decision, reason, _ = decided(drift_suspected=True, **changes)
    assert decision == "keep" and "not trained: " in reason and said in reason


def test_another_shape_is_trained_anew():
    assert decided(drift_suspected=True, other_shape="finetune.lora_alpha was 16, is 8")[::2] == ("retrain", False)


def test_a_task_without_calls_is_retired_and_one_without_a_specialist_is_new_once_it_can_be_certified():
    gone = {"num_recent": 0, "num_expected": 5.0}
    assert decided(**gone)[0] == "retire" and decided(**gone, stage=None, is_withdrawn=True)[0] == "keep"
    assert decided(num_recent=0, num_expected=4.9)[0] == "keep", "so rare a task may come again"
    none = {"specialist": None, "stage": None, "coverage": None}
    needed = sessions_needed(EPSILON, DELTA, 0)
    assert decided(**none, num_fresh_sessions=needed)[0] == "new"
    assert decided(**none, num_fresh_sessions=needed - 1)[0] == "keep"
    assert decided(**none, num_recent=0)[0] == "keep"


@given(
    st.fixed_dictionaries(
        {
            **{name: counts for name in ("num_recent", "num_new", "num_learned", "num_sessions", "num_failed")},
            **{
                name: st.booleans() for name in ("drift_suspected", "has_forgotten_client", "base_has_forgotten_client")
            },
            "specialist": st.sampled_from([None, "task-a@0123456789ab"]),
            "other_shape": st.sampled_from([None, "rank"]),
            "e_value": st.floats(0, 50),
            "num_repeated": counts,
            "num_contradicted": counts,
        }
    )
)
def test_every_decision_can_be_planned_and_nothing_is_trained_without_a_reason(values):
    if values["specialist"] is None:
        values |= {"stage": None, "coverage": None}
    found = facts(**values)
    decision, reason, is_warm = decide(found, CONFIG, EPSILON, DELTA)
    TaskPlan(task_id="a", name="a", decision=decision, reason=reason, is_warm=is_warm, facts=found)
    if decision in ("retrain", "reselect"):
        assert reasons_to_train(found, CONFIG) and found.num_recent
    if is_warm:
        assert not found.has_forgotten_client and not found.base_has_forgotten_client and found.other_shape is None
    if decision == "keep" and found.specialist and found.num_recent:
        assert "not trained" in reason or not reasons_to_train(found, CONFIG)


@given(st.integers(0, 1_000), st.integers(0, 1_000), st.floats(0, 0.95))
def test_replayed_examples_make_up_their_share_or_are_all_there_are(num_new, num_learned, share):
    num = num_replayed(num_new, num_learned, share)
    assert 0 <= num <= num_learned
    if num < num_learned:
        assert abs(num - share * (num + num_new)) <= 1


def plan(**changes: Any) -> Plan:
    task = TaskPlan(task_id="a", name="name", decision="retrain", reason="r", is_warm=True, facts=facts())
    whole = {
        "date": "2026-01-01", "release": "1" * 64, "snapshot": "s", "route_model": "route_model/one", "is_refit": False,
        "refit_reason": "same", "since_ts": 1.0, "delta": 0.01, "config": CONFIG, "events": (), "tasks": (task,),
        "spent": ("b",),
    }  # fmt: skip
    return Plan(**{**whole, **changes})


def test_a_plan_is_read_back_as_it_was_and_an_edited_one_has_another_name():
    text = json.dumps(plan().model_dump(mode="json"))
    assert read_plan(text, "here") == plan() and plan().name.startswith("refinements/2026-01-01-")
    edited = read_plan(text.replace('"retrain"', '"keep"').replace('"is_warm": true', '"is_warm": false'), "here")
    assert edited.trained() == [] and edited.name != plan().name


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"retrain"', '"train"', "tasks.0.decision: Input should be 'keep', 'retrain'"),
        ('"delta": 0.01', '"delta": "0.01"', "delta: Input should be a valid number"),
        ('"spent"', '"spend"', "spend: Extra inputs are not permitted"),
        ('"retrain"', '"new"', "is_warm with new; allowed: with retrain"),
        ('"has_forgotten_client": false, "base', '"has_forgotten_client": true, "base', "allowed: false"),
        ("{", "", "Invalid JSON"),
    ],
)
def test_a_plan_that_was_edited_wrongly_is_told_where(old, new, said):
    text = json.dumps(plan().model_dump(mode="json"))
    assert old in text
    with pytest.raises(InputError) as error:
        read_plan(text.replace(old, new, 1), "mine.json")
    assert said in str(error.value) and str(error.value).startswith("mine.json: ") and "next: " in str(error.value)
