"""Measures candidates for a base by short fine-tunes of (base, LoRA rank, number of examples) with successive halving (S4).

One Ray Tune trial per probe, each a Ray Train run (training/probe_loop.py). A probe trains one model on all tasks' train
rows mixed (LoRA on a pretrained base, all weights of a scratch one) and scores itself untrained and after a quarter, a
half and all of its steps; ASHA ends the trials that are behind there. An answer that says the same as the reference in
other tokens counts as wrong, so scores compare candidates and promise nothing; the gate does that, on calls that no
probe sees.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import Field, model_validator

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.records import Record
from training.catalog import BaseModelFacts, ScratchModel, num_parameters
from training.dataset import TaskData, num_answer_tokens, save_dataset
from training.finetune import FinetuneConfig
from training.memory import Load, device_bytes, gpu_bytes, shape_of
from training.probe_loop import probe_trial
from training.scratch import PretrainConfig, init_model
from training.zero import placements, plan_zero

ItemT = TypeVar("ItemT")
_REDUCTION = 2
_RUNGS = (0, 1, 2, 4)
"""Quarters of the steps after which a trial reports; 0 is the zero-shot score."""
_FLOPS_PER_WEIGHT = {"full": 6, "lora": 4}
"""And token: forward 2, backward 4; LoRA needs no gradient of the frozen weights (Kaplan et al. 2020, arXiv 2001.08361)."""


class ProbeConfig(Config):
    """How much probes may spend, and what they vary."""

    target: float | None = Field(default=None, gt=0, le=1)
    """Share of answers equal to the reference: the smallest candidate that reaches it is chosen. None, or reached by
    none: the smallest within `tolerance` of the best."""
    tolerance: float = Field(default=0.02, ge=0, lt=1)
    """The smallest candidate whose score is at most this much below the best one's is chosen."""
    ranks: tuple[int, ...] = ()
    """LoRA ranks to probe; the chosen one replaces finetune.lora_rank, its alpha in proportion. Empty probes that rank
    alone. Scratch candidates are trained whole and have none."""
    example_counts: tuple[int, ...] = ()
    """Train examples per task to probe with, such as 50, 200, 800: where the score goes with more is foretold from two
    on. Empty probes with as many as the steps see once."""
    probe_steps: int = Field(default=60, ge=4, multiple_of=4)
    """Optimiser steps of the probes that are never stopped; the others get a quarter or a half of them."""
    probe_examples: int = Field(default=64, ge=1)
    """Validation examples per task that are scored; with few, scores within `tolerance` are chance."""
    shots: int = Field(default=4, ge=0, le=64)
    """Train examples shown in the prompt of the untrained few-shot arm, fewer where they do not fit; 0 leaves it out."""

    @model_validator(mode="after")
    def _check_grid(self) -> ProbeConfig:
        for name in ("ranks", "example_counts"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or any(value < 1 for value in values):
                raise ValueError(f"{name} must be different positive numbers; got {', '.join(map(str, values))}")
        return self


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
    p99_call_tokens: int = 0
    few_shot: Mapping[str, Sequence[dict[str, Any]]] = {}
    """task_id -> validation rows whose prompt shows `num_shots` train examples; empty for a scratch base."""
    num_shots: Mapping[str, int] = {}

    @property
    def is_scratch(self) -> bool:
        return isinstance(self.entry, ScratchModel)


class ProbePlan(NamedTuple):
    """One probe to run."""

    contender: Contender
    lora_rank: int | None
    """None: a scratch base, trained whole."""
    num_examples: int
    """Train examples per task at most; what a task lacks it lacks."""
    times_steps: int = 1
    """Optimiser steps, as a multiple of `probe_steps`."""


class Rung(Record):
    """One measurement of one probe."""

    num_steps: int
    """Optimiser steps before it; 0: untrained."""
    score: float
    """Mean of `task_scores`."""
    task_scores: dict[str, float]
    """task_id -> share of the sampled validation examples answered exactly as the reference."""
    task_coverage: dict[str, float] = {}
    """task_id -> largest share of them, most confident first, that is wrong no more often than the gate allows."""
    num_tokens: int = 0
    """Trained on before it, padding included."""
    seconds: float
    """Since the model was loaded."""


class ProbeResult(NamedTuple):
    """What a probe measured, or why its trial failed."""

    rungs: tuple[Rung, ...]
    error: str | None
    few_shot: dict[str, float] | None = None
    """task_id -> score of the untrained base with examples in the prompt, where this probe was asked for it."""
    answers: Mapping[tuple[str, str], bool] = {}
    """(task_id, training.paired.row_key) -> whether the trained model is right; empty unless asked for."""


class Measuring(NamedTuple):
    """What all probes of a selection share."""

    config: ProbeConfig
    pretrain: PretrainConfig
    """Learning rate and batch of scratch candidates."""
    finetune: FinetuneConfig
    """Those of the others, the adapter's shape, and what each trial may use of the cluster."""
    num_scored: Mapping[str, int]
    """task_id -> validation examples sampled; those whose prompt does not fit count as wrong."""
    epsilon: float
    """Share of wrong answers that the gate allows."""
    folder: pathlib.Path
    """For datasets and Tune's own files; shared by all nodes of the cluster."""
    with_answers: bool = False
    """Whether results tell every answer apart."""

    def training_of(self, contender: Contender) -> FinetuneConfig:
        return self.pretrain if contender.is_scratch else self.finetune


def plan_probes(contenders: Sequence[Contender], measuring: Measuring) -> list[ProbePlan]:
    """The grid of (base, rank, number of examples): most examples first, of those the smallest base.

    ASHA lets the first trials at a rung pass and compares the later ones with them: every base begins at its best, and
    large ones, which cost most, and few examples are tried when there is something to beat.
    """
    config = measuring.config
    plans = []
    for one in sorted(contenders, key=lambda contender: num_parameters(contender.entry) or 0):
        ranks = (None,) if one.is_scratch else config.ranks or (measuring.finetune.lora_rank,)
        seen = -(-config.probe_steps * measuring.training_of(one).batch_size // len(one.data))
        longest = max(len(data.train) for data in one.data.values())
        counts = {min(count, longest) for count in config.example_counts or (seen,)}
        plans += [ProbePlan(one, rank, count) for count in counts for rank in ranks]
    return sorted(plans, key=lambda plan: -plan.num_examples)


def plan_curve(plans: Sequence[ProbePlan], results: Sequence[ProbeResult], chosen: ProbePlan) -> list[ProbePlan]:
    """Probes of the chosen base and rank that halving stopped: its learning curve needs all numbers of examples."""
    last = max((result.rungs[-1].num_steps for result in results if result.rungs), default=0)
    same = (chosen.contender.name, chosen.lora_rank)
    return [
        plan
        for plan, result in zip(plans, results, strict=True)
        if (plan.contender.name, plan.lora_rank) == same and result.rungs and result.rungs[-1].num_steps < last
    ]


def at_rank(finetune: FinetuneConfig, lora_rank: int | None) -> FinetuneConfig:
    """The same training at another LoRA rank; its update keeps the scale alpha / rank, and rsLoRA, whose scale is meant to
    fall with the root of the rank, its alpha. None changes nothing."""
    if lora_rank is None:
        return finetune
    scale = 1 if finetune.method == "rslora" else lora_rank / finetune.lora_rank
    alpha = finetune.lora_alpha * scale
    return finetune.model_copy(update={"lora_rank": lora_rank, "lora_alpha": alpha})


def train_flops(contender: Contender, num_tokens: int, *, is_full: bool | None = None) -> float:
    """Floating point operations of training on so many tokens.

    Args:
        is_full: whether all weights are trained; None: as a probe trains, a scratch base whole and the others by LoRA.
    """
    is_full = contender.is_scratch if is_full is None else is_full
    return _FLOPS_PER_WEIGHT["full" if is_full else "lora"] * (num_parameters(contender.entry) or 0) * num_tokens


def describe_budget(plans: Sequence[ProbePlan], measuring: Measuring) -> str:
    """What a measurement will spend, said before it."""
    steps, counts = measuring.config.probe_steps, len(measuring.config.example_counts)
    flops = sum(train_flops(plan.contender, steps * _tokens_per_step(plan, measuring)) for plan in plans)
    curve = f"; then at most {counts - 1} more for the chosen base's learning curve" if counts > 1 else ""
    is_alone = measuring.finetune.num_workers == 1
    ends = "halving ends those behind after a quarter or a half" if is_alone else "all run to the end (several workers)"
    return (
        f"{len(plans)} probes of {len({plan.contender.name for plan in plans})} bases, at most {steps} steps each: "
        f"{len(plans) * steps} steps, about {flops:.2g} floating point operations; {ends}{curve}"
    )


def measure(plans: Sequence[ProbePlan], measuring: Measuring, *, halving: bool = True) -> list[ProbeResult]:
    """Run the probes on the connected Ray cluster; results in the order of `plans`.

    Args:
        halving: False runs every probe to the end; probes of several workers run there anyway. Tune stops a trial by
            killing its process, and with it dies the trainer that would give its workers' placement group back: Ray
            Train's own cleaner for that needs the cluster's dashboard, and without one the CPUs are lost to all that
            comes after.
    """
    # Tune's switches for its console tables and for the log formats that cannot hold a list of rungs.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    steps, finetune = measuring.config.probe_steps, measuring.finetune
    scheduler = FIFOScheduler()
    is_alone = finetune.num_workers == 1
    if halving and is_alone:
        scheduler = ASHAScheduler(
            time_attr="step", max_t=steps, grace_period=steps // _RUNGS[-1], reduction_factor=_REDUCTION
        )
    # A trial whose workers are processes of their own only waits; Tune takes none that asks for nothing: one byte.
    waiting = {"cpu": 0, "memory": 1}
    own = {"cpu": finetune.cpus_per_worker, "gpu": min(1, finetune.gpus_per_worker)}
    name = "tune" if halving else "tune-all"
    storage = str(measuring.folder.resolve())
    tuner = tune.Tuner(
        tune.with_resources(probe_trial, own if is_alone else waiting),
        param_space={"trial": tune.grid_search(_write_trials(plans, measuring, name))},
        tune_config=tune.TuneConfig(
            metric="halving_score",
            mode="max",
            scheduler=scheduler,
            reuse_actors=is_alone,
            max_concurrent_trials=None if is_alone else _num_side_by_side(finetune),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name=name, storage_path=storage, callbacks=[JsonLoggerCallback()], verbose=0),
    )
    return [_result_of(result) for result in tuner.fit()]


def model_memory_gib(finetune: FinetuneConfig) -> float:
    """Memory of what trains one model: a GPU of the connected Ray cluster, else the largest node's main memory.

    ZeRO-3 spreads the model over the workers of a fine-tune, so where it may be used all of theirs count.
    """
    import ray

    if finetune.device_gib is not None:
        one = finetune.device_gib * 2**30
    elif finetune.gpus_per_worker:
        one = gpu_bytes()
    else:
        one = max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])
    # What auto may come to; CPU workers may all lie on one node, and share its memory.
    is_spread = finetune.zero_stage == 3 or (finetune.zero_stage == "auto" and finetune.gpus_per_worker > 0)
    return one * (finetune.num_workers if is_spread else 1) / 2**30


