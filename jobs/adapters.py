"""S5 of a conversion: tokenised tasks -> published adapters, trained as one fleet that serving may interrupt.

Every adapter is named by what it was made from: what is published already is not made again.
"""

from __future__ import annotations

import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cluster.errors import ConfigError, InputError
from cluster.prices import training_cost
from cluster.prompts import PromptFormat
from cluster.records import Record, TaskSpec
from cluster.session import cluster_nodes, num_replicas_without_place
from cluster.store import Store, content_hash
from jobs.plan import plan_run
from jobs.provenance import code
from jobs.recipe import Recipe
from training.catalog import known_license
from training.dataset import TaskData, num_answer_tokens, save_dataset
from training.finetune import ask_to_yield, finetune
from training.fleet import FleetReport, FleetRun, num_places, run_fleet
from training.memory import device_bytes
from training.model_card import write_card
from training.multi_finetune import AdapterTask, ManyTrained, finetune_many, load_of, plan_run_of
from training.multi_plan import TaskLoad, plan_groups
from training.speed import SPEED_FACTS

_NOT_LEARNED = {"log_to", "max_failures", "min_workers"}
"""Fields of a fine-tune that change how it is watched and survives, and nothing of what it learns."""
_ANSWER_SLACK = 1.5
"""A specialist may answer half as long again as the longest train answer before it is cut."""


class Start(Record):
    """What a retrained adapter goes on from; part of its name and manifest."""

    adapter: str
    """Store path."""
    sha256: str
    """Of its files."""
    num_new: int
    """Train examples that the old adapter had not seen."""
    num_replayed: int
    """Train examples that it had."""
    replay_share: float
    """Asked share of replayed examples among all."""


