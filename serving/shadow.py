"""A specialist in its shadow stage is asked what the LLM has answered, off the request path; the comparison is captured.

The specialist's answer becomes a call of its own that names the client's (`audit_of`, action `shadow`), with whether
it would be kept and whether it then agrees in its metadata. Nothing of it is ever shown to a client, learned from or
certified on. The counterpart of serving/audit.py, where the client has the specialist's answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cluster.access import Pseudonyms
from cluster.engine import Engine, EngineAnswer
from cluster.errors import InputError
from cluster.prices import PriceConfig, seconds_cost_usd
from cluster.prompts import PromptFormat
from cluster.records import RouteDecision, Specialist, Usage
from cluster.servable import ask_engine
from cluster.telemetry import Meter
from serving import policy
from serving.capture import Capture
from serving.evidence import KEPT
from serving.openai_wire import completion_body
from serving.pending import PendingCall

Agrees = Callable[
    [PendingCall, dict[str, Any] | None, dict[str, Any], Specialist],
    Awaitable[bool | None],
]
"""(call, answer, reference, specialist) -> whether they agree by the specialist's gate; None where nobody says."""
_MAX_IN_FLIGHT = 16
"""Shadows at once in one gateway; a call beyond them is not compared, and counted as missed."""


class Shadows:
    """Asks specialists in the background. Belongs to one event loop.

    Contract: `start` never blocks, awaits or raises; every started shadow ends up in one counter.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        capture: Capture,
        pseudonyms: Pseudonyms,
        prices: PriceConfig,
        meter: Meter,
        timeout_s: float,
        agrees: Agrees,
    ) -> None:
        """Take the parts; `timeout_s` is how long a specialist has where it serves, `agrees` compares two answers."""
        self._agrees = agrees
        self._engines, self._capture, self._pseudonyms = engines, capture, pseudonyms
        self._prices, self._meter, self._timeout_s = prices, meter, timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def start(self, call: PendingCall, reference: dict[str, Any], specialist: Specialist) -> None:
        """Ask `specialist` what the client asked; `reference` is the message that the client got from the LLM."""
        if self._is_closed or len(self._tasks) >= _MAX_IN_FLIGHT:
            return self._miss("closed" if self._is_closed else "busy")
        task = asyncio.get_running_loop().create_task(self._compare(call, reference, specialist))
        self._tasks.add(task)
        task.add_done_callback(self._end)

    async def close(self) -> None:
        """Cancel what runs; needs the capture still open."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(self, call: PendingCall, reference: dict[str, Any], specialist: Specialist) -> None:
        prompt_format = PromptFormat.model_validate(specialist.prompt_format)
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                answer, invalid = await ask_engine(
                    self._engines[specialist.model],
                    specialist.lora,
                    prompt_format,
                    call.request,
                    specialist.max_answer_tokens,
                    call.facing,
                )
        except InputError:
            # Its prompt does not fit: where the specialist serves, that is the LLM's call.
            return self._miss("not for it")
        seconds = time.perf_counter() - begin
        decision = policy.decide_after(answer, specialist, invalid, release=call.decision.release or "")
        agrees = None
        if decision.action == "accept":
            agrees = await self._agrees(call, answer.message, reference, specialist)
            if agrees is None:
                return self._miss("not judged")
        reason = KEPT if decision.action == "accept" else decision.reason
        decision = decision.model_copy(update={"action": "shadow", "reason": reason, "agrees": agrees})
        self._keep(call, answer, decision, seconds)

    def _keep(self, call: PendingCall, answer: EngineAnswer, decision: RouteDecision, seconds: float) -> None:
        shadow = call.shadow(decision)
        shadow.specialist_cost_usd = seconds_cost_usd(seconds, num_sharing=len(self._tasks), config=self._prices)
        usage = Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
        message, model = answer.message, decision.specialist or ""
        created = int(call.ts)
        body = message and completion_body(message, call_id=shadow.call_id, model=model, created=created, usage=usage)
        self._capture.put(
            shadow.captured(
                self._pseudonyms, response=body, llm_cost=None, served_by="specialist", status=200, error=None
            )
        )
        outcome = {True: "true", False: "false", None: "not kept"}[decision.agrees]
        self._meter.count("understudy_shadows_total", task_id=decision.task_id or "", agrees=outcome)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self._miss("closed")
        elif error := task.exception():
            self._miss("timeout" if isinstance(error, TimeoutError) else "failed")

    def _miss(self, reason: str) -> None:
        self._meter.count("understudy_shadows_missed_total", reason=reason)
