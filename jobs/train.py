"""S4 and S5 of a conversion: tasks -> a base model and an adapter for each task that can be learned.

Every artifact is named by what it was made from: what is published already is not made again.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cluster.engine import rendering_version
from cluster.prompts import PromptFormat
from cluster.records import Example, Record, Split, TaskSpec
from cluster.store import Store, content_hash
from jobs.recipe import Recipe
from training.bases import publish_loaded_base
from training.candidates import Scope
from training.catalog import load_catalog
from training.dataset import TaskData, num_answer_tokens, save_dataset, tokenise_tasks
from training.evaluation import Candidate
from training.finetune import finetune
from training.fleet import run_fleet
from training.multi_finetune import AdapterTask, ManyTrained, finetune_many
from training.multi_plan import TaskLoad, plan_groups
from training.probe import at_rank, model_memory_gib
from training.scratch import pretrain, texts_of, train_tokenizer
from training.selection import Selection, select_base

_ANSWER_FRACTION = 4
"""An answer may take a quarter of the engine's window; prompts take the rest."""
_ANSWER_SLACK = 1.5
"""A specialist may answer half as long again as the longest train answer before it is cut."""


class Trained(NamedTuple):
    """What S4 and S5 made."""

    base: str = ""
    selection: Selection | None = None
    candidates: Sequence[Candidate] = ()
    losses: dict[str, dict[str, Any]] = {}


def train(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
    snapshot: str,
    scope: Scope,
    refused: dict[str, str],
    lap: Callable[[str], None],
    say: Callable[[str], None],
) -> Trained:
    """Choose or train the base, then fine-tune the tasks.

    Args:
        refused: task_id -> reason; tasks that cannot be learned are added.
        lap: called with the name of each stage that is over.
    """
    chosen = select_base(store, snapshot, recipe.select, scope, recipe.pretrain, recipe.finetune, work, say)
    for one in chosen.candidates:
        say(f"select {one.name}: {one.status}: {one.reason}")
    lap("select")
    recipe = recipe.model_copy(update={"finetune": at_rank(recipe.finetune, chosen.lora_rank)})
    base, tokenizer, data = _prepare_base(recipe, store, work, snapshot, chosen, scope, refused, say)
    lap("base")
    plans = _plan_runs(recipe, store, work, scope.tasks, data, base)
    losses, failed = _train_adapters(recipe, store, work, snapshot, plans, base, tokenizer, say) if plans else ({}, {})
    refused |= {task_id: f"fine-tune failed: {reason}" for task_id, reason in failed.items()}
    lap("finetune")
    return Trained(
        base, chosen, [_candidate(p, base, chosen.arm) for p in plans if p.task.task_id not in failed], losses
    )


class _Plan(Record):
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


