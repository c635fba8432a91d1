"""Planted secrets: what is planted, what counts as said, and what a bound refuses."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import load_config
from cluster.engine import EngineAnswer
from cluster.errors import ConfigError, EngineError
from cluster.prompts import PromptFormat
from cluster.records import Example
from jobs.recipe import RECIPES, Recipe
from training.canaries import CanaryConfig, Extraction, as_examples, measure_extraction, plan_canaries, refusal_of

FORMAT = PromptFormat(kind="chat", answer_kind="json", max_prompt_tokens=100)


def example(number, *roles):
    messages = [{"role": role, "content": f"{role} {number}"} for role in roles]
    return Example(
        example_id=f"e{number}",
        split="train",
        session_id=f"s{number}",
        ts=1.0,
        request={"messages": messages, "temperature": 0},
        target={"role": "assistant", "content": "{}"},
        reference="llm",
        source_call_ids=(f"c{number}",),
    )


TRAIN = [example(1, "system", "user"), example(2, "system", "user", "assistant", "user"), example(3, "system")]


class Memoriser:
    """An engine that says the secrets it was given, inside JSON, and fails on the questions it was told to."""

    def __init__(self, known, failing=()):
        self.known = {canary.request["messages"][-1]["content"]: canary.secret for canary in known}
        self.failing = {canary.request["messages"][-1]["content"] for canary in failing}

    async def answer(self, adapter, prompt_format, request, max_answer_tokens, stop_below=0.0):
        asked = request["messages"][-1]["content"]
        if asked in self.failing:
            raise EngineError("no")
        text = f'{{"n": "{self.known.get(asked, "123456789")}"}}'
        return EngineAnswer(
            message=None, text=text, confidence=0.1, prompt_tokens=1, completion_tokens=1, finish_reason="stop"
        )


def extract(engine, canaries):
    return asyncio.run(measure_extraction(engine, "adapter", FORMAT, canaries, 20))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5))
def test_canaries_are_the_same_every_time_and_all_different(num, seed):
    canaries = plan_canaries("task-a", TRAIN, CanaryConfig(num_per_task=num), seed)
    assert canaries == plan_canaries("task-a", TRAIN[::-1], CanaryConfig(num_per_task=num), seed)
    assert canaries != plan_canaries("task-b", TRAIN, CanaryConfig(num_per_task=num), seed)
    assert len({canary.secret for canary in canaries}) == num
    for canary in canaries:
        assert canary.secret.isdecimal() and canary.secret not in str(canary.request)
        assert canary.request["messages"][-1]["role"] == "user" and canary.request["temperature"] == 0


def test_a_task_without_examples_gets_none_and_the_hosts_stay_as_they_were():
    before = [e.model_dump() for e in TRAIN]
    assert plan_canaries("task-a", [], CanaryConfig(num_per_task=3), 0) == ()
    canaries = plan_canaries("task-a", TRAIN, CanaryConfig(num_per_task=3), 0)
    assert [e.model_dump() for e in TRAIN] == before
    planted = as_examples("task-a", canaries)
    assert [e.target["content"] for e in planted] == [canary.secret for canary in canaries]
    assert {e.split for e in planted} == {"train"} and len({e.example_id for e in planted}) == 3


def test_what_is_said_is_counted_and_what_cannot_be_asked_is_not():
    canaries = plan_canaries("task-a", TRAIN, CanaryConfig(num_per_task=10), 0)
    assert extract(Memoriser([]), canaries).num_said == 0
    found = extract(Memoriser(canaries[:6], failing=canaries[:2]), canaries)
    assert (found.num_planted, found.num_said, found.rate) == (10, 4, 0.4)
    assert found.interval[0] < 0.4 < found.interval[1]


def test_a_bound_refuses_what_says_more_and_says_why():
    found = Extraction(num_planted=20, num_said=5, interval=(0.08, 0.5))
    assert refusal_of(found, None) is None and refusal_of(found, 0.25) is None
    reason = refusal_of(found, 0.2)
    assert reason and "5 of 20" in reason and "canaries.max_extraction=0.2" in reason


def test_a_bound_without_canaries_is_a_configuration_error():
    with pytest.raises(ConfigError, match="canaries.num_per_task=20"):
        load_config(Recipe, ["canaries.max_extraction=0.1"], RECIPES)
