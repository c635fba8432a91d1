"""An exponential moving average of the weights that a run trains, held in float32 beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class MovingAverage:
    """Follows the trainable weights of a model that every rank holds whole (ZeRO 0 to 2)."""

    def __init__(self, model: Any, decay: float) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._decay = decay
        self._num_updates = 0
        self._means = {name: p.detach().float().clone() for name, p in self._weights.items()}

    def update(self) -> None:
        """Take the weights in, after an optimiser step.

        Early on the decay is (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage with a step count, so that
        a short run is not an average of its untrained beginning.
        """
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        self._num_updates += 1
        for name, weight in self._weights.items():
            self._means[name].lerp_(weight.detach().float(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averages as its weights while the block runs."""
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._set(self._means)
        try:
            yield
        finally:
            self._set(own)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"num_updates": self._num_updates, "means": self._means}

    def load_state(self, state: dict[str, Any]) -> None:
        self._num_updates = state["num_updates"]
        for name, mean in state["means"].items():
            self._means[name].copy_(mean)

    def _set(self, values: dict[str, Any]) -> None:
        for name, weight in self._weights.items():
            weight.data.copy_(values[name])
