"""One chat.completions call -> a specialist's accepted answer, else the LLM's; captured.

Route, ask the specialist under a share of the call's deadline, and accept, escalate or fall back. Nothing of a
specialist's answer leaves before it is accepted, and of two answers that were asked for at once (serving/hedging.py) one
leaves whole; the last byte of no answer leaves before its call is kept as the capture promises. Every parsed call is
captured once, answered or not. Content is never logged. Knows nothing of HTTP but its responses (serving/api.py).
Source: OpenAI API reference, chat completions; DESIGN "Serve".
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import Response

from cluster.access import ApiKeys, Identity, Pseudonyms
from cluster.engine import Engine, EngineAnswer
from cluster.errors import InputError, StoreError, UpstreamError
from cluster.faces import FACES_HEADER, FacesConfig, Facing, faces_before
from cluster.prices import PriceConfig, seconds_cost_usd
from cluster.prompts import PromptFormat
from cluster.records import AgentCall, RouteDecision, ServedBy, Specialist, Usage
from cluster.route_model import RouteGuess
from cluster.servable import REJECTED_REASON, ask_engine
from cluster.telemetry import Meter, log_event
from cluster.tracing import span
from cluster.upstream import LLMNodeConfig
from serving import policy, rollout
from serving.admission import Admission
from serving.audit import Auditor
from serving.capture import Capture
from serving.decisions import RecentDecisions
from serving.degraded import asked_again, may_stand_in, stand_in_decision
from serving.draining import Drain
from serving.fallback import FallbackLLM
from serving.feedback import FeedbackBox
from serving.gateway_config import GatewayConfig
from serving.hedging import race
from serving.limits import read_limits, within
from serving.llm_answer import BegunAnswer, WholeAnswer, ask_llm
from serving.openai_wire import CLIENT_GONE, Denied, completion_body, with_code
from serving.passthrough import PassThrough
from serving.pending import PendingCall, agent_of
from serving.relay import LLMRelay
from serving.replies import failed_reply, fault_reply, kept_reply, llm_reply, told_of
from serving.rollout import RolloutConfig
from serving.shadow import Shadows
from serving.table import ServingTable, Snapshot
from serving.traces import note_call


class GatewayCore:
    """The request path without its HTTP. Belongs to one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        capture: Capture,
        fallback: FallbackLLM,
        auditor: Auditor,
        table: ServingTable,
        engines: Mapping[str, Engine],
        pseudonyms: Pseudonyms,
        api_keys: ApiKeys | None,
        prices: PriceConfig,
        passthrough: PassThrough,
        feedback: FeedbackBox,
        faces: FacesConfig = FacesConfig(),  # noqa: B008 (frozen)
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008 (frozen)
        meter: Meter | None = None,
    ) -> None:
        """Take the parts; `engines` are by store path of their base model, `api_keys` may be None where auth is open."""
        self.config, self.capture, self.fallback, self.table = config, capture, fallback, table
        self.auditor, self.prices, self.faces, self.rollout = auditor, prices, faces, rollout
        self.passthrough, self.feedback = passthrough, feedback
        self.drain, self.admission = Drain(config.drain_timeout_s), Admission(config.auth, api_keys)
        self.meter, self.decisions = meter or Meter(), RecentDecisions()
        self._engines, self.pseudonyms, self._num_asking = engines, pseudonyms, 0
        parts = (engines, capture, pseudonyms, prices, self.meter)
        self.shadows = Shadows(*parts, config.specialist_timeout_s, auditor.agrees)

    async def complete(self, identity: Identity, headers: Mapping[str, str], request: dict[str, Any]) -> Response:
        """Answer one parsed chat.completions request.

        Raises:
            Denied: 400, it asks for an unknown route or has a limit in a header that cannot be read; 404, for a
                specialist that is not served; 503, the call cannot be kept.
        """
        snapshot = self.table.snapshot
        is_for_llm = policy.is_for_llm(request, headers)
        task_id = None if is_for_llm else policy.named_task(request, snapshot.specialists)
        limits = read_limits(
            headers,
            deadline_s=self.config.deadline_s,
            budget_usd=self.config.budget_usd,
            now=asyncio.get_running_loop().time(),
        )
        reason = "the client asks for the LLM" if is_for_llm else "undecided"
        undecided = RouteDecision(action="llm", reason=reason, release=snapshot.release)
        facing = Facing(self.faces, faces_before(agent_of(headers), headers.get(FACES_HEADER), self.faces))
        now, begin, client = time.time(), time.perf_counter(), identity.client
        ids = (uuid.uuid4().hex, now, begin, client)
        call = PendingCall(*ids, request, headers, undecided, facing, limits, is_named=task_id is not None)
        # A call that the router did not send says nothing of the task's traffic.
        call.is_reference = not (call.is_named or is_for_llm) and self.auditor.is_drawn(call.call_id)
        try:
            try:
                finding = self._find_answer(call, snapshot, task_id, is_for_llm)
                found = await within(finding, limits.deadline_at, self.drain)
            except UpstreamError as error:
                return await self._fail(call, error)
            if isinstance(found, EngineAnswer):
                return await self._accept(call, found)
            if isinstance(found, BegunAnswer):
                return LLMRelay(self, call, found.stream, found.endpoint, found.stack)
            return await self._pass_on(call, found)
        except Denied:
            raise
        except asyncio.CancelledError:
            if not call.is_finished:
                self.abandon(call)
            raise
        except Exception as error:  # The process edge: a fault of ours is answered as one, and its call is kept.
            log_event("request_failed", logging.ERROR, call_id=call.call_id, error=type(error).__name__)
            if not call.is_finished:
                self.abandon(call, status=500, error=f"internal error: {type(error).__name__}")
            return fault_reply(call.response_headers())

    async def finish(
        self,
        call: PendingCall,
        *,
        response: dict[str, Any] | None = None,
        endpoint: LLMNodeConfig | None = None,
        served_by: ServedBy = "llm",
        status: int = 200,
        error: str | None = None,
    ) -> None:
        """Capture and count a call that has its end, once for each; its last byte may leave when this returns.

        Raises:
            Denied: 503, it cannot be kept as the capture promises.
        """
        captured = self._end(
            call, response=response, endpoint=endpoint, served_by=served_by, status=status, error=error
        )
        try:
            await self.capture.keep(captured)
        except StoreError:
            # Counted by whoever tells the client of it, whatever the call's own end was.
            message = "The gateway cannot record this call, and records every call before it answers; try again later"
            raise Denied(503, message, "server_error", "capture_failed", headers=call.response_headers()) from None
        self.count_failure(status)
        if call.shadowed and served_by == "llm" and status == 200 and captured.message is not None:
            self.shadows.start(call, captured.message, call.shadowed)

    def abandon(
        self,
        call: PendingCall,
        *,
        response: dict[str, Any] | None = None,
        endpoint: LLMNodeConfig | None = None,
        status: int = CLIENT_GONE,
        error: str = "the client left",
    ) -> None:
        """Capture and count, without waiting, a call whose client never saw its end."""
        self.capture.put(self._end(call, response=response, endpoint=endpoint, status=status, error=error))
        self.count_failure(status)

    def count_failure(self, status: int) -> None:
        """Count a request that ends with this status, if it is an error."""
        if status >= 400:
            self.meter.count("understudy_requests_failed_total", status=str(status))

    async def _find_answer(
        self, call: PendingCall, snapshot: Snapshot, task_id: str | None, is_for_llm: bool
    ) -> EngineAnswer | WholeAnswer | BegunAnswer:
        """A specialist's accepted answer, or the LLM's; the decision is left in `call`.

        Raises:
            UpstreamError: there is none; 400 where the LLM's could cost too much.
        """
        if is_for_llm:
            return await self._ask_llm(call)
        asking = self._ask_specialist(call, snapshot, task_id)
        if self.config.hedge_after_s is None:
            return await asking or await self._ask_llm(call)
        return await self._hedge(call, asking, self.config.hedge_after_s)

    async def _hedge(
        self, call: PendingCall, asking: Coroutine[Any, Any, EngineAnswer | None], after_s: float
    ) -> EngineAnswer | WholeAnswer | BegunAnswer:
        """Ask the LLM beside a specialist that is slow; raises what asking the LLM raises."""
        ended = await race(
            asking,
            lambda: self._ask_llm(call),
            after_s=after_s,
            is_good=lambda answer: answer.is_good,
            discard=lambda answer: self._give_back(call, answer),
        )
        if ended.was_hedged:
            self.meter.count("understudy_hedges_total", winner="llm" if ended.first is None else "specialist")
        if ended.first is not None:
            return ended.first
        assert ended.second is not None
        if call.decision.reason == policy.GIVEN_UP:
            call.decision = call.decision.model_copy(update={"reason": "slower than the LLM"})
        return ended.second

    async def _give_back(self, call: PendingCall, answer: WholeAnswer | BegunAnswer) -> None:
        """Count and close an LLM's answer that came too late; a refusal is not paid."""
        if answer.is_good:
            body = answer.body if isinstance(answer, WholeAnswer) else None
            call.lost.add(self.fallback.spending.charge_answer(answer.endpoint, call.request, body))
        await answer.close()

    async def _ask_specialist(self, call: PendingCall, snapshot: Snapshot, task_id: str | None) -> EngineAnswer | None:
        """The accepted answer, or None for the LLM; the decision is left in `call`. `task_id` is what the client named."""
        specialist: Specialist | None = None
        release = snapshot.release or ""
        begin = time.perf_counter()
        self._num_asking += 1
        try:
            with span("route"):
                found = self._decide_before(call, snapshot, task_id)
            if isinstance(found, RouteDecision):
                call.decision = found
                return None
            specialist = found
            now = asyncio.get_running_loop().time()
            async with asyncio.timeout(call.limits.specialist_s(now, self.config.specialist_timeout_s)):
                answer, call.decision = await self._judge(specialist, call, release)
            return answer if call.decision.action == "accept" else None
        except InputError:
            # Not an error of the specialist: the prompt is none for it.
            call.decision = policy.fall_back(specialist, "the prompt does not fit", release=release, action="escalate")
        except Exception as error:  # The process edge: whatever a specialist or its request does, the LLM answers.
            name = type(error).__name__
            log_event("specialist_failed", logging.ERROR, call_id=call.call_id, error=name)
            reason = "timeout" if isinstance(error, TimeoutError) else f"error: {name}"
            call.decision = policy.fall_back(specialist, reason, release=release)
        except asyncio.CancelledError:
            if specialist:
                call.decision = policy.fall_back(specialist, policy.GIVEN_UP, release=release)
            raise
        finally:
            self._note_specialist(call, specialist, time.perf_counter() - begin)
            self._num_asking -= 1
        return None

    def _decide_before(self, call: PendingCall, snapshot: Snapshot, task_id: str | None) -> Specialist | RouteDecision:
        if snapshot.route_model is None or snapshot.release is None:
            return RouteDecision(action="llm", reason="no release", release=snapshot.release)
        found = policy.decide_before(
            RouteGuess(task_id=task_id, reason="named") if task_id else snapshot.route_model.task_of(call.request),
            call.request,
            specialists=snapshot.specialists,
            refused=snapshot.refused,
            release=snapshot.release,
            max_temperature=self.config.max_temperature,
            facing=call.facing,
        )
        if isinstance(found, RouteDecision):
            return found
        stage = snapshot.rollout.get(found.task_id)
        held = rollout.hold_back(found, stage, lambda: call.session_id(self.pseudonyms), release=snapshot.release)
        if held and held.reason == rollout.SHADOW_REASON and not call.is_named:
            call.shadowed = found
        share = max(stage.audit_share if stage else 0.0, self.table.audit_shares.get(found.task_id, 0.0))
        call.is_watched = not call.is_named and self.auditor.is_drawn(call.call_id, share)
        return held or found

    async def _judge(
        self, specialist: Specialist, call: PendingCall, release: str
    ) -> tuple[EngineAnswer, RouteDecision]:
        prompt_format = PromptFormat.model_validate(specialist.prompt_format)
        engine = self._engines[specialist.model]
        answer, invalid = await ask_engine(
            engine,
            specialist.lora,
            prompt_format,
            call.request,
            specialist.max_answer_tokens,
            call.facing,
            stop_below=specialist.gate.threshold or 0.0,
        )
        if invalid == REJECTED_REASON:
            self.meter.count("understudy_early_rejections_total", task_id=specialist.task_id)
        return answer, policy.decide_after(answer, specialist, invalid, release=release)

    def _note_specialist(self, call: PendingCall, specialist: Specialist | None, seconds: float) -> None:
        if specialist is not None:
            call.specialist = specialist
            self.meter.observe("understudy_specialist_latency_ms", seconds * 1e3, task_id=specialist.task_id)
            call.specialist_cost_usd += seconds_cost_usd(seconds, num_sharing=self._num_asking, config=self.prices)

    async def _accept(self, call: PendingCall, answer: EngineAnswer) -> Response:
        assert answer.message is not None and call.decision.specialist is not None
        usage = Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
        body = completion_body(
            answer.message, call_id=call.call_id, model=call.decision.specialist, created=int(call.ts), usage=usage
        )
        await self.finish(call, response=body, served_by="specialist")
        # Runs once the client has its last byte.
        audit = (
            BackgroundTask(self._audit, call, answer.message)
            if call.is_reference or (call.is_watched and call.decision.action == "accept")
            else None
        )
        return kept_reply(body, call.request, call.response_headers(), audit)

    async def _audit(self, call: PendingCall, message: dict[str, Any]) -> None:
        """Begin the call's audit; a coroutine only because Starlette would run a plain function in a thread."""
        assert call.specialist is not None
        self.auditor.start(call, message, call.specialist)

    async def _ask_llm(self, call: PendingCall) -> WholeAnswer | BegunAnswer:
        """Raises UpstreamError where no LLM answers, or the longest answer could cost more than the call may."""
        left_usd = call.limits.budget_usd - call.specialist_cost_usd
        return await ask_llm(self.fallback, call.request, call.lost, call.limits._replace(budget_usd=left_usd))

    async def _pass_on(self, call: PendingCall, answer: WholeAnswer) -> Response:
        status, raw, body, endpoint = answer
        if status >= 400 or body is None:
            error = with_code("refused by the LLM" if status >= 400 else "the LLM's answer does not parse", body)
            await self.finish(call, status=status if status >= 400 else 502, error=error)
        else:
            await self.finish(call, response=body, endpoint=endpoint)
        return llm_reply(status, raw, body, call.request, call.response_headers())

    async def _fail(self, call: PendingCall, error: UpstreamError) -> Response:
        if self.config.degraded == "specialist" and (answer := await self._stand_in(call, error)):
            return await self._accept(call, answer)
        await self.finish(call, status=error.status, error=with_code("the LLM gave no answer", told_of(error)))
        return failed_reply(error, call.response_headers())

    async def _stand_in(self, call: PendingCall, error: UpstreamError) -> EngineAnswer | None:
        """The specialist's answer, whatever its confidence, to a call that no LLM answers; None where it has none."""
        specialist = call.specialist
        engine = self._engines.get(specialist.model) if specialist else None
        left_s = call.limits.deadline_at - asyncio.get_running_loop().time()
        if specialist is None or engine is None or not may_stand_in(error) or left_s <= 0 or self.drain.is_over:
            return None
        timeout_s = min(self.config.specialist_timeout_s, left_s)
        begin = time.perf_counter()
        self._num_asking += 1
        try:
            answer = await asked_again(engine, specialist, call, timeout_s)
        finally:
            self._note_specialist(call, specialist, time.perf_counter() - begin)
            self._num_asking -= 1
        if answer is not None:
            call.decision = stand_in_decision(call.decision, answer, specialist)
            call.is_reference = call.is_reference and call.decision.action == "accept"
        return answer

    def _end(
        self,
        call: PendingCall,
        *,
        response: dict[str, Any] | None,
        endpoint: LLMNodeConfig | None,
        served_by: ServedBy = "llm",
        status: int,
        error: str | None,
    ) -> AgentCall:
        """The call as it is stored; counted."""
        cost = endpoint and self.fallback.spending.charge_answer(endpoint, call.request, response)
        captured = call.captured(
            self.pseudonyms, response=response, llm_cost=cost, served_by=served_by, status=status, error=error
        )
        call.is_finished = True
        self.decisions.note(captured)
        self.auditor.savings.note(captured, cost and cost.usd)
        note_call(captured)
        action = call.decision.action
        self.meter.count("understudy_calls_total", action=action, task_id=call.decision.task_id or "")
        self.meter.observe("understudy_call_latency_ms", captured.latency_ms or 0.0, action=action)
        if captured.faces_person:
            self.meter.count("understudy_calls_facing_person_total", action=action)
        return captured
