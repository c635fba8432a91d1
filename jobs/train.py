"""S4 and S5 of a conversion: tasks -> a base model and an adapter for each task that can be learned.

Every artifact is named by what it was made from: what is published already is not made again.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from cluster.engine import rendering_version
from cluster.errors import TrainingError
from cluster.records import Example, Split, TaskSpec
from cluster.store import Store, content_hash
from jobs.adapters import AdapterPlan, Start, plan_adapters, train_adapters
from jobs.recipe import Recipe
from jobs.validate import calls_to_certify
from training.bases import publish_loaded_base
from training.bounding import describe_left_out, keep_fitting, refuse_lengths
from training.canaries import Canary, as_examples, plan_canaries
from training.candidates import Scope
from training.catalog import ScratchModel, find_entry, load_catalog
from training.dataset import TaskData, find_written, tokenise_tasks
from training.evaluation import Candidate
from training.merged_weights import publish_merged
from training.probe import at_rank, model_memory_gib
from training.scratch import pretrain, texts_of, train_tokenizer
from training.selection import SCRATCH_ARM, UNTRAINED_ARM, Selection, select_base

_ANSWER_FRACTION = 4
"""An answer may take a quarter of the engine's window; prompts take the rest."""


class Trained(NamedTuple):
    """What S4 and S5 made."""

    base: str = ""
    selection: Selection | None = None
    candidates: Sequence[Candidate] = ()
    losses: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    """task_id -> which of its calls stay on the LLM for their length, of tasks that were learned."""


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
    scope, canaries = _plant(recipe, scope)
    base, tokenizer, data = _prepare_base(recipe, store, work, snapshot, chosen, scope, refused, say)
    lap("base")
    trained = _fine_tune(
        recipe, store, work, snapshot, base, tokenizer, data, scope, canaries, chosen.arm, refused, say
    )
    lap("finetune")
    return trained._replace(selection=chosen)


class Onward(NamedTuple):
    """How tasks that have a specialist are trained again on its base."""

    base: str
    """Store path."""
    numbers: Mapping[str, int]
    """task_id -> its task token in compact prompts."""
    starts: Mapping[str, Start] = MappingProxyType({})
    """task_id -> the adapter it goes on from; the others begin with an untrained one."""
    left_out: Mapping[str, frozenset[str]] = MappingProxyType({})
    """task_id -> train examples that it does not learn from this time; what they say of its prompts and answers counts."""


def train_onward(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
    snapshot: str,
    scope: Scope,
    onward: Onward,
    refused: dict[str, str],
    say: Callable[[str], None],
) -> Trained:
    """Fine-tune tasks on a base that is published already; S4 is not asked.

    Args:
        refused: task_id -> reason; tasks that cannot be learned are added.
    """
    from transformers import AutoTokenizer

    name = store.manifest(onward.base)["base"]
    is_scratch = isinstance(find_entry(name), ScratchModel)
    scope, canaries = _plant(recipe, scope)
    path = store.fetch(onward.base, work / "cache")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    data = _tokenise(recipe, scope, tokenizer, name, is_scratch, refused, onward)
    arm = SCRATCH_ARM if is_scratch else UNTRAINED_ARM
    own = (onward.base, tokenizer, data, scope, canaries, arm, refused, say)
    return _fine_tune(recipe, store, work, snapshot, *own, starts=onward.starts)


def _fine_tune(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
    snapshot: str,
    base: str,
    tokenizer: Any,
    data: dict[str, TaskData],
    scope: Scope,
    canaries: dict[str, tuple[Canary, ...]],
    arm: str,
    refused: dict[str, str],
    say: Callable[[str], None],
    starts: Mapping[str, Start] = MappingProxyType({}),
) -> Trained:
    plans = plan_adapters(recipe, store, work, scope.tasks, data, base, _max_answer_tokens(recipe), starts)
    losses, failed = train_adapters(recipe, store, work, snapshot, plans, base, tokenizer, say) if plans else ({}, {})
    refused |= {task_id: f"fine-tune failed: {reason}" for task_id, reason in failed.items()}
    found = ((task_id, describe_left_out(its)) for task_id, its in data.items() if task_id not in failed)
    left_out = {task_id: told for task_id, told in found if told}
    for task_id, counts in ((task_id, its.stored) for task_id, its in data.items() if its.stored):
        told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        say(f"fine-tune {task_id}: log-probabilities of the LLM's answers: {told}; the others are learned as they are")
    for task_id, told in left_out.items():
        say(f"fine-tune {task_id}: {told}")
    learned = [plan for plan in plans if plan.task.task_id not in failed]
    made = [_candidate(plan, base, arm, canaries[plan.task.task_id], recipe) for plan in learned]
    candidates = [one for one in map(partial(_merged_or_not, recipe, store, refused, say), made) if one]
    return Trained(base, None, candidates, losses, left_out)


