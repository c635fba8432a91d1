"""What we are compared with, in virtual environments of their own: their versions are not ours, and ours stay untouched."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable

CACHE = pathlib.Path("~/.cache/understudy/bench").expanduser()
INSTALL_LIMIT_S = 600


def install_peer(name: str, version: str, requirement: str, say: Callable[[str], object]) -> pathlib.Path | None:
    """The environment of a peer, made at the first use; None, with a word on why, where it cannot be had.

    Args:
        requirement: what pip installs.
    """
    home = CACHE / f"{name}-{version}"
    ready = home / ".ready"
    if ready.exists():
        return home
    say(f"{name} {version}: installing into {home}")
    home.parent.mkdir(parents=True, exist_ok=True)
    for words in (
        [sys.executable, "-m", "venv", str(home)],
        [str(home / "bin" / "pip"), "install", "--quiet", requirement],
    ):
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
        except subprocess.TimeoutExpired:
            say(f"{name} {version}: left out, installing took more than {INSTALL_LIMIT_S} s")
            return None
        if done.returncode != 0:
            say(f"{name} {version}: left out, it cannot be installed: {done.stderr[-300:]}")
            return None
    ready.touch()
    return home