class AdapterPlan(Record):
    """Where one task's data and adapter are."""

    task: TaskSpec
    prompt_format: PromptFormat
    run_id: str
    max_answer_tokens: int
    mean_tokens: int
    """Of a row: every run takes the same number of steps, so this says which ones last longest."""
    has_validation: bool
    start: Start | None = None
    """None begins with an untrained adapter."""

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
    starts: Mapping[str, Start] = MappingProxyType({}),
) -> list[AdapterPlan]:
    """Name every task's run, and write the datasets of those that are still to come.

    Args:
        starts: task_id -> what its adapter goes on from, where it does.
    """
    plans = []
    for task in tasks:
        if task.task_id not in data:
            continue
        prompt_format, rows, held_out = data[task.task_id][:3]
        facts = [
            base,
            prompt_format.model_dump(mode="json"),
            recipe.finetune.model_dump(mode="json", exclude=_NOT_LEARNED),
            rows,
        ]
        start = starts.get(task.task_id)
        facts += [start.model_dump(mode="json")] if start else []
        run_id = content_hash(facts)[:12]
        longest = int(max(map(num_answer_tokens, rows)) * _ANSWER_SLACK)
        plan = AdapterPlan(
            task=task,
            prompt_format=prompt_format,
            run_id=run_id,
            max_answer_tokens=min(longest, max_answer_tokens),
            mean_tokens=sum(len(row["input_ids"]) for row in rows) // len(rows),
            has_validation=bool(held_out),
            start=start,
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
    missing = {plan.task.task_id: plan for plan in plans if not store.is_published(plan.adapter)}
    places = num_places(recipe.fleet, plan_run(recipe.finetune), cluster_nodes(), recipe.limits)
    base_path = store.fetch(base, work / "cache")
    groups, failed = _plan_groups(recipe, missing, base_path, work, places)
    facts = {"base": base, "snapshot": snapshot, "made_with": code()}
    shared = {"base_path": base_path, "pad_token_id": tokenizer.pad_token_id, "storage": work / "runs"}
    shared["num_parallel"] = min(places, max(1, len(groups)))
    trainer = _GroupTrainer(recipe, store, work, facts, shared)
    for task_id, reason in failed.items():
        say(f"fine-tune {task_id}: {reason}")

    def note(first: str, trained: ManyTrained | None, error: str | None) -> None:
        for task_id in (plan.task.task_id for plan in groups[first]):
            reason = error if trained is None else trained.failed.get(task_id)
            if reason:
                failed[task_id] = reason
            say(f"fine-tune {task_id}: {reason or _last_losses(trained and trained.done[task_id][1])}")

    runs = {
        first: FleetRun(
            sum(plan.mean_tokens for plan in group),
            lambda group=group: trainer.train(group),
            lambda group=group: ask_to_yield(trainer.name_of(group), work / "runs"),
        )
        for first, group in groups.items()
    }
    fleet = run_fleet(runs, places, note, num_replicas_without_place)
    if runs:
        say(_tell_fleet(fleet.report))
    done = [plan for plan in plans if plan.task.task_id not in failed]
    return {plan.task.task_id: store.manifest(plan.adapter)["metrics"] for plan in done}, failed


def _plan_groups(
    recipe: Recipe, missing: dict[str, AdapterPlan], base_path: pathlib.Path, work: pathlib.Path, places: int
) -> tuple[dict[str, list[AdapterPlan]], dict[str, str]]:
    """The tasks of each run, alone or several as adapters over one base, by its first; and reasons of those that no run of
    several takes."""
    if recipe.fleet.mode == "solo" or not missing:
        return {task_id: [plan] for task_id, plan in missing.items()}, {}
    config, base = recipe.finetune, str(base_path)
    room = device_bytes(config, min(places, len(missing)))
    loads, failed = {}, {}
    for task_id, plan in missing.items():
        try:
            loads[task_id] = load_of(_adapter_task(recipe, plan, work), base_path)
        except InputError as error:
            failed[task_id] = str(error)

    def reason_against_run(names: Sequence[str]) -> str | None:
        try:
            plan_run_of([loads[name] for name in names], config, base_path, room)
        except ConfigError as error:
            return str(error)
        return None

    failed |= {task_id: reason for task_id in loads if (reason := reason_against_run([task_id]))}
    sizes = {name: TaskLoad(base, plan.mean_tokens) for name, plan in missing.items() if name not in failed}
    groups = plan_groups(sizes, places, lambda names: reason_against_run(names) is None)
    return {names[0]: [missing[name] for name in names] for names in groups}, failed


def _adapter_task(
    recipe: Recipe, plan: AdapterPlan, work: pathlib.Path, start_path: pathlib.Path | None = None
) -> AdapterTask:
    return AdapterTask(
        plan.task.task_id,
        recipe.finetune,
        work / plan.run_id / "train",
        work / plan.run_id / "validation" if plan.has_validation else None,
        start_path,
    )


class _GroupTrainer:
    """Trains one run's tasks and publishes their adapters; one for all runs of a fleet, which call it side by side."""

    def __init__(
        self, recipe: Recipe, store: Store, work: pathlib.Path, facts: dict[str, Any], shared: dict[str, Any]
    ) -> None:
        """Take what all runs have in common.

        Args:
            facts: of every adapter's manifest.
            shared: arguments of `finetune` and `finetune_many`.
        """
        self._recipe, self._store, self._work = recipe, store, work
        self._facts, self._shared = facts, shared
        self._spent_s: Counter[str] = Counter()

    def name_of(self, group: Sequence[AdapterPlan]) -> str:
        """What Ray Train knows the run by; the same after a restart."""
        if self._recipe.fleet.mode == "solo":
            return group[0].run_id
        return content_hash(sorted(plan.run_id for plan in group))[:12]

    def train(self, group: Sequence[AdapterPlan]) -> ManyTrained:
        """Results by task id. Raises what `finetune` and `finetune_many` raise."""
        name, begin = self.name_of(group), time.monotonic()
        try:
            trained = self._fit(name, group)
        finally:
            self._spent_s[name] += time.monotonic() - begin
        for plan in group:
            if plan.task.task_id in trained.done:
                model, metrics = trained.done[plan.task.task_id]
                seconds = self._spent_s[name] / len(group)
                speed = trained.speed or {key: metrics[key] for key in SPEED_FACTS if key in metrics}
                learned = {key: one for key, one in metrics.items() if key not in SPEED_FACTS}
                facts = {**self._facts, "metrics": learned, "speed": speed}
                _publish_adapter(self._recipe, self._store, plan, model, facts, seconds)
                # What was learned from is readable there; it stays no longer than it is needed.
                shutil.rmtree(self._work / plan.run_id)
        return trained

    def _fit(self, name: str, group: Sequence[AdapterPlan]) -> ManyTrained:
        tasks = [_adapter_task(self._recipe, plan, self._work, self._start_of(plan)) for plan in group]
        if self._recipe.fleet.mode == "multi_lora":
            return finetune_many(name, tasks, label=f"{len(tasks)} tasks", **self._shared)
        (task,) = tasks
        paths = {"train_path": task.train_path, "validation_path": task.validation_path, "start_path": task.start_path}
        return ManyTrained({task.name: finetune(name, task.config, label=task.name, **paths, **self._shared)}, {})

    def _start_of(self, plan: AdapterPlan) -> pathlib.Path | None:
        return self._store.fetch(plan.start.adapter, self._work / "cache") if plan.start else None


def _publish_adapter(
    recipe: Recipe, store: Store, plan: AdapterPlan, model: pathlib.Path, facts: dict[str, Any], seconds: float
) -> None:
    """Publish an adapter with its card; the manifest says what made it and what that cost.

    Args:
        seconds: how long it held its place; of a run with several adapters, its share.
    """
    license_name = known_license(store.manifest(facts["base"])["base"])
    write_card(model, plan.task, facts["base"], license_name, recipe.finetune, facts["metrics"], facts["snapshot"])
    used = plan_run(recipe.finetune)
    cost = training_cost(seconds, cpus=used.total_cpus, gpus=used.total_gpus, config=recipe.prices)
    config = recipe.finetune.model_dump(mode="json")
    own = {"task_id": plan.task.task_id, "config": config, "cost": cost}
    own |= {"start": plan.start.model_dump(mode="json")} if plan.start else {}
    store.publish(plan.adapter, model, {**facts, **own})


def _tell_fleet(report: FleetReport) -> str:
    ratio = report.makespan_s / max(report.lower_bound_s, 1e-9)
    return (
        f"fleet: {len(report.run_s)} fine-tunes, {report.num_places} at a time, {report.makespan_s:.0f} s, "
        f"{ratio:.2f} of the least possible; {report.num_yields} made room for serving"
    )


def _last_losses(metrics: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in (metrics or {}).items() if key != "curve")
