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
        tokenised = tokenise_tasks(scope.tasks, train, validation, tokenizer, **limits)
        data = {task_id: _within(its, scope.max_model_tokens) for task_id, its in tokenised.items()}
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


def _within(data: TaskData, max_tokens: int) -> TaskData:
    """Without the examples whose prompt and answer together outgrow the engine's window: it could never say them."""
    train, validation = (
        [row for row in rows if len(row["input_ids"]) <= max_tokens] for rows in (data.train, data.validation)
    )
    num_skipped = data.num_skipped + len(data.train) - len(train)
    return data._replace(train=train, validation=validation, num_skipped=num_skipped)


def _reason_to_refuse(data: TaskData, base_name: str, max_answer_tokens: int) -> str | None:
    """Why this task has nothing to learn from, or prompts or answers too long for the base's engine; or None."""
    num_rows = len(data.train)
    if not num_rows and not data.num_skipped:
        return "no example in its train split; it needs more calls, or a larger curate.split.train"
    if data.num_skipped >= max(1, num_rows):
        return (
            f"{data.num_skipped} of {data.num_skipped + num_rows} examples do not fit base {base_name}: prompts longer "
            f"than {data.prompt_format.max_prompt_tokens} tokens, answers that the window has no room for, or not plain text"
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

    def run(plan: _Plan) -> dict[str, Any]:
        model, metrics = finetune(
            plan.run_id,
            recipe.finetune,
            base_path=base_path,
            train_path=work / plan.run_id / "train",
            validation_path=work / plan.run_id / "validation" if plan.has_validation else None,
            pad_token_id=tokenizer.pad_token_id,
            storage=work / "runs",
            label=plan.task.task_id,
            num_parallel=min(recipe.fleet.max_parallel, len(missing)),
        )
        (model / "README.md").unlink(missing_ok=True)
        meta = {"base": base, "task_id": plan.task.task_id, "snapshot": snapshot, "metrics": metrics}
        store.publish(plan.adapter, model, meta)
        # What was learned from is readable there; it stays no longer than it is needed.
        shutil.rmtree(work / plan.run_id)
        return metrics

    missing = {p.task.task_id: (p.mean_tokens, lambda p=p: run(p)) for p in plans if not store.is_published(p.adapter)}
    _, errors = run_fleet(
        missing,
        recipe.fleet,
        lambda task_id, metrics, error: say(f"fine-tune {task_id}: {error or _last_losses(metrics)}"),
    )
    done = [plan for plan in plans if plan.task.task_id not in errors]
    return {plan.task.task_id: store.manifest(plan.adapter)["metrics"] for plan in done}, errors


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
