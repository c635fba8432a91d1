"""Which checkpoint of a run is released, and when to stop: by agreement on held-out examples.

All is read off the run's curve, which its checkpoints carry, so a resumed run decides as the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def best_point(curve: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The point of the highest held-out agreement, of equal ones that of the lowest validation loss; None without any."""
    graded = [point for point in curve if "agreement" in point]
    return max(graded, key=lambda point: (point["agreement"], -point["validation_loss"]), default=None)


def is_patience_over(curve: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether so many checkpoints in a row brought nothing better than the best; never with a patience of 0."""
    graded = [point for point in curve if "agreement" in point]
    best = best_point(graded)
    return bool(patience) and best is not None and len(graded) - 1 - graded.index(best) >= patience
