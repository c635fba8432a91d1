"""Where the CPU of a call that is passed on goes: the gateway under uvicorn and cProfile -> shares by package.

The profiler counts CPU seconds of the serving thread (time.thread_time), so that waiting counts nothing, and makes small
functions look dearer than they are; what C functions take is their caller's. Threads beside that one, which write what
was captured, are read from the kernel in a turn without a profiler.
"""

from __future__ import annotations

import pathlib
import pstats
import signal
from collections.abc import Mapping
from typing import Any

from jobs.bench.core_gateway import core_command
from jobs.bench.http_load import http_request
from jobs.bench.passthrough import MODES, Mode, request_body, run_turn
from jobs.bench.processes import server
from jobs.bench.stage import make_stage

_PACKAGES = ("serving", "cluster", "aiohttp", "uvicorn", "starlette", "fastapi", "pydantic", "json", "ray", "asyncio")
_BODY_KB = 5
_CONCURRENCY = 8
_WARM_REQUESTS, _NUM_REQUESTS = 100, 1_000
_MAX_SECONDS = 15.0


def profile_gateway(folder: pathlib.Path, llm: str, num_requests: int = _NUM_REQUESTS) -> dict[str, Any]:
    """Profile unary and streamed calls.

    Returns:
        By mode: `serving_thread`, shares by package, the rest under "other"; `other_threads`, their share of all CPU.
    """
    return {mode: _profile(folder / mode, llm, mode, num_requests) for mode in MODES}


def _profile(folder: pathlib.Path, llm: str, mode: Mode, num_requests: int) -> dict[str, Any]:
    store, key = make_stage(folder)
    with server(core_command(store, llm, str(folder / "stats")), folder / "core.log") as (process, url):
        request = http_request(url, request_body(mode, _BODY_KB), key)
        run_turn(url, request, mode, _CONCURRENCY, _WARM_REQUESTS, _MAX_SECONDS)
        before = _cpu_seconds(process.pid)
        run_turn(url, request, mode, _CONCURRENCY, num_requests, _MAX_SECONDS)
        whole, serving = (now - then for now, then in zip(_cpu_seconds(process.pid), before, strict=True))
        process.send_signal(signal.SIGUSR1)
        run_turn(url, request, mode, _CONCURRENCY, num_requests, _MAX_SECONDS)
    stats = pstats.Stats(str(folder / "stats")).stats  # type: ignore[attr-defined]
    return {"serving_thread": shares_by_package(stats), "other_threads": round(1 - serving / max(whole, 1e-9), 3)}


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """Of the whole process, threads that have ended included, and of its first thread, which serves."""
    import psutil

    process = psutil.Process(pid)
    whole, first = process.cpu_times(), next(one for one in process.threads() if one.id == pid)
    return whole.user + whole.system, first.user_time + first.system_time


def shares_by_package(stats: Mapping[Any, Any]) -> dict[str, float]:
    """Shares of the time within functions, by the package of their file; a C function's go to those who called it.

    Args:
        stats: of pstats: (file, line, name) -> (calls, calls, own seconds, whole seconds, callers likewise).
    """
    seconds: dict[str, float] = {}
    for (file, _, _), (_, _, own, _, callers) in stats.items():
        if file.startswith(("/", "<frozen")) or not callers:
            by_file = {file: own}
        else:
            by_file = {}
            for (caller, _, _), (_, _, called_own, _) in callers.items():
                by_file[caller] = by_file.get(caller, 0.0) + called_own
        for name, share in by_file.items():
            package = package_of(name)
            seconds[package] = seconds.get(package, 0.0) + share
    total = sum(seconds.values()) or 1.0
    return {name: round(one / total, 3) for name, one in sorted(seconds.items(), key=lambda item: -item[1])}


def package_of(file: str) -> str:
    """Which of the packages that matter here a source file belongs to, or "other"."""
    parts = pathlib.PurePath(file).parts
    return next((name for name in _PACKAGES if name in parts), "other")
