"""A conversion's stages and fine-tunes -> a small file in its store, again and again, for the gateway's page.

A store that refuses the file costs the conversion nothing. Knows nothing of what the stages do.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from cluster.conversions import STAGES, ConversionProgress, RunProgress, write_conversion
from cluster.errors import StoreError
from cluster.store import Store
from cluster.telemetry import log_event
from training.progress import running

_EVERY_S = 2.0


class Followed:
    """What is known of one conversion. Its stages are told by one thread, the file is written by another."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self.seconds: dict[str, float] = {}
        self._started_ts, self._last = time.time(), time.monotonic()
        self.release: str | None = None

    def lap(self, stage: str) -> None:
        """A stage is over, and the next one begins."""
        now = time.monotonic()
        self.seconds, self._last = {**self.seconds, stage: round(now - self._last, 2)}, now

    def write(self, error: str | None = None) -> None:
        """Write the file as things stand now."""
        seconds = self.seconds
        state = "failed" if error else "done" if self.release else "running"
        # Stages may be left out (nothing to learn): the one that runs comes after the last one that is over.
        place = max((STAGES.index(one) for one in seconds), default=-1) + 1
        progress = ConversionProgress(
            started_ts=self._started_ts,
            updated_ts=time.time(),
            state=state,
            stage=None if state == "done" else STAGES[min(place, len(STAGES) - 1)],
            seconds=seconds,
            runs=tuple(map(RunProgress.model_validate, running())) if state == "running" else (),
            release=self.release,
            error=error,
        )
        with self._lock:
            try:
                write_conversion(self._store, progress)
            except (StoreError, OSError) as failure:
                log_event("progress_not_written", logging.WARNING, error=type(failure).__name__)


@contextlib.contextmanager
def followed(store: Store) -> Iterator[Followed]:
    """Write the file every two seconds while the block runs, and once it is over; set `release` to say that it is done."""
    conversion, is_over = Followed(store), threading.Event()

    def follow() -> None:
        while not is_over.wait(_EVERY_S):
            conversion.write()

    conversion.write()
    thread = threading.Thread(target=follow, name="conversion's progress", daemon=True)
    thread.start()

    def end(kind: type[BaseException] | None, *_: object) -> None:
        is_over.set()
        thread.join()
        conversion.write(kind and kind.__name__)

    with contextlib.ExitStack() as stack:
        stack.push(end)
        yield conversion
