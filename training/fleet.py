"""Many fine-tunes at once on one cluster: longest first, failures isolated per task."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pydantic import Field

from cluster.config import Config

JobT = TypeVar("JobT")


class FleetConfig(Config):
    """How many fine-tunes share the cluster."""

    max_parallel: int = Field(default=2, ge=1)
    """Fine-tunes at a time; each takes `finetune.num_workers` workers."""
    mode: Literal["solo", "multi_lora"] = "solo"
    """solo: a run for each task. multi_lora: `max_parallel` runs, each with its share of the tasks as adapters side by side
    over one base (finetune.zero_stage 0 or 3): the same adapters, without a start of processes for each."""


def run_fleet(
    runs: dict[str, tuple[int, Callable[[], JobT]]],
    config: FleetConfig,
    on_done: Callable[[str, JobT | None, str | None], Any],
) -> tuple[dict[str, JobT], dict[str, str]]:
    """Run every fine-tune, the largest first.

    Args:
        runs: task_id -> (size for ordering, the run).
        on_done: called once per task with (task_id, result, error).

    Returns:
        (results by task, errors by task). One task's failure never stops the others.
    """
    results: dict[str, JobT] = {}
    errors: dict[str, str] = {}
    ordered = sorted(runs, key=lambda task_id: -runs[task_id][0])
    with concurrent.futures.ThreadPoolExecutor(config.max_parallel) as pool:
        futures = {pool.submit(runs[task_id][1]): task_id for task_id in ordered}
        for future in concurrent.futures.as_completed(futures):
            task_id = futures[future]
            try:
                results[task_id] = future.result()
            except Exception as error:  # the fleet's edge: whatever failed, the other tasks go on
                errors[task_id] = f"{type(error).__name__}: {error}"
            on_done(task_id, results.get(task_id), errors.get(task_id))
    return results, errors
