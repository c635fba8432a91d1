"""The conversion: captured calls in, a release out. `understudy convert recipe=NAME`.

| stage       | from -> to                    | code                              | artifact under the store          |
|-------------|-------------------------------|-----------------------------------|-----------------------------------|
| S2 curate   | AgentCall* -> Example*        | training/curate.py                | examples/SNAPSHOT/                |
| S3 discover | Example* -> TaskSpec*         | training/discover.py              | tasks/TASK_ID.json, route_model/  |
| S4 select   | TaskSpec* -> base model       | training/selection.py, probe.py   | tasks/selection-SNAPSHOT.json     |
|             |                               | training/bases.py, scratch.py     | bases/NAME-HASH/                  |
| S5 finetune | TaskSpec + base -> adapter    | training/finetune.py, fleet.py    | adapters/TASK_ID/RUN_ID/          |
| validate    | adapter + held-out -> gate    | training/evaluation.py, gate.py   | adapters/TASK_ID/RUN_ID/report.json |
| release     | all of it -> Release          | cluster/registry.py               | releases/SHA256.json              |

Beside the release stands SHA256.config.json: the resolved recipe, code, packages and seeds (jobs/provenance.py).

Every artifact is named by what it was made from, so a conversion that is run again continues where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from cluster.engine import Engine, rendering_version
from cluster.errors import InputError
from cluster.prompts import PromptFormat
from cluster.records import Example, Record, Release, Specialist, Split, TaskSpec
from cluster.registry import publish_release
from cluster.session import serve_without_http
from cluster.store import Store, content_hash
from jobs.provenance import save_config
from jobs.recipe import Recipe
from training.bases import publish_loaded_base
from training.candidates import Scope
from training.catalog import load_catalog
from training.curate import curate, load_split
from training.dataset import TaskData, num_answer_tokens, save_dataset, tokenise_tasks
from training.discover import discover, save_discovery
from training.evaluation import Candidate, Evaluation, evaluate_all
from training.finetune import finetune
from training.fleet import run_fleet
from training.gate import release_delta
from training.probe import model_memory_gib
from training.report import write_report
from training.scratch import pretrain, texts_of, train_tokenizer
from training.selection import Selection, group_by_task, select_base

SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "test")
_ANSWER_SLACK = 1.5
"""A specialist may answer half as long again as the longest train answer before it is cut."""


class Conversion(Record):
    """What a conversion made."""

    release: str
    snapshot: str
    tasks: tuple[TaskSpec, ...]
    unassigned: dict[str, int]
    selection: Selection
    evaluations: tuple[Evaluation, ...]
    refused: dict[str, str]
    losses: dict[str, dict[str, Any]]
    seconds: dict[str, float]


class _Plan(Record):
    """Where one task's data and adapter are."""

    task: TaskSpec
    prompt_format: PromptFormat
    run_id: str
    max_answer_tokens: int
    num_rows: int

    @property
    def adapter(self) -> str:
        return f"adapters/{self.task.task_id}/{self.run_id}"


EngineOf = Callable[[str], contextlib.AbstractContextManager[Engine]]
"""Store path of a base -> the engine that serves it, for as long as the block runs."""


def convert(recipe: Recipe, say: Callable[[str], None] = print, engine_of: EngineOf | None = None) -> Conversion:
    """Run every stage. Needs Ray to be connected and, for validation, Ray Serve to be allowed to start.

    Args:
        engine_of: where a graph that serves the base runs or will run anyway, its engine; None starts one for
            validation and takes it down again.
    """
    store = Store(recipe.store)
    work = pathlib.Path(recipe.store) / "work"
    clock = _Clock()
    snapshot = curate(store, recipe.curate)
    say(
        f"curate: {snapshot.counts.num_calls} calls -> {snapshot.counts.num_examples}; dropped {snapshot.counts.dropped}"
    )
    clock.lap("curate")
    train = {split: load_split(store, snapshot.id, split, as_served=split != "train") for split in SPLITS}
    if not train["train"]:
        raise InputError(f"store {recipe.store}: no calls to learn from; capture or `understudy ingest PATH...` first")
    discovery = discover(train, recipe.discover)
    route_model = save_discovery(store, snapshot.id, discovery)
    by_split = {split: group_by_task(train[split], discovery.assignment) for split in SPLITS}
    say(f"discover: {len(discovery.tasks)} tasks; unassigned {discovery.unassigned}")
    clock.lap("discover")
    tasks, refused = _learnable(discovery.tasks, by_split)
    scope = _scope(recipe, tasks, by_split)
    chosen = select_base(store, snapshot.id, recipe.select, scope, recipe.pretrain, recipe.finetune, work)
    for one in chosen.candidates:
        say(f"select {one.name}: {one.status}: {one.reason}")
    clock.lap("select")
    base, tokenizer, data = _prepare_base(recipe, store, work, chosen, scope, say)
    clock.lap("base")
    plans = _plan_runs(recipe, work, tasks, data, base, chosen.base, refused)
    losses, failed = _train_adapters(recipe, store, work, plans, base, tokenizer, say)
    refused |= {task_id: f"fine-tune failed: {reason}" for task_id, reason in failed.items()}
    clock.lap("finetune")
    candidates = [_candidate(plan, base, chosen.arm) for plan in plans if plan.task.task_id not in failed]
    num_candidates = len(candidates) + len(refused)
    evaluations: list[Evaluation] = []
    if candidates:
        with (engine_of or (lambda base: _validation_engine(recipe, base)))(base) as engine:
            evaluations = _validate(recipe, store, candidates, by_split, engine, num_candidates, say)
    clock.lap("validate")
    release = _release(store, candidates, evaluations, refused, route_model, snapshot.id)
    sha = publish_release(store, release)
    save_config(store, sha, recipe)
    return Conversion(
        release=sha,
        snapshot=snapshot.id,
        tasks=discovery.tasks,
        unassigned=discovery.unassigned,
        selection=chosen,
        evaluations=tuple(evaluations),
        refused=release.refused,
        losses=losses,
        seconds=clock.laps,
    )


