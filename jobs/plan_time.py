"""What a conversion will take in time and money: told from those that this store has been through, else roughly from its calls.

A conversion's seconds depend on the machine, the calls and the base more than on anything that could be counted beforehand:
so they are carried over from its own reports, training by the examples that the recipe's steps go through, all else as it
was in the newest. A stage that found its work done took nothing then; of each training the slowest that is on record counts.
A store that was never converted has no such record: there the steps are counted and one of them is timed on this machine
(training/pace.py), and what starting a run and an engine takes is what it took where it was measured. That is good to a
factor of two, for trainings on CPUs like this machine's. Knows nothing of memory (training/memory.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.conversions import STAGES
from cluster.errors import StoreError
from cluster.records import Record
from cluster.registry import release_names
from cluster.store import Store
from jobs.plan_rows import TaskRows
from jobs.recipe import Recipe

if TYPE_CHECKING:
    from training.finetune import FinetuneConfig
    from training.memory import ModelShape

_TRAININGS = {"base": "pretrain", "finetune": "finetune"}
"""Stage -> the recipe's section that says how much of it there is."""
_MAX_RELEASES = 50
_RUN_START_S = 20.0
"""Until a run of Ray Train takes its first step, and after its last, 12 to 28 where it was measured: processes that import
torch and DeepSpeed, which keep _START_CPUS busy, so that runs that start side by side wait for each other where there are no more."""
_START_CPUS = 2
_BASE_MADE_S = 4.0
"""Tokenizer, dataset and publication of a scratch base."""
_ENGINE_START_S = 50.0
"""Until vLLM answers on a CPU."""
_ANSWER_S = 0.03
"""That an engine takes for a call beside its arithmetic, in full batches."""
_CALL_S = 0.0015
"""That curation and discovery take for a call."""
_GRADED = 1 / 3
"""Of a training pass: held-out rows are only read forwards."""


class TimePlan(Record):
    """What a conversion is expected to take."""

    seconds: float
    by_stage: dict[str, float]
    usd: float | None
    """At prices.replica_usd_per_hour; None where that is 0."""
    from_release: str | None
    """Whose conversion it is carried over from; None: counted up, good to a factor of two."""

    def lines(self) -> list[str]:
        """For a person."""
        stages = ", ".join(f"{name} {_told(s)}" for name, s in self.by_stage.items() if s >= 1)
        money = "prices.replica_usd_per_hour is not set" if self.usd is None else f"${self.usd:.4f}"
        if self.from_release is None:
            return [
                f"time: roughly {_told(self.seconds)}, within a factor of 2 ({stages}), by steps timed on this machine; a "
                f"conversion of this store will tell it better; money: {money}"
            ]
        return [
            f"time: about {_told(self.seconds)} ({stages}), as release {self.from_release[:12]} took; money: {money}"
        ]


def plan_time(recipe: Recipe) -> TimePlan | None:
    """None where the store holds no conversion to tell from."""
    store = Store(recipe.store, is_made=False)
    found = [one for sha in release_names(store)[:_MAX_RELEASES] if (one := _conversion(store, sha))]
    found = [one for one in found if one["config"]["select"]["base"] == recipe.select.base]
    if not found:
        return None
    newest = max(found, key=lambda one: one["created_ts"])
    by_stage = dict(newest["seconds"])
    for stage, section in _TRAININGS.items():
        rates = [one["seconds"].get(stage, 0.0) / _examples(one["config"][section]) for one in found]
        if any(rates):
            by_stage[stage] = max(rates) * _examples(getattr(recipe, section).model_dump())
    return _time_plan(recipe, by_stage, newest["release"])


class Work(Record):
    """What one training of a first conversion would do."""

    tasks: tuple[TaskRows, ...]
    step_s: float
    """Seconds of one optimiser step."""


def time_step(config: FinetuneConfig, shape: ModelShape, tasks: Sequence[TaskRows]) -> Work:
    """Time a step of a training on this machine's CPU; takes about a second."""
    from training.pace import step_seconds

    num_rows = sum(one.num_train for one in tasks)
    row, answer = (
        sum(getattr(one, name) * one.num_train for one in tasks) / num_rows
        for name in ("mean_tokens", "mean_answer_tokens")
    )
    return Work(tasks=tuple(tasks), step_s=step_seconds(shape, config, row, answer))


def estimate_first(
    recipe: Recipe, num_calls: int, base: Work | None, finetune: Work, places: int, cpus: float
) -> TimePlan:
    """Count up a conversion that nothing on record is like.

    Args:
        base: its training from scratch, where there is one.
        places: fine-tunes at a time.
        cpus: of all nodes.
    """
    by_stage = {"curate": num_calls * _CALL_S}
    if base is not None:
        by_stage["base"] = _BASE_MADE_S + _RUN_START_S + _learn_seconds(recipe.pretrain, base.step_s, base.tasks)
    learn_s = [_learn_seconds(recipe.finetune, finetune.step_s, [task]) for task in finetune.tasks]
    if recipe.fleet.mode == "multi_lora":
        by_stage["finetune"] = _RUN_START_S + sum(learn_s)
    else:
        at_once = min(places, len(learn_s))
        start_s = _RUN_START_S * max(1.0, at_once * _START_CPUS / cpus)
        by_stage["finetune"] = (start_s + max(learn_s)) * math.ceil(len(learn_s) / at_once)
    read_s = finetune.step_s * _GRADED / recipe.finetune.batch_size
    num_asked = sum(task.num_held_out for task in finetune.tasks)
    by_stage["validate"] = _ENGINE_START_S * (1 + len(recipe.specialists.merge)) + num_asked * (_ANSWER_S + read_s)
    return _time_plan(recipe, by_stage, None)


def _learn_seconds(config: FinetuneConfig, step_s: float, tasks: Sequence[TaskRows]) -> float:
    """Of one run's steps, and of held-out rows graded at every checkpoint."""
    num_graded = math.ceil(config.num_steps / config.checkpoint_every) * sum(one.num_validation for one in tasks)
    return step_s * (config.num_steps + num_graded * _GRADED / config.batch_size)


def _time_plan(recipe: Recipe, by_stage: dict[str, float], from_release: str | None) -> TimePlan:
    seconds, per_hour = sum(by_stage.values()), recipe.prices.replica_usd_per_hour
    return TimePlan(
        seconds=round(seconds, 1),
        by_stage={name: round(by_stage[name], 1) for name in STAGES if name in by_stage},
        usd=seconds / 3600 * per_hour if per_hour else None,
        from_release=from_release,
    )


def _conversion(store: Store, sha: str) -> dict[str, Any] | None:
    """Of one release: {release, created_ts, seconds, config}; None where no conversion made it here."""
    try:
        report, config = (store.read_json(f"releases/{sha}.{name}.json") for name in ("report", "config"))
        created_ts = store.read_json(f"releases/{sha}.json")["created_ts"]
        return {"release": sha, "created_ts": created_ts, "seconds": report["seconds"], "config": config["config"]}
    except (StoreError, KeyError, ValueError):
        return None


def _examples(section: dict[str, Any]) -> int:
    return int(section["num_steps"]) * int(section["batch_size"])


def _told(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.1f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
