"""The serving graph with an engine that is none: the gateway as it is, a stub in the place of vLLM. For tests of changes.

The stub answers at once, names the adapter it was asked for, and takes its confidence from adapter and request, so that a
client can tell from an answer alone which release's adapter and threshold made it. It keeps as many adapters as it was
told and loads what it has not. Whatever is measured with it says nothing of an engine's speed.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from cluster.engine import EngineAnswer
from cluster.errors import EngineError
from cluster.prompts import PromptFormat
from cluster.session import connect, let_ingress_listen
from jobs.bench.processes import free_port
from jobs.bench.stage import BASE, FINGERPRINT
from serving.app import ServeArgs, bind_gateway
from serving.specialist import router_options

APP = "stub"
LOAD_S = 0.2
BROKEN, SLOW = "broken", "slow"
"""In an adapter's path: one that does not load, one whose answers take SLOW_S."""
SLOW_S = 3.0
_MARK = re.compile(r"#(\d+)#")


class StubEngine:
    """An Engine; also says what it has done, and dies on request."""

    def __init__(self, max_adapters: int) -> None:
        self._max_adapters = max_adapters
        self._resident: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._num_loads = self._num_cold = self._num_asked = 0

    async def fingerprint(self) -> str:
        return FINGERPRINT

    async def load(self, adapter: str) -> None:
        if BROKEN in adapter:
            raise EngineError(f"{adapter}: cannot be loaded")
        if adapter not in self._resident:
            await asyncio.sleep(LOAD_S)
            self._num_loads += 1
        self._resident[adapter] = None
        self._resident.move_to_end(adapter)
        while len(self._resident) > self._max_adapters:
            self._resident.popitem(last=False)

    async def answer(
        self,
        adapter: str | None,
        prompt_format: PromptFormat,
        request: dict[str, Any],
        max_answer_tokens: int,
        stop_below: float = 0.0,
    ) -> EngineAnswer:
        """The text that this adapter gives to the number in the request's mark; an adapter that is not resident is loaded."""
        assert adapter is not None
        self._num_asked += 1
        if adapter not in self._resident:
            self._num_cold += 1
        await self.load(adapter)
        if SLOW in adapter:
            await asyncio.sleep(SLOW_S)
        found = _MARK.search(request["messages"][-1]["content"])
        number = int(found[1]) if found else 0
        text = stub_text(adapter, number)
        return EngineAnswer(
            message={"role": "assistant", "content": text},
            text=text,
            confidence=stub_confidence(adapter, number),
            prompt_tokens=10,
            completion_tokens=2,
            finish_reason="stop",
        )

    async def facts(self) -> dict[str, int]:
        """Adapters loaded, answers that had to load one first, answers, and this replica's process."""
        return {
            "num_loads": self._num_loads,
            "num_cold": self._num_cold,
            "num_asked": self._num_asked,
            "pid": os.getpid(),
        }


def stub_text(adapter: str, number: int) -> str:
    """What the stub answers to the request that holds `#number#`."""
    return f"{adapter} #{number}#"


def stub_confidence(adapter: str, number: int) -> float:
    """0.05 above the threshold in the adapter's name (`.../tTT-NAME`, in hundredths) for odd numbers, else below it."""
    found = re.search(r"/t(\d\d)-", adapter)
    threshold = int(found[1]) / 100 if found else 0.5
    return round(threshold + (0.05 if number % 2 else -0.05), 2)


def bind_stub_graph(args: ServeArgs, num_engines: int = 1, engine_class: type[StubEngine] = StubEngine) -> Any:
    """The graph of serving/app.py, with stubs for the engine of the one base that they serve."""
    from ray import serve

    engine = serve.deployment(
        engine_class,
        name="stub-engine",
        num_replicas=num_engines,
        max_ongoing_requests=1_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1.0,
        **router_options(args.specialists),
    )
    return bind_gateway(args, {BASE: engine.bind(args.specialists.max_adapters)}, {})


@contextlib.contextmanager
def stub_endpoint(args: ServeArgs, num_engines: int = 1) -> Iterator[str]:
    """The graph on a Ray of its own, at the address that it gives; all is gone with the block."""
    import ray
    from ray import serve

    port = free_port()
    let_ingress_listen(port)
    connect()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
        serve.run(bind_stub_graph(args, num_engines), name=APP, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def stub_facts() -> dict[str, int]:
    """What a stub engine of the running graph has done."""
    from ray import serve

    return serve.get_deployment_handle("stub-engine", APP).facts.remote().result(timeout_s=10.0)
