"""What the parts of a job ask Ray for, against what the cluster has: a plan that can never start is an error at once.

Ray itself waits for CPUs and GPUs that no node will ever offer. Parts of one phase run at the same time, phases one
after another, so each phase must fit alone. A cluster that is in use by others is not looked at: waiting helps there.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Sequence

from pydantic import Field

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.records import Record

THIS_MACHINE = "this machine"
_NAMES = {"cpus": "CPUs", "gpus": "GPUs"}
_ROUNDING = 1e-6


class LimitsConfig(Config):
    """How large an autoscaling cluster may grow; for other clusters and this machine, what is there is counted."""

    cpus: float | None = Field(default=None, gt=0)
    """CPUs of all nodes at most; None takes what the cluster has when the job begins."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of all nodes at most; None takes what the cluster has when the job begins."""


class Part(Record):
    """Equal groups of equal workers (or replicas) that run at the same time."""

    name: str
    phase: str
    groups: int = 1
    workers: int = 1
    """Workers of each group."""
    cpus: float
    """CPUs of each worker."""
    gpus: float = 0
    """GPUs of each worker."""
    fields: dict[str, str] = {}
    """Which recipe field sets `groups`, `workers`, `cpus` and `gpus`; the others are fixed."""

    @property
    def total_cpus(self) -> float:
        return self.groups * self.workers * self.cpus

    @property
    def total_gpus(self) -> float:
        return self.groups * self.workers * self.gpus


class Node(Record):
    """What one machine offers to Ray."""

    cpus: float
    gpus: float


def local_nodes() -> list[Node]:
    """This machine as a Ray of its own would see it, told without Ray: all CPUs, and its NVIDIA GPUs."""
    return [Node(cpus=os.cpu_count() or 1, gpus=_num_local_gpus())]


def local_memory_bytes() -> int:
    """Main memory of this machine, or what its container may take of it (cgroup v2)."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return whole if allowed == "max" else min(whole, int(allowed))


def check_fits(parts: Sequence[Part], nodes: Sequence[Node], limits: LimitsConfig, where: str) -> None:
    """Compare what is asked for with what there is.

    Args:
        where: what the nodes are, for the message: THIS_MACHINE or another name.

    Raises:
        ConfigError: one line per thing that could never start: the field, its value, what is allowed.
    """
    problems = []
    for kind, limit in (("cpus", limits.cpus), ("gpus", limits.gpus)):
        offered = sum(getattr(node, kind) for node in nodes) if limit is None else limit
        largest = max((getattr(node, kind) for node in nodes), default=0) if limit is None else limit
        for part in parts:
            problem = _too_large(part, kind, largest, where) or _too_many(part, kind, offered, where)
            problems += [problem] if problem else []
        problems += [] if problems else _crowded_phases(parts, kind, offered, where)
    if problems:
        raise ConfigError("\n".join(problems))


def num_groups_that_fit(part: Part, nodes: Sequence[Node]) -> int:
    """Groups of `part` that run side by side; a group's workers may stand on several nodes, a worker on one."""
    workers = 0
    for node in nodes:
        asked = [(node.cpus, part.cpus), (node.gpus, part.gpus)]
        fits = [math.floor(offered / each + _ROUNDING) for offered, each in asked if each > 0]
        workers += min(fits, default=0)
    return workers // part.workers


def _too_large(part: Part, kind: str, largest: float, where: str) -> str | None:
    """One worker that no node can hold."""
    asked = getattr(part, kind)
    if asked <= largest + _ROUNDING:
        return None
    name = part.fields.get(kind, part.name)
    if kind == "gpus" and largest == 0:
        value, allowed = ("gpu", "cpu") if name.endswith(".device") else (f"{asked:g}", "0")
        return f"{name}={value}: {where} has no GPU; allowed: {name}={allowed}; {_elsewhere(kind, where)}"
    there = f"{largest:g} {_NAMES[kind]}"
    return (
        f"{name}={asked:g}: the largest node of {where} has {there}; allowed: at most that; {_elsewhere(kind, where)}"
    )


def _too_many(part: Part, kind: str, offered: float, where: str) -> str | None:
    """Workers of one group, or groups, that do not fit side by side."""
    each = getattr(part, kind)
    group = part.workers * each
    if part.groups * group <= offered + _ROUNDING:
        return None
    blamed, unit = ("groups", group) if group <= offered + _ROUNDING else ("workers", each)
    return (
        f"{part.fields.get(blamed, part.name)}={getattr(part, blamed)}: {part.name}: {part.groups * group:g} "
        f"{_NAMES[kind]} wanted at the same time ({part.groups} x {part.workers} x {each:g}), {where} has {offered:g}; "
        f"allowed: at most {math.floor(offered / unit + _ROUNDING)}; {_elsewhere(kind, where)}"
    )


def _crowded_phases(parts: Sequence[Part], kind: str, offered: float, where: str) -> list[str]:
    """Phases whose parts fit one by one and not together."""
    problems = []
    for phase in dict.fromkeys(part.phase for part in parts):
        together = [part for part in parts if part.phase == phase]
        total = sum(getattr(part, f"total_{kind}") for part in together)
        if total > offered + _ROUNDING:
            each = ", ".join(f"{part.name} {getattr(part, f'total_{kind}'):g}" for part in together)
            problems.append(
                f"{phase}: {total:g} {_NAMES[kind]} wanted at the same time ({each}), {where} has {offered:g}; "
                f"allowed: at most that; {_elsewhere(kind, where)}"
            )
    return problems


def _elsewhere(kind: str, where: str) -> str:
    grows = "" if where == THIS_MACHINE else f", or limits.{kind} where this one grows"
    return f"or a larger cluster (RAY_ADDRESS=ADDRESS){grows}"


def _num_local_gpus() -> int:
    """NVIDIA devices of this machine, or those that CUDA_VISIBLE_DEVICES leaves."""
    devices = [path for path in pathlib.Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(devices)
    return min(len(devices), len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
