"""How many adapters an engine has room for: what the served release has, and what the store's recent calls asked for.

Two numbers, each the recipe's where it says one. Resident adapters (vLLM's max_cpu_loras) wait in a replica's memory: a
release is swapped in beside the served one, so it is twice the adapters that the served release has on one base. Adapters
of one batch (max_loras) each have a place beside the weights, which on a GPU is memory that keys and values lack: it is
the working set, the most adapters of one base that were asked within one minute of the recent calls, and all resident
ones where none was. Neither falls below 8. Where no adapter is released yet, 64 may be resident and 8 in a batch, so that an
endpoint need not be started again for its first release. Calls for an adapter beyond a batch wait for the next one.
Source: Denning, "The working set model for program behavior", CACM 11(5), 1968.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cluster.calls import read_recent_columns
from cluster.records import Release
from cluster.store import Store
from serving.specialist_config import MIN_ADAPTERS, SpecialistConfig

WINDOW_S = 60
FIRST_ADAPTERS = 64
MAX_PARTS = 200
"""Of the calls, the newest: some minutes of what gateways have just written, weeks of what was compacted."""
_ASKED = ("accept", "escalate", "fall_back", "degrade", "shadow")
"""What was done with calls that a specialist was asked."""


class WorkingSet(NamedTuple):
    """What was measured, over all bases."""

    num_adapters: int
    """Most adapters that the release has on one base."""
    num_called: int
    """Most of them, on one base, that were asked within one minute."""
    num_calls: int
    """Calls that tell so."""


def measure_working_set(store: Store, release: Release | None) -> WorkingSet:
    """Look at the release and the newest MAX_PARTS parts of the calls; no content is read."""
    by_base: dict[str, dict[str, str]] = {}
    for task_id, one in (release.specialists if release else {}).items():
        if one.gate.is_open and one.lora:
            by_base.setdefault(one.base, {})[task_id] = one.lora
    if not by_base:
        return WorkingSet(0, 0, 0)
    calls = read_recent_columns(store, ["ts", "task_id", "action"], MAX_PARTS)
    asked = calls.filter(pc.is_in(calls["action"], value_set=pa.array(_ASKED)))
    found = [_most_in_a_window(asked, adapters) for adapters in by_base.values()]
    num_adapters = max(len(set(adapters.values())) for adapters in by_base.values())
    return WorkingSet(num_adapters, max(most for most, _ in found), sum(num for _, num in found))


def size_specialists(config: SpecialistConfig, found: WorkingSet) -> SpecialistConfig:
    """The config with both numbers said, by the rules above."""
    if found.num_adapters == 0:
        resident, measured = config.max_adapters or FIRST_ADAPTERS, MIN_ADAPTERS
    else:
        resident = config.max_adapters or max(MIN_ADAPTERS, 2 * found.num_adapters)
        measured = max(MIN_ADAPTERS, found.num_called) if found.num_calls else resident
    at_once = config.max_batch_adapters or measured
    return config.model_copy(update={"max_adapters": resident, "max_batch_adapters": min(at_once, resident)})


def _most_in_a_window(calls: pa.Table, adapters: Mapping[str, str]) -> tuple[int, int]:
    """Most distinct adapters in one minute by the clock, and the calls of them all."""
    tasks = pa.array(list(adapters), pa.string())
    numbers = pc.index_in(calls["task_id"], value_set=tasks)
    own = pa.table({"task": numbers, "window": pc.floor(pc.divide(calls["ts"], float(WINDOW_S)))})
    own = own.filter(pc.is_valid(own["task"]))
    names = pa.array(list(adapters.values()), pa.string())
    own = own.append_column("adapter", pc.take(names, own["task"].combine_chunks()))
    counts = own.group_by("window").aggregate([("adapter", "count_distinct")])["adapter_count_distinct"]
    return (pc.max(counts).as_py() or 0), own.num_rows
