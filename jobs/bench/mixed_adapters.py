"""Calls for many adapters: whose call is the next, and how many adapters the replicas have loaded for them."""

from __future__ import annotations

import random
import time
from typing import Any

_ASK_TIMEOUT_S, _PATIENCE_S = 30.0, 60.0


def draw_adapters(num_adapters: int, spread: str, count: int) -> list[int]:
    """Whose call is the next: each alike, or the k-th 1 / k as often as the first (Zipf).

    Example:
        >>> draw_adapters(1, "zipf", 3)
        [0, 0, 0]
    """
    weights = [1.0 if spread == "uniform" else 1 / (k + 1) for k in range(num_adapters)]
    return random.Random(f"{num_adapters}:{spread}").choices(range(num_adapters), weights, k=count)


def count_loads(handle: Any, num_replicas: int) -> int:
    """Adapters loaded so far by all replicas of a deployment that has a method `facts` ("pid", "num_loads").

    Serve says of no call which replica will answer it, so they are asked until all have told.

    Args:
        handle: a DeploymentHandle.

    Raises:
        RuntimeError: fewer than `num_replicas` told in a minute: a sum without them would be none.
    """
    told: dict[int, int] = {}
    end = time.monotonic() + _PATIENCE_S
    while len(told) < num_replicas:
        if time.monotonic() > end:
            raise RuntimeError(f"{len(told)} of {num_replicas} replicas tell how many adapters they have loaded")
        for answer in [handle.facts.remote() for _ in range(2 * num_replicas)]:
            facts = answer.result(timeout_s=_ASK_TIMEOUT_S)
            told[facts["pid"]] = facts["num_loads"]
    return sum(told.values())
