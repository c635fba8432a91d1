"""The training loop of one Ray Train worker: DeepSpeed engine, answer-only loss, checkpoint, resume.

One loop for LoRA adapters and for full training. The order of batches and dropout follow from the seed and the step
number alone, so a run that resumes does what the undisturbed run would have done. No JIT build of DeepSpeed happens on
CPU: torch's AdamW is used, and the shared-memory collective is switched off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import tempfile
from typing import Any

from training.progress import write_progress

_NUM_CURVE_POINTS = 20


def train_loop(settings: dict[str, Any]) -> None:
    """Run on every worker of a TorchTrainer.

    Args:
        settings: see `training.finetune.RunSettings`, as a plain dictionary.

    Side effects: reports {step, loss, validation_loss, curve} with a checkpoint every `checkpoint_every` steps and at
    the end; the last checkpoint's `model/` folder holds what is served (PEFT or full safetensors).
    """
    import ray.train
    import torch

    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    torch.set_num_threads(settings["num_threads"])
    torch.manual_seed(settings["seed"])
    model = build_model(settings)
    engine = build_engine(model, settings)
    rows = Rows(settings["train_path"], settings, context.get_world_rank(), context.get_world_size())
    held_out = Rows(settings["validation_path"], settings, 0, 1) if settings["validation_path"] else None
    step, curve = _resume(engine)
    stride = max(1, settings["num_steps"] // _NUM_CURVE_POINTS)
    losses: list[float] = []
    # A model comes from its folder in evaluation mode.
    engine.train()
    while step < settings["num_steps"]:
        # Dropout of a resumed run is that of the undisturbed one: it follows from seed, rank and step alone.
        torch.manual_seed(_seed_of(settings["seed"], context.get_world_rank(), step))
        _set_learning_rate(engine, settings, step)
        loss = answer_loss(engine, rows.batch(step), engine.device)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        step += 1
        is_checkpoint = step % settings["checkpoint_every"] == 0 or step == settings["num_steps"]
        if step % stride == 0 or is_checkpoint:
            curve.append({"step": step, "loss": sum(losses) / len(losses)})
            losses.clear()
            if context.get_world_rank() == 0:
                write_progress(pathlib.Path(settings["progress_path"]), step, curve[-1]["loss"])
        if is_checkpoint:
            curve[-1]["validation_loss"] = _validation_loss(engine, held_out)
            _report(engine, settings, step, curve)


def rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Learning-rate factor: linear warm-up, then linear decay to zero."""
    return min(1.0, (step + 1) / max(warmup_steps, 1)) * max(0.0, 1.0 - step / max(num_steps, 1))


