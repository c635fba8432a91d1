"""serving/audit.py behind a gateway: who is drawn, what is captured, and that no client waits or sees a failure."""

from __future__ import annotations

import asyncio
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from fakes import LLM_TEXT, Running, gateway

from cluster.access import Pseudonyms
from cluster.store import Store
from cluster.telemetry import Meter
from cluster.upstream import Upstream, UpstreamConfig
from serving.audit import AuditConfig, Auditor
from serving.capture import Capture, CaptureConfig
from serving.fallback import FallbackLLM

ALL = AuditConfig(share=1.0)
AUDITS, MISSED = "understudy_audits_total", "understudy_audits_missed_total"


def auditor(share: float, tmp_path: pathlib.Path) -> Auditor:
    fallback = FallbackLLM([Upstream(UpstreamConfig(base_url="http://127.0.0.1:9/v1"))])
    capture = Capture(Store(str(tmp_path)), CaptureConfig())
    return Auditor(AuditConfig(share=share), fallback, capture, Pseudonyms(b"k" * 32), Meter())


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def audited(run: Running) -> None:
    await until(lambda: run.core.meter.total(AUDITS) + run.core.meter.total(MISSED))


def test_the_share_is_uniform_over_ids_and_grows_by_addition(tmp_path: pathlib.Path) -> None:
    none, small, large, every = (auditor(share, tmp_path) for share in (0.0, 0.02, 0.2, 1.0))
    ids = [uuid.UUID(int=i).hex for i in range(50_000)]
    assert not any(map(none.is_drawn, ids)) and all(map(every.is_drawn, ids))
    drawn = set(filter(small.is_drawn, ids))
    # Binomial with mean 1,000: five standard deviations are 157.
    assert abs(len(drawn) - 1_000) < 157
    assert drawn <= set(filter(large.is_drawn, ids)) and drawn == set(filter(small.is_drawn, ids))


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_kept_answer_is_compared_and_the_llms_is_captured_as_a_call_of_its_own(
    tmp_path: pathlib.Path, is_stream: bool
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=ALL) as run:
            run.llm.text = "refund"
            reply = await run.ask(stream=is_stream, stream_options={"include_usage": True})
            assert reply.headers["x-understudy-route"] == "accept" and "audit" not in str(reply.headers)
            await audited(run)
            assert run.core.meter.counts[(AUDITS, "triage", "true")] == 1
            (sent,) = run.llm.requests
            assert not {"stream", "stream_options"} & sent.keys()
            kept, audit = sorted(await run.captured(), key=lambda call: call.audit_of is not None)
            assert (kept.call_id, kept.served_by, kept.is_reference) == (audit.audit_of, "specialist", True)
            assert (audit.served_by, audit.status, audit.is_reference) == ("llm", 200, True)
            assert audit.route is not None and kept.route is not None
            assert audit.route.action == "audit" and audit.route.specialist == kept.route.specialist
            assert (audit.route.agrees, kept.route.agrees) == (True, None)
            assert audit.cost_usd == pytest.approx(120e-6) and audit.usage.prompt_tokens == 100
            same = ("request", "session_id", "client_id", "agent", "step", "ts")
            assert all(getattr(audit, name) == getattr(kept, name) for name in same)

    asyncio.run(scenario())


def test_a_disagreement_is_counted_as_one(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=ALL) as run:
            await run.ask()
            await audited(run)
            assert run.core.meter.counts[(AUDITS, "triage", "false")] == 1

    asyncio.run(scenario())


def test_a_call_that_the_llm_answers_anyway_is_marked_and_not_asked_twice(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=ALL) as run:
            run.engine.confidence = 0.5
            await run.ask()
            (call,) = await run.captured()
            assert call.is_reference and call.audit_of is None and len(run.llm.requests) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(("status", "reason"), [(503, "failed"), (400, "refused")])
def test_a_failing_llm_is_counted_and_no_client_notices(tmp_path: pathlib.Path, status: int, reason: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=ALL) as run:
            run.llm.status = status
            assert (await run.ask()).status_code == 200
            await audited(run)
            assert run.core.meter.counts[(MISSED, reason)] == 1
            assert [call.status for call in await run.captured()] == [200]

    asyncio.run(scenario())


def test_a_body_that_is_no_completion_is_counted_as_missed(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=ALL) as run:
            run.llm.body = {"choices": {"0": "no list"}}
            assert (await run.ask()).status_code == 200
            await audited(run)
            assert run.core.meter.counts[(MISSED, "no answer")] == 1
            assert [call.message for call in await run.captured() if call.audit_of] == [None]

    asyncio.run(scenario())


def test_clients_do_not_wait_and_audits_beyond_the_bound_are_missed(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0, max_in_flight=2)) as run:
            run.llm.may_answer.clear()
            async with asyncio.timeout(3):
                replies = [await run.ask() for _ in range(5)]
            assert {reply.headers["x-understudy-route"] for reply in replies} == {"accept"}
            assert run.core.meter.counts[(MISSED, "busy")] == 3
            run.llm.may_answer.set()
            await until(lambda: run.core.meter.total(AUDITS) == 2)
            assert len(await run.captured()) == 7

    asyncio.run(scenario())


@pytest.mark.parametrize(("wait_s", "is_captured"), [(5.0, True), (0.0, False)])
def test_closing_waits_for_audits_or_cancels_them(tmp_path: pathlib.Path, wait_s: float, is_captured: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0, close_timeout_s=wait_s)) as run:
            run.llm.may_answer.clear()
            await run.ask()
            await until(lambda: run.llm.requests)
            asyncio.get_running_loop().call_later(0.1, run.llm.may_answer.set)
        texts = [(call.message or {})["content"] for call in await run.captured()]
        assert sorted(texts) == (sorted([LLM_TEXT, "refund"]) if is_captured else ["refund"])
        assert run.core.meter.counts[(MISSED, "closed")] == (0 if is_captured else 1)

    asyncio.run(scenario())
