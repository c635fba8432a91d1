"""A fine-tune's progress, from its worker to the terminal of the person who waits: a small file, and a bar that reads it.

The file lies beside the run's checkpoints, which all nodes share. Only what is shown goes through it.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterator

from tqdm import tqdm

_POLL_S = 0.5


def write_progress(path: pathlib.Path, step: int, loss: float) -> None:
    """Replace the file whole, so that a reader never sees half of it."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({"step": step, "loss": loss}))
    beside.replace(path)


@contextlib.contextmanager
def show_progress(path: pathlib.Path, name: str, num_steps: int) -> Iterator[None]:
    """Draw a bar on a terminal while the block runs; elsewhere nothing."""
    is_over = threading.Event()
    with tqdm(total=num_steps, desc=name, unit="step", disable=None) as bar:
        watcher = threading.Thread(target=_follow, args=(path, bar, is_over), name=f"progress of {name}", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join()


def _follow(path: pathlib.Path, bar: tqdm, is_over: threading.Event) -> None:
    while True:
        is_last = is_over.wait(_POLL_S)
        if path.exists():
            progress = json.loads(path.read_text())
            bar.set_postfix(loss=f"{progress['loss']:.3f}", refresh=False)
            bar.update(progress["step"] - bar.n)
        if is_last:
            return
