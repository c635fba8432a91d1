"""`understudy compact`: fold what dead gateways left in journals, and merge the small files of calls/."""

from __future__ import annotations

from collections.abc import Callable

from cluster.compaction import CompactionCounts, compact_calls
from cluster.store import Store


def compact(store: Store, progress: Callable[[int, int], None] | None = None) -> CompactionCounts:
    """Safe beside running gateways, readers and another compaction.

    Args:
        progress: called with the number of days done and of all days.

    Raises:
        KeyAccessError: the content key is not to be had.
    """
    return compact_calls(store, progress)
