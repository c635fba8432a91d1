"""What a conversion will take in time and money, told from those that this store has been through.

A conversion's seconds depend on the machine, the calls and the base more than on anything that could be counted beforehand:
so they are carried over from its own reports, training by the examples that the recipe's steps go through, all else as it
was in the newest. A stage that found its work done took nothing then; of each training the slowest that is on record counts.
A store that was never converted has no such record, and is told nothing. Knows nothing of memory (training/memory.py).
"""

from __future__ import annotations

from typing import Any

from cluster.conversions import STAGES
from cluster.errors import StoreError
from cluster.records import Record
from cluster.registry import release_names
from cluster.store import Store
from jobs.recipe import Recipe

_TRAININGS = {"base": "pretrain", "finetune": "finetune"}
"""Stage -> the recipe's section that says how much of it there is."""
_MAX_RELEASES = 50


class TimePlan(Record):
    """What a conversion is expected to take."""

    seconds: float
    by_stage: dict[str, float]
    usd: float | None
    """At prices.replica_usd_per_hour; None where that is 0."""
    from_release: str
    """Whose conversion it is carried over from."""

    def lines(self) -> list[str]:
        """For a person."""
        stages = ", ".join(f"{name} {_told(s)}" for name, s in self.by_stage.items() if s >= 1)
        money = "prices.replica_usd_per_hour is not set" if self.usd is None else f"${self.usd:.4f}"
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
    seconds, per_hour = sum(by_stage.values()), recipe.prices.replica_usd_per_hour
    return TimePlan(
        seconds=round(seconds, 1),
        by_stage={name: round(by_stage[name], 1) for name in STAGES if name in by_stage},
        usd=seconds / 3600 * per_hour if per_hour else None,
        from_release=newest["release"],
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
