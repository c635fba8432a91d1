"""A fine-tune's progress, from its worker to the terminal of the person who waits: a small file, and a bar that reads it.

The bar tells the time left from the steps so far. The file lies beside the run's checkpoints, which all nodes share. Only what is shown goes through it.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

_POLL_S = 0.5
_RUNNING: dict[pathlib.Path, tuple[str, int]] = {}
"""Progress file -> name and steps of each run that this process waits for."""


_SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "communication_share": ("waiting", "{:.0%}"),
    "agreement": ("agreement", "{:.1%}"),
}
"""Fact -> what it is called beside the bar, and how it is written."""


def write_progress(path: pathlib.Path, facts: Mapping[str, float]) -> None:
    """Replace the file whole, so that a reader never sees half of it.

    Args:
        facts: step, and what there is of loss, tokens_per_s, communication_share and agreement.
    """
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(dict(facts)))
    beside.replace(path)


def running() -> list[dict[str, Any]]:
    """The runs that this process waits for: {name, step, num_steps} and what their files hold of what is shown."""
    return [
        {"name": name, "num_steps": num_steps, "step": 0, **_read(path)}
        for path, (name, num_steps) in list(_RUNNING.items())
    ]


@contextlib.contextmanager
def show_progress(path: pathlib.Path, name: str, num_steps: int) -> Iterator[None]:
    """Draw a bar on a terminal while the block runs; elsewhere nothing."""
    is_over = threading.Event()
    _RUNNING[path] = name, num_steps
    with tqdm(total=num_steps, desc=name, unit="step", disable=None) as bar:
        watcher = threading.Thread(target=_follow, args=(path, bar, is_over), name=f"progress of {name}", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            del _RUNNING[path]
            is_over.set()
            watcher.join()


def describe_progress(facts: Mapping[str, float]) -> str:
    """What stands beside the bar.

    Example:
        >>> describe_progress({"step": 40, "loss": 0.5, "tokens_per_s": 2100.0})
        'loss 0.500, tokens/s 2,100'
    """
    return ", ".join(f"{name} {form.format(facts[key])}" for key, (name, form) in _SHOWN.items() if key in facts)


def _read(path: pathlib.Path) -> dict[str, float]:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):  # Not begun, or its folder is cleared away.
        return {}
    return {name: facts[name] for name in ("step", "loss", "agreement", "tokens_per_s") if name in facts}


def _follow(path: pathlib.Path, bar: tqdm, is_over: threading.Event) -> None:
    while True:
        is_last = is_over.wait(_POLL_S)
        if path.exists():
            facts = json.loads(path.read_text())
            bar.set_postfix_str(describe_progress(facts), refresh=False)
            bar.update(facts["step"] - bar.n)
        if is_last:
            return
