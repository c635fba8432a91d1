"""What the recipe's `gateway` section sets: who may call, how many at once, and what one call may take."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from serving.passthrough import DEFAULT_PATHS, check_path
from serving.scaling import ScaleConfig


class GatewayConfig(ScaleConfig):
    """Who may call, how many at once, and what one call may take in time and money."""

    min_replicas: int = Field(default=1, ge=1)
    """Replicas kept when idle."""
    max_ongoing: int = Field(default=1_000, ge=1)
    """Requests in flight at each replica at most; further ones are answered 503 with Retry-After."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """How long calls in flight may take to finish when the endpoint is told to stop, in seconds; then they are ended with an
    error and captured so."""
    degraded: Literal["fail", "specialist"] = "fail"
    """What a call gets that no LLM answers: the LLM's error, or what its specialist says below its threshold, if that is
    valid, with the header x-understudy-degraded."""
    auth: Literal["keys", "open"] = "keys"
    """`keys` asks for an API key of this store; `open` lets everybody in who reaches the port."""
    specialist_timeout_s: float = Field(default=10.0, gt=0)
    """Longest wait for a specialist's answer, in seconds; then the LLM is asked. At most half of the call's deadline."""
    hedge_after_s: float | None = Field(default=None, ge=0)
    """After so many seconds without a specialist's answer the LLM is asked as well, and the first good answer is served.
    Off unless set: it costs most where specialists are slow because there is much to do."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Longest time for one call from its arrival to its last byte, specialist and LLMs together; the default is that of
    OpenAI's clients. A client can shorten it (header x-deadline-s)."""
    budget_usd: float | None = Field(default=None, ge=0)
    """Most that one call may cost, as the upstreams' prices and `prices` have it; None bounds nothing. A client can lower
    it (header x-budget-usd). An LLM is not asked where its longest answer could cost more."""
    max_temperature: float = Field(default=1.0, ge=0)
    """A request with a higher temperature wants variety, which a greedy specialist does not give. Gates count with it:
    raise it before a conversion, not after."""
    passthrough: tuple[str, ...] = DEFAULT_PATHS
    """Paths besides the gateway's own whose POST requests go to the first endpoint of `upstream` as they are, under its
    key. Every other path answers 404: an agent's key must not reach the owner's files, batches or fine-tunes."""

    @field_validator("passthrough")
    @classmethod
    def _check_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_path(path) for path in paths)

    @model_validator(mode="after")
    def _check_hedge(self) -> Self:
        if self.hedge_after_s is not None and self.hedge_after_s >= self.specialist_timeout_s:
            raise ValueError(
                f"hedge_after_s: got {self.hedge_after_s:g}; allowed: less than specialist_timeout_s="
                f"{self.specialist_timeout_s:g}, after which the LLM is asked anyway; next: lower it or leave it out"
            )
        return self
