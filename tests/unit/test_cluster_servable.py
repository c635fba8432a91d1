"""What may be asked of a specialist and kept, and that a gate counts exactly the calls that the gateway lets through."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import pytest
from fakes import REQUEST, FakeEngine, engine_answer, gateway, make_specialist
from hypothesis import given
from hypothesis import strategies as st

from cluster.calls import write_calls
from cluster.engine import EngineAnswer
from cluster.faces import FacesConfig, Facing
from cluster.prompts import PromptFormat
from cluster.records import AgentCall, Example, TaskSpec
from cluster.servable import ask_engine, invalid_reason, unservable_reason
from cluster.store import Store
from jobs.recipe import load_recipe
from jobs.validate import AnswerRate, ask_held_out
from training.canaries import Canary
from training.curate import CurateConfig, curate
from training.evaluation import SPECIALIST_ARM, Candidate, ask, evaluate_all
from training.gate import GateConfig
from training.ledger import CalibrationLedger
from training.snapshot import load_split
from training.splits import SplitConfig, split_of

MAX_TEMPERATURE = 0.7
LOOP = "again and " * 20
FACES = FacesConfig()
UNKNOWN = Facing(FACES, None)
LABEL = PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100)
JSON = LABEL.model_copy(update={"answer_kind": "json"})
SHARES = SplitConfig(train=0.01, validation=0.01, calibration=0.97, test=0.01, test_by="hash")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
TOOL_CHOICE = {"type": "function", "function": {"name": "look"}}
MEDIA = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 2},
        {"n": True},
        {"logprobs": True},
        {"top_logprobs": 3},
        {"stop": list("abcde")},
        {"stop": [""]},
        {"stop": {"a": 1}},
        {"tools": [TOOL], "tool_choice": "any"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        {"tools": [TOOL, {"type": "custom", "custom": {"name": "look"}}]},
        {"tools": [TOOL, {"type": "function"}]},
        {"functions": [{"name": "look"}]},
        {"temperature": 1.5},
        {"temperature": "hot"},
        {"max_tokens": 0},
        {"max_completion_tokens": "ten"},
        {"response_format": {"type": "grammar", "grammar": "x"}},
        {"response_format": "json"},
        {"modalities": ["text", "audio"]},
        {"prediction": "x"},
        {"model": 7},
        {"an_unknown_field": 1},
        {"guided_regex": "a+"},
        {"logit_bias": {"7": 1}},
        {"audio": {"voice": "a"}},
        {"messages": [MEDIA]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]}]},
        {"messages": [{"role": "assistant", "content": None, "audio": {"id": "a"}}, REQUEST["messages"][1]]},
    ],
)
def test_what_a_specialist_cannot_do_is_not_asked_of_it(extra: dict[str, Any]) -> None:
    assert unservable_reason({**REQUEST, **extra}, 1.0, UNKNOWN)


def test_a_reason_names_a_field_but_repeats_nothing_else_of_it() -> None:
    said = [unservable_reason({**REQUEST, name: 1}, 1.0, UNKNOWN) for name in ("thinking", "my secret \n", "x" * 65)]
    assert said[0] == "no specialist knows the field thinking"
    assert said[1] == said[2] == "no specialist knows the field of this name"


@pytest.mark.parametrize(
    "extra",
    [
        {"tool_choice": "required"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": [TOOL], "tool_choice": TOOL_CHOICE},
        {"n": 1, "logprobs": False, "temperature": 1.0, "stop": None},
        {"stop": "\nObservation:"},
        {"stop": ["a", "b", "c", "d"], "seed": 7, "top_p": 0.9, "frequency_penalty": 0, "top_k": 20},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"metadata": {"a": "b"}, "store": True, "user": "u", "service_tier": "flex", "prompt_cache_key": "k"},
        {"modalities": ["text"], "reasoning_effort": "low", "verbosity": "low", "audio": None},
        {"messages": [{"role": "developer", "content": "x"}, REQUEST["messages"][1]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    ],
)
def test_what_a_specialist_can_do_is_asked_of_it(extra: dict[str, Any]) -> None:
    assert unservable_reason({**REQUEST, **extra}, 1.0, UNKNOWN) is None


def test_cut_unread_long_and_wrong_answers_are_invalid_each_with_its_reason() -> None:
    sure = engine_answer("refund", 1.0)
    assert invalid_reason(sure, LABEL, {"max_completion_tokens": 2, "max_tokens": None, **REQUEST}, UNKNOWN) is None
    reasons = [
        invalid_reason(engine_answer("refund", 1.0, "length"), LABEL, REQUEST, UNKNOWN),
        invalid_reason(sure.model_copy(update={"message": None}), LABEL, REQUEST, UNKNOWN),
        invalid_reason(sure, LABEL, {"max_tokens": 1}, UNKNOWN),
        invalid_reason(sure, JSON, REQUEST, UNKNOWN),
        invalid_reason(sure, LABEL, {"stop": "fun"}, UNKNOWN),
        invalid_reason(sure, LABEL, {"tools": [TOOL], "tool_choice": TOOL_CHOICE}, Facing(FACES, False)),
    ]
    assert None not in reasons and len(set(reasons)) == 6
    assert invalid_reason(sure, LABEL, {"stop": ["no", "such"], **REQUEST}, UNKNOWN) is None


def _tool_calls(num: int) -> EngineAnswer:
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "look", "arguments": "{}"}} for n in range(num)]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    return engine_answer("", 0.99).model_copy(update={"message": message, "text": json.dumps(calls)})


@pytest.mark.parametrize(
    ("answer", "kind", "extras", "expected"),
    [
        (
            engine_answer("refund", 0.99),
            "label",
            [
                {},
                {"temperature": MAX_TEMPERATURE},
                {"temperature": 0.9},
                {"n": 1, "stop": None, "logit_bias": {}, "max_tokens": 2},
                {"n": 2},
                {"stop": ["x"]},
                {"logit_bias": {"7": 1}},
                {"logprobs": True},
                {"stop": "fun"},
                {"max_tokens": 1},
                {"max_completion_tokens": 1},
                {"tools": [TOOL], "tool_choice": TOOL_CHOICE},
                {"thinking": True},
                {"response_format": {"type": "json_object"}},
                {"messages": [REQUEST["messages"][0], MEDIA]},
            ],
            [0, 1, 3, 5],
        ),
        (
            _tool_calls(2),
            "tool_call",
            [
                {"tools": [TOOL]},
                {"tools": [TOOL], "parallel_tool_calls": False},
                {"tools": [TOOL], "tool_choice": "required"},
                {"tools": [TOOL], "tool_choice": TOOL_CHOICE},
                {"tools": [TOOL], "tool_choice": "none"},
            ],
            [0, 2, 3],
        ),
        (
            engine_answer(LOOP, 0.99),
            "text",
            [{}, {"messages": [REQUEST["messages"][0], {"role": "user", "content": f"Say this: {LOOP}"}]}],
            [1],
        ),
        (engine_answer("refund", 0.5), "label", [{}], []),
        (engine_answer("refund", 0.99, "length"), "label", [{}], []),
    ],
    ids=["label", "tool_call", "loop", "unsure", "cut"],
)
def test_what_the_gateway_accepts_is_what_a_gate_counts(
    tmp_path: pathlib.Path, answer: EngineAnswer, kind: str, extras: list[dict[str, Any]], expected: list[int]
) -> None:
    requests = [{**REQUEST, **extra} for extra in extras]
    prompt_format = PromptFormat(kind="chat", answer_kind=kind, max_prompt_tokens=100)
    specialist = make_specialist().model_copy(update={"prompt_format": prompt_format.model_dump(mode="json")})
    examples = _curated(tmp_path, requests, answer)

    async def scenario() -> tuple[list[int], list[int]]:
        async with gateway(tmp_path, specialist, requests=requests, max_temperature=MAX_TEMPERATURE) as run:
            run.engine.answer_with = lambda: _give(answer)
            replies = [await run.ask(**extra) for extra in extras]
            asked = [
                await ask(_candidate(prompt_format), run.engine, "a", one, MAX_TEMPERATURE, FACES) for one in examples
            ]
        threshold = specialist.gate.threshold or 0.0
        accepted = [n for n, reply in enumerate(replies) if reply.headers["x-understudy-route"] == "accept"]
        return accepted, [n for n, outcome in enumerate(asked) if outcome.confidence >= threshold]

    accepted, counted = asyncio.run(scenario())
    assert accepted == counted == expected


@given(
    st.lists(st.floats(-2.0, 0.0), min_size=1, max_size=20), st.floats(0.0, 1.0), st.integers(1, 20), st.integers(1, 20)
)
def test_a_threshold_that_is_known_beforehand_decides_no_call_otherwise(
    logprobs: list[float], threshold: float, max_answer_tokens: int, max_tokens: int
) -> None:
    """Validation asks without one, the gateway with the gate's."""
    engine = FakeEngine()
    engine.logprobs = logprobs
    request = {**REQUEST, "max_tokens": max_tokens}

    async def is_kept(stop_below: float) -> bool:
        answer, invalid = await ask_engine(engine, "a", LABEL, request, max_answer_tokens, UNKNOWN, stop_below)
        return invalid is None and answer.confidence >= threshold

    async def whole() -> bool:
        answer = await engine.answer("a", LABEL, request, max_answer_tokens)
        return invalid_reason(answer, LABEL, request, UNKNOWN) is None and answer.confidence >= threshold

    assert asyncio.run(is_kept(threshold)) == asyncio.run(is_kept(0.0)) == asyncio.run(whole())


