"""How far the conversion of a store is: one small file beside the releases, written by who converts and read by who looks.

It holds names, counts and times, never content. A conversion that is killed cannot say so: its file then stays as it was,
and `updated_ts` tells for how long.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationError

from cluster.errors import StoreError
from cluster.records import Record
from cluster.store import Store

PROGRESS_FILE = "conversion.json"
STAGES = ("curate", "discover", "select", "base", "finetune", "validate", "release")


class RunProgress(Record):
    """One fine-tune that runs now."""

    name: str
    """Of its task, or of the first of its tasks."""
    step: int
    num_steps: int
    loss: float | None = None
    agreement: float | None = None
    """Share of held-out examples answered as their reference."""
    tokens_per_s: float | None = None


class ConversionProgress(Record):
    """One conversion, as of `updated_ts`."""

    started_ts: float
    updated_ts: float
    state: Literal["running", "done", "failed"]
    stage: str | None
    """The one that runs, or that failed; None once it is done."""
    seconds: dict[str, float] = {}
    """Of the stages that are over."""
    runs: tuple[RunProgress, ...] = ()
    release: str | None = None
    """What it made."""
    error: str | None = None
    """Type of what stopped it; the rest is in its log."""


def read_conversion(store: Store) -> ConversionProgress | None:
    """The last conversion that said anything; None where there was none, or nothing of it that can be read."""
    try:
        return ConversionProgress.model_validate(store.read_json(PROGRESS_FILE))
    except (StoreError, ValueError, ValidationError):
        return None


def write_conversion(store: Store, progress: ConversionProgress) -> None:
    """Replace the file.

    Raises:
        StoreError: the store cannot be written to.
    """
    store.write_json(PROGRESS_FILE, progress.model_dump(mode="json"))
