"""Which tasks train in one multi-LoRA run, and which adapters share a forward pass.

Adapters of a run lie one after another in a batch, so none is padded to another's length; what a bad grouping costs is
waiting: of runs that share the cluster for the longest one, and of memory that a pass with too many tokens does not have.
So runs are balanced by their tokens (longest task first to the run with least, at most 4/3 of the best possible: Graham
1969), as far as the memory of one holds them, and a pass takes as many adapters as fit its number of tokens. An adapter's gradients come out of one pass alone,
so passes change no result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class TaskLoad(NamedTuple):
    """What a task asks of a run."""

    base: str
    num_tokens: float
    """Over all steps."""


def plan_groups(
    loads: Mapping[str, TaskLoad], max_groups: int, fits: Callable[[Sequence[str]], bool] = lambda names: True
) -> list[list[str]]:
    """Split tasks into runs of one base each.

    Args:
        max_groups: of one base; runs that train at the same time. There are more where memory asks for it.
        fits: whether a run of these tasks has room; one of a single task is not asked about.

    Returns:
        Names of tasks, the longest run first.
    """
    groups: list[tuple[float, list[str]]] = []
    for base in sorted({load.base for load in loads.values()}):
        own = [name for name, load in loads.items() if load.base == base]
        totals = [0.0] * min(max_groups, len(own))
        members: list[list[str]] = [[] for _ in totals]
        for name in sorted(own, key=lambda name: (-loads[name].num_tokens, name)):
            by_tokens = sorted(range(len(totals)), key=lambda number: (totals[number], number))
            chosen = next((n for n in by_tokens if not members[n] or fits([*members[n], name])), len(totals))
            if chosen == len(totals):
                totals.append(0.0)
                members.append([])
            totals[chosen] += loads[name].num_tokens
            members[chosen].append(name)
        groups += zip(totals, members, strict=True)
    return [names for _, names in sorted(groups, key=lambda one: (-one[0], one[1]))]


def plan_passes(max_tokens: Sequence[int], limit: int) -> list[list[int]]:
    """Split adapters into forward passes of at most `limit` tokens; one that has more goes alone.

    Args:
        max_tokens: of each adapter, what its largest batch may have. Every worker must plan the same passes, as a
            sharded base is gathered by all of them together, so it is not what their own batches have.

    Returns:
        Places in `max_tokens`.
    """
    passes: list[list[int]] = []
    room = 0
    for place, tokens in enumerate(max_tokens):
        if not passes or tokens > room:
            passes.append([])
            room = limit
        passes[-1].append(place)
        room -= tokens
    return passes
