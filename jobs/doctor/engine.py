"""The engine: whether vLLM starts to load here, on which device, and what a CPU engine reads from the environment.

vLLM is imported in a process of its own: a wheel that does not fit the processor ends it with a signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cluster.resources import local_memory_bytes
from jobs.doctor.check import Check, Reporter
from jobs.recipe import Recipe
from serving.engine_options import cpu_environment

_PROBE = """
import json, vllm
from vllm.platforms import current_platform
print("\\n" + json.dumps({"version": vllm.__version__, "device": current_platform.device_type}))
"""
_PROBE_TIMEOUT_S = 180
_GIB = 2**30
_say = Reporter("engine")


class Probed(NamedTuple):
    """What importing vLLM in another process gave."""

    returncode: int
    stdout: str
    stderr: str


def probe_engine() -> Probed:
    """Import vLLM in another process, which takes some seconds."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Probed(1, "", f"it took more than {_PROBE_TIMEOUT_S} s")
    return Probed(run.returncode, run.stdout, run.stderr)


def check_engine(recipe: Recipe, probe: Callable[[], Probed] = probe_engine) -> Iterator[Check]:
    """See whether an engine of the recipe's device could run on this machine."""
    config = recipe.specialists
    probed = probe()
    if probed.returncode:
        yield _say.failed(
            "vLLM", _why(probed), "pip install --no-deps -r requirements-cpu.txt, or ray[llm] on a GPU machine"
        )
        return
    told = json.loads(probed.stdout.strip().splitlines()[-1])
    found = f"{told['version']} on {told['device'] or 'no device'}"
    device = "gpu" if told["device"] in ("cuda", "rocm") else told["device"]
    if device != config.device:
        advice = (
            f"specialists.device={device}" if device in ("cpu", "gpu") else "install the vLLM of this machine's device"
        )
        yield _say.warning(
            "vLLM", f"{found}, and specialists.device={config.device}", f"{advice}, or serve on a cluster"
        )
    else:
        yield _say.ok("vLLM", found)
    if config.device == "cpu":
        yield _cpu_memory(recipe)
        yield _cpu_environment(cpu_environment(config.kv_cache_gib, config.num_threads))


def _cpu_memory(recipe: Recipe) -> Check:
    most, each = local_memory_bytes() / _GIB, recipe.specialists.kv_cache_gib
    if each > most / 2:
        advice = f"specialists.kv_cache_gib={max(1, int(most / 4))}"
        return _say.warning("CPU memory", f"each replica takes {each} of {most:.1f} GiB for keys and values", advice)
    return _say.ok("CPU memory", f"{each} GiB for keys and values in each replica")


def _cpu_environment(given: dict[str, str]) -> Check:
    """What is set here is not what replicas get: they get what the recipe says."""
    others = [f"{name}={os.environ[name]}" for name in given if os.environ.get(name, given[name]) != given[name]]
    others = [one for one in others if not one.startswith("OMP_NUM_THREADS")]
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    if others:
        advice = "unset it, and set specialists.kv_cache_gib and specialists.num_threads instead"
        return _say.warning("CPU environment", f"{' '.join(others)} has no effect; replicas get {shown}", advice)
    return _say.ok("CPU environment", shown)


def _why(probed: Probed) -> str:
    if probed.returncode < 0:
        name = signal.Signals(-probed.returncode).name
        return f"ended by {name} while it was imported: its build may not fit this processor"
    lines = [line for line in probed.stderr.strip().splitlines() if line.strip()]
    return f"cannot be imported: {lines[-1] if lines else 'it says nothing'}"
