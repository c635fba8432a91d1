"""`understudy compact`: fold what dead gateways left in journals, and merge the small files of calls/."""

from __future__ import annotations

from collections.abc import Callable

from cluster.compaction import CompactionCounts, compact_calls
from cluster.feedback import remove_forgotten_feedback
from cluster.store import Store
from serving.capture import CaptureConfig, journal_folder
from serving.folding import Folded, fold_orphans


def compact(
    store: Store, capture: CaptureConfig, progress: Callable[[int, int], None] | None = None
) -> tuple[Folded, CompactionCounts]:
    """Safe beside running gateways, readers and another compaction. Forgotten clients leave the files.

    Args:
        progress: called with the number of days done and of all days.

    Raises:
        KeyAccessError: the content key is not to be had.
    """
    folded = fold_journals(store, capture)
    remove_forgotten_feedback(store)
    return folded, compact_calls(store, progress)


def fold_journals(store: Store, capture: CaptureConfig) -> Folded:
    """Publish what gateways that died have left on this machine; a living gateway folds its own."""
    folder = journal_folder(capture, store.uri)
    return fold_orphans(store, store.content_keys, folder) if folder is not None and folder.exists() else Folded()