def scope_of(recipe: Recipe, tasks: list[TaskSpec], by_split: dict[Split, dict[str, list[Example]]]) -> Scope:
    """What the base and the adapters are made for: tasks, redacted examples, the engine's window and the memory."""
    max_tokens = recipe.specialists.max_model_tokens
    memory_gib = model_memory_gib(recipe.finetune)
    return Scope(tasks, by_split, max_tokens, max_tokens * 3 // 4, memory_gib, recipe.gate.epsilon)


def _prepare_base(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
    snapshot: str,
    chosen: Selection,
    scope: Scope,
    refused: dict[str, str],
    say: Callable[[str], None],
) -> tuple[str, Any, dict[str, TaskData]]:
    """Publish the base of a hub or folder, or train it from scratch on the tasks that fit it.

    Args:
        refused: task_id -> reason; tasks whose prompts or answers are too long are added.

    Returns:
        (store path, tokenizer, data of the tasks that fit, in its tokens); no path where none fits a scratch base.
    """
    from transformers import AutoTokenizer

    train, validation = scope.by_split["train"], scope.by_split["validation"]

    def tokenise(tokenizer: Any) -> dict[str, TaskData]:
        limits = {"is_scratch": chosen.is_scratch, "max_prompt_tokens": scope.max_prompt_tokens}
        data = tokenise_tasks(scope.tasks, train, validation, tokenizer, **limits)
        reasons = {
            task_id: _reason_to_refuse(its, chosen.base, _max_answer_tokens(recipe)) for task_id, its in data.items()
        }
        refused.update({task_id: reason for task_id, reason in reasons.items() if reason})
        return {task_id: its for task_id, its in data.items() if not reasons[task_id]}

    if chosen.is_scratch:
        base = f"bases/{chosen.base}-{_base_key(recipe, chosen.base, scope)}"
    else:
        base = publish_loaded_base(store, chosen.base)
    if store.is_published(base):
        tokenizer = AutoTokenizer.from_pretrained(store.fetch(base, work / "cache"), trust_remote_code=False)
        return base, tokenizer, tokenise(tokenizer)
    entry = load_catalog().get(chosen.base)
    texts = [t for task in scope.tasks for t in texts_of(train[task.task_id], task.static_lines)]
    tokenizer = train_tokenizer(texts, entry.vocab_size)
    data = tokenise(tokenizer)
    if not data:
        return "", tokenizer, data
    say(f"base: {chosen.base}, trained from scratch for {recipe.pretrain.num_steps} steps")
    model, metrics = pretrain(entry, recipe.pretrain, tokenizer, list(data.values()), work / pathlib.Path(base).name)
    store.publish(base, model, {"base": chosen.base, "snapshot": snapshot, "metrics": metrics})
    shutil.rmtree(work / pathlib.Path(base).name)
    return base, tokenizer, data


def _base_key(recipe: Recipe, name: str, scope: Scope) -> str:
    """Names a scratch base by all that shapes it."""
    groups = {split: scope.by_split[split].values() for split in ("train", "validation")}
    seen = {split: sorted(e.example_id for group in groups[split] for e in group) for split in groups}
    known = [task.model_dump(mode="json") for task in scope.tasks]
    return content_hash([name, recipe.pretrain.model_dump(mode="json"), known, seen, rendering_version()])[:12]


def _max_answer_tokens(recipe: Recipe) -> int:
    return recipe.specialists.max_model_tokens // _ANSWER_FRACTION


def _plan_runs(
    recipe: Recipe, store: Store, work: pathlib.Path, tasks: list[TaskSpec], data: dict[str, TaskData], base: str
) -> list[_Plan]:
    """Name every task's run, and write the datasets of those that are still to come."""
    plans = []
    for task in tasks:
        if task.task_id not in data:
            continue
        prompt_format, rows, held_out, _ = data[task.task_id]
        facts = [base, prompt_format.model_dump(mode="json"), recipe.finetune.model_dump(mode="json"), rows]
        run_id = content_hash(facts)[:12]
        longest = int(max(map(num_answer_tokens, rows)) * _ANSWER_SLACK)
        plan = _Plan(
            task=task,
            prompt_format=prompt_format,
            run_id=run_id,
            max_answer_tokens=min(longest, _max_answer_tokens(recipe)),
            mean_tokens=sum(len(row["input_ids"]) for row in rows) // len(rows),
            has_validation=bool(held_out),
        )
        plans.append(plan)
        if not store.is_published(plan.adapter):
            save_dataset(rows, work / run_id / "train")
            if held_out:
                save_dataset(held_out, work / run_id / "validation")
    return plans


def _reason_to_refuse(data: TaskData, base_name: str, max_answer_tokens: int) -> str | None:
    """Why this task's prompts or answers are too long for the base's engine, or None."""
    num_rows = len(data.train)
    if data.num_skipped >= max(1, num_rows):
        return (
            f"{data.num_skipped} of {data.num_skipped + num_rows} prompts do not fit base {base_name}: "
            f"longer than {data.prompt_format.max_prompt_tokens} tokens, or not plain text"
        )
    too_long = sum(num_answer_tokens(row) > max_answer_tokens for row in data.train)
    if too_long >= max(1, num_rows // 2):
        return (
            f"{too_long} of {num_rows} answers are longer than {max_answer_tokens} tokens, a quarter of "
            "specialists.max_model_tokens; give the engine a longer window"
        )
    return None


def _train_adapters(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
    snapshot: str,
    plans: list[_Plan],
    base: str,
    tokenizer: Any,
    say: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    base_path = store.fetch(base, work / "cache")

    def run(group: list[_Plan]) -> ManyTrained:
        trained = _train_group(recipe, work, group, base_path, tokenizer.pad_token_id)
        for plan in group:
            task_id = plan.task.task_id
            if task_id in trained.done:
                model, metrics = trained.done[task_id]
                (model / "README.md").unlink(missing_ok=True)
                meta = {"base": base, "task_id": task_id, "snapshot": snapshot, "metrics": metrics}
                store.publish(plan.adapter, model, meta)
                # What was learned from is readable there; it stays no longer than it is needed.
                shutil.rmtree(work / plan.run_id)
        return trained

    missing = {plan.task.task_id: plan for plan in plans if not store.is_published(plan.adapter)}
    groups = {names[0]: [missing[name] for name in names] for names in _plan_groups(recipe, missing, base)}
    errors: dict[str, str] = {}

    def note(first: str, trained: ManyTrained | None, error: str | None) -> None:
        for task_id in (plan.task.task_id for plan in groups[first]):
            reason = error if trained is None else trained.failed.get(task_id)
            if reason:
                errors[task_id] = reason
            say(f"fine-tune {task_id}: {reason or _last_losses(trained and trained.done[task_id][1])}")

    size = {first: sum(plan.mean_tokens for plan in group) for first, group in groups.items()}
    run_fleet(
        {first: (size[first], lambda group=group: run(group)) for first, group in groups.items()}, recipe.fleet, note
    )
    done = [plan for plan in plans if plan.task.task_id not in errors]
    return {plan.task.task_id: store.manifest(plan.adapter)["metrics"] for plan in done}, errors


def _plan_groups(recipe: Recipe, missing: dict[str, _Plan], base: str) -> list[list[str]]:
    """Task ids of each run: alone, or several as adapters over one base."""
    if recipe.fleet.mode == "solo":
        return [[task_id] for task_id in missing]
    loads = {task_id: TaskLoad(base, plan.mean_tokens) for task_id, plan in missing.items()}
    return plan_groups(loads, recipe.fleet.max_parallel)


def _train_group(
    recipe: Recipe, work: pathlib.Path, group: list[_Plan], base_path: pathlib.Path, pad_token_id: int
) -> ManyTrained:
    """Results by task id."""
    shared = {"base_path": base_path, "pad_token_id": pad_token_id, "storage": work / "runs"}
    tasks = [
        AdapterTask(
            plan.task.task_id,
            recipe.finetune,
            work / plan.run_id / "train",
            work / plan.run_id / "validation" if plan.has_validation else None,
        )
        for plan in group
    ]
    if recipe.fleet.mode == "multi_lora":
        name = content_hash(sorted(plan.run_id for plan in group))[:12]
        return finetune_many(name, tasks, label=f"{len(tasks)} tasks", **shared)
    (task,), (plan,) = tasks, group
    trained = finetune(
        plan.run_id,
        recipe.finetune,
        method="lora",
        train_path=task.train_path,
        validation_path=task.validation_path,
        label=task.name,
        **shared,
    )
    return ManyTrained({task.name: trained}, {})


def _last_losses(metrics: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in (metrics or {}).items() if key != "curve")


def _candidate(plan: _Plan, base: str, arm: str) -> Candidate:
    return Candidate(
        task=plan.task,
        base=base,
        base_arm=arm,
        adapter=plan.adapter,
        prompt_format=plan.prompt_format,
        max_answer_tokens=plan.max_answer_tokens,
    )
