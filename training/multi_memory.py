"""How much memory a worker of a multi-LoRA run will need at its peak, and the passes and ZeRO stage that fit.

The base is held once, whole or sharded; every adapter has its weights, gradients, Adam's two moments and the copy that is
released, all in float32 (training/multi_member.py); activations are those of the largest forward pass, which holds as
many adapters as fit its number of tokens, or one whose batch is larger. The arithmetic of a solo run is
training/memory.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cluster.errors import ConfigError
from cluster.records import Record
from training.memory import Load, Memory, ModelShape, predict_memory
from training.multi_plan import plan_passes
from training.zero import USABLE

if TYPE_CHECKING:
    from training.finetune import FinetuneConfig

_FEWEST_TOKENS = 256
"""A pass is not halved below: one that is smaller costs more calls than it saves memory."""

_BYTES_PER_WEIGHT = 2 * 4 + 4 + 8
"""Of an adapter: trained and released, gradients, Adam."""
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "communication", "overhead")


class AdapterLoad(Record):
    """What one adapter adds to a run."""

    name: str
    trainable: int
    """Its weights."""
    examples: int
    """Of a worker's batch."""
    row_tokens: int
    """Of the longest example."""
    answer_tokens: int
    """Of the longest answer."""

    @property
    def max_tokens(self) -> int:
        """Of its largest batch."""
        return self.examples * self.row_tokens


class ManyPlan(Record):
    """How a run of several adapters is placed."""

    stage: int
    tokens_per_pass: int
    memory: Memory
    device_bytes: int
    """Of one worker's device, all of it."""


def predict_many(
    shape: ModelShape, config: FinetuneConfig, loads: Sequence[AdapterLoad], *, stage: int, tokens_per_pass: int
) -> Memory:
    """Peak memory of one worker.

    Args:
        shape: of the base; its `trainable` is not read.
        config: the fields that the adapters have in common.
        stage: ZeRO stage of the base, 0 or 3.
    """
    trained = sum(load.trainable for load in loads)
    passes = plan_passes([load.max_tokens for load in loads], tokens_per_pass)
    of_passes = [_of_pass(shape, config, [loads[place] for place in places], stage) for places in passes]
    largest = max(of_passes, key=lambda memory: memory.activations + memory.logits)
    return largest.model_copy(
        update={
            # What is trained and what is released.
            "weights": largest.weights + 2 * 4 * trained,
            "gradients": 4 * trained,
            "optimizer": 8 * trained,
        }
    )


def plan_many(
    shape: ModelShape, config: FinetuneConfig, loads: Sequence[AdapterLoad], device_bytes: int, tokens_per_pass: int
) -> ManyPlan:
    """The first placement that fits: smaller passes before a sharded base, as they cost less and change no result.

    Args:
        tokens_per_pass: at most.

    Raises:
        ConfigError: none fits; says what the smallest one needs and what would make it fit.
    """
    tried = []
    for stage, tokens in _placements(config, loads, tokens_per_pass):
        memory = predict_many(shape, config, loads, stage=stage, tokens_per_pass=tokens)
        plan = ManyPlan(stage=stage, tokens_per_pass=tokens, memory=memory, device_bytes=device_bytes)
        if memory.total <= USABLE * device_bytes:
            return plan
        tried.append(plan)
    raise ConfigError(_explain_refusal(config, loads, min(tried, key=lambda plan: plan.memory.total)))


def most_adapters(plan: ManyPlan, load: AdapterLoad) -> int:
    """How many adapters like this one a run placed for one of them has room for, at least: each has passes of its own."""
    free = USABLE * plan.device_bytes - plan.memory.total
    return 1 + int(free // (_BYTES_PER_WEIGHT * load.trainable))


def explain_many(plan: ManyPlan, load: AdapterLoad) -> list[str]:
    """The arithmetic of a run planned for one adapter, line by line."""
    memory = plan.memory
    parts = ", ".join(f"{name} {getattr(memory, name) / 2**30:.3f} GiB" for name in _PARTS)
    return [
        f"one base, ZeRO stage {plan.stage}, and adapters of {load.trainable:,} weights beside it, {_BYTES_PER_WEIGHT} bytes "
        "each (weights, gradients, Adam, released copy)",
        f"  with one: {memory.total / 2**30:.3f} GiB of {plan.device_bytes / 2**30:.3f} GiB ({parts})",
        f"  room for {most_adapters(plan, load)} in one run, in passes of at most {max(plan.tokens_per_pass, load.max_tokens)} "
        "tokens",
    ]


def _placements(
    config: FinetuneConfig, loads: Sequence[AdapterLoad], tokens_per_pass: int
) -> Iterator[tuple[int, int]]:
    stages = [0] if config.num_workers == 1 else [0, 3]
    # Below the largest batch of all, a smaller pass changes nothing.
    least = max(_FEWEST_TOKENS, *(load.max_tokens for load in loads))
    for stage in stages if config.zero_stage == "auto" else [config.zero_stage]:
        tokens = tokens_per_pass
        yield stage, tokens
        while tokens > least:
            tokens = max(least, tokens // 2)
            yield stage, tokens


def _of_pass(shape: ModelShape, config: FinetuneConfig, loads: Sequence[AdapterLoad], stage: int) -> Memory:
    """A pass as a solo run that trains nothing of its own."""
    frozen = shape.model_copy(update={"trainable": 0})
    parts = [
        predict_memory(
            frozen,
            config,
            Load(examples=load.examples, row_tokens=load.row_tokens, answer_tokens=load.answer_tokens),
            stage=stage,
        )
        for load in loads
    ]
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("activations", "logits")}
    return parts[0].model_copy(update=sums)


def _explain_refusal(config: FinetuneConfig, loads: Sequence[AdapterLoad], plan: ManyPlan) -> str:
    memory = plan.memory
    largest = max(loads, key=lambda load: load.max_tokens)
    remedies = []
    if largest.examples > 1:
        remedies.append(f"finetune.batch_size={largest.examples // 2}")
    if len(loads) > 1:
        remedies.append("fewer of these tasks in one run")
    remedies.append("fleet.mode=solo, which may split a batch")
    if config.gpus_per_worker and plan.stage == 0:
        remedies.append(f"finetune.num_workers={config.num_workers + 1} with finetune.zero_stage=3")
    parts = ", ".join(f"{name} {getattr(memory, name) / 2**30:.3f} GiB" for name in _PARTS)
    return (
        f"multi-LoRA run of {', '.join(load.name for load in loads)}: needs {memory.total / 2**30:.3f} GiB on each worker "
        f"(ZeRO {plan.stage}, passes of {max(plan.tokens_per_pass, largest.max_tokens)} tokens: {parts}), and a device has "
        f"{plan.device_bytes / 2**30:.3f} GiB, of which {USABLE:.0%} may be used; what would fit: a device of "
        f"{memory.total / USABLE / 2**30:.1f} GiB, or {', or '.join(remedies)}"
    )
