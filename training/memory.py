"""How much memory a worker of a fine-tune will need at its peak, told before it starts.

Weights, gradients and optimiser state follow from the parameter counts and the ZeRO stage (Rajbhandari et al. 2020, "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054, section 5, with the frozen weights of an
adapter's base beside the trained ones). Activations are counted from what autograd keeps of a Llama-style layer under
scaled-dot-product attention, logits from the answer tokens alone. `python -m jobs.bench.memory` compares with measurement.
"""

from __future__ import annotations

import functools
import pathlib
from typing import TYPE_CHECKING, Any

from cluster.records import Record
from training.engine import BUCKET_ELEMENTS

if TYPE_CHECKING:
    from training.catalog import ScratchModel
    from training.finetune import FinetuneConfig

CPU_OVERHEAD = 700 * 2**20
"""Resident bytes of a worker with torch, transformers, peft, deepspeed and datasets imported and nothing loaded."""
_CPU_SLACK, _CPU_SLACK_FULL = 2.1, 1.35
"""Main memory that activations take over what autograd keeps of them, with an adapter and in full training: glibc's heap
holds what was freed, and an adapter's narrow products between the wide ones keep its pieces apart. Measured on bases of 2M
and 22M parameters. With recomputed activations the heap is told to hold nothing (training/methods.py)."""
_GROUP_ELEMENTS = 1_000_000_000
"""That ZeRO-3's optimiser takes a step on at a time: DeepSpeed's sub_group_size."""
GPU_OVERHEAD = 3 * 2**29
"""CUDA context, libraries' workspaces and the allocator's slack: 1.5 GiB, an assumption that no GPU here has checked."""
_WHOLE_BUCKET_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed flattens at a time where nothing is sharded (runtime/engine.py: MEMORY_OPT_ALLREDUCE_SIZE)."""
_ADAM_BYTES = 8
_MASTER_BYTES = 4
"""A float32 copy of the trained weights: kept by mixed precision, and by ZeRO 1 to 3 in any precision."""


class ModelShape(Record):
    """What of a base and its method decides memory."""

    parameters: int
    trainable: int
    """Of an adapter's weights, or of all."""
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_window_tokens: int | None = None
    is_estimated: bool = False
    """Only the number of parameters is known; the rest is that of a typical decoder of this size."""


class Load(Record):
    """What one worker holds at a time."""

    examples: int
    """In a micro-batch."""
    row_tokens: int
    """Of the longest example."""
    answer_tokens: int
    """Of the longest answer."""


class Memory(Record):
    """Bytes on one device, and in the host's memory where something is offloaded."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    communication: int = 0
    """What travels between workers, and the shard's gradients as the optimiser takes them."""
    host: int = 0

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.communication + self.overhead


