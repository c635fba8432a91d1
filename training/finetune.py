"""One fine-tune: a base and a tokenised dataset -> a folder of safetensors, by Ray Train, DeepSpeed and PEFT (S5).

What cannot fit or cannot be read is told before any worker starts; what a worker finds out later comes back as its
diagnosis. A run that meets the end of its memory goes on from its last checkpoint with half the micro-batch.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import Config
from cluster.errors import InputError, RunYielded, TrainingError
from training.diagnosis import Diagnosis, read_diagnosis, write_diagnosis
from training.distill import DistillConfig
from training.loop import train_loop
from training.memory import Load, ModelShape, device_bytes, shape_of
from training.methods import UNSHARDED, Method, check_base_folder, check_method
from training.progress import show_progress
from training.watching import LogTo, check_log_to, watch_settings
from training.zero import ZeroPlan, plan_zero


class FinetuneConfig(Config):
    """How each specialist's adapter is trained."""

    method: Method = "lora"
    """lora, rslora (scale alpha / sqrt(rank): for high ranks), qlora (over a 4-bit base: needs a GPU and bitsandbytes; the
    engine serves the adapter over the base as it is). dora and full cannot be served as adapters: for experiments."""
    num_steps: int = Field(default=300, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per worker and step, where all num_workers are there."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples that are in memory at a time; the gradients of a batch's parts are summed, so the result is the same. None
    takes the largest that the memory prediction allows, and half of it whenever a worker runs out of memory."""
    packing: bool = False
    """Several examples in a row without seeing each other, instead of batches of similar length. With batches sorted by
    length there is little padding to save; `python -m jobs.bench.packing` measures it."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak, after warm-up; decays linearly to zero."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    lora_rank: int = Field(default=8, ge=1, le=256)
    """Rank of the adapter's matrices."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """Scale numerator: the update is multiplied by alpha / rank, with rslora by alpha / sqrt(rank)."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and compute the rest again in the backward pass: less memory, a third more work; on a
    CPU about twice the work, because what is freed must go back to the kernel for memory to be saved at all."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Release a moving average of the trained weights with this decay per step, such as 0.99; 0 releases the weights."""
    patience: int = Field(default=0, ge=0)
    """Stop after so many checkpoints without better agreement on the validation split; 0 trains all steps. Either way the
    weights released are those of the checkpoint that agreed best."""
    distill: DistillConfig = DistillConfig()
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage; auto takes the lowest that fits (`understudy plan` shows the arithmetic)."""
    offload: Literal["auto", "none", "optimizer", "parameters"] = "auto"
    """What a GPU leaves in main memory: auto takes nothing while something else fits. Anything but none makes DeepSpeed
    compile its CPU Adam, minutes on every cold machine."""
    device_gib: float | None = Field(default=None, gt=0)
    """Memory of one worker's device; None asks the cluster. Name it to plan for GPUs that are elsewhere."""
    bf16: bool = False
    """Train in bfloat16."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; a killed worker loses at most these."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers per fine-tune."""
    min_workers: int | None = Field(default=None, ge=1)
    """Go on with so few workers where there is no room for num_workers, and with more once there is (Ray looks once a
    minute): a run then starts again from its last checkpoint. Steps stay what they are: batch_size x num_workers examples,
    shared by the workers there are. None: num_workers or none. Needs ZeRO stage 0."""
    gpus_per_worker: int = Field(default=0, ge=0)
    """GPUs per worker; 0 trains on CPU with gloo."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves per worker."""
    max_failures: int = Field(default=2, ge=0)
    """How often a run restarts from its last checkpoint before it counts as failed."""
    seed: int = 0
    """Of initial weights and data order."""
    log_to: LogTo = "none"
    """Where losses, agreement and speed are written for people to watch, beside the terminal and Ray's own metrics:
    tensorboard (event files in WORK/runs/RUN.tensorboard) or mlflow (at MLFLOW_TRACKING_URI)."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _check_stage(cls, stage: Any) -> Any:
        if isinstance(stage, bool):  # equal to 0 or 1, and so in a literal's choice
            raise ValueError(f"got {stage}; allowed: 'auto', 0, 1, 2 or 3")
        return stage

    @model_validator(mode="after")
    def _check_together(self) -> FinetuneConfig:
        if self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers}: above num_workers={self.num_workers}; allowed: at most that"
            )
        if self.min_workers and (self.zero_stage not in ("auto", 0) or self.offload not in ("auto", "none")):
            raise ValueError(
                f"min_workers={self.min_workers}: zero_stage={self.zero_stage}, offload={self.offload!r}; a checkpoint of a "
                "sharded optimiser is cut for its number of workers and cannot be read by another; allowed: zero_stage 0 "
                "or auto, offload none or auto"
            )
        if self.method == "qlora" and not self.gpus_per_worker:
            raise ValueError("method='qlora': 4-bit weights need a GPU; allowed: gpus_per_worker=1, or lora, rslora")
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size}: above batch_size={self.batch_size}; allowed: at most that"
            )
        if self.zero_stage == 3 and (self.method in UNSHARDED or self.ema_decay):
            what = f"ema_decay={self.ema_decay:g}" if self.ema_decay else f"method={self.method!r}"
            raise ValueError(
                f"zero_stage=3: {what} needs every worker to hold the weights whole; allowed: auto, 0, 1, 2"
            )
        least = {"auto": 0, "none": 0, "optimizer": 2, "parameters": 3}[self.offload]
        if self.zero_stage != "auto" and self.zero_stage < least:
            raise ValueError(
                f"offload={self.offload!r}: zero_stage={self.zero_stage}; allowed: auto or at least {least}"
            )
        if least and not self.gpus_per_worker:
            raise ValueError(f"offload={self.offload!r}: a CPU worker has no other memory; allowed: auto, none")
        if least == 3 and (self.method in UNSHARDED or self.ema_decay):
            raise ValueError(
                f"offload='parameters': not with method={self.method!r} or a moving average; allowed: none"
            )
        return self


def finetune(
    name: str,
    config: FinetuneConfig,
    *,
    base_path: pathlib.Path,
    train_path: pathlib.Path,
    validation_path: pathlib.Path | None,
    pad_token_id: int,
    storage: pathlib.Path,
    label: str | None = None,
    num_parallel: int = 1,
    start_path: pathlib.Path | None = None,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Train and wait for the result. Continues from the last checkpoint where a run of this name began before.

    Args:
        storage: folder for checkpoints; shared by all nodes of the cluster.
        label: what its progress bar is called; None takes `name`.
        num_parallel: runs like this one that share the cluster's memory.
        start_path: PEFT folder of the adapter to go on from; None begins with an untrained one.

    Returns:
        (folder with what is served, last metrics; among them training.speed.SPEED_FACTS).

    Raises:
        ConfigError: the method has no such device, or nothing fits in its memory.
        InputError: the base or the dataset cannot be used.
        TrainingError: the run failed more than `max_failures` times, or left the numbers.
        RunYielded: it stopped at a checkpoint because `ask_to_yield` was called; call again to go on.
    """
    plan = plan_finetune(config, base_path, train_path, num_parallel)
    storage.mkdir(parents=True, exist_ok=True)
    diagnosis_path = storage.resolve() / f"{name}.diagnosis"
    settings = {
        **config.model_dump(mode="json"),
        "zero_stage": plan.stage,
        "offload": plan.offload,
        "micro_batch_size": plan.micro_batch_size,
        "base_path": str(base_path),
        "train_path": str(train_path),
        "validation_path": str(validation_path) if validation_path else None,
        "start_path": str(start_path) if start_path else None,
        "pad_token_id": pad_token_id,
        "num_threads": max(1, int(config.cpus_per_worker)),
        "progress_path": str(storage.resolve() / f"{name}.progress"),
        "diagnosis_path": str(diagnosis_path),
        "yield_path": str(yield_path(name, storage)),
        **watch_settings(name, config.log_to, storage),
    }
    diagnosis_path.unlink(missing_ok=True)
    yield_path(name, storage).unlink(missing_ok=True)
    with show_progress(pathlib.Path(settings["progress_path"]), label or name, config.num_steps):
        result = _fit(name, config, settings, storage)
    diagnosis = read_diagnosis(diagnosis_path)
    if diagnosis is not None and diagnosis.kind == "diverged":
        raise TrainingError(f"run {name}: {diagnosis.message}")
    if result.checkpoint is None:
        raise TrainingError(f"run {name}: ended without a checkpoint")
    metrics = {**(result.metrics or {}), "predicted_memory_bytes": plan.memory.total}
    if metrics.get("yielded"):
        raise RunYielded(f"run {name}: stopped after step {metrics['step']}, because it was asked to")
    return pathlib.Path(result.checkpoint.path) / "model", metrics


def plan_finetune(
    config: FinetuneConfig, base_path: pathlib.Path, train_path: pathlib.Path, num_parallel: int = 1
) -> ZeroPlan:
    """Check a run's base, data and method, and place it in the connected cluster's memory.

    Raises:
        ConfigError, InputError: as `finetune`.
    """
    import datasets

    check_method(config.method, config.gpus_per_worker)
    check_log_to(config.log_to)
    check_base_folder(base_path)
    table = datasets.load_from_disk(str(train_path))
    lengths = [len(ids) for ids in table["input_ids"]]
    answers = [length - start for length, start in zip(lengths, table["num_prompt"], strict=True)]
    load = Load(examples=config.batch_size, row_tokens=max(lengths), answer_tokens=max(answers))
    shape = shape_of(base_path, config)
    check_window(train_path, lengths, shape)
    return plan_zero(shape, config, load, device_bytes(config, num_parallel))


def check_window(path: pathlib.Path, lengths: Sequence[int], shape: ModelShape) -> None:
    """Refuse a dataset whose examples have so many tokens, where a base does not read them whole.

    Raises:
        InputError: names the dataset, and how many examples are too long.
    """
    window = shape.context_window_tokens
    if window is not None and max(lengths) > window:
        num_long = sum(length > window for length in lengths)
        raise InputError(
            f"dataset {str(path)!r}: {num_long} of {len(lengths)} examples are longer than the base's window of {window} "
            f"tokens (longest {max(lengths)}); next: a base with a longer window"
        )


def _fit(name: str, config: FinetuneConfig, settings: dict[str, Any], storage: pathlib.Path) -> Any:
    """Run to the end; once more with half the micro-batch for as long as memory is what a run lacks.

    Raises:
        TrainingError: the run failed.
    """
    from ray.train import TrainingFailedError

    path = pathlib.Path(settings["diagnosis_path"])
    while True:
        try:
            return build_trainer(train_loop, name, config, settings, storage).fit()
        except TrainingFailedError as error:
            lacked = _lacked_memory(error, path, settings["micro_batch_size"])
            if lacked is None or lacked.micro_batch_size == 1:
                said = [line for line in str(error).splitlines() if line.strip()]
                reason = said[-1].strip() if said else type(error).__name__
                raise TrainingError(f"run {name}: failed after {config.max_failures} restarts: {reason}") from error
            write_diagnosis(path, lacked)


def _lacked_memory(error: Any, path: pathlib.Path, micro_batch_size: int) -> Diagnosis | None:
    """What its worker wrote when torch was refused memory, or what Ray says when it killed one that took too much."""
    from ray.exceptions import OutOfMemoryError

    left = read_diagnosis(path)
    if left is not None and left.kind == "out_of_memory":
        return left
    failures = getattr(error, "worker_failures", {}).values()
    if not any(isinstance(one, OutOfMemoryError) for one in failures):
        return None
    return Diagnosis(kind="out_of_memory", message=str(error), micro_batch_size=micro_batch_size)


def build_trainer(
    loop: Callable[[dict[str, Any]], None],
    name: str,
    config: FinetuneConfig,
    settings: dict[str, Any],
    storage: pathlib.Path,
) -> Any:
    """The TorchTrainer of a run; not started.

    Args:
        loop: run on every worker with `settings`.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": config.cpus_per_worker, **({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})}
    return TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.num_workers) if config.min_workers else config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def ask_to_yield(name: str, storage: pathlib.Path) -> None:
    """Have a running fine-tune write a checkpoint after its next step and stop; `finetune` then raises RunYielded."""
    yield_path(name, storage).touch()


def yield_path(name: str, storage: pathlib.Path) -> pathlib.Path:
    """The file whose presence asks a run to yield."""
    return storage.resolve() / f"{name}.yield"
