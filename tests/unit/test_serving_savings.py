"""What kept answers save is told from what the LLM asked for the same task, and never flattered."""

from __future__ import annotations

import asyncio
import pathlib
from typing import Any

import pytest
from fakes import gateway

from cluster.prices import PriceConfig
from cluster.records import AgentCall, RouteDecision
from cluster.telemetry import Meter
from serving.audit import AuditConfig
from serving.savings import AVOIDED, ENOUGH_AUDITS, SPENT, Savings


def call(action: str, task: str | None = "t", **facts: Any) -> AgentCall:
    route = RouteDecision(action=action, reason="r", task_id=task)
    known = {"call_id": "c", "ts": 0.0, "client_id": "b", "agent": "a", "session_id": "s", "step": 0, "request": {}}
    return AgentCall.model_validate(
        {**known, "response": None, "usage": {}, "latency_ms": 1.0, "status": 200, "route": route, **facts}
    )


def kept(cost_usd: float = 0.0) -> AgentCall:
    return call("accept", served_by="specialist", cost_usd=cost_usd)


def totals(meter: Meter) -> tuple[float, float]:
    return meter.total(AVOIDED), meter.total(SPENT)


def test_kept_answers_are_worth_what_the_llm_asked_for_the_task_s_others() -> None:
    meter = Meter()
    savings = Savings(meter)
    savings.note(kept(0.1), None)
    assert totals(meter) == (0, pytest.approx(0.1))  # no price is known yet
    savings.note(call("escalate", cost_usd=5.1), 5.0)
    savings.note(kept(0.1), None)
    assert totals(meter) == pytest.approx((10.0, 0.3))
    savings.note(call("llm", "other", cost_usd=1.0), 1.0)
    savings.note(call("llm", None, cost_usd=1.0), 1.0)
    savings.note(call("llm", status=500, cost_usd=9.0), 9.0)
    savings.note(kept(), None)
    assert totals(meter) == pytest.approx((15.0, 0.3))


def test_enough_audits_alone_tell_the_price_and_are_paid_from_what_is_saved() -> None:
    meter = Meter()
    savings = Savings(meter)
    savings.note(call("escalate", cost_usd=100.0), 100.0)
    for _ in range(ENOUGH_AUDITS):
        savings.note(call("audit", audit_of="c", cost_usd=2.0), 2.0)
    savings.note(kept(), None)
    assert totals(meter) == pytest.approx((2.0, 2.0 * ENOUGH_AUDITS))


def test_a_gateway_tells_viewers_what_it_saved_and_what_that_cost(tmp_path: pathlib.Path) -> None:
    prices = PriceConfig(replica_usd_per_hour=36.0)

    async def scenario() -> None:
        async with gateway(tmp_path, prices=prices, audit=AuditConfig(share=1.0)) as run:
            for _ in range(3):
                assert (await run.ask()).headers["x-understudy-route"] == "accept"
            await run.core.auditor.close()
            await run.ask()
            price = 100 * 1e-6 + 10 * 2e-6
            own = sum(one.cost_usd or 0.0 for one in await run.captured() if one.served_by == "specialist")
            assert run.core.meter.total(AVOIDED) == pytest.approx(4 * price)
            assert run.core.meter.total(SPENT) == pytest.approx(3 * price + own) and own > 0

    asyncio.run(scenario())