def predict_memory(
    shape: ModelShape, config: FinetuneConfig, load: Load, *, stage: int, offload: str = "none"
) -> Memory:
    """Peak memory of one worker.

    Args:
        stage: ZeRO stage 0 to 3.
        offload: none, optimizer, or parameters (which takes the optimiser along).
    """
    bytes_each = 2 if config.bf16 else 4
    workers = config.num_workers
    frozen = 0 if config.method == "full" else shape.parameters
    # QLoRA: four bits a weight and a quantised constant per block of 64 (arXiv 2305.14314, section 3: 0.127 bits).
    frozen_bytes = int(frozen * (4.127 / 8)) if config.method == "qlora" else frozen * bytes_each
    weights = frozen_bytes + shape.trainable * bytes_each
    gradients = shape.trainable * bytes_each
    has_master = config.bf16 or stage > 0
    optimizer = shape.trainable * (_ADAM_BYTES + (_MASTER_BYTES if has_master else 0))
    host = 0
    if stage >= 1:
        optimizer = -(-optimizer // workers)
    if stage >= 2:
        gradients = -(-gradients // workers)
    if stage == 3:
        weights = -(-weights // workers)
    if offload != "none":
        # Gradients go to float32 buffers of the host as they come, a bucket at a time.
        host, optimizer = host + optimizer + 4 * shape.trainable // workers, 0
        gradients = min(gradients, BUCKET_ELEMENTS * bytes_each)
    if offload == "parameters":
        # What a layer needs is brought back for its turn, with the next one's on the way.
        live = 2 * (shape.parameters // max(1, shape.layers)) * bytes_each
        host, weights = host + weights, min(weights, live)
    elif stage == 3:
        # What is whole at a time: a layer, and what is kept for another use or brought back ahead.
        live = shape.parameters // max(1, shape.layers) + BUCKET_ELEMENTS
        weights += min(shape.parameters, live) * bytes_each
    slack = _slack(config)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=int(slack * _activation_bytes(shape, config, load, bytes_each)),
        logits=int(slack * _logit_bytes(shape, load, bytes_each)),
        communication=_communication_bytes(shape, workers, bytes_each, stage, offload),
        overhead=GPU_OVERHEAD if config.gpus_per_worker else CPU_OVERHEAD,
        host=host,
    )


def _communication_bytes(shape: ModelShape, workers: int, bytes_each: int, stage: int, offload: str) -> int:
    if workers == 1 and stage == 0:
        return 0
    if stage == 0:
        return min(_WHOLE_BUCKET_ELEMENTS, shape.trainable) * bytes_each
    taken_in = shape.parameters if stage == 3 else shape.trainable
    buckets = min(BUCKET_ELEMENTS, shape.trainable) + min(BUCKET_ELEMENTS, taken_in)
    own = -(-shape.trainable // workers)
    step = 0 if offload != "none" else 4 * (min(own, _GROUP_ELEMENTS) if stage == 3 else own)
    return buckets * bytes_each + step


def shape_of(base: str | pathlib.Path, config: FinetuneConfig) -> ModelShape:
    """Read a base's description, a folder or a hub id in the local cache; no weights are read."""
    from transformers import AutoConfig

    return shape_of_config(AutoConfig.from_pretrained(str(base), trust_remote_code=False), config)


def shape_of_config(description: Any, config: FinetuneConfig) -> ModelShape:
    """Count on a model without storage.

    Args:
        description: a transformers configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(description, trust_remote_code=False)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = parameters if config.method == "full" else _num_adapter_weights(model, config)
    text = description.get_text_config()
    return ModelShape(
        parameters=parameters,
        trainable=trainable,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", 4 * text.hidden_size),
        vocab_size=text.vocab_size,
        context_window_tokens=getattr(text, "max_position_embeddings", None),
    )


def shape_of_scratch(entry: ScratchModel, config: FinetuneConfig) -> ModelShape:
    """Of a base that is still to be trained."""
    adapter = _lora_weights(entry.hidden_size, entry.intermediate_size, entry.layers, config)
    return ModelShape(
        parameters=entry.parameters,
        trainable=entry.parameters if config.method == "full" else adapter,
        layers=entry.layers,
        hidden_size=entry.hidden_size,
        intermediate_size=entry.intermediate_size,
        vocab_size=entry.vocab_size,
        context_window_tokens=entry.context_window_tokens,
    )


def estimate_shape(parameters: int, config: FinetuneConfig) -> ModelShape:
    """A shape for a base of which only the size is known.

    A decoder has about 12 h^2 weights a layer; with as many layers as h / 128 (7B: h 4096, 32 layers) that gives h.
    """
    hidden = max(128, round((parameters * 128 / 12) ** (1 / 3) / 128) * 128)
    layers = max(1, round(parameters / (12 * hidden**2)))
    inner = int(2.7 * hidden)
    return ModelShape(
        parameters=parameters,
        trainable=parameters if config.method == "full" else _lora_weights(hidden, inner, layers, config),
        layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=128_000 if parameters > 10**9 else 49_152,
        is_estimated=True,
    )


def _lora_weights(hidden: int, inner: int, layers: int, config: FinetuneConfig) -> int:
    """Weights of an adapter on a Llama whose keys and values have as many heads as its queries."""
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    sides = [2 * hidden if name in attention else hidden + inner for name in config.lora_targets]
    return layers * config.lora_rank * sum(sides)


def device_bytes(config: FinetuneConfig, num_parallel: int = 1) -> int:
    """Memory that one worker may fill: a GPU of the connected Ray cluster, or a CPU worker's share of the largest node.

    Args:
        num_parallel: runs at a time; their workers share a node as far as its CPUs hold them.
    """
    import ray

    if config.device_gib is not None:
        return int(config.device_gib * 2**30)
    if config.gpus_per_worker:
        return gpu_bytes()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max(nodes, key=lambda node: node.get("memory", 0.0))
    seats = max(1, int(largest.get("CPU", 1) // config.cpus_per_worker))
    return int(largest.get("memory", 0.0) / min(seats, num_parallel * config.num_workers))


@functools.cache
def gpu_bytes() -> int:
    """Memory of a GPU of the connected Ray cluster; asked once, by a Ray task."""
    import ray

    return ray.get(ray.remote(num_gpus=1)(_own_gpu_bytes).remote())


def _own_gpu_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def _num_adapter_weights(model: Any, config: FinetuneConfig) -> int:
    import torch

    total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in config.lora_targets:
            total += config.lora_rank * (module.in_features + module.out_features)
            total += module.out_features if config.method == "dora" else 0
    return total


def _slack(config: FinetuneConfig) -> float:
    """What activations take of a device's memory over what is alive of them."""
    if config.gpus_per_worker or config.gradient_checkpointing:
        return 1.0
    return _CPU_SLACK_FULL if config.method == "full" else _CPU_SLACK


def _activation_bytes(shape: ModelShape, config: FinetuneConfig, load: Load, bytes_each: int) -> int:
    """What autograd keeps per token of a layer: two norms' inputs and outputs (4h), q, k, v and the attention's result (4h),
    and gate, up, their activation and product (4f); full training also keeps the normalised inputs (2h)."""
    per_layer = 8 * shape.hidden_size + 4 * shape.intermediate_size
    if config.method == "full":
        per_layer += 2 * shape.hidden_size
    else:
        # The inputs of every B and the scaled updates of its layer.
        per_layer += len(config.lora_targets) * config.lora_rank
    tokens = load.examples * load.row_tokens
    # The last norm's input.
    after = shape.hidden_size
    if config.gradient_checkpointing:
        # Every layer's input, and one layer's activations at a time.
        return tokens * (shape.layers * shape.hidden_size + per_layer + after) * bytes_each
    return tokens * (shape.layers * per_layer + after) * bytes_each


def _logit_bytes(shape: ModelShape, load: Load, bytes_each: int) -> int:
    """Logits and their gradient, and in float32 the answers' logits, their log-softmax and its gradient."""
    tokens = load.examples * load.answer_tokens
    return tokens * shape.vocab_size * (2 * bytes_each + 3 * 4)
