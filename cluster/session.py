"""Connect this process to Ray: join the cluster a job runs on, or start one on this machine."""

from __future__ import annotations

import os
from typing import Any


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster named by RAY_ADDRESS (a Ray job has it set), else start a local one. Idempotent.

    Args:
        num_cpus: CPUs of a local cluster; None takes the machine's.
    """
    import ray

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **options)
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)
