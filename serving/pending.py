"""One chat.completions call on its way through the gateway -> its response headers, and the AgentCall that is stored.

Names of clients and conversations become pseudonyms here. Knows nothing of how the call is answered.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.access import Pseudonyms
from cluster.faces import Facing
from cluster.records import AgentCall, RouteDecision, ServedBy, Specialist
from serving.billing import Bill, Cost
from serving.limits import Limits
from serving.openai_wire import usage_of

_MAX_HEADER_CHARS = 200
_STEP = re.compile(r"[0-9]{1,9}")


@dataclass
class PendingCall:
    """What is known of a call before it is answered; `decision` and the costs are filled in on the way."""

    call_id: str
    ts: float
    begin: float
    """time.perf_counter at arrival."""
    client: str
    request: dict[str, Any]
    headers: Mapping[str, str]
    decision: RouteDecision
    facing: Facing
    """Whether it speaks to a person, as far as that is known before it is answered."""
    limits: Limits
    specialist: Specialist | None = None
    """Who was asked first."""
    specialist_cost_usd: float = 0.0
    lost: Bill = field(default_factory=Bill)
    """Of LLMs that were asked and whose answer the client does not get."""
    is_named: bool = False
    """The client asked for a specialist by its name, which says nothing of its task's traffic."""
    is_reference: bool = False
    is_watched: bool = False
    """Audited where a specialist's answer is kept, because the specialist is new; not of the reference stream by that."""
    audit_of: str | None = None
    shadowed: Specialist | None = None
    """The specialist to compare with the LLM's answer once the client has it."""
    is_finished: bool = False
    """Whether it has been handed to capture."""

    def audit(self) -> PendingCall:
        """The same call asked again of the LLM, begun now: a call of its own, with its own latency and cost."""
        return replace(
            self,
            call_id=uuid.uuid4().hex,
            begin=time.perf_counter(),
            decision=self.decision.model_copy(update={"action": "audit", "reason": "reference stream"}),
            specialist_cost_usd=0.0,
            lost=Bill(),
            audit_of=self.call_id,
            is_finished=False,
        )

    def shadow(self, decision: RouteDecision) -> PendingCall:
        """The same call as a specialist was asked it in the background; ended at once."""
        return replace(
            self,
            call_id=uuid.uuid4().hex,
            begin=time.perf_counter(),
            decision=decision,
            lost=Bill(),
            is_reference=False,
            audit_of=self.call_id,
            is_finished=False,
        )

    def session_id(self, pseudonyms: Pseudonyms) -> str:
        """Pseudonym of the conversation."""
        return pseudonyms.session_of(self.client, self._session())

    def captured(
        self,
        pseudonyms: Pseudonyms,
        *,
        response: dict[str, Any] | None,
        llm_cost: Cost | None,
        served_by: ServedBy,
        status: int,
        error: str | None,
    ) -> AgentCall:
        """The call as it is stored, ended now.

        Args:
            llm_cost: of `response`, where an LLM gave it; None where none answered.
        """
        cost = self._cost(llm_cost, served_by)
        call = AgentCall(
            call_id=self.call_id,
            ts=self.ts,
            client_id=pseudonyms.of("client", self.client),
            agent=agent_of(self.headers),
            session_id=self.session_id(pseudonyms),
            step=self._step(),
            request=self.request,
            response=response,
            usage=usage_of(response),
            latency_ms=(time.perf_counter() - self.begin) * 1e3,
            cost_usd=cost and cost.usd,
            cost_basis=cost and ("estimated" if cost.is_estimated else "reported"),
            served_by=served_by,
            route=self.decision.model_copy(update={"is_named": True}) if self.is_named else self.decision,
            status=status,
            error=error,
            is_reference=self.is_reference,
            audit_of=self.audit_of,
        )
        return call.model_copy(update={"faces_person": self.facing.faces(self.request, call.message)})

    def response_headers(self) -> dict[str, str]:
        """x-understudy-* headers: what was done with the call, and why; OpenAI's x-request-id is its id."""
        decision = self.decision
        values = {
            "route": decision.action,
            "task": decision.task_id,
            "specialist": decision.specialist,
            "confidence": None if decision.confidence is None else f"{decision.confidence:.6f}",
            "reason": decision.reason,
            "call-id": self.call_id,
            "release": decision.release,
            "degraded": "below threshold" if decision.action == "degrade" else None,
        }
        headers = {f"x-understudy-{name}": _header_text(value) for name, value in values.items() if value}
        return {**headers, "x-request-id": self.call_id}

    def _session(self) -> str:
        """What is one conversation: the client's word for it, else all up to the first user message."""
        given = self.headers.get("x-session-id")
        if given:
            return given
        # A long system prompt is hashed as it is; to write it as JSON first would cost as much as the rest of the call.
        digest = hashlib.sha256()
        for message in self.request["messages"]:
            content = message.get("content")
            text = content.encode(errors="surrogatepass") if isinstance(content, str) else b""
            others = {key: value for key, value in message.items() if key != "content" or not text}
            digest.update(json.dumps([len(text), others]).encode() + text)
            if message.get("role") == "user":
                break
        return digest.hexdigest()

    def _step(self) -> int:
        """The client's count, else how often the assistant has spoken."""
        given = self.headers.get("x-step", "")
        if _STEP.fullmatch(given):
            return int(given)
        return sum(message.get("role") == "assistant" for message in self.request["messages"])

    def _cost(self, llm_cost: Cost | None, served_by: ServedBy) -> Cost | None:
        """Tokens of LLMs plus time of a specialist, kept or not; None where no LLM was at work and none was to answer."""
        if llm_cost is None and served_by == "llm" and not self.lost.cost.usd:
            return None
        return Cost(self.specialist_cost_usd).plus(self.lost.cost).plus(llm_cost or Cost())


def agent_of(headers: Mapping[str, str]) -> str:
    """What the client calls its agent."""
    return headers.get("x-agent", "unknown")[:_MAX_HEADER_CHARS]


def _header_text(value: str) -> str:
    return re.sub(r"[^ -~]", "?", value)[:_MAX_HEADER_CHARS]
