"""A tokenised dataset on disk -> the batches of every step, the same whenever they are asked for.

The order follows from seed and epoch alone, so a run that resumes at step N draws what the undisturbed one drew. A batch
may be handed out in micro-batches that need less memory: each carries the number of examples of the whole batch, so that
their losses add up to that of the batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from training.packing import collate_packed, collate_padded, plan_batches, split_evenly

_WINDOW = 20
"""Batches whose examples are sorted by length together: keeps padding low and batches still random."""
_PACKED_LENGTH = 2
"""A packed row is this many times as long as the batch's longest example: the mask of a row grows with its square."""


class Rows:
    """Deterministic batches from a tokenised dataset: of similar length, or packed."""

    def __init__(self, path: str, settings: dict[str, Any], rank: int, world_size: int) -> None:
        """Read the dataset.

        Args:
            settings: batch_size, seed, pad_token_id; also packing (False where it is not given) and micro_batch_size
                (the whole batch).
        """
        import datasets

        table = datasets.load_from_disk(path)
        self._ids = table["input_ids"][:]
        self._num_prompt = table["num_prompt"][:]
        names = ("top_ids", "top_logprobs") if "top_ids" in table.column_names else ()
        self._tops = list(zip(*(table[name][:] for name in names), strict=True))
        self._batch, self._rank, self._world = settings["batch_size"], rank, world_size
        self._seed, self._pad = settings["seed"], settings["pad_token_id"]
        self._is_packed = settings.get("packing", False)
        self._micro = settings.get("micro_batch_size") or self._batch
        self._epoch, self._batches = -1, []

    def num_batches(self) -> int:
        return max(1, math.ceil(len(self._ids) / (self._batch * self._world)))

    def batch(self, step: int) -> dict[str, Any]:
        """This rank's batch number `step` of an endless sequence of shuffled epochs.

        Returns:
            input_ids and labels [B, T], num_examples; position_ids too where rows are packed.
        """
        rows = self._rows_at(step)[self._rank]
        return self._collate(rows, len(rows))

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """The same in parts of at most `micro_batch_size` examples; as many of them on every rank.

        A rank with fewer examples than parts repeats one that counts nothing, because the collectives of sharded
        training wait for every rank.
        """
        of_all = self._rows_at(step)
        num_parts = math.ceil(max(map(len, of_all)) / self._micro)
        own = of_all[self._rank]
        return [
            self._collate(part, len(own)) if part else self._collate(own[:1], math.inf)
            for part in split_evenly(own, num_parts)
        ]

    def num_tokens(self, step: int) -> int:
        """Tokens of the examples that all ranks together learn from at a step, padding left out."""
        return sum(len(self._ids[k]) for rows in self._rows_at(step) for k in rows)

    def _rows_at(self, step: int) -> list[list[int]]:
        """Rank -> examples."""
        epoch, index = divmod(step, self.num_batches())
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._plan(epoch)
        batch = self._batches[index]
        # Every rank needs a row, or the collectives would wait for it.
        padded = (batch * self._world)[: max(len(batch), self._world)]
        return [padded[rank :: self._world] for rank in range(self._world)]

    def _plan(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self._seed}:{epoch}")
        lengths = [len(ids) for ids in self._ids]
        return plan_batches(lengths, self._batch * self._world, rng, 1 if self._is_packed else _WINDOW)

    def _collate(self, rows: list[int], num_examples: float) -> dict[str, Any]:
        ids = [self._ids[k] for k in rows]
        num_prompts = [self._num_prompt[k] for k in rows]
        if self._is_packed:
            tensors = collate_packed(ids, num_prompts, self._pad, _PACKED_LENGTH * max(map(len, ids)))
        else:
            tensors = collate_padded(ids, num_prompts, self._pad)
        if self._tops:
            tensors |= stack_tops([(*self._tops[rows[k]], num_prompts[k]) for k in tensors["examples"]])
        return {**tensors, "num_examples": num_examples}


def stack_tops(tops: Sequence[tuple[list[list[int]], list[list[float]], int]]) -> dict[str, Any]:
    """What was likeliest at each answer token's place, as tensors.

    Args:
        tops: of each example, in the order of its tokens in the batch: for each token of its answer the likeliest ones and
            their log-probabilities, and how many tokens of prompt stand before.

    Returns:
        top_ids and top_logprobs [N, K] for the N answer tokens of the batch, row by row; -inf where there are fewer than
        K.
    """
    import torch

    # The first token of an example is foretold by nothing.
    pairs = [
        pair
        for ids, logprobs, num_prompt in tops
        for pair in list(zip(ids, logprobs, strict=True))[0 if num_prompt else 1 :]
    ]
    width = max(1, *(len(ids) for ids, _ in pairs))
    top_ids = torch.zeros(len(pairs), width, dtype=torch.long)
    top_logprobs = torch.full((len(pairs), width), -math.inf)
    for place, (ids, logprobs) in enumerate(pairs):
        top_ids[place, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        top_logprobs[place, : len(ids)] = torch.tensor(logprobs)
    return {"top_ids": top_ids, "top_logprobs": top_logprobs}
