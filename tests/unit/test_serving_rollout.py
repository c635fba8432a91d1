"""serving/rollout.py and serving/shadow.py behind a gateway: who answers at which stage, and what is compared."""

from __future__ import annotations

import asyncio
import pathlib
import types
import uuid
from typing import Any

import pytest
from fakes import LLM_TEXT, PATH, REQUEST, Running, engine_answer, gateway, make_specialist
from hypothesis import given
from hypothesis import strategies as st

from cluster import registry
from cluster.engine import EngineAnswer
from cluster.errors import InputError
from cluster.prices import PriceConfig
from cluster.records import AgentCall, Rollout, TextGrader
from serving.audit import AuditConfig
from serving.evidence import KEPT, CallReader, Cursor
from serving.rollout import CANARY_REASON, SHADOW_REASON, hold_back, in_canary
from training.validity import find_problem

SHADOWS, MISSED = "understudy_shadows_total", "understudy_shadows_missed_total"
SHADOW = Rollout(stage="shadow")
SESSIONS = [uuid.UUID(int=i).hex for i in range(20_000)]


async def at_stage(run: Running, stage: Rollout | None) -> None:
    found = registry.current(run.store)
    assert found is not None
    sha = registry.publish_release(run.store, registry.derive(*found, rollout={"triage": stage}))
    registry.promote(run.store, sha)
    await run.core.table.refresh()


async def compared(run: Running) -> AgentCall | None:
    """The shadow's call once it is captured; None where it was missed."""
    async with asyncio.timeout(5):
        while not run.core.meter.total(SHADOWS) + run.core.meter.total(MISSED):
            await asyncio.sleep(0.01)
    return next((call for call in await run.captured() if call.audit_of), None)


def test_a_canary_is_its_share_of_sessions_and_grows_by_addition() -> None:
    small, large = ({one for one in SESSIONS if in_canary(one, "triage", share)} for share in (0.1, 0.3))
    # Binomial with mean 2,000: five standard deviations are 213.
    assert abs(len(small) - 2_000) < 213 and small < large
    assert all(in_canary(one, "triage", 1.0) for one in SESSIONS[:100])
    other = {one for one in SESSIONS if in_canary(one, "other", 0.1)}
    assert 100 < len(small & other) < 300, "tasks draw their sessions independently"


@given(session=st.text(), share=st.floats(0.01, 1.0))
def test_a_session_stays_where_it_is(session: str, share: float) -> None:
    rollout, specialist = Rollout(stage="canary", canary_share=share), make_specialist()
    first, again = (hold_back(specialist, rollout, lambda: session, release="r") for _ in range(2))
    assert first == again and (first is None) == in_canary(session, "triage", share)


