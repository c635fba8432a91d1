"""A specialist's life behind one gateway and one steward: shadow, canary, live, gone wrong, demoted; no client sees any of it."""

from __future__ import annotations

import asyncio
import pathlib
import time

from fakes import LLM_TEXT, PATH, REQUEST, Running, gateway

from cluster import registry
from cluster.events import read_events
from cluster.records import Rollout
from serving.audit import AuditConfig
from serving.steward import Steward, StewardConfig

EVERY = AuditConfig(share=1.0)


async def talk(run: Running, steward: Steward, prefix: str, number: int) -> dict[str, int]:
    """Calls of sessions of their own, then one look of the steward and one of the gateway; how often each route was taken."""
    routes: dict[str, int] = {}
    for k in range(number):
        reply = await run.http.post(PATH, json=REQUEST, headers={"x-session-id": f"{prefix}-{k}"})
        assert reply.status_code == 200, reply.text
        route = reply.headers["x-understudy-route"]
        routes[route] = routes.get(route, 0) + 1
        # Background comparisons of this call, before the next one begins.
        async with asyncio.timeout(5):
            while run.core.auditor._tasks or run.core.shadows._tasks:
                await asyncio.sleep(0)
    await run.core.capture.flush()
    steward.step(time.time())
    await run.core.table.refresh()
    return routes


def stage(run: Running) -> str:
    found = registry.current(run.store)
    assert found is not None
    return found[1].stage_of("triage") if "triage" in found[1].specialists else "refused"


def test_from_shadow_to_live_and_back_to_the_llm_without_a_failed_call(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, audit=EVERY) as run:
            run.engine.text = LLM_TEXT
            found = registry.current(run.store)
            assert found is not None
            begin = registry.derive(*found, rollout={"triage": Rollout(stage="shadow", canary_share=0.5)})
            registry.promote(run.store, registry.publish_release(run.store, begin))
            await run.core.table.refresh()
            steward = Steward(run.store, StewardConfig(session_idle_s=0.0))
            steward.step(time.time())

            assert await talk(run, steward, "shadow", 80) == {"llm": 80} and stage(run) == "canary"
            routes = await talk(run, steward, "canary", 30)
            assert min(routes.values()) > 4 and set(routes) == {"llm", "accept"} and stage(run) == "canary"
            await talk(run, steward, "more", 170)
            assert stage(run) == "live"
            assert await talk(run, steward, "live", 10) == {"accept": 10}

            run.engine.text = "something else"
            assert await talk(run, steward, "wrong", 30) == {"accept": 30} and stage(run) == "refused"
            reply = await run.ask()
            assert reply.headers["x-understudy-route"] == "llm" and LLM_TEXT in reply.text
            assert reply.headers["x-understudy-reason"].startswith("demoted: 30 of ")
            assert [(event.kind, event.by) for event in read_events(run.store)[2:]] == [
                ("advance", "steward"),
                ("advance", "steward"),
                ("demote", "steward"),
            ]
            assert run.core.meter.total("understudy_requests_failed_total") == 0

    asyncio.run(scenario())
