"""The DeepSpeed engine of a run: its ZeRO stage, where the optimiser's state lives, and which optimiser that takes.

No JIT build of DeepSpeed happens without offload: torch's AdamW is used, and the shared-memory collective is switched off.
With offload DeepSpeed takes its own CPU Adam alone, whose C++ build takes minutes on every cold machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BUCKET_ELEMENTS = 2**24
"""Numbers that travel between workers at a time, and that ZeRO-3 brings back ahead of their use. DeepSpeed's own 500 million
are a base of 500 million parameters held twice: what sharding saves, a small base's buckets would take again."""
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01


def build_engine(model: Any, settings: dict[str, Any]) -> Any:
    """Wrap a model for training on all ranks.

    Args:
        settings: learning_rate, batch_size, zero_stage 0 to 3, bf16; also offload ("none" where it is not given).
    """
    import deepspeed

    avoid_builds()
    offload = settings.get("offload", "none")
    config = {
        "train_micro_batch_size_per_gpu": settings["batch_size"],
        # Micro-batches are summed by the loop, which says itself where a step ends.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero_options(settings["zero_stage"]) | _offload_options(offload),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings["bf16"]},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=_optimizer(model, settings, offload), config=config, dist_init_required=False
    )
    return engine


def avoid_builds() -> None:
    """Keep DeepSpeed from compiling where there is no GPU: minutes at the first init of every cold machine, and a compiler."""
    import deepspeed.ops
    import torch

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_options(stage: int) -> dict[str, int]:
    """DeepSpeed's zero_optimization without offload."""
    names = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    names += ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    return {"stage": stage, **dict.fromkeys(names, BUCKET_ELEMENTS)}


def adam(parameters: Iterable[Any], learning_rate: float) -> Any:
    """The optimiser of every run, solo or many. Fused: one pass over the weights, and no copies of them on the way."""
    import torch

    return torch.optim.AdamW(parameters, lr=learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True)


def _offload_options(offload: str) -> dict[str, Any]:
    if offload == "none":
        return {}
    to_host = {"device": "cpu", "pin_memory": True}
    parameters = {"offload_param": to_host} if offload == "parameters" else {}
    return {"offload_optimizer": to_host, **parameters}


def _optimizer(model: Any, settings: dict[str, Any], offload: str) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if offload == "none":
        return adam(parameters, settings["learning_rate"])
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    options = {"lr": settings["learning_rate"], "betas": _BETAS, "weight_decay": _WEIGHT_DECAY}
    return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
