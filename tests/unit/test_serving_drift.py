"""serving/drift.py: traffic that looks otherwise has more calls audited, and nothing else happens."""

from __future__ import annotations

import asyncio
import pathlib
import uuid

import numpy as np
import pytest
from fakes import REQUEST, gateway, make_specialist, promote_release

from cluster import registry
from cluster.calls import write_calls
from cluster.records import AgentCall, RouteDecision
from cluster.store import Store
from serving.audit import AuditConfig
from serving.drift import AUDIT_SHARES_FILE, BASELINE_CALLS, BLOCK_CALLS, Asked, Drift, observe, read_audit_shares
from serving.evidence import CallReader, Cursor
from serving.steward import Steward, StewardConfig

NAME = make_specialist().name
LATER = 1e6


def asked(number: int, *, begin: float, escalated: float = 0.2, mean: float = 0.8, seed: int = 0) -> list[Asked]:
    generator = np.random.default_rng(seed)
    confidences = np.clip(generator.normal(mean, 0.1, number), 0, 1).tolist()
    is_escalated = (generator.random(number) < escalated).tolist()
    return [Asked(begin + k, NAME, is_escalated[k], confidences[k]) for k in range(number)]


def test_steady_traffic_is_hardly_ever_suspected() -> None:
    num_suspected = 0
    for seed in range(20):
        drift = observe(Drift(), asked(BASELINE_CALLS + 20 * BLOCK_CALLS, begin=1.0, seed=seed), LATER)
        num_suspected += drift.is_suspected
    assert num_suspected <= 1


@pytest.mark.parametrize("change", [{"escalated": 0.4}, {"escalated": 0.05}, {"mean": 0.7}, {"mean": 0.9}])
def test_a_change_is_suspected_within_two_blocks_and_forgotten_after_it_ended(change: dict[str, float]) -> None:
    drift = observe(Drift(), asked(BASELINE_CALLS + BLOCK_CALLS // 2, begin=1.0), LATER)
    drift = observe(drift, asked(2 * BLOCK_CALLS, begin=10_000.0, seed=1, **change), LATER)
    assert drift.is_suspected
    calm = observe(drift, asked(22 * BLOCK_CALLS, begin=20_000.0, seed=2), LATER)
    assert not calm.is_suspected


def test_calls_that_come_again_count_once_and_few_calls_suspect_nothing() -> None:
    calls = asked(900, begin=1.0)
    drift = observe(observe(Drift(), calls, LATER), calls, LATER)
    assert drift.baseline.num_calls == 900 and not drift.is_suspected
    assert observe(drift, [], LATER) is drift
    ahead = observe(drift, [Asked(LATER + 1, NAME, False, 0.5)], LATER)
    assert observe(ahead, asked(90, begin=2_000.0), LATER).baseline.num_calls == 990, "a clock ahead hides no others"
    equal = [one._replace(confidence=1.0, is_escalated=False) for one in asked(2_000, begin=1.0)]
    assert not observe(Drift(), equal, LATER).is_suspected


def captured(calls: list[Asked]) -> list[AgentCall]:
    return [
        AgentCall(
            call_id=uuid.uuid4().hex,
            ts=one.ts,
            client_id="c",
            agent="a",
            session_id=f"s{one.ts}",
            step=0,
            request=REQUEST,
            response=None,
            route=RouteDecision(
                action="escalate" if one.is_escalated else "accept",
                reason="",
                task_id="triage",
                specialist=NAME,
                confidence=one.confidence,
            ),
        )
        for one in calls
    ]


def test_the_steward_raises_the_share_and_demotes_nobody_for_it(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    sha = promote_release(store, tmp_path / "scratch", make_specialist())
    steward = Steward(store, StewardConfig(raised_audit_share=0.3))
    write_calls(store, captured(asked(BASELINE_CALLS, begin=1.0)))
    steward.step(5_000.0)
    assert read_audit_shares(store) == {}
    write_calls(store, captured(asked(BLOCK_CALLS, begin=2_000.0, escalated=0.6)))
    steward.step(5_000.0)
    assert read_audit_shares(store) == {"triage": 0.3} and registry.current_sha(store) == sha
    # Told once: a restart knows it, and a task without a specialist is no more of its business.
    Steward(store, StewardConfig(raised_audit_share=0.3)).step(5_000.0)
    assert read_audit_shares(store) == {"triage": 0.3}
    found = registry.current(store)
    assert found is not None
    registry.promote(store, registry.publish_release(store, registry.derive(*found, refuse={"triage": "withdrawn"})))
    steward.step(5_000.0)
    assert read_audit_shares(store) == {}


def test_a_gateway_follows_the_shares_and_leaves_the_reference_stream_alone(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=0.0)) as run:
            await run.ask()
            run.store.write_json(AUDIT_SHARES_FILE, {"triage": 1.0, "other": 1.0})
            await run.core.table.refresh()
            await run.ask()
            async with asyncio.timeout(5):
                while not run.core.meter.total("understudy_audits_total"):
                    await asyncio.sleep(0.01)
            calls = await run.captured()
            assert len([call for call in calls if call.audit_of]) == 1 and not any(call.is_reference for call in calls)

    asyncio.run(scenario())


def test_what_clients_ask_of_a_specialist_by_its_name_is_no_drift_and_not_of_the_reference_stream(
    tmp_path: pathlib.Path,
) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=AuditConfig(share=1.0), llm_model="llm-1") as run:
            for confidence in (0.99, 0.5):
                run.engine.confidence = confidence
                for model in ({}, {"model": f"understudy/{make_specialist().task_id}"}):
                    assert (await run.ask(**model)).status_code == 200
            calls = [call for call in await run.captured() if call.route and not call.audit_of]
            named = [call for call in calls if call.route and call.route.is_named]
            assert len(calls) == 4 and [call.route and call.route.action for call in named] == ["accept", "escalate"]
            assert [call.is_reference for call in calls if call not in named] == [True, True]
            assert not any(call.is_reference for call in named)
            _, asked_of = CallReader(run.store).read(Cursor())
            assert sorted(one.is_escalated for one in asked_of) == [False, True], "those that the router sent"

    asyncio.run(scenario())


def test_shares_that_are_none_stop_no_release(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            run.store.write_bytes(AUDIT_SHARES_FILE, b"oh")
            other = promote_release(run.store, tmp_path / "scratch", make_specialist(), snapshot="two")
            await run.core.table.refresh()
            assert run.core.table.snapshot.release == other

    asyncio.run(scenario())
