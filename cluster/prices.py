"""Tokens and seconds -> US dollars.

An LLM's answer costs its tokens. A specialist's answer costs the replica time it used, shared with the calls that
ran beside it; idle replica time belongs to nobody's call and is priced where utilisation is known (the report).
"""

from __future__ import annotations

from pydantic import Field

from cluster.config import Config
from cluster.records import Usage


class PriceConfig(Config):
    """What this cluster's own hardware costs."""

    replica_usd_per_hour: float = Field(default=0.0, ge=0)
    """US dollars for one hour of one specialist replica, all its CPUs and GPUs; 0 leaves it out of the cost."""
    watts_per_cpu: float = Field(default=10.0, ge=0)
    """Power of one CPU under load, for the energy estimate; the default is a server processor's 250 W over 24 cores."""
    watts_per_gpu: float = Field(default=700.0, ge=0)
    """Power of one GPU under load, for the energy estimate; the default is an H100 SXM's limit."""


def tokens_cost_usd(usage: Usage, *, prompt_usd_per_million: float, completion_usd_per_million: float) -> float | None:
    """Cost of one LLM answer; None where the provider reported no usage."""
    if usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    spent = usage.prompt_tokens * prompt_usd_per_million + usage.completion_tokens * completion_usd_per_million
    return spent / 1e6


def training_cost(seconds: float, *, cpus: float, gpus: float, config: PriceConfig) -> dict[str, float]:
    """What holding CPUs and GPUs for `seconds` costs: hours of each, and an upper estimate of the energy in Wh."""
    hours = seconds / 3600
    watts = cpus * config.watts_per_cpu + gpus * config.watts_per_gpu
    return {"cpu_hours": cpus * hours, "gpu_hours": gpus * hours, "energy_wh_estimate": watts * hours}


def seconds_cost_usd(seconds: float, *, num_sharing: int, config: PriceConfig) -> float:
    """Cost of `seconds` of a replica that worked on `num_sharing` calls at once."""
    return seconds / 3600 * config.replica_usd_per_hour / max(1, num_sharing)
