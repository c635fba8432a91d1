"""Our choice of replicas inside a real Ray Serve: two replicas with more adapters than either has room for."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.prompts import PromptFormat
from jobs.bench.mixed_adapters import count_loads
from jobs.bench.stub_graph import bind_stub
from serving.app import ServeArgs
from serving.specialist import ServeEngine

pytestmark = pytest.mark.integration

APP, ROOM = "router", 3


def test_each_adapter_stays_on_one_replica_and_every_replica_can_be_asked_what_it_loaded(
    ray_cluster: None, serve_port: int
) -> None:
    from ray import serve

    specialists = {"max_adapters": ROOM, "request_router": "adapter"}
    args = ServeArgs.model_validate(
        {"store": "unused", "upstream": [{"base_url": "http://127.0.0.1:1/v1"}], "specialists": specialists}
    )
    handle = serve.run(bind_stub(args, 2), name=APP, route_prefix=None)
    prompt_format = PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100)
    adapters = [f"adapters/t50-{number}" for number in range(2 * ROOM)]
    calls = random.Random(0).choices(adapters, k=60)

    async def ask() -> list[str]:
        engine = ServeEngine(handle)
        # Each adapter once, as a gateway does it before a release takes traffic.
        for adapter in adapters:
            await engine.load(adapter)
        request = {"messages": [{"role": "user", "content": "#1#"}]}
        return [(await engine.answer(adapter, prompt_format, request, 8)).text for adapter in calls]

    try:
        assert asyncio.run(ask()) == [f"{adapter} #1#" for adapter in calls]
        assert count_loads(handle, 2) == 2 * ROOM, "an adapter was loaded where another one had room for it"
    finally:
        serve.delete(APP)
