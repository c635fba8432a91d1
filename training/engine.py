"""The DeepSpeed engine of a run: its ZeRO stage, where the optimiser's state lives, and which optimiser that takes.

No JIT build of DeepSpeed happens without offload: torch's AdamW is used, and the shared-memory collective is switched off.
With offload DeepSpeed takes its own CPU Adam alone, whose C++ build takes minutes on every cold machine.
"""

from __future__ import annotations

from typing import Any

_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01


def build_engine(model: Any, settings: dict[str, Any]) -> Any:
    """Wrap a model for training on all ranks.

    Args:
        settings: learning_rate, batch_size, zero_stage 0 to 3, bf16; also offload ("none" where it is not given).
    """
    import deepspeed
    import deepspeed.ops
    import torch

    if not torch.cuda.is_available():
        # Else its C++ build runs at the first init of every cold machine (minutes, and a compiler).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    offload = settings.get("offload", "none")
    config = {
        "train_micro_batch_size_per_gpu": settings["batch_size"],
        # Micro-batches are summed by the loop, which says itself where a step ends.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": settings["zero_stage"], **_offload_options(offload)},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings["bf16"]},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=_optimizer(model, settings, offload), config=config, dist_init_required=False
    )
    return engine


def _offload_options(offload: str) -> dict[str, Any]:
    if offload == "none":
        return {}
    to_host = {"device": "cpu", "pin_memory": True}
    parameters = {"offload_param": to_host} if offload == "parameters" else {}
    return {"offload_optimizer": to_host, **parameters}


def _optimizer(model: Any, settings: dict[str, Any], offload: str) -> Any:
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": settings["learning_rate"], "betas": _BETAS, "weight_decay": _WEIGHT_DECAY}
    if offload == "none":
        return torch.optim.AdamW(parameters, **options)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