def _seed_of(seed: int, rank: int, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{rank}:{step}".encode(), digest_size=7).digest(), "big")


class Rows:
    """Deterministic batches of similar length from a tokenised dataset."""

    def __init__(self, path: str, settings: dict[str, Any], rank: int, world_size: int) -> None:
        import datasets

        table = datasets.load_from_disk(path)
        self._ids = table["input_ids"][:]
        self._num_prompt = table["num_prompt"][:]
        self._batch, self._rank, self._world = settings["batch_size"], rank, world_size
        self._seed, self._pad = settings["seed"], settings["pad_token_id"]
        self._epoch, self._batches = -1, []

    def num_batches(self) -> int:
        return max(1, math.ceil(len(self._ids) / (self._batch * self._world)))

    def batch(self, step: int) -> dict[str, Any]:
        """Batch number `step` of an endless sequence of shuffled epochs: input_ids and labels [B, T]."""
        epoch, index = divmod(step, self.num_batches())
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._plan(epoch)
        return self._collate(self._batches[index])

    def _plan(self, epoch: int) -> list[list[int]]:
        import random

        rng = random.Random(f"{self._seed}:{epoch}")
        order = list(range(len(self._ids)))
        rng.shuffle(order)
        size, batches = self._batch * self._world, []
        # Sorting within windows of 20 batches keeps padding low and batches still random.
        for begin in range(0, len(order), size * 20):
            window = sorted(order[begin : begin + size * 20], key=lambda k: len(self._ids[k]))
            batches += [window[k : k + size] for k in range(0, len(window), size)]
        rng.shuffle(batches)
        # Every rank needs a row, or the collectives would wait for it.
        padded = [(b * self._world)[: max(len(b), self._world)] for b in batches]
        return [b[self._rank :: self._world] for b in padded]

    def _collate(self, rows: list[int]) -> dict[str, Any]:
        import torch

        longest = max(len(self._ids[k]) for k in rows)
        input_ids = torch.full((len(rows), longest), self._pad, dtype=torch.long)
        labels = torch.full((len(rows), longest), -100, dtype=torch.long)
        for line, k in enumerate(rows):
            ids = torch.tensor(self._ids[k])
            input_ids[line, : len(ids)] = ids
            labels[line, self._num_prompt[k] : len(ids)] = ids[self._num_prompt[k] :]
        return {"input_ids": input_ids, "labels": labels}


def build_model(settings: dict[str, Any]) -> Any:
    model = load_base(settings["base_path"])
    return model if settings["method"] == "full" else add_lora(model, settings)


def load_base(path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    model.config.use_cache = False
    return model


def add_lora(model: Any, settings: dict[str, Any]) -> Any:
    """Put an untrained adapter on a base; its weights follow from torch's seed."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=0.0,
        target_modules=settings["lora_targets"],
    )
    return get_peft_model(model, lora)


def build_engine(model: Any, settings: dict[str, Any]) -> Any:
    import deepspeed
    import deepspeed.ops
    import torch

    if not torch.cuda.is_available():
        # Else its C++ build runs at the first init of every cold machine (minutes, and a compiler).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01)
    config = {
        "train_micro_batch_size_per_gpu": settings["batch_size"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": settings["zero_stage"]},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings["bf16"]},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def answer_loss(engine: Any, batch: dict[str, Any], device: Any) -> Any:
    """Mean over examples of the mean cross-entropy of the answer's tokens.

    A gate counts answers and not tokens, so a long answer weighs no more than a short one. Right padding needs no mask
    under causal attention.
    """
    import torch.nn.functional as F

    labels = batch["labels"].to(device)
    # Logits are the dear part of a small model: none are computed before the first answer token of the batch.
    first = int((labels != -100).any(dim=0).nonzero()[0])
    kept = labels.shape[1] - first + 1
    logits = engine(input_ids=batch["input_ids"].to(device), logits_to_keep=kept).logits[:, :-1]
    labels = labels[:, first:]
    is_answer = labels != -100
    losses = F.cross_entropy(logits[is_answer].float(), labels[is_answer], reduction="none")
    lengths = is_answer.sum(dim=1, keepdim=True).expand_as(labels)[is_answer]
    return (losses / lengths).sum() / len(labels)


def _set_learning_rate(engine: Any, settings: dict[str, Any], step: int) -> None:
    rate = settings["learning_rate"] * rate_factor(step, settings["num_steps"], settings["warmup_steps"])
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _resume(engine: Any) -> tuple[int, list[dict[str, Any]]]:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, []
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder, tag="last")
    return int(state["step"]), list(state["curve"])


def _report(engine: Any, settings: dict[str, Any], step: int, curve: list[dict[str, Any]]) -> None:
    import ray.train
    from ray.train import Checkpoint

    metrics = {**curve[-1], "curve": curve}
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="last", client_state={"step": step, "curve": curve})
        if step == settings["num_steps"]:
            _save_model(engine, settings, pathlib.Path(folder) / "model")
        if ray.train.get_context().get_world_rank() == 0:
            (pathlib.Path(folder) / "metrics.json").write_text(json.dumps(metrics))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _validation_loss(engine: Any, held_out: Rows | None) -> float | None:
    import torch

    if held_out is None:
        return None
    engine.eval()
    with torch.no_grad():
        losses = [float(answer_loss(engine, held_out.batch(k), engine.device)) for k in range(held_out.num_batches())]
    engine.train()
    return sum(losses) / len(losses)


def _save_model(engine: Any, settings: dict[str, Any], folder: pathlib.Path) -> None:
    """Write what is served. Under ZeRO-3 every rank takes part in gathering the weights."""
    import deepspeed
    import ray.train

    module = engine.module
    parameters = [p for p in module.parameters() if settings["method"] == "full" or p.requires_grad]
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=settings["zero_stage"] == 3):
        if ray.train.get_context().get_world_rank() == 0:
            module.save_pretrained(folder, safe_serialization=True)
