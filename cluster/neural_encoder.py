"""A sentence encoder from the hub or a local folder: mean-pooled transformer states, as sentence-transformers does it.

Loaded only where a recipe names one (`discover.encoder`); importing this module loads neither torch nor transformers.
There is no fallback: routes fitted on one encoder mean nothing to another. Knows nothing of tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from cluster.errors import ConfigError

_MAX_TOKENS = 256
_BATCH = 64


@functools.lru_cache(maxsize=2)
def neural_encoder(name: str) -> NeuralEncoder:
    """The encoder of a hub id or a folder, loaded once per process.

    Raises:
        ConfigError: transformers is missing, or the weights are neither on this machine nor reachable.
    """
    return NeuralEncoder(name)


class NeuralEncoder:
    """Text -> unit vector [D], on the CPU."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = AutoModel.from_pretrained(name).eval()
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(
                f"discover.encoder={name}: cannot be loaded ({type(error).__name__}); allowed: hashed, a hub id that this "
                "machine can reach, or a folder with config.json, tokenizer and weights; next: discover.encoder=hashed"
            ) from None
        self.name = name

    def encode(self, text: str) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [N, D]; texts of like length share a batch."""
        import torch

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for begin in range(0, len(order), _BATCH):
                rows = order[begin : begin + _BATCH]
                batch = self._tokenizer(
                    [texts[i] for i in rows], padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
                )
                states, mask = self._model(**batch).last_hidden_state, batch["attention_mask"][..., None]
                means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
                vectors.update(zip(rows, means.numpy(), strict=True))
        return np.stack([vectors[i] for i in range(len(texts))])
