"""S5 of a conversion: tokenised tasks -> published adapters, trained as one fleet that serving may interrupt.

Every adapter is named by what it was made from: what is published already is not made again.
"""

from __future__ import annotations

import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cluster.prices import training_cost
from cluster.prompts import PromptFormat
from cluster.records import Record, TaskSpec
from cluster.session import cluster_nodes, num_replicas_without_place
from cluster.store import Store, content_hash
from jobs.plan import plan_run
from jobs.provenance import code
from jobs.recipe import Recipe
from training.catalog import HubModel, find_entry
from training.dataset import TaskData, num_answer_tokens, save_dataset
from training.finetune import ask_to_yield, finetune
from training.fleet import FleetReport, FleetRun, num_places, run_fleet
from training.model_card import write_card

_ANSWER_SLACK = 1.5
"""A specialist may answer half as long again as the longest train answer before it is cut."""


class AdapterPlan(Record):
    """Where one task's data and adapter are."""

    task: TaskSpec
    prompt_format: PromptFormat
    run_id: str
    max_answer_tokens: int
    mean_tokens: int
    """Of a row: every run takes the same number of steps, so this says which ones last longest."""
    has_validation: bool

    @property
    def adapter(self) -> str:
        return f"adapters/{self.task.task_id}/{self.run_id}"


def plan_adapters(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
    tasks: Sequence[TaskSpec],
    data: dict[str, TaskData],
    base: str,
    max_answer_tokens: int,
) -> list[AdapterPlan]:
    """Name every task's run, and write the datasets of those that are still to come."""
    plans = []
    for task in tasks:
        if task.task_id not in data:
            continue
        prompt_format, rows, held_out, _ = data[task.task_id]
        facts = [base, prompt_format.model_dump(mode="json"), recipe.finetune.model_dump(mode="json"), rows]
        run_id = content_hash(facts)[:12]
        longest = int(max(map(num_answer_tokens, rows)) * _ANSWER_SLACK)
        plan = AdapterPlan(
            task=task,
            prompt_format=prompt_format,
            run_id=run_id,
            max_answer_tokens=min(longest, max_answer_tokens),
            mean_tokens=sum(len(row["input_ids"]) for row in rows) // len(rows),
            has_validation=bool(held_out),
        )
        plans.append(plan)
        if not store.is_published(plan.adapter):
            save_dataset(rows, work / run_id / "train")
            if held_out:
                save_dataset(held_out, work / run_id / "validation")
    return plans


def train_adapters(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
    snapshot: str,
    plans: list[AdapterPlan],
    base: str,
    tokenizer: Any,
    say: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Train what is not published yet, as one fleet.

    Args:
        work: holds the datasets that `plan_adapters` wrote; they are removed once their adapter is published.

    Returns:
        (last metrics by task, reasons of the tasks that failed).
    """
    base_path = store.fetch(base, work / "cache")
    made_with = code()
    places = num_places(recipe.fleet, plan_run(recipe.finetune), cluster_nodes(), recipe.limits)
    spent_s: Counter[str] = Counter()

    def run(plan: AdapterPlan) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            model, metrics = finetune(
                plan.run_id,
                recipe.finetune,
                base_path=base_path,
                train_path=work / plan.run_id / "train",
                validation_path=work / plan.run_id / "validation" if plan.has_validation else None,
                pad_token_id=tokenizer.pad_token_id,
                storage=work / "runs",
                label=plan.task.task_id,
                num_parallel=min(places, len(missing)),
            )
        finally:
            spent_s[plan.run_id] += time.monotonic() - begin
        facts = {"base": base, "snapshot": snapshot, "metrics": metrics, "made_with": made_with}
        _publish_adapter(recipe, store, plan, model, facts, spent_s[plan.run_id])
        # What was learned from is readable there; it stays no longer than it is needed.
        shutil.rmtree(work / plan.run_id)
        return metrics

    missing = {
        p.task.task_id: FleetRun(p.mean_tokens, lambda p=p: run(p), lambda p=p: ask_to_yield(p.run_id, work / "runs"))
        for p in plans
        if not store.is_published(p.adapter)
    }
    fleet = run_fleet(
        missing,
        places,
        lambda task_id, metrics, error: say(f"fine-tune {task_id}: {error or _last_losses(metrics)}"),
        num_replicas_without_place,
    )
    if missing:
        say(_tell_fleet(fleet.report))
    done = [plan for plan in plans if plan.task.task_id not in fleet.errors]
    return {plan.task.task_id: store.manifest(plan.adapter)["metrics"] for plan in done}, fleet.errors


def _publish_adapter(
    recipe: Recipe, store: Store, plan: AdapterPlan, model: pathlib.Path, facts: dict[str, Any], seconds: float
) -> None:
    """Publish an adapter with its card; the manifest says what made it and what that cost."""
    entry = find_entry(store.manifest(facts["base"])["base"])
    license_name = entry.license.value if isinstance(entry, HubModel) and entry.license else None
    write_card(model, plan.task, facts["base"], license_name, recipe.finetune, facts["metrics"], facts["snapshot"])
    used = plan_run(recipe.finetune)
    cost = training_cost(seconds, cpus=used.total_cpus, gpus=used.total_gpus, config=recipe.prices)
    config = recipe.finetune.model_dump(mode="json")
    store.publish(plan.adapter, model, {**facts, "task_id": plan.task.task_id, "config": config, "cost": cost})


def _tell_fleet(report: FleetReport) -> str:
    ratio = report.makespan_s / max(report.lower_bound_s, 1e-9)
    return (
        f"fleet: {len(report.run_s)} fine-tunes, {report.num_places} at a time, {report.makespan_s:.0f} s, "
        f"{ratio:.2f} of the least possible; {report.num_yields} made room for serving"
    )


def _last_losses(metrics: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in (metrics or {}).items() if key != "curve")
