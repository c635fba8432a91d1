"""The recipe's words on replicas against what Ray Serve takes."""

from __future__ import annotations

import pytest

from cluster.config import validate
from cluster.errors import ConfigError
from serving.cluster_llm import ClusterLLMConfig
from serving.gateway_config import GatewayConfig
from serving.scaling import ScaleConfig, autoscaling_of
from serving.specialist_config import SpecialistConfig


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "config",
    [ScaleConfig(), ScaleConfig(min_replicas=0, max_replicas=3, target_ongoing=5.0, upscale_delay_s=0.0)],
)
def test_ray_serve_takes_what_is_made_of_it(config: ScaleConfig) -> None:
    from ray.serve.config import AutoscalingConfig

    made = AutoscalingConfig(**autoscaling_of(config, 64))
    assert (made.min_replicas, made.max_replicas) == (config.min_replicas, config.max_replicas)
    assert made.target_ongoing_requests == (config.target_ongoing or 32)
    assert made.initial_replicas == 1


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_replicas=1: below min_replicas=2"):
        validate(SpecialistConfig, {"min_replicas": 2, "max_replicas": 1})


def test_specialists_and_a_cluster_llm_may_scale_to_zero_and_the_gateway_may_not() -> None:
    validate(SpecialistConfig, {"min_replicas": 0})
    validate(ClusterLLMConfig, {"cluster_model": "m", "min_replicas": 0})
    with pytest.raises(ConfigError, match="min_replicas"):
        validate(GatewayConfig, {"min_replicas": 0})
