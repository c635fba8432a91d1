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
from cluster.answers import grade
from cluster.config import Config
from cluster.errors import UpstreamError
from cluster.records import AnswerKind, RouteDecision
from cluster.telemetry import Meter, log_event
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
    close_timeout_s: float = Field(default=5.0, ge=0)
    """Longest time a stopping gateway waits for its audits, in seconds; the rest is cancelled and counted as missed."""


def with_verdict(decision: RouteDecision, agrees: bool | None) -> RouteDecision:
    """The decision of a comparison, which tells its outcome to whoever may not read content."""
    return decision.model_copy(update={"agrees": agrees})


class Auditor:
    """Asks the LLM about kept answers in the background. Belongs to one event loop.

    Contract:
    - `is_drawn` depends on the id and the share alone: a call drawn at a smaller share is drawn at a larger one.
    - `start` never blocks, awaits or raises, and no client ever waits for an audit or sees one fail.
    - Every started audit ends up in one counter: agrees, does not, or missed with the reason.
    """

    def __init__(
        self, config: AuditConfig, fallback: FallbackLLM, capture: Capture, pseudonyms: Pseudonyms, meter: Meter
    ) -> None:
        self._config, self._fallback, self._capture = config, fallback, capture
        self._pseudonyms, self._meter = pseudonyms, meter
        self.savings = Savings(meter)
        """What kept answers save; audits say what they would have cost."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def is_drawn(self, call_id: str, share: float | None = None) -> bool:
        """Whether the call is one of the reference stream, or of another share of all calls, which holds a smaller one."""
        digest = hashlib.blake2b(call_id.encode(), key=b"understudy reference", digest_size=8).digest()
        return int.from_bytes(digest, "big") < (self._config.share if share is None else share) * 2**64

    def start(self, call: PendingCall, answer: dict[str, Any], kind: AnswerKind) -> None:
        """Ask the LLM what the client asked; `answer` is the message the client got."""
        if self._is_closed:
            return self._miss("closed")
        if len(self._tasks) >= self._config.max_in_flight:
            return self._miss("busy")
        task = asyncio.get_running_loop().create_task(self._audit(call.audit(), answer, kind))
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

    async def _audit(self, audit: PendingCall, answer: dict[str, Any], kind: AnswerKind) -> None:
        # Nobody reads along, so the answer is wanted in one piece.
        body = {key: value for key, value in audit.request.items() if key not in ("stream", "stream_options")}
        try:
            reply, endpoint = await self._fallback.chat(body, audit.lost)
        except UpstreamError:
            return self._miss("failed")
        if reply.status >= 400:
            return self._miss("refused")
        cost = self._fallback.spending.charge_answer(endpoint, audit.request, reply.body)
        captured = audit.captured(
            self._pseudonyms, response=reply.body, llm_cost=cost, served_by="llm", status=200, error=None
        )
        self.savings.note(captured, cost.usd)
        message = captured.message
        if message is None:
            self._capture.put(captured)
            return self._miss("no answer")
        agrees = grade(answer, message, kind, audit.request).agrees
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
