"""How far a fleet's order of runs is from the best that any order could do, on simulated places with measured run times.

The order and the bound are those of training/fleet.py. Fleets of 4 to 32 tasks are drawn from the runs measured, with
replacement and a fixed seed; a place is taken by one run at a time and is free again when its seconds are over.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from training.fleet import plan_fleet

_NUM_TASKS = (4, 8, 16, 32)
_NUM_DRAWS = 200


def measure_makespan(
    run_seconds: Mapping[str, float], slots: int, sizes: Mapping[str, float] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Makespan over its lower bound.

    Args:
        run_seconds: what runs took; at least one.
        slots: runs at a time.
        sizes: what the fleet expected of the same runs and ordered them by, such as their tokens; None: the seconds
            themselves.

    Returns:
        {fleet_over_bound: {number of tasks: mean ratio over the draws}, fleet_over_bound_worst: {...: largest}}.
    """
    rng = random.Random(seed)
    names = sorted(run_seconds)
    ratios: dict[str, list[float]] = {}
    for count in _NUM_TASKS:
        own = ratios.setdefault(str(count), [])
        for _ in range(_NUM_DRAWS):
            drawn = dict(enumerate(rng.choices(names, k=count)))
            seconds = {f"{number:02}": run_seconds[name] for number, name in drawn.items()}
            expected = {f"{number:02}": sizes[name] for number, name in drawn.items()} if sizes else None
            plan = plan_fleet(seconds, slots, expected)
            own.append(plan.makespan_s / plan.lower_bound_s)
    return {
        "fleet_over_bound": {count: sum(own) / len(own) for count, own in ratios.items()},
        "fleet_over_bound_worst": {count: max(own) for count, own in ratios.items()},
    }
