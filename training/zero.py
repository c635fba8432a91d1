"""Where a fine-tune's weights, gradients and optimiser state live: ZeRO stage, offload and micro-batch from memory.

Placements are tried from the one that costs least: nothing sharded, ZeRO 1 and 2 (as much communication as plain data
parallelism), ZeRO 3 (half as much again: Rajbhandari et al. 2020, section 7), then the optimiser in the host's memory
(Ren et al. 2021, arXiv 2101.06840), then the parameters too. Under each the micro-batch is halved before the next is
tried: accumulating gradients costs next to nothing beside moving weights. A recipe may fix any of the three.

The arithmetic is training/memory.py's, and is shown by `understudy plan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from cluster.errors import ConfigError
from cluster.records import Record
from training.memory import Load, Memory, ModelShape, predict_memory
from training.methods import UNSHARDED

if TYPE_CHECKING:
    from training.finetune import FinetuneConfig

Offload = Literal["none", "optimizer", "parameters"]
USABLE = 0.9
"""Of a device's memory; the rest is left to fragmentation and to what a prediction misses."""
_SOURCE = "arXiv 1910.02054 section 5"


class ZeroPlan(Record):
    """How one fine-tune is placed."""

    stage: int
    offload: Offload
    micro_batch_size: int
    memory: Memory
    device_bytes: int
    """Of one worker's device, all of it."""
    shape: ModelShape
    load: Load


def plan_zero(shape: ModelShape, config: FinetuneConfig, load: Load, device_bytes: int) -> ZeroPlan:
    """The first placement that fits.

    Args:
        load: of a whole batch; its `examples` are lowered where that is needed.

    Raises:
        ConfigError: none fits; says what the smallest one needs and what would make it fit.
    """
    tried: list[ZeroPlan] = []
    for stage, offload in placements(config):
        for examples in _micro_batches(config, load.examples):
            part = load.model_copy(update={"examples": examples})
            memory = predict_memory(shape, config, part, stage=stage, offload=offload)
            plan = ZeroPlan(
                stage=stage,
                offload=offload,
                micro_batch_size=examples,
                memory=memory,
                device_bytes=device_bytes,
                shape=shape,
                load=part,
            )
            if memory.total <= USABLE * device_bytes:
                return plan
            tried.append(plan)
    raise ConfigError(_explain_refusal(config, min(tried, key=lambda plan: plan.memory.total)))


def placements(config: FinetuneConfig) -> list[tuple[int, Offload]]:
    """(stage, offload) that the recipe leaves open, the cheapest first.

    With one worker there is nothing to shard, so a stage is only what its offload needs. Offload needs a GPU: on a CPU the
    host's memory is the device's.
    """
    every: list[tuple[int, Offload]] = [(0, "none")]
    # With another number of workers than it was written by, a sharded checkpoint could not be read.
    if config.num_workers > 1 and not config.min_workers:
        every += [(1, "none"), (2, "none"), (3, "none")]
    if config.gpus_per_worker and not config.min_workers:
        every += [(2, "optimizer"), (3, "optimizer"), (3, "parameters")]
    if config.zero_stage != "auto":
        offloads = sorted({offload for stage, offload in every if stage == config.zero_stage}, key=_OFFLOADS.index)
        every = [(config.zero_stage, offload) for offload in offloads or ("none",)]
    if config.offload != "auto":
        least = {"none": 0, "optimizer": 2, "parameters": 3}[config.offload]
        stages = sorted({stage for stage, _ in every if stage >= least})
        every = [(stage, config.offload) for stage in stages or ([least] if config.zero_stage == "auto" else [])]
    must_be_whole = config.method in UNSHARDED or config.ema_decay > 0
    return [(stage, offload) for stage, offload in every if stage < 3 or not must_be_whole]