def write_conversion_report(
    path: pathlib.Path, conversion: Conversion, summary: dict[str, Any] | None, notes: list[str]
) -> None:
    """Write the HTML page a person reads: what moved, how sure that is, what stays and why."""
    write_report(
        path,
        tasks=conversion.tasks,
        evaluations=conversion.evaluations,
        refused=conversion.refused,
        unassigned=conversion.unassigned,
        losses=conversion.losses,
        summary=summary,
        notes=notes,
    )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 2), now


def _learnable(
    tasks: tuple[TaskSpec, ...], by_split: dict[Split, dict[str, list[Example]]]
) -> tuple[list[TaskSpec], dict[str, str]]:
    refused: dict[str, str] = {}
    for task in tasks:
        missing = [split for split in SPLITS if not by_split[split].get(task.task_id)]
        if missing:
            refused[task.task_id] = f"no examples in {', '.join(missing)} ({task.num_calls} calls in all)"
    return [task for task in tasks if task.task_id not in refused], refused


def _scope(recipe: Recipe, tasks: list[TaskSpec], by_split: dict[Split, dict[str, list[Example]]]) -> Scope:
    max_tokens = recipe.specialists.max_model_tokens
    return Scope(tasks, by_split, max_tokens, max_tokens * 3 // 4, model_memory_gib(recipe.finetune))


def _prepare_base(
    recipe: Recipe, store: Store, work: pathlib.Path, chosen: Selection, scope: Scope, say: Callable[[str], None]
) -> tuple[str, Any, dict[str, TaskData]]:
    """Publish the base of a hub or folder, or train it from scratch.

    Returns:
        (store path, tokenizer, every task's data in its tokens).
    """
    from transformers import AutoTokenizer

    train, validation = scope.by_split["train"], scope.by_split["validation"]

    def tokenise(tokenizer: Any) -> dict[str, TaskData]:
        limits = {"is_scratch": chosen.is_scratch, "max_prompt_tokens": scope.max_prompt_tokens}
        return tokenise_tasks(scope.tasks, train, validation, tokenizer, **limits)

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
    say(f"base: {chosen.base}, trained from scratch for {recipe.pretrain.num_steps} steps")
    model, metrics = pretrain(entry, recipe.pretrain, tokenizer, list(data.values()), work / pathlib.Path(base).name)
    store.publish(base, model, {"base": chosen.base, "metrics": metrics})
    return base, tokenizer, data


def _base_key(recipe: Recipe, name: str, scope: Scope) -> str:
    """Names a scratch base by all that shapes it."""
    groups = {split: scope.by_split[split].values() for split in ("train", "validation")}
    seen = {split: sorted(e.example_id for group in groups[split] for e in group) for split in groups}
    known = [task.model_dump(mode="json") for task in scope.tasks]
    return content_hash([name, recipe.pretrain.model_dump(mode="json"), known, seen, rendering_version()])[:12]


def _plan_runs(
    recipe: Recipe,
    work: pathlib.Path,
    tasks: list[TaskSpec],
    data: dict[str, TaskData],
    base: str,
    base_name: str,
    refused: dict[str, str],
) -> list[_Plan]:
    """Write every task's dataset; a task whose prompts do not fit is refused with its reason."""
    plans = []
    for task in tasks:
        prompt_format, rows, held_out, num_skipped = data[task.task_id]
        if num_skipped >= max(1, len(rows)):
            refused[task.task_id] = (
                f"{num_skipped} of {num_skipped + len(rows)} prompts do not fit base {base_name}: longer than {prompt_format.max_prompt_tokens} tokens, or not plain text"
            )
            continue
        facts = [base, prompt_format.model_dump(mode="json"), recipe.finetune.model_dump(mode="json"), rows]
        run_id = content_hash(facts)[:12]
        save_dataset(rows, work / run_id / "train")
        save_dataset(held_out or rows[:1], work / run_id / "validation")
        longest = int(max(map(num_answer_tokens, rows)) * _ANSWER_SLACK)
        plans.append(
            _Plan(
                task=task,
                prompt_format=prompt_format,
                run_id=run_id,
                max_answer_tokens=min(longest, recipe.specialists.max_model_tokens // 4),
                num_rows=len(rows),
            )
        )
    return plans


def _train_adapters(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
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
            method="lora",
            base_path=base_path,
            train_path=work / plan.run_id / "train",
            validation_path=work / plan.run_id / "validation",
            pad_token_id=tokenizer.pad_token_id,
            storage=work / "runs",
            label=plan.task.task_id,
        )
        (model / "README.md").unlink(missing_ok=True)
        store.publish(plan.adapter, model, {"base": base, "task_id": plan.task.task_id, "metrics": metrics})
        return metrics

    missing = {p.task.task_id: (p.num_rows, lambda p=p: run(p)) for p in plans if not store.is_published(p.adapter)}
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


@contextlib.contextmanager
def _validation_engine(recipe: Recipe, base: str) -> Iterator[Engine]:
    from ray import serve

    from serving.specialist import ServeEngine, build_specialists

    # One name for one store: conversions side by side do not meet, and one that was killed is taken over.
    app = f"validation-{content_hash(recipe.store)[:8]}"
    with serve_without_http():
        handle = serve.run(build_specialists(base, recipe.specialists, recipe.store), name=app, route_prefix=None)
        try:
            yield ServeEngine(handle)
        finally:
            serve.delete(app)


def _validate(
    recipe: Recipe,
    store: Store,
    candidates: list[Candidate],
    by_split: dict[Split, dict[str, list[Example]]],
    engine: Engine,
    num_candidates: int,
    say: Callable[[str], None],
) -> list[Evaluation]:
    """Ask the engine that serves the held-out calls; `num_candidates` counts the refused ones too."""
    splits = {c.task.task_id: {s: by_split[s][c.task.task_id] for s in SPLITS if s != "train"} for c in candidates}

    def save(candidate: Candidate, found: Evaluation) -> None:
        store.write_json(f"{candidate.adapter}/report.json", found.model_dump(mode="json"))
        gate = found.gate
        certified = f"open at {gate.threshold}, coverage {gate.coverage:.2f}, bound {gate.upper_bound}"
        say(f"validate {candidate.task.task_id}: {gate.refused or certified}")

    delta = release_delta(recipe.gate.delta, num_candidates)
    with tqdm(desc="validate", unit="answer", disable=None) as bar:
        limit = recipe.gateway.max_temperature
        asked = evaluate_all(
            candidates, engine, splits, recipe.gate, delta, max_temperature=limit, on_answer=bar.update, on_done=save
        )
        return asyncio.run(asked)


def _release(
    store: Store,
    candidates: list[Candidate],
    evaluations: list[Evaluation],
    refused: dict[str, str],
    route_model: str,
    snapshot: str,
) -> Release:
    specialists = {}
    refused = dict(refused)
    for candidate, evaluation in zip(candidates, evaluations, strict=True):
        task_id = candidate.task.task_id
        if not evaluation.gate.is_open:
            refused[task_id] = evaluation.gate.refused or "no threshold"
            continue
        facts = {
            "task_id": task_id,
            "base": candidate.base,
            "adapter": candidate.adapter,
            "prompt_format": candidate.prompt_format.model_dump(mode="json"),
            "gate": evaluation.gate.model_dump(mode="json"),
            "report": f"{candidate.adapter}/report.json",
            "max_answer_tokens": candidate.max_answer_tokens,
        }
        sha = content_hash([facts, store.manifest(candidate.adapter)["sha256"]])
        specialists[task_id] = Specialist.model_validate({**facts, "sha": sha})
    return Release(
        specialists=specialists, refused=refused, route_model=route_model, snapshot=snapshot, created_ts=time.time()
    )