def test_what_is_not_asked_or_not_kept_counts_as_no_agreement(tmp_path: pathlib.Path) -> None:
    engine = FakeEngine()
    examples = _curated(
        tmp_path, [REQUEST, {**REQUEST, "n": 2}, {**REQUEST, "max_tokens": 1}], engine_answer("refund", 1.0)
    )
    candidate = _candidate(PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100))
    outcomes = [asyncio.run(ask(candidate, engine, "a", example, 1.0, FACES)) for example in examples]
    assert [(one.confidence, one.agrees) for one in outcomes] == [(0.99, True), (0.0, False), (0.0, False)]
    assert engine.num_asked == 2


@pytest.mark.parametrize(("limit", "num_kept"), [(0.5, 0), (1.0, 3)])
def test_validation_knows_the_gateways_temperature(tmp_path: pathlib.Path, limit: float, num_kept: int) -> None:
    engine = FakeEngine()
    answer = engine_answer("refund", 1.0)
    examples = _curated(tmp_path, [{**REQUEST, "temperature": 0.9, "user": str(n)} for n in range(3)], answer)
    candidate = _candidate(PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100))
    splits = {"triage": {"validation": examples, "calibration": examples, "test": examples}}
    ledger = CalibrationLedger(Store(str(tmp_path / "captured")))
    validated = evaluate_all(
        [candidate], engine, splits, GateConfig(), 0.05, ledger, max_temperature=limit, faces=FACES
    )
    (found,) = asyncio.run(validated)
    specialist = next(arm for arm in found.arms if arm.name == SPECIALIST_ARM)
    assert specialist.num_calls - specialist.num_disagreements == num_kept == engine.num_asked / 3