def explain(plan: ZeroPlan, config: FinetuneConfig) -> list[str]:
    """The arithmetic of a plan, line by line."""
    shape, memory, load = plan.shape, plan.memory, plan.load
    size = 2 if config.bf16 else 4
    about = "about " if shape.is_estimated else ""
    shards = config.num_workers
    adam = 12 if config.bf16 or plan.stage else 8
    parts = {1: f"optimiser/{shards}", 2: f"optimiser/{shards}, gradients/{shards}"}
    parts[3] = f"{parts[2]}, weights/{shards}"
    sharded = f", sharded: {parts[plan.stage]}" if plan.stage and shards > 1 else ""
    kind = "GPU" if config.gpus_per_worker else "CPU worker"
    lines = [
        f"base: {about}{shape.parameters:,} parameters ({about}{shape.layers} layers of {shape.hidden_size}), of which "
        f"{config.method} trains {about}{shape.trainable:,}",
        f"ZeRO stage {plan.stage}, offload {plan.offload}, {config.num_workers} workers{sharded} ({_SOURCE})",
        f"  weights      {_gib(memory.weights)}  {size} bytes each",
        f"  gradients    {_gib(memory.gradients)}  {size} bytes per trained weight",
        f"  optimiser    {_gib(memory.optimizer)}  {adam} bytes per trained weight"
        + (" (float32 copy 4, Adam 8)" if adam == 12 else " (Adam)"),
        f"  activations  {_gib(memory.activations)}  {load.examples} examples of {load.row_tokens} tokens"
        + (", recomputed layer by layer" if config.gradient_checkpointing else ""),
        f"  logits       {_gib(memory.logits)}  {load.examples} answers of {load.answer_tokens} tokens over "
        f"{shape.vocab_size:,} words",
        f"  between      {_gib(memory.communication)}  buckets between workers, gradients of the optimiser's shard",
        f"  overhead     {_gib(memory.overhead)}",
        f"  together     {_gib(memory.total)}  of {_gib(plan.device_bytes)} on each {kind}",
    ]
    if memory.host:
        lines.append(f"  in main memory {_gib(memory.host)} for each worker")
        lines.append("  offload takes DeepSpeedCPUAdam, whose C++ build takes minutes on every cold machine")
    if plan.micro_batch_size < config.batch_size:
        lines.append(
            f"micro-batch {plan.micro_batch_size}: gradients of {-(-config.batch_size // plan.micro_batch_size)} parts are "
            f"summed to a batch of {config.batch_size}"
        )
    if plan.offload == "none":
        lines.append("optimiser: torch AdamW; nothing is compiled")
    return lines


_OFFLOADS: Sequence[Offload] = ("none", "optimizer", "parameters")


def _micro_batches(config: FinetuneConfig, most: int) -> Iterator[int]:
    """Sizes to try; the recipe's alone where it gives one."""
    size = min(config.micro_batch_size or most, most)
    yield size
    while config.micro_batch_size is None and size > 1:
        size = (size + 1) // 2
        yield size


def _explain_refusal(config: FinetuneConfig, plan: ZeroPlan) -> str:
    """What the placement that needs least needs, and what would give it room."""
    memory, usable = plan.memory, USABLE * plan.device_bytes
    fixed = memory.overhead + memory.activations + memory.logits
    sharded = memory.total - fixed
    remedies = []
    if fixed < usable and config.method not in UNSHARDED and config.gpus_per_worker:
        needed = -(-int(sharded * config.num_workers) // int(usable - fixed))
        remedies.append(f"finetune.num_workers={max(needed, config.num_workers + 1)} with finetune.zero_stage=3")
    if not config.gradient_checkpointing:
        remedies.append("finetune.gradient_checkpointing=true")
    if config.method == "full":
        remedies.append("finetune.method=lora")
    if not config.bf16:
        remedies.append("finetune.bf16=true")
    gib = memory.total / USABLE / 2**30
    return (
        f"fine-tune: {plan.shape.parameters:,} parameters by {config.method} need {_gib(memory.total).strip()} on each "
        f"worker (ZeRO {plan.stage}, offload {plan.offload}, micro-batch {plan.micro_batch_size}: weights "
        f"{_gib(memory.weights).strip()}, gradients {_gib(memory.gradients).strip()}, optimiser "
        f"{_gib(memory.optimizer).strip()}, activations {_gib(memory.activations).strip()}, logits "
        f"{_gib(memory.logits).strip()}, between workers {_gib(memory.communication).strip()}, overhead {_gib(memory.overhead).strip()}), and a device has "
        f"{_gib(plan.device_bytes).strip()}, of which {USABLE:.0%} may be used; what would fit: a device of "
        f"{gib:.1f} GiB{''.join(', or ' + one for one in remedies)}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:8.3f} GiB"
