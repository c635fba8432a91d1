"""Measures candidates for a base: a zero-shot score and a short fine-tune each, on Ray Tune with successive halving (S4).

One Tune trial per candidate. It trains one model on all tasks' train rows mixed (LoRA on a pretrained base, all weights
of a scratch one) and stops after a quarter and a half of the steps to score itself; ASHA ends the trials that are
behind there. A score is the share of validation examples that greedy decoding would answer exactly as the reference,
averaged over tasks. It is read off one forward pass: greedy decoding gives the reference's tokens if and only if each of
them is the likeliest after the ones before it. An answer that says the same in other tokens counts as wrong, so scores
compare candidates and promise nothing; the gate does that, on calls that no probe sees.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import Field

from cluster.config import Config
from cluster.records import Record
from training.catalog import BaseModelFacts, ScratchModel, num_parameters
from training.dataset import TaskData, save_dataset
from training.finetune import FinetuneConfig
from training.loop import Rows, answer_loss, build_model, rate_factor
from training.scratch import PretrainConfig, init_model

ItemT = TypeVar("ItemT")
_REDUCTION = 2
_RUNGS = (0, 1, 2, 4)
"""Quarters of the steps after which a trial reports; 0 is the zero-shot score."""


class ProbeConfig(Config):
    """How much a probe may spend on each candidate."""

    tolerance: float = Field(default=0.02, ge=0, lt=1)
    """The smallest candidate whose score is at most this much below the best one's is chosen."""
    probe_steps: int = Field(default=60, ge=4, multiple_of=4)
    """Optimiser steps of the candidates that are never stopped; the others get a quarter or a half of them."""
    probe_examples: int = Field(default=64, ge=1)
    """Validation examples per task that are scored; with few, scores within `tolerance` are chance."""


class Contender(NamedTuple):
    """A candidate that fits the needs and can be loaded."""

    name: str
    entry: BaseModelFacts
    location: str
    """Of a pretrained base, for `from_pretrained`; empty for a scratch one."""
    tokenizer: Any
    data: Mapping[str, TaskData]
    """task_id -> a sample of its rows in this tokenizer's tokens."""
    p99_prompt_tokens: int


class Rung(Record):
    """One measurement of one candidate."""

    num_steps: int
    """Optimiser steps before it; 0: untrained."""
    score: float
    """Mean of `task_scores`."""
    task_scores: dict[str, float]
    """task_id -> share of the sampled validation examples answered exactly as the reference."""
    seconds: float
    """Since the model was loaded."""


class ProbeResult(NamedTuple):
    """All rungs a candidate reached, or why its trial failed."""

    rungs: tuple[Rung, ...]
    error: str | None


def measure(
    contenders: Sequence[Contender],
    config: ProbeConfig,
    pretrain: PretrainConfig,
    finetune: FinetuneConfig,
    num_scored: Mapping[str, int],
    folder: pathlib.Path,
) -> dict[str, ProbeResult]:
    """Probe every contender on the connected Ray cluster, smallest first.

    Args:
        pretrain: learning rate and batch of scratch contenders.
        finetune: those of the others, the adapter's shape, and what each trial may use of the cluster.
        num_scored: task_id -> validation examples sampled; those whose prompt does not fit count as wrong.
        folder: for datasets and Tune's own files; shared by all nodes of the cluster.
    """
    # Tune's switches for its console tables and for the log formats that cannot hold a list of rungs.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback
    from ray.tune.schedulers import ASHAScheduler

    ordered = sorted(contenders, key=lambda contender: num_parameters(contender.entry) or 0)
    trials = []
    for number, contender in enumerate(ordered):
        own = folder.resolve() / f"{number}-{pathlib.Path(contender.name).name}"
        settings = _trial_settings(contender, config, pretrain, finetune, own)
        penalty = config.tolerance * number / max(1, len(ordered) - 1)
        trials.append({**settings, "num_scored": dict(num_scored), "size_penalty": penalty})
    resources = {"cpu": finetune.cpus_per_worker, "gpu": min(1, finetune.gpus_per_worker)}
    quarter = config.probe_steps // _RUNGS[-1]
    scheduler = ASHAScheduler(
        time_attr="step", max_t=config.probe_steps, grace_period=quarter, reduction_factor=_REDUCTION
    )
    tuner = tune.Tuner(
        tune.with_resources(probe_trial, resources),
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(
            metric="halving_score",
            mode="max",
            scheduler=scheduler,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(folder.resolve()), callbacks=[JsonLoggerCallback()], verbose=0
        ),
    )
    return {contender.name: _result_of(result) for contender, result in zip(ordered, tuner.fit(), strict=True)}


def probe_trial(config: dict[str, Any]) -> None:
    """Run as a Ray Tune trial; reports after each rung.

    Args:
        config: {"trial": settings}, see `_trial_settings`.
    """
    import torch
    from ray import tune

    settings = config["trial"]
    torch.set_num_threads(settings["num_threads"])
    torch.manual_seed(settings["seed"])
    device = torch.device("cuda" if settings["use_gpu"] else "cpu")
    model = build_model(settings).to(device)
    rows = Rows(settings["train_path"], settings, 0, 1)
    held_out = {task_id: Rows(path, settings, 0, 1) for task_id, path in settings["validation_paths"].items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings["learning_rate"])
    rungs, began = [], time.monotonic()
    for step in range(settings["num_steps"] + 1):
        if step in settings["rungs"]:
            scores = _score_tasks(model, held_out, settings, device)
            score = sum(scores.values()) / len(scores)
            seconds = round(time.monotonic() - began, 2)
            rungs.append({"num_steps": step, "score": score, "task_scores": scores, "seconds": seconds})
            halving_score = score_for_halving(score, settings["size_penalty"])
            tune.report({"step": step, "halving_score": halving_score, "rungs": list(rungs)})
        if step < settings["num_steps"]:
            _train_step(model, optimizer, rows.batch(step), settings, step, device)


