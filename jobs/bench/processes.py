"""Servers of a benchmark as processes of their own on loopback: started, watched, and ended in order.

Counts CPU, memory and file handles of a process with all below it, which is where Ray keeps its own.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
_WATCH_EVERY_S = 1.0


class Usage(NamedTuple):
    """What a tree of processes has used, or holds."""

    cpu_s: dict[int, float]
    """By process id, user and system."""
    rss_mib: float
    num_handles: int
    names: dict[int, str]

    def cpu_ms_since(self, earlier: Usage) -> float:
        """Milliseconds of CPU since then; a process that began in between counts whole, one that ended not at all."""
        return sum(self.cpu_ms_by_name(earlier).values())

    def cpu_ms_by_name(self, earlier: Usage) -> dict[str, float]:
        """The same by name of process."""
        used: dict[str, float] = {}
        for pid, now in self.cpu_s.items():
            used[self.names[pid]] = used.get(self.names[pid], 0.0) + (now - earlier.cpu_s.get(pid, 0.0)) * 1e3
        return used


def usage_of(pid: int) -> Usage:
    """Of the process and all below it."""
    import psutil

    cpu_s, names, rss, handles = {}, {}, 0, 0
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            names[process.pid], own = process.name(), process.memory_info().rss
            rss += own
            handles += process.num_fds()
            cpu_s[process.pid] = times.user + times.system
    return Usage(cpu_s, rss / 2**20, handles, names)


class Watched(NamedTuple):
    """A command that has ended."""

    status: int
    wall_s: float
    cpu_s: float
    """Of all its processes, as they were last seen: what one used in its last second is missing."""
    timed_out: bool


def watch(command: Sequence[str], log: pathlib.Path, limit_s: float | None = None) -> Watched:
    """Run a command to its end with its output in `log`, counting the CPU of all that it starts.

    Args:
        limit_s: after so many seconds it is told to end, and killed a minute later; None waits.
    """
    import psutil

    begin, seen, timed_out = time.monotonic(), dict[int, float](), False
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                seen |= usage_of(process.pid).cpu_s
            if limit_s is not None and time.monotonic() - begin > limit_s:
                timed_out = True
                _end_group(process)
            time.sleep(_WATCH_EVERY_S)
    finally:
        if process.poll() is None:
            _end_group(process)
    return Watched(process.wait(), time.monotonic() - begin, sum(seen.values()), timed_out)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C first, so that servers and clusters are put down in order."""
    for number, wait_s in ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return


@contextlib.contextmanager
def server(
    command: Sequence[str], log: pathlib.Path, environment: Mapping[str, str] | None = None, port: int | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that listens on loopback, and its address; its output goes to `log`, and it ends with the block.

    Args:
        port: where it was told to listen, which says that it has started; None takes the first loopback address it prints.

    Raises:
        RuntimeError: it ended, or did not listen in three minutes.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    try:
        yield process, _wait_for_address(process, log, port)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def module(name: str, *words: str) -> list[str]:
    """The command that runs a module of this project."""
    return [sys.executable, "-m", name, *words]


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_address(process: subprocess.Popen[bytes], log: pathlib.Path, port: int | None) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        printed = re.search(r"http://127\.0\.0\.1:[0-9]+(?=\D)", log.read_text(errors="replace"))
        if port is None and printed:
            return printed[0]
        if port is not None and _listens(port):
            return f"http://127.0.0.1:{port}"
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2_000:]
    raise RuntimeError(f"{log.stem}: did not start (status {process.poll()}): {tail}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
