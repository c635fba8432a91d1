"""The last calls that this gateway answered: what was decided and how long it took, in memory, for a person to watch.

Takes ended calls, keeps ids, names and numbers of them, and never a message. Nothing is written; a gateway that ends
forgets them, and what is captured (serving/capture.py) stays.
"""

from __future__ import annotations

import collections
import math
import secrets
import time
from typing import Any

from cluster.records import AgentCall

MAX_KEPT = 1_000
_MAX_REASON_CHARS = 200


class RecentDecisions:
    """A ring of decisions. Belongs to one event loop."""

    def __init__(self) -> None:
        self.gateway = secrets.token_hex(4)
        """Name of this process among the gateways behind one address."""
        self.started_ts = time.time()
        self._kept: collections.deque[dict[str, Any]] = collections.deque(maxlen=MAX_KEPT)

    def note(self, call: AgentCall) -> None:
        """Remember an ended call; the oldest makes room."""
        route = call.route
        self._kept.append(
            {
                "call_id": call.call_id,
                "ts": call.ts,
                "task_id": route and route.task_id,
                "action": route and route.action,
                "reason": route and route.reason[:_MAX_REASON_CHARS],
                "confidence": route and _finite(route.confidence),
                "latency_ms": call.latency_ms,
                "status": call.status,
            }
        )

    def newest(self, number: int) -> list[dict[str, Any]]:
        """So many decisions at most, the newest first."""
        return [self._kept[-place] for place in range(1, min(number, len(self._kept)) + 1)]

    def latencies(self) -> dict[str, dict[str, float]]:
        """task_id ("" is none) -> {num_calls, p50_ms, p95_ms} of the calls that are kept, by nearest rank."""
        found: dict[str, list[float]] = {}
        for one in self._kept:
            if one["latency_ms"] is not None:
                found.setdefault(one["task_id"] or "", []).append(one["latency_ms"])
        return {task: _quantiles(sorted(values)) for task, values in found.items()}


def _quantiles(values: list[float]) -> dict[str, float]:
    p50, p95 = (values[math.ceil(share * len(values)) - 1] for share in (0.5, 0.95))
    return {"num_calls": len(values), "p50_ms": p50, "p95_ms": p95}


def _finite(value: float | None) -> float | None:
    """JSON has no other numbers."""
    return value if value is not None and math.isfinite(value) else None
