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
from collections.abc import Callable, Iterator
from typing import Any

from cluster.engine import EngineAnswer
from cluster.errors import EngineError
from cluster.prompts import PromptFormat
from cluster.session import connect, let_ingress_listen, listen_on_node_alone
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
        listen_on_node_alone()
        self._max_adapters = max_adapters
        self._resident: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._num_loads = self._num_cold = self._num_asked = self._num_left = 0

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
            try:
                await asyncio.sleep(SLOW_S)
            except asyncio.CancelledError:
                self._num_left += 1
                raise
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
        """Adapters loaded, answers that had to load one first, answers, those that nobody waited for, and this replica's
        process."""
        return {
            "num_loads": self._num_loads,
            "num_cold": self._num_cold,
            "num_asked": self._num_asked,
            "num_left": self._num_left,
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


def bind_stub(args: ServeArgs, num_engines: int = 1, engine_class: type[StubEngine] = StubEngine) -> Any:
    """Stubs for as many adapters as the engines of `args` have room for."""
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
    return engine.bind(args.specialists.num_resident)


def bind_stub_graph(args: ServeArgs, num_engines: int = 1, engine_class: type[StubEngine] = StubEngine) -> Any:
    """The graph of serving/app.py, with stubs for the engine of the one base that they serve."""
    return bind_gateway(args, {BASE: bind_stub(args, num_engines, engine_class)}, {})


@contextlib.contextmanager
def stub_endpoint(args: ServeArgs, bind: Callable[[ServeArgs], Any] = bind_stub) -> Iterator[str]:
    """The graph of serving/app.py on a Ray of its own, at the address that it gives; all is gone with the block.

    Args:
        bind: gives what stands in for the engine of the one base.
    """
    import ray
    from ray import serve

    port = free_port()
    let_ingress_listen(port)
    connect()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
        serve.run(bind_gateway(args, {BASE: bind(args)}, {}), name=APP, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def stub_facts() -> dict[str, int]:
    """What a stub engine of the running graph has done."""
    from ray import serve

    return serve.get_deployment_handle("stub-engine", APP).facts.remote().result(timeout_s=10.0)
