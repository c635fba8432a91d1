"""Many fine-tunes over one base as one Ray Train run: tokenised datasets -> a PEFT folder each (S5).

Each adapter comes out as `training.finetune.finetune` would make it alone, within float tolerance; what is saved is the
start of a run's processes for every task, and on a GPU the passes of many small batches. One that leaves the numbers
stops with a diagnosis, and the others go on.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from cluster.errors import ConfigError, RunYielded, TrainingError
from training.finetune import FinetuneConfig, build_trainer, check_window, yield_path
from training.memory import device_bytes, shape_of
from training.methods import check_base_folder
from training.multi_loop import multi_loop
from training.multi_memory import AdapterLoad, ManyPlan, plan_many
from training.progress import show_progress
from training.speed import SPEED_FACTS
from training.watching import check_log_to, watch_settings

_OF_THE_RUN = (
    "zero_stage",
    "bf16",
    "num_workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "max_failures",
    "log_to",
)
"""Fields that all adapters of a run have in common; in all others they may differ."""
_ALLOWED = {
    "method": ("lora", "rslora"),
    "packing": (False,),
    "ema_decay": (0.0,),
    "gradient_checkpointing": (False,),
    "offload": ("auto", "none"),
}
"""What the loop of many adapters can do of what a solo run can."""
_TOKENS_PER_PASS = {"cpu": 4096, "cuda": 65536}
"""On a CPU more tokens at a time are slower: their activations leave the caches. The GPU's number is not measured."""


class AdapterTask(NamedTuple):
    """One adapter to train."""

    name: str
    config: FinetuneConfig
    train_path: pathlib.Path
    validation_path: pathlib.Path | None
    start_path: pathlib.Path | None = None
    """PEFT folder of the adapter to go on from; None begins with an untrained one."""


class ManyTrained(NamedTuple):
    """What a run made."""

    done: dict[str, tuple[pathlib.Path, dict[str, Any]]]
    """Task -> (PEFT folder, last metrics), as `finetune` returns them."""
    failed: dict[str, str]
    """Task -> why it stopped."""
    speed: dict[str, float] = {}
    """training.speed.SPEED_FACTS of a run of several adapters."""


def finetune_many(
    name: str,
    tasks: Sequence[AdapterTask],
    *,
    base_path: pathlib.Path,
    pad_token_id: int,
    storage: pathlib.Path,
    label: str | None = None,
    num_parallel: int = 1,
) -> ManyTrained:
    """Train and wait for the result. Continues from the last checkpoint where a run of this name began before.

    Args:
        storage: folder for checkpoints; shared by all nodes of the cluster.
        label: what its progress bar is called; None takes `name`.
        num_parallel: runs like this one that share the cluster's memory.

    Raises:
        ConfigError: the tasks cannot share a run, or it does not fit in memory.
        InputError: the base or a dataset cannot be used.
        TrainingError: the run failed more than `max_failures` times.
        RunYielded: it stopped at a checkpoint because `ask_to_yield` was called; call again to go on.
    """
    config = common_config(tasks)
    check_log_to(config.log_to)
    check_base_folder(base_path)
    loads = [load_of(task, base_path) for task in tasks]
    plan = plan_run_of(loads, config, base_path, device_bytes(config, num_parallel))
    settings = {
        "adapters": [adapter_settings(task, pad_token_id) for task in tasks],
        "base_path": str(base_path),
        "zero_stage": plan.stage,
        "bf16": config.bf16,
        "num_threads": max(1, int(config.cpus_per_worker)),
        "tokens_per_pass": plan.tokens_per_pass,
        "progress_path": str(storage.resolve() / f"{name}.progress"),
        "yield_path": str(yield_path(name, storage)),
        **watch_settings(name, config.log_to, storage),
    }
    storage.mkdir(parents=True, exist_ok=True)
    yield_path(name, storage).unlink(missing_ok=True)
    num_rounds = max(task.config.num_steps for task in tasks)
    with show_progress(pathlib.Path(settings["progress_path"]), label or name, num_rounds):
        result = build_trainer(multi_loop, name, config, settings, storage).fit()
    if result.error is not None or result.checkpoint is None or result.metrics is None:
        raise TrainingError(f"run {name}: failed after {config.max_failures} restarts: {result.error}")
    if result.metrics["yielded"]:
        raise RunYielded(f"run {name}: stopped after round {result.metrics['step']}, because it was asked to")
    metrics = {**result.metrics, "predicted_memory_bytes": plan.memory.total}
    return _collect(pathlib.Path(result.checkpoint.path), metrics)


def load_of(task: AdapterTask, base_path: pathlib.Path) -> AdapterLoad:
    """What a task's adapter asks of its worker's memory; its datasets are read for their longest rows.

    Raises:
        InputError: the base does not read its longest rows whole.
    """
    shape = shape_of(base_path, task.config)
    rows, answers = [], []
    for path in filter(None, (task.train_path, task.validation_path)):
        lengths = _lengths(path)
        check_window(path, [row for row, _ in lengths], shape)
        rows += [row for row, _ in lengths]
        answers += [answer for _, answer in lengths]
    return AdapterLoad(
        name=task.name,
        trainable=shape.trainable,
        examples=task.config.batch_size,
        row_tokens=max(rows),
        answer_tokens=max(answers),
    )


