"""The machine: Python, cores, memory, disks, shared memory, GPUs and open files. Starts nothing but nvidia-smi."""

from __future__ import annotations

import os
import pathlib
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from cluster.resources import local_memory_bytes, local_nodes
from jobs.doctor.check import Check, Reporter
from jobs.recipe import Recipe

_GIB = 2**30
_PYTHON = (3, 11)
_LEAST_CORES = 2
"""What all measurements in jobs/bench/README.md were made on."""
_LEAST_MEMORY_GIB = 8
"""What k8s/overlays/local-cpu gives the one worker that trains and serves."""
_LEAST_DISK_GIB, _LEAST_SHARED_GIB = 5, 1
_FULL = 0.95
"""Ray's local_fs_capacity_threshold: beyond it its object store creates nothing on that disk."""
_SOCKETS_PER_CALL, _OTHER_FILES = 2, 512
"""A call in flight has a connection to its client and one to the LLM."""
_NVIDIA = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
_say = Reporter("machine")


def check_machine(recipe: Recipe) -> Iterator[Check]:
    """Look at what the machine offers to the recipe."""
    yield _python()
    yield _cores()
    yield _memory()
    places = {
        "disk of the store": _nearest(recipe.store),
        "disk of temporary files": pathlib.Path(tempfile.gettempdir()),
    }
    for name, folder in places.items():
        if folder is not None:
            yield _disk(name, folder)
    yield _shared_memory(pathlib.Path("/dev/shm"))
    yield _gpu(recipe)
    yield _open_files(recipe)


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] != _PYTHON or platform.system() != "Linux":
        wanted = ".".join(map(str, _PYTHON))
        return _say.failed("Python", found, f"use Python {wanted} on Linux: make setup PYTHON=python{wanted}")
    return _say.ok("Python", found)


def _cores() -> Check:
    seen, allowed = int(local_nodes()[0].cpus), len(os.sched_getaffinity(0))
    if allowed < seen:
        advice = f"start Ray with --num-cpus={allowed}, or give this process all of them: Ray counts the machine's"
        return _say.warning("cores", f"{allowed} of {seen} are this process's", advice)
    if seen < _LEAST_CORES:
        return _say.warning("cores", str(seen), f"use {_LEAST_CORES} or more: a gateway and an engine take one each")
    return _say.ok("cores", str(seen))


def _memory() -> Check:
    whole, free = local_memory_bytes() / _GIB, _available_bytes() / _GIB
    found = f"{whole:.1f} GiB, {free:.1f} GiB available"
    if min(whole, free) < _LEAST_MEMORY_GIB:
        return _say.warning("memory", found, f"have {_LEAST_MEMORY_GIB} GiB free, or use a smaller base and one worker")
    return _say.ok("memory", found)


def _available_bytes() -> float:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _disk(name: str, folder: pathlib.Path) -> Check:
    usage = shutil.disk_usage(folder)
    free, share = usage.free / _GIB, 1 - usage.free / usage.total
    found = f"{free:.1f} GiB free, {share:.0%} full ({folder})"
    if free < _LEAST_DISK_GIB or share > _FULL:
        what = f"free {_LEAST_DISK_GIB} GiB there and stay below {_FULL:.0%}, beyond which Ray writes nothing"
        where = "or name another place: store=..." if name.endswith("store") else "or set TMPDIR and Ray's --temp-dir"
        return _say.warning(name, found, f"{what}; {where}")
    return _say.ok(name, found)


def _shared_memory(folder: pathlib.Path) -> Check:
    advice = (
        f"mount {_LEAST_SHARED_GIB} GiB or more at {folder} (docker run --shm-size=2g): Ray's objects would go to disk"
    )
    if not folder.is_dir():
        return _say.warning("shared memory", f"{folder} is not there", advice)
    free = shutil.disk_usage(folder).free / _GIB
    if free < _LEAST_SHARED_GIB:
        return _say.warning("shared memory", f"{free:.2f} GiB free ({folder})", advice)
    return _say.ok("shared memory", f"{free:.1f} GiB free ({folder})")


def _gpu(recipe: Recipe) -> Check:
    count = int(local_nodes()[0].gpus)
    is_wanted = recipe.specialists.device == "gpu" or recipe.finetune.gpus_per_worker > 0
    if not count:
        if is_wanted:
            advice = "run on a cluster that has one (RAY_ADDRESS), or specialists.device=cpu finetune.gpus_per_worker=0"
            return _say.warning("GPU", "none here, and the recipe asks for one", advice)
        return _say.ok("GPU", "none; everything runs on the CPU")
    try:
        told = subprocess.run(_NVIDIA, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return _say.warning("GPU", f"{count} devices, and nvidia-smi fails: {error}", "install the NVIDIA driver")
    return _say.ok("GPU", f"{count}: {'; '.join(told.split(chr(10))).strip('; ')}")


def _open_files(recipe: Recipe) -> Check:
    needed = recipe.gateway.max_ongoing * _SOCKETS_PER_CALL + _OTHER_FILES
    # Ray raises the soft limit to the hard one by itself.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        advice = f"ulimit -Hn {needed} before `serve` (gateway.max_ongoing={recipe.gateway.max_ongoing}), or lower that"
        return _say.warning("open files", f"at most {hard}", advice)
    return _say.ok("open files", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}")


def _nearest(store: str) -> pathlib.Path | None:
    """The store's folder, or the nearest one above it that is there; None for a remote store."""
    if "://" in store:
        return None
    folder = pathlib.Path(store)
    return next(one for one in (folder, *folder.parents) if one.is_dir())
