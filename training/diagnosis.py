"""Why a run gave up though nothing crashed: told by its worker in a file, so that it is not tried again in vain.

Ray Train starts a worker that raises again from its last checkpoint. A loss that is no number would come back there: a
worker that sees one writes what it saw and ends. One whose memory does not hold a micro-batch writes that before it
raises, and the next attempt takes half.
"""

from __future__ import annotations

import contextlib
import errno
import math
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Literal

from cluster.errors import TrainingError
from cluster.records import Record

_NO_ROOM = 2**20
"""Fewer free bytes than this on the disk that a write failed on: it is full."""


class Diagnosis(Record):
    """What a worker saw."""

    kind: Literal["diverged", "out_of_memory"]
    message: str
    micro_batch_size: int | None = None
    """That the memory did not hold."""


def write_diagnosis(path: pathlib.Path, diagnosis: Diagnosis) -> None:
    path.write_text(diagnosis.model_dump_json())


def read_diagnosis(path: pathlib.Path) -> Diagnosis | None:
    """What the run's worker left, or None where it left nothing."""
    return Diagnosis.model_validate_json(path.read_bytes()) if path.exists() else None


def smaller_micro_batch(path: pathlib.Path, micro_batch_size: int) -> int:
    """The size to begin with: as planned, or half of what an attempt before this one could not hold."""
    left = read_diagnosis(path)
    if left is None or left.micro_batch_size is None:
        return micro_batch_size
    return min(micro_batch_size, max(1, left.micro_batch_size // 2))


class Diverged(TrainingError):
    """A loss that is no number, seen by every rank at the same step."""


def check_loss(what: str, loss: float, rate: float, losses: Sequence[float]) -> None:
    """Stop a run whose loss left the numbers.

    Args:
        what: names the step and the loss.
        losses: of the steps before, newest last.

    Raises:
        Diverged: it did; says at what learning rate, and how it came to it.
    """
    if math.isfinite(loss):
        return
    before = ", ".join(f"{one:.4g}" for one in losses[-5:]) or "none"
    raise Diverged(
        f"{what} is {loss:.4g} at learning rate {rate:.3g}; losses before: {before}; next: a lower "
        f"finetune.learning_rate (such as {rate / 10:.1g}), or more finetune.warmup_steps"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of a device's memory, or of main memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def naming_a_full_disk(folder: pathlib.Path, num_bytes: int | None = None) -> Iterator[None]:
    """Tell a disk that is full while the block writes a checkpoint as what it is.

    torch's and safetensors' writers fail on one with errors that do not say so, so the room left is looked at too.

    Args:
        num_bytes: of the checkpoint, where it is known.

    Raises:
        TrainingError: the disk of `folder` is full.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and free >= _NO_ROOM:
            raise
        size = "" if num_bytes is None else f" of {num_bytes:,} bytes"
        raise TrainingError(
            f"checkpoint{size} in {folder}: the disk is full ({free:,} bytes free); next: free some, or give the recipe a "
            "work folder (work=/PATH) and the workers a TMPDIR on another disk"
        ) from error