def plan_run_of(
    loads: Sequence[AdapterLoad], config: FinetuneConfig, base_path: pathlib.Path, num_bytes: int
) -> ManyPlan:
    """Place a run of these adapters on workers whose devices have `num_bytes`.

    Raises:
        ConfigError: it does not fit.
    """
    return plan_many(shape_of(base_path, config), config, loads, num_bytes, tokens_per_pass(config))


def tokens_per_pass(config: FinetuneConfig) -> int:
    """Of one forward pass, at most, where memory does not ask for fewer."""
    return _TOKENS_PER_PASS["cuda" if config.gpus_per_worker else "cpu"]


def common_config(tasks: Sequence[AdapterTask]) -> FinetuneConfig:
    """The configuration whose fields of the run all tasks share.

    Raises:
        ConfigError: they differ, two tasks have one name, or the ZeRO stage cannot keep adapters apart.
    """
    first = tasks[0]
    if len({task.name for task in tasks}) < len(tasks):
        raise ConfigError(f"tasks of a multi-LoRA run: {[task.name for task in tasks]}; allowed: each name once")
    for field in _OF_THE_RUN:
        values = {str(getattr(task.config, field)) for task in tasks}
        if len(values) > 1:
            raise ConfigError(
                f"finetune.{field}: {', '.join(sorted(values))} in one multi-LoRA run; allowed: one value for all its "
                "tasks; next: runs apart, or fleet.mode=solo"
            )
    if reason := next(filter(None, (reason_against(task.config) for task in tasks)), None):
        raise ConfigError(reason)
    return first.config


def reason_against(config: FinetuneConfig) -> str | None:
    """Why adapters of this configuration cannot share a run, or None."""
    for field, allowed in _ALLOWED.items():
        value = getattr(config, field)
        if value not in allowed:
            choices = ", ".join(str(one) for one in allowed)
            return (
                f"finetune.{field}={value}: not with fleet.mode=multi_lora; allowed: {choices}; next: "
                f"finetune.{field}={allowed[0]}, or fleet.mode=solo"
            )
    if config.min_workers is not None:
        return (
            f"finetune.min_workers={config.min_workers}: not with fleet.mode=multi_lora; allowed: a recipe without it; next: "
            "fleet.mode=solo"
        )
    if config.distill.teacher is not None:
        return (
            f"finetune.distill.teacher={config.distill.teacher!r}: not with fleet.mode=multi_lora; allowed: none; next: "
            "fleet.mode=solo"
        )
    if config.distill.stored:
        return (
            "finetune.distill.stored=true: not with fleet.mode=multi_lora; allowed: false; next: "
            "finetune.distill.stored=false, or fleet.mode=solo"
        )
    return _reason_against_stage(config.zero_stage)


def _reason_against_stage(stage: int | str) -> str | None:
    """Why a ZeRO stage cannot keep the adapters of a run apart, or None."""
    if stage in ("auto", 0, 3):
        return None
    return (
        f"finetune.zero_stage={stage}: with fleet.mode=multi_lora stages 1 and 2 would cut one vector of all "
        "adapters' gradients into the workers' parts, so that no adapter could be clipped or stopped by itself; "
        "allowed: 0, or 3 (the base sharded); next: finetune.zero_stage=0, or fleet.mode=solo"
    )


def adapter_settings(task: AdapterTask, pad_token_id: int) -> dict[str, Any]:
    """What the loop needs to know of a task."""
    paths = [path for path in (task.train_path, task.validation_path) if path is not None]
    longest = max(row for path in paths for row, _ in _lengths(path))
    return {
        **task.config.model_dump(mode="json"),
        "name": task.name,
        "train_path": str(task.train_path),
        "validation_path": str(task.validation_path) if task.validation_path else None,
        "start_path": str(task.start_path) if task.start_path else None,
        "pad_token_id": pad_token_id,
        "max_tokens": task.config.batch_size * longest,
    }


def _lengths(path: pathlib.Path) -> list[tuple[int, int]]:
    """Tokens of each example, and of its answer."""
    import datasets

    table = datasets.load_from_disk(str(path))
    columns = zip(table["input_ids"], table["num_prompt"], strict=True)
    return [(len(ids), len(ids) - num_prompt) for ids, num_prompt in columns]


def _collect(checkpoint: pathlib.Path, metrics: dict[str, Any]) -> ManyTrained:
    done, failed = {}, {}
    for name, facts in metrics["adapters"].items():
        if facts["reason"]:
            failed[name] = facts["reason"]
        else:
            done[name] = (checkpoint / "models" / name, {key: one for key, one in facts.items() if key != "reason"})
    return ManyTrained(done, failed, {key: metrics[key] for key in SPEED_FACTS if key in metrics})
