"""The reference stream within its money: paced over the day, and drawn at a share that only the past decides."""

from __future__ import annotations

import asyncio
import pathlib
import random
from typing import Any

import pytest
from fakes import LLM_TEXT, Running, gateway, tool_message

from cluster.records import TextGrader
from serving.audit import AuditConfig
from serving.audit_budget import AuditBudget
from serving.savings import SPENT

MISSED = "understudy_audits_missed_total"
MINUTE = 60.0


def spend_a_day(max_usd: float, calls_per_minute: int, usd: float, seed: int = 0) -> tuple[AuditBudget, list[float]]:
    """A day of audits of `usd` each, drawn at the budget's factor; what each minute cost."""
    now = [0.0]
    budget, draw, spent = AuditBudget(max_usd, lambda: now[0]), random.Random(seed), []
    for minute in range(24 * 60):
        before = budget.spent_usd
        for call in range(calls_per_minute):
            now[0] = minute * MINUTE + call * MINUTE / calls_per_minute
            if draw.random() < budget.factor and not budget.is_spent:
                budget.add(usd * budget.factor)
        spent.append(budget.spent_usd - before)
    return budget, spent


@pytest.mark.parametrize(("calls", "usd"), [(20, 0.01), (3, 0.05), (60, 0.001)])
def test_a_day_costs_no_more_than_it_may_and_is_audited_to_its_end(calls: int, usd: float) -> None:
    budget, spent = spend_a_day(10.0, calls, usd)
    assert budget.spent_usd <= 10.0 + usd
    assert budget.spent_usd > 8.0, "what is allowed is used"
    evening = sum(spent[-6 * 60 :])
    assert 2.0 < evening < 3.0, "a quarter of the day gets about a quarter of its money"


def test_within_its_money_every_drawn_call_is_audited() -> None:
    budget, spent = spend_a_day(10.0, 2, 0.001)
    assert budget.factor == 1.0 and sum(spent) == pytest.approx(2 * 24 * 60 * 0.001)


def test_the_share_of_a_minute_is_known_before_it_and_nothing_in_it_changes_it() -> None:
    now = [0.0]
    budgets = [AuditBudget(1.0, lambda: now[0]) for _ in range(2)]
    for minute in range(30):
        now[0] = minute * MINUTE
        begun = {budget.factor for budget in budgets}
        assert len(begun) == 1
        for budget, usd in zip(budgets, (0.002, 0.004) if minute == 29 else (0.002, 0.002), strict=True):
            budget.add(usd * budget.factor)
            assert budget.factor in begun
    now[0] += MINUTE
    assert budgets[0].factor > budgets[1].factor, "the next minute knows"


def test_a_new_day_has_money_again_and_no_bound_bounds_nothing() -> None:
    now = [86_000.0]
    budget, free = AuditBudget(1.0, lambda: now[0]), AuditBudget(None, lambda: now[0])
    budget.add(2.0)
    free.add(1e9)
    assert budget.is_spent and not free.is_spent and free.factor == 1.0
    now[0] = 86_460.0
    assert not budget.is_spent and budget.spent_usd == 0.0


async def _done(run: Running) -> None:
    async with asyncio.timeout(5):
        while not run.core.meter.total("understudy_audits_total") + run.core.meter.total(MISSED):
            await asyncio.sleep(0.01)


def test_what_audits_cost_is_counted_and_an_empty_purse_asks_no_llm(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0, max_usd_per_day=1e-6)) as run:
            await run.ask()
            await _done(run)
            meter = run.core.meter
            assert meter.total("understudy_audit_spend_usd_total") == pytest.approx(120e-6)
            assert run.core.auditor.budget.spent_usd == pytest.approx(120e-6) and run.core.auditor.budget.is_spent
            assert (await run.ask()).status_code == 200, "clients go on"
            await asyncio.sleep(0)
            assert meter.counts[(MISSED, "budget")] == 1 and len(run.llm.requests) == 1

    asyncio.run(scenario())


def _let_judge(run: Running) -> None:
    """An LLM compares what the specialist says from now on."""
    specialist = next(iter(run.core.table.snapshot.specialists.values()))
    gate = specialist.gate.model_copy(update={"text_grader": TextGrader(name="judge")})
    judged = specialist.model_copy(
        update={"gate": gate, "prompt_format": {**specialist.prompt_format, "answer_kind": "text"}}
    )
    run.core.table.snapshot.specialists[judged.task_id] = judged


@pytest.mark.parametrize(("verdict", "agrees", "num_asked"), [("same", True, 3), ("second", False, 3), ("oh", None, 2)])
def test_a_specialist_whose_gate_has_a_judge_is_audited_by_the_judge(
    tmp_path: pathlib.Path, verdict: str, agrees: bool | None, num_asked: int
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0)) as run:
            _let_judge(run)
            asked = []

            def answer(request):
                asked.append(request)
                is_judge = "first" in request["messages"][-1]["content"]
                return {"role": "assistant", "content": f'{{"verdict": "{verdict}"}}' if is_judge else LLM_TEXT}

            run.llm.answer_with = answer
            await run.ask()
            await _done(run)
            said = {True: "true", False: "false"}
            if agrees is None:
                assert run.core.meter.counts[(MISSED, "not judged")] == 1
            else:
                assert run.core.meter.counts[("understudy_audits_total", "triage", said[agrees])] == 1
            assert len(asked) == num_asked, "the audit, and the judge in both orders"
            meter = run.core.meter
            spent = meter.total("understudy_audit_spend_usd_total")
            assert spent == pytest.approx(num_asked * 120e-6) == meter.total(SPENT), "savings pay for the judge as well"

    asyncio.run(scenario())


def test_a_judge_that_refuses_costs_nothing(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0)) as run:
            _let_judge(run)

            def answer(request):
                run.llm.answer_with, run.llm.status = None, 400
                return {"role": "assistant", "content": LLM_TEXT}

            run.llm.answer_with = answer
            await run.ask()
            await _done(run)
            assert run.core.meter.counts[(MISSED, "not judged")] == 1 and len(run.llm.requests) == 2
            assert run.core.auditor.budget.spent_usd == pytest.approx(120e-6)

    asyncio.run(scenario())


def test_an_audit_that_the_llm_read_and_did_not_answer_in_time_is_paid_from_the_budget(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0), llm_timeout_s=0.1) as run:
            run.llm.may_answer.clear()
            await run.ask()
            await _done(run)
            meter = run.core.meter
            assert meter.counts[(MISSED, "failed")] == 1
            paid = meter.total("understudy_llm_spend_usd_total")
            assert paid > 0 and run.core.auditor.budget.spent_usd == paid == meter.total(SPENT)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "I cannot help with that."},
        tool_message(("send", {"to": "billing"})),
    ],
)
def test_no_judge_is_asked_whether_text_agrees_with_what_is_none(tmp_path: pathlib.Path, said: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0)) as run:
            _let_judge(run)
            run.llm.answer_with = lambda request: {"role": "assistant", **said}
            await run.ask()
            await _done(run)
            assert run.core.meter.counts[("understudy_audits_total", "triage", "false")] == 1
            assert len(run.llm.requests) == 1

    asyncio.run(scenario())