def score_for_halving(score: float, size_penalty: float) -> float:
    """What halving ranks by: of two candidates within the tolerance it keeps the smaller one.

    Size does not count among candidates that have not answered anything yet: ties go on.
    """
    return max(0.0, score - size_penalty)


def model_memory_gib(finetune: FinetuneConfig) -> float:
    """Memory of what trains one model: a GPU of the connected Ray cluster, else the largest node's main memory.

    ZeRO-3 spreads the model over the workers of a fine-tune, so it counts all of theirs.
    """
    import ray

    if finetune.gpus_per_worker:
        one = ray.get(ray.remote(num_gpus=1)(_gpu_bytes).remote())
    else:
        one = max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])
    return one * (finetune.num_workers if finetune.zero_stage == 3 else 1) / 2**30


def _gpu_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def spread(items: Sequence[ItemT], limit: int) -> list[ItemT]:
    """At most `limit` items, evenly spread, so that a rerun takes the same ones.

    Example:
        >>> spread("abcdef", 3), spread("ab", 3)
        (['a', 'c', 'e'], ['a', 'b'])
    """
    kept = min(len(items), limit)
    return [items[k * len(items) // kept] for k in range(kept)]


def is_exact(logits: Any, labels: Any) -> Any:
    """Which answers greedy decoding would give token by token.

    Args:
        logits: [B, T, V]; at each place for the token that `labels` has there.
        labels: [B, T]; -100 where there is no answer token.

    Returns:
        Booleans [B].
    """
    return ((logits.argmax(dim=-1) == labels) | (labels == -100)).all(dim=1)


def _trial_settings(
    contender: Contender,
    config: ProbeConfig,
    pretrain: PretrainConfig,
    finetune: FinetuneConfig,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Write a contender's datasets, and its untrained weights where it is a scratch one; name all its trial needs."""
    is_scratch = isinstance(contender.entry, ScratchModel)
    if isinstance(contender.entry, ScratchModel):
        init_model(contender.entry, contender.tokenizer, folder / "init", pretrain.seed)
    training = pretrain if is_scratch else finetune
    per_task = -(-config.probe_steps * training.batch_size // len(contender.data))
    save_dataset([row for data in contender.data.values() for row in spread(data.train, per_task)], folder / "train")
    validation_paths = {}
    for task_id, data in contender.data.items():
        if data.validation:
            validation_paths[task_id] = str(folder / "validation" / task_id)
            save_dataset(data.validation, folder / "validation" / task_id)
    return {
        **training.model_dump(mode="json"),
        "method": "full" if is_scratch else "lora",
        "base_path": str(folder / "init") if is_scratch else contender.location,
        "train_path": str(folder / "train"),
        "validation_paths": validation_paths,
        "pad_token_id": contender.tokenizer.pad_token_id,
        "num_threads": max(1, int(finetune.cpus_per_worker)),
        "use_gpu": finetune.gpus_per_worker > 0,
        "num_steps": config.probe_steps,
        "rungs": [quarters * config.probe_steps // _RUNGS[-1] for quarters in _RUNGS],
    }


def _train_step(model: Any, optimizer: Any, batch: Any, settings: dict[str, Any], step: int, device: Any) -> None:
    import torch

    rate = settings["learning_rate"] * rate_factor(step, settings["num_steps"], settings["num_steps"] // 10)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):
        loss = answer_loss(model, batch, device)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _score_tasks(model: Any, held_out: Mapping[str, Rows], settings: dict[str, Any], device: Any) -> dict[str, float]:
    import torch

    scores = dict.fromkeys(settings["num_scored"], 0.0)
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):
        for task_id, rows in held_out.items():
            num_exact = sum(_num_exact(model, rows.batch(k), device) for k in range(rows.num_batches()))
            scores[task_id] = num_exact / settings["num_scored"][task_id]
    model.train()
    return scores


def _num_exact(model: Any, batch: Any, device: Any) -> int:
    labels = batch["labels"].to(device)
    # As in the training loss: no logits are computed before the first answer token of the batch.
    first = int((labels != -100).any(dim=0).nonzero()[0])
    kept = labels.shape[1] - first + 1
    logits = model(input_ids=batch["input_ids"].to(device), logits_to_keep=kept).logits[:, :-1]
    return int(is_exact(logits, labels[:, first:]).sum())


def _result_of(result: Any) -> ProbeResult:
    rungs = tuple(Rung.model_validate(rung) for rung in (result.metrics or {}).get("rungs", ()))
    if result.error is None:
        return ProbeResult(rungs, None)
    lines = [line for line in str(result.error).splitlines() if line.strip()]
    return ProbeResult(rungs, f"probe failed: {lines[-1].strip()[:300] if lines else type(result.error).__name__}")
