"""What kept answers save, by task: what the LLM would have asked for them, less what specialists and audits cost.

What the LLM would have asked for an answer that it did not give is an estimate: the mean of what it asked for this task's
calls that it did answer, as this gateway saw them. Once there are enough audits these alone count, because they are kept
calls drawn at random; the calls that escalate are not like them. Counted from zero when the gateway starts. Shadows, which
serve nobody, are left out.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass

from cluster.records import AgentCall
from cluster.telemetry import Meter

ENOUGH_AUDITS = 20
"""Of a task, from which on their mean alone is the LLM's price of a kept call."""
AVOIDED, SPENT = "understudy_avoided_usd_total", "understudy_specialist_usd_total"


@dataclass
class _Seen:
    """Of one task."""

    num_answered: int = 0
    answered_usd: float = 0.0
    num_audits: int = 0
    audits_usd: float = 0.0
    num_unpriced: int = 0
    """Kept calls from before the LLM answered any of the task's."""

    @property
    def mean_usd(self) -> float | None:
        if self.num_audits >= ENOUGH_AUDITS:
            return self.audits_usd / self.num_audits
        number = self.num_answered + self.num_audits
        return (self.answered_usd + self.audits_usd) / number if number else None


class Savings:
    """Counts calls as they end. Belongs to one event loop."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._seen: dict[str, _Seen] = collections.defaultdict(_Seen)

    def note(self, call: AgentCall, llm_usd: float | None) -> None:
        """Take a call that has its end, or its audit; a call of no task changes nothing.

        Args:
            llm_usd: what the LLM asked for the answer in `call`; None where none gave it.
        """
        task = call.route and call.route.task_id
        if not task:
            return
        seen, is_audit = self._seen[task], call.audit_of is not None
        if is_audit:
            self._count(SPENT, llm_usd or 0.0, task)
        else:
            # Time of a specialist, kept or not, and LLMs that were asked for nothing.
            self._count(SPENT, (call.cost_usd or 0.0) - (llm_usd or 0.0), task)
        if llm_usd is not None and call.status == 200:
            if is_audit:
                seen.num_audits, seen.audits_usd = seen.num_audits + 1, seen.audits_usd + llm_usd
            else:
                seen.num_answered, seen.answered_usd = seen.num_answered + 1, seen.answered_usd + llm_usd
        seen.num_unpriced += call.served_by == "specialist"
        if (mean_usd := seen.mean_usd) is not None:
            self._count(AVOIDED, seen.num_unpriced * mean_usd, task)
            seen.num_unpriced = 0

    def spend(self, task_id: str, usd: float) -> None:
        """Take what an audit cost beside the LLM's answer: its judge, and LLMs that were asked in vain."""
        self._count(SPENT, usd, task_id)

    def _count(self, name: str, usd: float, task: str) -> None:
        # Differences of floats may be a hair below 0, which a counter does not take.
        if usd > 0:
            self._meter.count(name, usd, task_id=task)
