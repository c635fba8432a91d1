"""One fine-tune: a base and a tokenised dataset -> a folder of safetensors, by Ray Train, DeepSpeed and PEFT (S5)."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

from pydantic import Field

from cluster.config import Config
from cluster.errors import RunYielded, TrainingError
from training.loop import train_loop
from training.progress import show_progress


class FinetuneConfig(Config):
    """How each specialist's adapter is trained."""

    num_steps: int = Field(default=300, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per worker and step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak, after warm-up; decays linearly to zero."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    lora_rank: int = Field(default=8, ge=1, le=256)
    """Rank of the adapter's matrices."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """Scale numerator: the update is multiplied by alpha / rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    bf16: bool = False
    """Train in bfloat16."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; a killed worker loses at most these."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers per fine-tune."""
    gpus_per_worker: int = Field(default=0, ge=0)
    """GPUs per worker; 0 trains on CPU with gloo."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves per worker."""
    max_failures: int = Field(default=2, ge=0)
    """How often a run restarts from its last checkpoint before it counts as failed."""
    seed: int = 0
    """Of initial weights and data order."""


def finetune(
    name: str,
    config: FinetuneConfig,
    *,
    method: Literal["lora", "full"],
    base_path: pathlib.Path,
    train_path: pathlib.Path,
    validation_path: pathlib.Path | None,
    pad_token_id: int,
    storage: pathlib.Path,
    label: str | None = None,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Train and wait for the result. Continues from the last checkpoint where a run of this name began before.

    Args:
        storage: folder for checkpoints; shared by all nodes of the cluster.
        label: what its progress bar is called; None takes `name`.

    Returns:
        (folder with what is served, last metrics).

    Raises:
        TrainingError: the run failed more than `max_failures` times.
        RunYielded: it stopped at a checkpoint because `ask_to_yield` was called; call again to go on.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = {
        **config.model_dump(mode="json"),
        "method": method,
        "base_path": str(base_path),
        "train_path": str(train_path),
        "validation_path": str(validation_path) if validation_path else None,
        "pad_token_id": pad_token_id,
        "num_threads": max(1, int(config.cpus_per_worker)),
        "progress_path": str(storage.resolve() / f"{name}.progress"),
        "yield_path": str(_yield_path(name, storage)),
    }
    resources = {"CPU": config.cpus_per_worker, **({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    storage.mkdir(parents=True, exist_ok=True)
    _yield_path(name, storage).unlink(missing_ok=True)
    with show_progress(pathlib.Path(settings["progress_path"]), label or name, config.num_steps):
        result = trainer.fit()
    if result.error is not None or result.checkpoint is None:
        raise TrainingError(f"run {name}: failed after {config.max_failures} restarts: {result.error}")
    metrics = dict(result.metrics or {})
    if metrics["step"] < config.num_steps:
        raise RunYielded(
            f"run {name}: stopped at step {metrics['step']} of {config.num_steps}, because it was asked to"
        )
    return pathlib.Path(result.checkpoint.path) / "model", metrics


def ask_to_yield(name: str, storage: pathlib.Path) -> None:
    """Have a running fine-tune write a checkpoint after its next step and stop; `finetune` then raises RunYielded."""
    _yield_path(name, storage).touch()


def _yield_path(name: str, storage: pathlib.Path) -> pathlib.Path:
    return storage.resolve() / f"{name}.yield"
