"""Connect this process to Ray: join the cluster a job runs on, or start one on this machine."""

from __future__ import annotations

import logging
import os
from typing import Any

_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
    "RAY_worker_niceness": "0",  # Ray's 15 starves replicas and workers beside any other process
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray warns it will become
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody preempts the one machine, and it costs a process a run
    "OMP_NUM_THREADS": "1",  # runs, replicas and engines share the cores
}
"""Of a cluster on this machine, read when Ray is imported; what the user has set stays."""


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster named by RAY_ADDRESS (a Ray job has it set), else start a local one. Idempotent.

    Args:
        num_cpus: CPUs of a local cluster; None takes the machine's.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    is_local = not os.environ.get("RAY_ADDRESS")
    for name, value in _LOCAL_ENVIRONMENT.items() if is_local else ():
        os.environ.setdefault(name, value)
    import ray

    for name in ("httpx", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if is_local:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)
    else:
        ray.init(address="auto", **options)