def _plant(recipe: Recipe, scope: Scope) -> tuple[Scope, dict[str, tuple[Canary, ...]]]:
    """Put the canaries into train, after the base was chosen without them."""
    train = scope.by_split["train"]
    canaries = {
        task.task_id: plan_canaries(task.task_id, train[task.task_id], recipe.canaries, recipe.finetune.seed)
        for task in scope.tasks
    }
    planted = {task_id: [*train[task_id], *as_examples(task_id, own)] for task_id, own in canaries.items()}
    return scope._replace(by_split={**scope.by_split, "train": planted}), canaries


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

    def tokenise(tokenizer: Any) -> dict[str, TaskData]:
        return _tokenise(recipe, scope, tokenizer, chosen.base, chosen.is_scratch, refused)

    if chosen.is_scratch:
        base = f"bases/{chosen.base}-{_base_key(recipe, chosen.base, scope)}"
    else:
        base = publish_loaded_base(store, chosen.base)
    if store.is_published(base):
        tokenizer = AutoTokenizer.from_pretrained(store.fetch(base, work / "cache"), trust_remote_code=False)
        return base, tokenizer, tokenise(tokenizer)
    entry = load_catalog().get(chosen.base)
    train = scope.by_split["train"]
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


def _tokenise(
    recipe: Recipe,
    scope: Scope,
    tokenizer: Any,
    base_name: str,
    is_scratch: bool,
    refused: dict[str, str],
    onward: Onward | None = None,
) -> dict[str, TaskData]:
    """Data of the tasks that fit the base, in its tokens; the reasons of the others are added to `refused`."""
    train, validation = scope.by_split["train"], scope.by_split["validation"]
    limits = {"is_scratch": is_scratch, "max_prompt_tokens": scope.max_prompt_tokens}
    limits["with_stored"] = recipe.finetune.distill.stored
    limits["numbers"] = onward.numbers if onward else {}
    tokenised = tokenise_tasks(scope.tasks, train, validation, tokenizer, **limits)
    data = {task_id: keep_fitting(its, scope.max_model_tokens) for task_id, its in tokenised.items()}
    num_needed = calls_to_certify(recipe, len(scope.tasks) + len(refused))
    num_calibration = {task.task_id: task.num_examples.get("calibration", 0) for task in scope.tasks}
    reasons = {
        task_id: refuse_lengths(its, base_name, _max_answer_tokens(recipe), num_calibration[task_id], num_needed)
        for task_id, its in data.items()
    }
    # What of a task fits is told by all its examples, also where only some of them are learned.
    for task_id, unlearned in (onward.left_out if onward else {}).items():
        its = tokenised[task_id]
        written = find_written(train[task_id], its.prompt_format, tokenizer)
        rows = [row for row, one in zip(its.train, written, strict=True) if one.example_id not in unlearned]
        learned = keep_fitting(its._replace(train=rows), scope.max_model_tokens).train
        data[task_id] = data[task_id]._replace(train=learned)
        reasons[task_id] = reasons[task_id] or (None if learned else "none of its new examples fits its base")
    refused.update({task_id: reason for task_id, reason in reasons.items() if reason})
    return {task_id: its for task_id, its in data.items() if not reasons[task_id]}


def _base_key(recipe: Recipe, name: str, scope: Scope) -> str:
    """Names a scratch base by all that shapes it."""
    groups = {split: scope.by_split[split].values() for split in ("train", "validation")}
    seen = {split: sorted(e.example_id for group in groups[split] for e in group) for split in groups}
    known = [task.facts() for task in scope.tasks]
    return content_hash([name, recipe.pretrain.model_dump(mode="json"), known, seen, rendering_version()])[:12]


def _max_answer_tokens(recipe: Recipe) -> int:
    return recipe.specialists.max_model_tokens // _ANSWER_FRACTION


def _candidate(plan: AdapterPlan, base: str, arm: str, canaries: tuple[Canary, ...], recipe: Recipe) -> Candidate:
    return Candidate(
        task=plan.task,
        base=base,
        base_arm=arm,
        adapter=plan.adapter,
        prompt_format=plan.prompt_format,
        max_answer_tokens=plan.max_answer_tokens,
        canaries=canaries,
        max_extraction=recipe.canaries.max_extraction,
        text_grader=recipe.evaluation.grader_of(plan.task.kind),
        max_false_agreement=recipe.evaluation.max_false_agreement,
    )


def _merged_or_not(
    recipe: Recipe, store: Store, refused: dict[str, str], say: Callable[[str], None], candidate: Candidate
) -> Candidate | None:
    """The candidate with its merged weights where the recipe wants that; None, with the reason in `refused`, where they
    cannot be made, whether or not that takes the worker with it. Merges on a node of the cluster, one at a time: each holds a
    whole model in float32."""
    import ray

    task_id = candidate.task.task_id
    if task_id not in recipe.specialists.merge:
        return candidate
    merging = ray.remote(num_cpus=1)(publish_merged)
    try:
        merged = ray.get(merging.remote(store, task_id, candidate.base, candidate.adapter))
    except (TrainingError, ray.exceptions.RayError) as error:
        first_line = (
            next(iter(str(error).splitlines()), "") if isinstance(error, TrainingError) else type(error).__name__
        )
        refused[task_id] = (
            f"merge failed: {first_line}; next: take it out of specialists.merge, or give a node more memory"
        )
        return None
    say(f"merge {task_id}: {merged}")
    return candidate.model_copy(update={"merged": merged})
