"""Reference stream: a fixed uniform share of all calls gets the LLM's answer, whatever a specialist said to them.

Drawn by a hash of the call id alone, before anything is known of content or confidence, so that agreement counted on
drawn calls speaks for all calls of a task. Where the LLM answers the client anyway, the call is only marked. Where a
specialist's answer was kept, the LLM is asked in the background after the client has its answer; what it says is
captured as a call of its own that names the client's (`audit_of`), with its usage and cost. Source: DESIGN "S6".
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Any

from pydantic import Field

from cluster.access import Pseudonyms
from cluster.answers import check, grade
from cluster.config import Config
from cluster.errors import UpstreamError
from cluster.judging import MAX_ANSWER_TOKENS, Judge, answer_text
from cluster.prompts import PromptFormat, text_of
from cluster.records import RouteDecision, Specialist
from cluster.telemetry import Meter, log_event
from serving.audit_budget import AuditBudget
from serving.billing import Bill, Cost
from serving.capture import Capture
from serving.fallback import FallbackLLM
from serving.pending import PendingCall
from serving.savings import Savings


class AuditConfig(Config):
    """How much of the traffic is the reference stream, and what its questions to the LLM may take."""

    share: float = Field(default=0.02, ge=0, le=1)
    """Share of all calls in the reference stream; 0 turns audits off, and later nothing can be said about agreement."""
    max_in_flight: int = Field(default=8, ge=1)
    """Audits at once in one gateway; a call drawn beyond them is not audited, and counted as missed."""
    max_usd_per_day: float | None = Field(default=None, gt=0)
    """What the stream may cost in a day (UTC); its share of calls is lowered from minute to minute to keep within it, by what
    was spent before alone. Counted by each gateway replica for itself, from zero when it starts."""
    close_timeout_s: float = Field(default=5.0, ge=0)
    """Longest time a stopping gateway waits for its audits, in seconds; the rest is cancelled and counted as missed."""


def with_verdict(decision: RouteDecision, agrees: bool | None) -> RouteDecision:
    """The decision of a comparison, which tells its outcome to whoever may not read content."""
    return decision.model_copy(update={"agrees": agrees})


class Auditor:
    """Asks the LLM about kept answers in the background. Belongs to one event loop.

    Contract:
    - `is_drawn` depends on the id and the share alone: a call drawn at a smaller share is drawn at a larger one. With a
      budget the share is that of the minute, which past spending decided (serving/audit_budget.py).
    - `start` never blocks, awaits or raises, and no client ever waits for an audit or sees one fail.
    - Every started audit ends up in one counter: agrees, does not, or missed with the reason.
    """

    def __init__(
        self, config: AuditConfig, fallback: FallbackLLM, capture: Capture, pseudonyms: Pseudonyms, meter: Meter
    ) -> None:
        self._config, self._fallback, self._capture = config, fallback, capture
        self._pseudonyms, self._meter = pseudonyms, meter
        self.budget = AuditBudget(config.max_usd_per_day)
        self._shown_share: float | None = None
        self.savings = Savings(meter)
        """What kept answers save; audits say what they would have cost."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def share(self) -> float:
        """Of all calls, in the reference stream this minute."""
        return self._config.share * self.budget.factor

    def is_drawn(self, call_id: str, share: float | None = None) -> bool:
        """Whether the call is one of the reference stream, or of another share of all calls, which holds a smaller one."""
        digest = hashlib.blake2b(call_id.encode(), key=b"understudy reference", digest_size=8).digest()
        self._show_share()
        share = (self._config.share if share is None else share) * self.budget.factor
        return int.from_bytes(digest, "big") < share * 2**64

    def start(self, call: PendingCall, answer: dict[str, Any], specialist: Specialist) -> None:
        """Ask the LLM what the client asked; `answer` is the message the client got from `specialist`."""
        if self._is_closed:
            return self._miss("closed")
        if self.budget.is_spent:
            return self._miss("budget")
        if len(self._tasks) >= self._config.max_in_flight:
            return self._miss("busy")
        task = asyncio.get_running_loop().create_task(self._audit(call.audit(), answer, specialist))
        self._tasks.add(task)
        task.add_done_callback(self._end)

    async def close(self) -> None:
        """Let running audits end for a while, then cancel them; needs the LLM and the capture still open."""
        self._is_closed = True
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=self._config.close_timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def agrees(
        self, call: PendingCall, answer: dict[str, Any] | None, reference: dict[str, Any], specialist: Specialist
    ) -> bool | None:
        """Whether two answers to a call agree, as the specialist's gate compares them; None where a judge does not say."""
        kind = PromptFormat.model_validate(specialist.prompt_format).answer_kind
        grader = specialist.gate.text_grader
        facts = (answer, reference, kind, call.request, None, grader)
        # An encoder, or the n-grams of long texts, would hold up the requests of this loop.
        agreed = (await asyncio.to_thread(grade, *facts) if kind == "text" else grade(*facts)).agrees
        if agreed or answer is None or grader is None or grader.name != "judge":
            return agreed
        if check(reference, kind, call.request):
            # Nothing that text could agree with, such as a tool call or a refusal; a judge finds any text no worse.
            return False

        # A shadow's judge is no part of what kept answers save.
        audited = call.decision.task_id if call.audit_of else None

        async def chat(system: str, user: str) -> str | None:
            said = [{"role": role, "content": text} for role, text in (("system", system), ("user", user))]
            named = {"model": call.request["model"]} if "model" in call.request else {}
            body = {**named, "messages": said, "max_tokens": MAX_ANSWER_TOKENS, "temperature": 0}
            if self.budget.is_spent:
                return None
            lost = Bill()
            try:
                reply, endpoint = await self._fallback.chat(body, lost)
            finally:
                self._pay(lost.cost, audited)
            if reply.status >= 400:
                return None
            self._pay(self._fallback.spending.charge_answer(endpoint, body, reply.body), audited)
            return answer_text(reply.body)

        return await Judge(chat, {}, b"").agrees(call.request, *map(text_of, (answer, reference)))

    def _show_share(self) -> None:
        if self.share != self._shown_share:
            self._shown_share = self.share
            self._meter.set("understudy_audit_share", self._shown_share)

    def _pay(self, cost: Cost, task_id: str | None = None) -> None:
        """`task_id` is whose savings pay for it; None where they know of it already, or do not."""
        self.budget.add(cost.usd)
        self._meter.count("understudy_audit_spend_usd_total", cost.usd)
        if task_id:
            self.savings.spend(task_id, cost.usd)

    async def _audit(self, audit: PendingCall, answer: dict[str, Any], specialist: Specialist) -> None:
        # Nobody reads along, so the answer is wanted in one piece.
        body = {key: value for key, value in audit.request.items() if key not in ("stream", "stream_options")}
        try:
            reply, endpoint = await self._fallback.chat(body, audit.lost)
        except UpstreamError:
            return self._miss("failed")
        finally:
            self._pay(audit.lost.cost, audit.decision.task_id)
        if reply.status >= 400:
            return self._miss("refused")
        cost = self._fallback.spending.charge_answer(endpoint, audit.request, reply.body)
        self._pay(cost)
        captured = audit.captured(
            self._pseudonyms, response=reply.body, llm_cost=cost, served_by="llm", status=200, error=None
        )
        self.savings.note(captured, cost.usd)
        message = captured.message
        if message is None:
            self._capture.put(captured)
            return self._miss("no answer")
        try:
            agrees = await self.agrees(audit, answer, message, specialist)
        except UpstreamError:
            agrees = None
        if agrees is None:
            self._capture.put(captured)
            return self._miss("not judged")
        self._capture.put(captured.model_copy(update={"route": with_verdict(audit.decision, agrees)}))
        self._meter.count(
            "understudy_audits_total", task_id=audit.decision.task_id or "", agrees="true" if agrees else "false"
        )

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return self._miss("closed")
        error = task.exception()
        if error is not None:
            # An answer that is no chat.completion, whatever it is; the client has long had its own.
            log_event("audit_failed", logging.ERROR, error=type(error).__name__)
            self._miss("failed")

    def _miss(self, reason: str) -> None:
        self._meter.count("understudy_audits_missed_total", reason=reason)
