"""What a recipe says of the engines that serve specialists."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from serving.scaling import ScaleConfig

MIN_ADAPTERS = 8
"""Room that an engine has at least, where the recipe says no other."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for its largest rank: vllm.config.lora.MaxLoRARanks."""


class SpecialistConfig(ScaleConfig):
    """How the engine of each base model runs."""

    device: str = Field(default="cpu", pattern="^(cpu|gpu)$")
    """What the engine runs on."""
    dtype: str = Field(default="float32", pattern="^(float32|bfloat16|float16)$")
    """Weights and arithmetic."""
    merge: tuple[str, ...] = ()
    """Tasks whose adapter is merged into a copy of the base's weights, which engines of its own serve: less work for each
    token of a task that keeps an engine busy by itself, for one more engine. Certified on that engine."""
    max_adapters: int | None = Field(default=None, ge=1)
    """Adapters resident in one replica, for each base model: a release is swapped in beside the served one, and refused where
    both need more. None sizes it by the release served at the start (serving/working_set.py)."""
    max_batch_adapters: int | None = Field(default=None, ge=1)
    """Adapters that one batch may mix, of those resident. None sizes it by the store's recent calls (working_set.py)."""
    max_lora_rank: int = 16
    """Largest adapter rank the engine makes room for: 1, 8, 16, 32, 64, 128, 256, 320 or 512."""
    max_model_tokens: int = Field(default=1024, ge=64)
    """Prompt and answer together."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Requests in one batch."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Memory for keys and values; CPU only (a GPU engine takes its share of device memory)."""
    num_threads: int = Field(default=1, ge=1)
    """OpenMP threads of a CPU engine."""
    request_router: Literal["default", "adapter"] = "default"
    """How a gateway chooses among replicas: as Ray Serve does, or where the call costs least by what is in flight and by the
    adapters and prompts that replicas have (serving/replica_choice.py)."""
    min_replicas: int = Field(default=1, ge=0)
    """Replicas kept when idle. With 0 the LLM answers while none is up, and the first such call starts one."""

    @property
    def num_resident(self) -> int:
        return self.max_adapters or MIN_ADAPTERS

    @property
    def num_at_once(self) -> int:
        return min(self.max_batch_adapters or self.num_resident, self.num_resident)

    @field_validator("max_lora_rank")
    @classmethod
    def _check_rank(cls, rank: int) -> int:
        if rank not in LORA_RANKS:
            raise ValueError(f"got {rank}; allowed: {', '.join(map(str, LORA_RANKS))}")
        return rank
