"""How many replicas a deployment has and how many calls may wait for them: the recipe's words -> Ray Serve's options.

Source: ray.serve.config.AutoscalingConfig of Ray 2.60.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from cluster.config import Config

_LOOK_BACK_S = 15.0
"""Calls are averaged over so long. Ray counts them every 10 s (RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S) and
wants more than that; a longer mean would hide what is to be reacted to."""


class ScaleConfig(Config):
    """Between how many replicas one deployment scales, and by what."""

    min_replicas: int = Field(default=1, ge=0)
    """Replicas kept when idle."""
    max_replicas: int = Field(default=1, ge=1)
    """Replicas at most."""
    target_ongoing: float | None = Field(default=None, gt=0)
    """Calls at each replica, in work and waiting, that autoscaling aims at; None takes half of what a replica works on at
    once."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """How long there must be more calls than that before a replica is added, in seconds."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    """How long there must be fewer before one is taken away, the last one too, in seconds."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas}: below min_replicas={self.min_replicas}; allowed: at least that; "
                f"next: raise max_replicas to {self.min_replicas}"
            )
        return self


STOP_MARGIN_S = 20.0
"""What a gateway may take after its last call to finish audits (5 s) and write what it has captured (10 s)."""


def autoscaling_of(config: ScaleConfig, num_at_once: int) -> dict[str, Any]:
    """Ray Serve's autoscaling_config.

    Args:
        num_at_once: calls that a replica works on at once.
    """
    return {
        "min_replicas": config.min_replicas,
        # Also where none is kept: what does not start is told by the deployment, not by the first call.
        "initial_replicas": max(1, config.min_replicas),
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.target_ongoing or num_at_once / 2,
        "upscale_delay_s": config.upscale_delay_s,
        "downscale_delay_s": config.downscale_delay_s,
        "look_back_period_s": _LOOK_BACK_S,
    }
