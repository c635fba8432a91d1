"""Measured numbers as flat rows: medians and intervals over repetitions, and two measurements beside each other. Pure.

The interval of a median is the smallest and the largest repetition: whatever the distribution, n repetitions hold the true
median between them with probability 1 - 2^(1-n) (order statistics; Conover 1999, "Practical Nonparametric Statistics").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

SKIPPED = frozenset({"provenance", "machine", "parts", "bench", "quick", "facts", "error", "files"})
"""What stands beside numbers and is none, or is all the detail behind them."""
MAX_DEPTH = 6


class Spread(NamedTuple):
    """One number over repetitions."""

    median: float
    low: float
    high: float
    num: int


class Compared(NamedTuple):
    """One number of two measurements."""

    name: str
    before: Spread
    after: Spread

    @property
    def ratio(self) -> float | None:
        """After / before; None where that says nothing."""
        return self.after.median / self.before.median if self.before.median else None

    @property
    def verdict(self) -> str:
        """Whether the intervals are apart; a single repetition has none."""
        if self.before.median == self.after.median:
            return "equal"
        if min(self.before.num, self.after.num) < 2:
            return "no interval"
        is_apart = self.before.high < self.after.low or self.after.high < self.before.low
        return "differs" if is_apart else "within"


def flatten(numbers: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, float]:
    """Every number by its dotted name; lists, texts and what SKIPPED names are left out."""
    found: dict[str, float] = {}
    for key, value in numbers.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key in SKIPPED:
            continue
        if isinstance(value, bool):
            found[name] = float(value)
        elif isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
        elif isinstance(value, Mapping) and depth < MAX_DEPTH:
            found |= flatten(value, name, depth + 1)
    return found


def spread(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """Each number that any repetition has, over those that have it."""
    flat = [flatten(one) for one in repetitions]
    names = dict.fromkeys(name for one in flat for name in one)
    values = {name: [one[name] for one in flat if name in one] for name in names}
    return {name: Spread(median(own), min(own), max(own), len(own)) for name, own in values.items()}


def compare(before: Mapping[str, Spread], after: Mapping[str, Spread]) -> tuple[list[Compared], list[str]]:
    """What both have, in the order of `before`; and the names that one alone has."""
    both = [Compared(name, one, after[name]) for name, one in before.items() if name in after]
    return both, sorted(before.keys() ^ after.keys())


def describe(value: Spread) -> str:
    """A number with its interval where there are repetitions."""
    if value.num < 2 or value.low == value.high:
        return figure(value.median)
    return f"{figure(value.median)} ({figure(value.low)} to {figure(value.high)})"


def figure(value: float) -> str:
    """Four significant digits, whole numbers as they are, thousands apart."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def coverage_of(num: int) -> float:
    """With what probability the interval of so many repetitions holds the true median."""
    return 1 - 2.0 ** (1 - num) if num else 0.0


class Peer(NamedTuple):
    """Two numbers that are to be read side by side; `*` stands for the same word of a name in both, `**` for any words."""

    part: str
    what: str
    ours: str
    peer: str
    peer_name: str
    more_is_better: bool


PEERS = (
    Peer("curate", "personal data found, recall", "pii_recall", "presidio_recall", "presidio-analyzer", True),
    Peer("curate", "personal data found, precision", "pii_precision", "presidio_precision", "presidio-analyzer", True),
    Peer("discover", "V-measure of topics, *", "v_measure.*.ours", "v_measure.*.default_pipeline", "HDBSCAN", True),
    Peer(
        "train",
        "adapters per hour beside Trainer, *",
        "trainer_adapters_per_hour.*.multi_lora",
        "trainer_adapters_per_hour.*.trainer",
        "PEFT with transformers.Trainer",
        True,
    ),
    Peer(
        "train",
        "tokens per second beside Trainer, *",
        "trainer_tokens_per_s.*.multi_lora",
        "trainer_tokens_per_s.*.trainer",
        "PEFT with transformers.Trainer",
        True,
    ),
    Peer("serve", "CPU ms per passed call, *", "cpu_ms.**.ours", "cpu_ms.**.litellm", "LiteLLM's proxy", False),
    Peer("serve", "CPU ms per passed call, *", "cpu_ms.**.ours", "cpu_ms.**.floor", "bare FastAPI and aiohttp", False),
    Peer("gate", "share kept, *", "coverage.**.ours", "coverage.**.tracer", "TRACER's gate", True),
    Peer("gate", "promises broken, *", "violation_rate.**", "tracer_violation_rate.**", "TRACER's gate", False),
)


class Pair(NamedTuple):
    """Ours and a peer's number for one thing."""

    what: str
    ours: Spread
    peer: Spread
    peer_name: str
    more_is_better: bool


def pairs(part: str, numbers: Mapping[str, Spread]) -> list[Pair]:
    """Ours beside the peers of a part; a peer that was not there has no row."""
    found = []
    for one in PEERS:
        for words, ours in _matches(one.ours, numbers) if one.part == part else ():
            peer = numbers.get(one.peer.replace("**", words).replace("*", words))
            if peer is not None:
                what = one.what.replace("*", words)
                found.append(Pair(what, ours, peer, one.peer_name, one.more_is_better))
    return found


def _matches(pattern: str, numbers: Mapping[str, Spread]) -> Iterable[tuple[str, Spread]]:
    """Each number whose name fits, with what the stars stand for."""
    told = re.escape(pattern).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)")
    for name, value in numbers.items():
        if found := re.fullmatch(told, name):
            yield "".join(found.groups()), value