def test_live_asks_for_no_session() -> None:
    def fail() -> str:
        raise AssertionError("a live specialist needs no session")

    assert hold_back(make_specialist(), None, fail, release="r") is None
    held = hold_back(make_specialist(), SHADOW, fail, release="r")
    assert held is not None and (held.action, held.reason, held.task_id) == ("llm", SHADOW_REASON, "triage")


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("said", "agrees"), [(LLM_TEXT, True), ("refund", False)])
def test_in_its_shadow_stage_a_specialist_is_compared_and_the_client_gets_the_llms_answer(
    tmp_path: pathlib.Path, is_stream: bool, said: str, agrees: bool
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            await at_stage(run, SHADOW)
            run.engine.text = said
            reply = await run.ask(stream=is_stream)
            assert reply.headers["x-understudy-route"] == "llm" and LLM_TEXT[4:] in reply.text
            assert reply.headers["x-understudy-reason"] == SHADOW_REASON
            shadow = await compared(run)
            assert shadow is not None and shadow.route is not None and shadow.message is not None
            (client,) = [call for call in await run.captured() if not call.audit_of]
            assert (shadow.audit_of, client.served_by) == (client.call_id, "llm")
            assert (shadow.route.action, shadow.route.reason, shadow.route.agrees) == ("shadow", KEPT, agrees)
            assert (shadow.served_by, shadow.message["content"], shadow.is_reference) == ("specialist", said, False)
            assert (shadow.request, shadow.session_id) == (client.request, client.session_id)
            ((found,), _) = CallReader(run.store).read(Cursor())
            assert (found.action, found.agrees, found.specialist) == ("shadow", agrees, make_specialist().name)
            assert find_problem(shadow, keep_faces_person=True, max_prompt_chars=10_000), "no target is made of it"

    asyncio.run(scenario())


def test_a_shadow_below_the_threshold_is_told_as_not_kept(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            await at_stage(run, SHADOW)
            run.engine.confidence = 0.5
            await run.ask()
            shadow = await compared(run)
            assert shadow is not None and shadow.route is not None
            assert (shadow.route.agrees, shadow.route.reason) == (None, "confidence below threshold")
            ((found,), _) = CallReader(run.store).read(Cursor())
            assert found.agrees is None

    asyncio.run(scenario())


async def _is_away() -> EngineAnswer:
    raise ConnectionError("no replica")


async def _does_not_fit() -> EngineAnswer:
    raise InputError("prompt: too long")


@pytest.mark.parametrize(("fault", "reason"), [(_is_away, "failed"), (_does_not_fit, "not for it")])
def test_a_shadow_that_fails_is_counted_and_no_client_notices(tmp_path: pathlib.Path, fault: Any, reason: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            await at_stage(run, SHADOW)
            run.engine.answer_with = fault
            assert (await run.ask()).status_code == 200
            assert await compared(run) is None
            assert run.core.meter.counts[(MISSED, reason)] == 1

    asyncio.run(scenario())


def test_a_hanging_engine_holds_up_no_client_and_shadows_end_with_the_gateway(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            await at_stage(run, SHADOW)
            entered = asyncio.Event()

            async def hang() -> EngineAnswer:
                entered.set()
                await asyncio.sleep(3600)
                return engine_answer("never", 1.0)

            run.engine.answer_with = hang
            replies = await asyncio.gather(*(run.ask() for _ in range(20)))
            assert {reply.status_code for reply in replies} == {200}
            await entered.wait()
            assert run.core.meter.counts[(MISSED, "busy")] == 4
        assert run.core.meter.counts[(MISSED, "closed")] == 16

    asyncio.run(scenario())


def test_an_llm_that_fails_is_not_compared(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            await at_stage(run, SHADOW)
            run.llm.status = 400
            await run.ask()
            await asyncio.sleep(0)
            assert run.engine.num_asked == 0 and run.core.meter.total(SHADOWS) + run.core.meter.total(MISSED) == 0

    asyncio.run(scenario())


def test_a_canary_answers_its_sessions_alone_and_is_watched_more_closely(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=0.0)) as run:
            await at_stage(run, Rollout(stage="canary", canary_share=0.5, audit_share=1.0))
            routes: dict[str, set[str]] = {}
            for number in range(24):
                session = f"session-{number % 12}"
                reply = await run.http.post(PATH, json=REQUEST, headers={"x-session-id": session})
                routes.setdefault(session, set()).add(reply.headers["x-understudy-route"])
                if reply.headers["x-understudy-route"] == "llm":
                    assert reply.headers["x-understudy-reason"] == CANARY_REASON
            assert all(len(found) == 1 for found in routes.values()), "a session changes sides"
            assert set().union(*routes.values()) == {"llm", "accept"}
            kept = 2 * sum(found == {"accept"} for found in routes.values())
            async with asyncio.timeout(5):
                while run.core.meter.total("understudy_audits_total") < kept:
                    await asyncio.sleep(0.01)
            audits = [call for call in await run.captured() if call.audit_of]
            assert len(audits) == kept and not any(call.is_reference for call in audits), "the stream stays uniform"

    asyncio.run(scenario())


def test_moved_to_live_a_specialist_answers_everybody(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            await at_stage(run, SHADOW)
            await at_stage(run, None)
            assert (await run.ask()).headers["x-understudy-route"] == "accept"
            assert run.core.meter.total(SHADOWS) == 0

    asyncio.run(scenario())


def test_a_shadow_s_judge_takes_none_of_the_specialist_s_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("serving.shadow.time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    async def scenario() -> None:
        plain = make_specialist()
        judged = plain.model_copy(
            update={
                "gate": plain.gate.model_copy(update={"text_grader": TextGrader(name="judge")}),
                "prompt_format": {**plain.prompt_format, "answer_kind": "text"},
            }
        )
        async with gateway(tmp_path, judged, prices=PriceConfig(replica_usd_per_hour=3600.0)) as run:
            await at_stage(run, SHADOW)

            def answer(request: dict[str, Any]) -> dict[str, Any]:
                if "first" not in request["messages"][-1]["content"]:
                    return {"role": "assistant", "content": LLM_TEXT}
                now[0] += 10
                return {"role": "assistant", "content": '{"verdict": "same"}'}

            run.llm.answer_with = answer
            await run.ask()
            call = await compared(run)
            assert call is not None and call.route is not None and call.route.agrees
            assert (now[0], call.cost_usd) == (20, 0)

    asyncio.run(scenario())