def spread(items: Sequence[ItemT], limit: int) -> list[ItemT]:
    """At most `limit` items, evenly spread, so that a rerun takes the same ones.

    Example:
        >>> spread("abcdef", 3), spread("ab", 3)
        (['a', 'c', 'e'], ['a', 'b'])
    """
    kept = min(len(items), limit)
    return [items[k * len(items) // kept] for k in range(kept)]


def _num_side_by_side(finetune: FinetuneConfig) -> int:
    """Trials whose workers the cluster can hold at once; their own processes only wait."""
    import ray

    held = ray.cluster_resources()
    fits = [held.get("CPU", 0) // (finetune.num_workers * finetune.cpus_per_worker)]
    if finetune.gpus_per_worker:
        fits.append(held.get("GPU", 0) // (finetune.num_workers * finetune.gpus_per_worker))
    return max(1, int(min(fits)))


def _tokens_per_step(plan: ProbePlan, measuring: Measuring) -> int:
    lengths = [len(row["input_ids"]) for data in plan.contender.data.values() for row in data.train]
    training = measuring.training_of(plan.contender)
    return sum(lengths) * training.batch_size * training.num_workers // max(1, len(lengths))


def _write_trials(plans: Sequence[ProbePlan], measuring: Measuring, run: str) -> list[dict[str, Any]]:
    """Write every probe's datasets, and the untrained weights of scratch bases; name all that its trial needs."""
    names = list(dict.fromkeys(plan.contender.name for plan in plans))
    trials: list[dict[str, Any]] = []
    asked: set[str] = set()
    for number, plan in enumerate(plans):
        place = names.index(plan.contender.name)
        penalty = measuring.config.tolerance * place / max(1, len(names) - 1)
        # Untrained, all probes of a base are the same: the first one asks with examples in the prompt.
        few_shot = {} if plan.contender.name in asked else plan.contender.few_shot
        asked.add(plan.contender.name)
        base = measuring.folder.resolve() / f"base-{place}-{pathlib.Path(plan.contender.name).name}"
        settings = trial_settings(plan, measuring, base, few_shot)
        trials.append({**settings, "size_penalty": penalty, "name": f"{run}-{number}"})
    return trials


def trial_settings(
    plan: ProbePlan, measuring: Measuring, base: pathlib.Path, few_shot: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, Any]:
    """Write a probe's datasets below `base`, and the untrained weights of a scratch base; name all that its loop needs."""
    contender, config, finetune = plan.contender, measuring.config, measuring.finetune
    training, num_steps = measuring.training_of(contender), plan.times_steps * config.probe_steps
    own = base / f"{plan.num_examples}"
    validation = {task_id: data.validation for task_id, data in contender.data.items() if data.validation}
    if isinstance(contender.entry, ScratchModel) and not (base / "init").exists():
        init_model(contender.entry, contender.tokenizer, base / "init", measuring.pretrain.seed)
    if not own.exists():
        save_dataset([row for data in contender.data.values() for row in spread(data.train, plan.num_examples)], own)
    shared = ("num_workers", "cpus_per_worker", "gpus_per_worker", "device_gib")
    training = at_rank(training, plan.lora_rank).model_copy(update={name: getattr(finetune, name) for name in shared})
    return {
        **training.model_dump(mode="json"),
        **_placement(contender, training, str(base / "init") if contender.is_scratch else contender.location),
        "base_path": str(base / "init") if contender.is_scratch else contender.location,
        "train_path": str(own),
        "validation_paths": _save_rows(validation, base / "validation"),
        "few_shot_paths": _save_rows(few_shot, base / "few-shot"),
        "pad_token_id": contender.tokenizer.pad_token_id,
        "num_threads": max(1, int(finetune.cpus_per_worker)),
        "num_steps": num_steps,
        "rungs": [quarters * num_steps // _RUNGS[-1] for quarters in _RUNGS],
        "num_scored": {task_id: measuring.num_scored[task_id] for task_id in contender.data},
        "target": config.target,
        "epsilon": measuring.epsilon,
        "with_answers": measuring.with_answers,
        "storage": str(measuring.folder.resolve() / "runs"),
    }


def _placement(contender: Contender, training: FinetuneConfig, base: str) -> dict[str, Any]:
    """ZeRO stage and offload of a probe. Where auto finds nothing that fits, the placement that needs least is tried: the
    probe then fails alone, and its candidate's record says why."""
    if training.num_workers == 1:
        return {"zero_stage": 0, "offload": "none"}
    rows = [row for data in contender.data.values() for row in data.train]
    longest, answer = max(len(row["input_ids"]) for row in rows), max(map(num_answer_tokens, rows))
    load = Load(examples=training.batch_size, row_tokens=longest, answer_tokens=answer)
    try:
        placed = plan_zero(shape_of(base, training), training, load, device_bytes(training))
    except ConfigError:
        stage, offload = placements(training)[-1]
        return {"zero_stage": stage, "offload": offload}
    return {"zero_stage": placed.stage, "offload": placed.offload}


def _save_rows(rows: Mapping[str, Sequence[dict[str, Any]]], folder: pathlib.Path) -> dict[str, str]:
    """task_id -> where its rows are."""
    for task_id, own in rows.items():
        if not (folder / task_id).exists():
            save_dataset(list(own), folder / task_id)
    return {task_id: str(folder / task_id) for task_id in rows}


def _result_of(result: Any) -> ProbeResult:
    metrics = result.metrics or {}
    rungs = tuple(Rung.model_validate(rung) for rung in metrics.get("rungs", ()))
    if result.error is None:
        answers = {(task_id, key): is_right for task_id, key, is_right in metrics.get("answers", ())}
        return ProbeResult(rungs, None, metrics.get("few_shot"), answers)
    lines = [line for line in str(result.error).splitlines() if line.strip()]
    return ProbeResult(rungs, f"probe failed: {lines[-1].strip()[:300] if lines else type(result.error).__name__}")