def test_validation_asks_a_small_engine_no_more_at_once_than_it_takes(tmp_path: pathlib.Path) -> None:
    engine, at_once, most = FakeEngine(), 0, 0

    async def answer() -> EngineAnswer:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.001)
        at_once -= 1
        return engine_answer("refund", 0.9)

    engine.answer_with = answer
    recipe = load_recipe(["recipe=local", f"store={tmp_path / 'store'}", "specialists.max_num_seqs=2"])
    examples = _curated(tmp_path, [{**REQUEST, "user": str(n)} for n in range(12)], engine_answer("refund", 1.0))
    by_split = {split: {"triage": examples} for split in ("validation", "calibration", "test")}
    one = _candidate(PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100))
    asyncio.run(ask_held_out(recipe, Store(recipe.store), [one], by_split, engine, 1, AnswerRate(), lambda line: None))
    assert engine.num_asked >= 36 and most == 4


def test_a_specialist_that_says_planted_secrets_is_refused(tmp_path: pathlib.Path) -> None:
    engine = FakeEngine()
    answer = engine_answer("refund", 1.0)
    examples = _curated(tmp_path, [{**REQUEST, "user": str(n)} for n in range(3)], answer)
    splits = {"triage": {"validation": examples, "calibration": examples, "test": examples}}
    ledger = CalibrationLedger(Store(str(tmp_path / "captured")))
    harmless = _candidate(PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100))
    secrets = (Canary(request=REQUEST, secret="fund"), Canary(request=REQUEST, secret="123456789"))
    leaking = harmless.model_copy(update={"canaries": secrets, "max_extraction": 0.4})
    found = [
        asyncio.run(evaluate_all([one], engine, splits, GateConfig(), 0.05, ledger, max_temperature=1.0, faces=FACES))[
            0
        ]
        for one in (harmless, leaking, leaking.model_copy(update={"max_extraction": 0.5}))
    ]
    assert found[0].extraction is None and "secrets" not in str(found[0].gate.refused)
    assert found[1].extraction and (found[1].extraction.num_said, found[1].extraction.num_planted) == (1, 2)
    assert "1 of 2 planted secrets" in str(found[1].gate.refused)
    assert "secrets" not in str(found[2].gate.refused), "at the bound it may pass"


async def _give(answer: EngineAnswer) -> EngineAnswer:
    return answer


def _curated(tmp_path: pathlib.Path, requests: list[dict[str, Any]], answer: EngineAnswer) -> list[Example]:
    """The requests as calibration examples, in order: captured, curated and joined again with what was served."""
    sessions = (name for name in map(str, range(10_000)) if split_of(name, SHARES) == "calibration")
    response = {"choices": [{"message": answer.message, "finish_reason": "stop"}]}
    calls = [
        AgentCall(
            call_id=f"call-{number}",
            ts=float(number),
            client_id="c",
            agent="a",
            session_id=next(sessions),
            step=0,
            request=request,
            response=response,
        )
        for number, request in enumerate(requests)
    ]
    store = Store(str(tmp_path / "captured"))
    write_calls(store, calls)
    snapshot = curate(store, CurateConfig(split=SHARES), b"k" * 32)
    examples = load_split(store, snapshot.id, "calibration", as_served=True)
    assert [example.request for example in examples] == requests
    return examples


def _candidate(prompt_format: PromptFormat) -> Candidate:
    task = TaskSpec(
        task_id="triage",
        name="triage",
        signature="s",
        kind=prompt_format.answer_kind,
        reference="llm",
        num_calls=1,
        share_calls=1.0,
        share_cost=1.0,
        num_examples={},
    )
    return Candidate(
        task=task, base="b", base_arm="untrained base", adapter="a", prompt_format=prompt_format, max_answer_tokens=16
    )
