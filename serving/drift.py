"""What a specialist was asked -> whether its traffic looks otherwise than at first: escalations and confidence.

A suspicion demotes nobody: it only has more calls audited, so that the test that may demote (cluster/sequential.py) sees
enough soon. It depends on past calls alone, audits are drawn by call id, and a session counts with the mean of what was compared
in it (serving/evidence.py), so more audits make that mean surer and not another one. The first
calls of a specialist are the baseline; every later block is compared with it by two z-tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cluster.records import Record
from cluster.store import Store

AUDIT_SHARES_FILE = "steward/audit_shares.json"
"""task_id -> share of its kept answers to audit while drift is suspected; the steward writes it, gateways follow it."""
BASELINE_CALLS = 1_000
BLOCK_CALLS = 200
_CALM_BLOCKS = 20
"""Blocks without anything unusual after which a suspicion ends."""
_LIMIT = 4.0
"""Standard errors that are unusual: one block in some 8,000 by chance, for each of the two tests."""


class Asked(NamedTuple):
    """One call that a specialist answered for the client, or handed over because it was not sure."""

    ts: float
    specialist: str
    is_escalated: bool
    confidence: float


class Sums(Record):
    """Calls of one period."""

    num_calls: int = 0
    num_escalated: int = 0
    confidence: float = 0.0
    confidence_squared: float = 0.0

    def plus(self, one: Asked) -> Sums:
        return Sums(
            num_calls=self.num_calls + 1,
            num_escalated=self.num_escalated + one.is_escalated,
            confidence=self.confidence + one.confidence,
            confidence_squared=self.confidence_squared + one.confidence**2,
        )


class Drift(Record):
    """One specialist's traffic so far."""

    newest_ts: float = 0.0
    baseline: Sums = Sums()
    block: Sums = Sums()
    """The block that is being filled."""
    calm_blocks: int = _CALM_BLOCKS
    """Since the last unusual one."""

    @property
    def is_suspected(self) -> bool:
        """Whether a recent block was unusual."""
        return self.calm_blocks < _CALM_BLOCKS


def observe(drift: Drift, asked: Sequence[Asked], now: float) -> Drift:
    """The drift once these calls are seen; those not newer than the newest one are left out, as they may come again.

    Args:
        now: seconds since the epoch; calls of a clock that runs ahead of it are left out, or they would hide all others.
    """
    new = sorted((one for one in asked if drift.newest_ts < one.ts <= now), key=lambda one: one.ts)
    if not new:
        return drift
    baseline, block, calm = drift.baseline, drift.block, drift.calm_blocks
    for one in new:
        if baseline.num_calls < BASELINE_CALLS:
            baseline = baseline.plus(one)
            continue
        block = block.plus(one)
        if block.num_calls == BLOCK_CALLS:
            calm = 0 if is_unusual(baseline, block) else min(calm + 1, _CALM_BLOCKS)
            block = Sums()
    return Drift(newest_ts=new[-1].ts, baseline=baseline, block=block, calm_blocks=calm)


def is_unusual(baseline: Sums, block: Sums) -> bool:
    """Whether escalations or the mean confidence of a block are far from the baseline's."""
    pooled = (baseline.num_escalated + block.num_escalated) / (baseline.num_calls + block.num_calls)
    rates = [one.num_escalated / one.num_calls for one in (baseline, block)]
    spread = math.sqrt(pooled * (1 - pooled) * (1 / baseline.num_calls + 1 / block.num_calls))
    if abs(rates[1] - rates[0]) > _LIMIT * spread:
        return True
    means = [one.confidence / one.num_calls for one in (baseline, block)]
    variances = [
        max(one.confidence_squared / one.num_calls - mean**2, 0.0) / one.num_calls
        for one, mean in zip((baseline, block), means, strict=True)
    ]
    # Rounding must not make equal confidences unusual.
    return abs(means[1] - means[0]) > _LIMIT * math.sqrt(sum(variances)) + 1e-6


def read_audit_shares(store: Store) -> dict[str, float]:
    """Shares in [0, 1] by task; empty where nothing is suspected.

    Raises:
        ValueError: the file is not what a steward wrote.
    """
    found = store.read_json(AUDIT_SHARES_FILE) if store.exists(AUDIT_SHARES_FILE) else {}
    if not isinstance(found, dict) or not all(isinstance(share, int | float) for share in found.values()):
        raise ValueError(f"{AUDIT_SHARES_FILE}: not what the steward writes; next: remove it")
    return {str(task): float(share) for task, share in found.items()}
