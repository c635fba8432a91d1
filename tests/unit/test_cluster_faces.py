"""Which calls speak to a person: the rule itself, and that gateway, gate and curation agree on it."""

from __future__ import annotations

import asyncio
import pathlib
from typing import Any

import pytest
from fakes import LLM_TEXT, PATH, REQUEST, FakeEngine, gateway
from hypothesis import given
from hypothesis import strategies as st

from cluster.faces import FacesConfig, Facing, ends_turn, faces_before, faces_person, facing_of
from cluster.prompts import PromptFormat
from cluster.records import Example, TaskSpec
from cluster.servable import ask_engine, unservable_reason
from training.evaluation import Candidate, ask

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
OFFERED = {**REQUEST, "tools": [TOOL]}
SAID = {"role": "assistant", "content": "refund"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
}
DEFAULT = FacesConfig()


@pytest.mark.parametrize(
    ("request_", "message", "expected"),
    [
        (OFFERED, SAID, True),
        (OFFERED, CALLED, False),
        (OFFERED, None, False),
        (REQUEST, SAID, False),
        ({**REQUEST, "tools": []}, SAID, False),
        ({**REQUEST, "functions": [{"name": "look"}]}, SAID, True),
        ({**REQUEST, "functions": [{"name": "look"}]}, {**SAID, "function_call": {"name": "look"}}, False),
        ({**OFFERED, "response_format": {"type": "text"}}, SAID, True),
        ({**OFFERED, "response_format": {"type": "json_object"}}, SAID, False),
    ],
)
def test_an_answer_without_a_tool_call_where_tools_were_offered_ends_a_turn(
    request_: dict[str, Any], message: dict[str, Any] | None, expected: bool
) -> None:
    assert ends_turn(request_, message) == expected
    assert faces_person(request_, message, agent="a", config=DEFAULT) == expected
    assert not faces_person(request_, message, agent="a", config=FacesConfig(last_of_turn=False))


@pytest.mark.parametrize(
    ("agent", "header", "expected"),
    [
        ("support-eu", None, True),
        ("support-eu", "false", False),
        ("planner", "TRUE", True),
        ("planner", "perhaps", None),
        ("Support-eu", None, None),
    ],
)
def test_the_header_overrides_the_rule_for_agents(agent: str, header: str | None, expected: bool | None) -> None:
    assert faces_before(agent, header, FacesConfig(agents=("support-*",))) is expected


@given(
    st.sampled_from([None, True, False]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([REQUEST, OFFERED]),
    st.sampled_from([SAID, CALLED, None]),
)
def test_what_faces_a_person_is_barred_unless_it_may_move(
    before: bool | None, last_of_turn: bool, move: bool, request_: dict[str, Any], message: Any
) -> None:
    facing = Facing(FacesConfig(last_of_turn=last_of_turn, move=move), before)
    assert facing.bars_answer(request_, message) == (facing.faces(request_, message) and not move)
    assert not facing.bars_call or facing.bars_answer(request_, message)


async def _route(run: Any, headers: dict[str, str], **extra: Any) -> tuple[str, str]:
    reply = await run.http.post(PATH, json={**REQUEST, **extra}, headers=headers)
    assert reply.status_code == 200
    return reply.headers["x-understudy-route"], reply.headers["x-understudy-reason"]


def test_the_gateway_keeps_no_answer_to_a_person_and_marks_the_calls(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        faces = FacesConfig(agents=("support-*",))
        async with gateway(tmp_path, faces=faces, requests=[OFFERED]) as run:
            barred = "faces a person"
            assert await _route(run, {}) == ("accept", "confident")
            assert await _route(run, {"x-agent": "support-eu"}) == ("llm", barred)
            assert await _route(run, {"x-faces-person": "true"}) == ("llm", barred)
            assert await _route(run, {"x-faces-person": "false", "x-agent": "support-eu"}) == ("accept", "confident")
            assert run.engine.num_asked == 2
            assert await _route(run, {}, tools=[TOOL]) == ("escalate", barred)
            assert await _route(run, {"x-faces-person": "false"}, tools=[TOOL]) == ("accept", "confident")
            assert [call.faces_person for call in await run.captured()] == [False, True, True, False, True, False]
            assert run.core.meter.total("understudy_calls_facing_person_total") == 3

    asyncio.run(scenario())


def test_answers_to_a_person_move_where_the_recipe_lets_them(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, faces=FacesConfig(move=True), requests=[OFFERED]) as run:
            assert await _route(run, {"x-faces-person": "true"}) == ("accept", "confident")
            assert await _route(run, {}, tools=[TOOL]) == ("accept", "confident")
            assert all(call.faces_person and call.served_by == "specialist" for call in await run.captured())

    asyncio.run(scenario())


def test_the_llms_stream_is_marked_by_what_it_said(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            await run.ask(stream=True, n=2, tools=[TOOL])
            await run.ask(stream=True, n=2)
            told, other = await run.captured()
            assert told.message == {"role": "assistant", "content": LLM_TEXT} == other.message
            assert (told.faces_person, other.faces_person) == (True, False)

    asyncio.run(scenario())


def _example(request_: dict[str, Any], target: dict[str, Any], is_facing: bool) -> Example:
    facts = {"example_id": "e", "split": "calibration", "session_id": "s", "ts": 0.0, "reference": "llm"}
    return Example(**facts, request=request_, target=target, source_call_ids=("c",), faces_person=is_facing)


@pytest.mark.parametrize("config", [DEFAULT, FacesConfig(move=True), FacesConfig(last_of_turn=False)])
@pytest.mark.parametrize("before", [None, True, False])
@pytest.mark.parametrize("request_", [REQUEST, OFFERED])
def test_a_gate_counts_as_the_gateway_keeps(request_: dict[str, Any], before: bool | None, config: FacesConfig) -> None:
    """The reference's answer here is the specialist's; only where it makes a known fact look like a found one may they
    differ, and never in what is kept."""
    engine, prompt_format = FakeEngine(), PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100)

    async def kept_by_gateway() -> bool:
        facing = Facing(config, before)
        if unservable_reason(request_, 1.0, facing) is not None:
            return False
        _, invalid = await ask_engine(engine, "a", prompt_format, request_, 16, facing)
        return invalid is None

    example = _example(request_, SAID, Facing(config, before).faces(request_, SAID))
    candidate = _candidate(prompt_format)
    outcome = asyncio.run(ask(candidate, engine, "a", example, 1.0, config))
    assert (outcome.confidence > 0) == asyncio.run(kept_by_gateway())


@pytest.mark.parametrize(
    ("request_", "answer", "is_facing", "before"),
    [
        (REQUEST, SAID, True, True),
        (OFFERED, CALLED, True, True),
        (OFFERED, SAID, False, False),
        (OFFERED, SAID, True, None),
        (REQUEST, SAID, False, None),
    ],
)
def test_a_stored_call_tells_what_was_known_before_its_answer(
    request_: dict[str, Any], answer: dict[str, Any], is_facing: bool, before: bool | None
) -> None:
    assert facing_of(request_, answer, is_facing=is_facing, config=DEFAULT).before is before


def _candidate(prompt_format: PromptFormat) -> Candidate:
    counts = {"num_calls": 1, "share_calls": 1.0, "share_cost": 1.0, "num_examples": {}}
    task = TaskSpec(task_id="triage", name="triage", signature="s", kind="label", reference="llm", **counts)
    facts = {"task": task, "base": "b", "base_arm": "untrained base", "adapter": "a", "max_answer_tokens": 16}
    return Candidate(**facts, prompt_format=prompt_format)
