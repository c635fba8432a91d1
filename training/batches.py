"""A tokenised dataset on disk -> the batches of every step, the same whenever they are asked for.

The order follows from seed and epoch alone, so a run that resumes at step N draws what the undisturbed one drew. A batch
may be handed out in micro-batches that need less memory: each carries the mean number of examples of a rank, so that
their losses add up over the ranks to that of the step, whose every example counts alike, also where ranks have more and
fewer of them.
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

    def __init__(
        self, path: str, settings: dict[str, Any], rank: int, world_size: int, step_examples: int | None = None
    ) -> None:
        """Read the dataset.

        Args:
            settings: batch_size, seed, pad_token_id; also packing (False where it is not given) and micro_batch_size
                (the whole batch).
            step_examples: of a step over all ranks; None takes `batch_size` for each. With a number that does not change
                with the ranks, neither do the examples of a step.
        """
        import datasets

        table = datasets.load_from_disk(path)
        self._ids = table["input_ids"][:]
        self._num_prompt = table["num_prompt"][:]
        names = ("top_ids", "top_logprobs") if "top_ids" in table.column_names else ()
        self._tops = list(zip(*(table[name][:] for name in names), strict=True))
        self._rank, self._world = rank, world_size
        self._step_examples = step_examples or settings["batch_size"] * world_size
        self._seed, self._pad = settings["seed"], settings["pad_token_id"]
        self._is_packed = settings.get("packing", False)
        self._micro = settings.get("micro_batch_size") or settings["batch_size"]
        self._epoch, self._batches = -1, []

    def num_batches(self) -> int:
        return max(1, math.ceil(len(self._ids) / self._step_examples))

    def batch(self, step: int) -> dict[str, Any]:
        """This rank's batch number `step` of an endless sequence of shuffled epochs.

        Returns:
            input_ids and labels [B, T], num_examples; position_ids too where rows are packed.
        """
        of_all = self._rows_at(step)
        return self._part(of_all[self._rank], of_all)

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """The same in parts of at most `micro_batch_size` examples; as many of them on every rank.

        A rank with fewer examples than parts has one that counts nothing in the others.
        """
        of_all = self._rows_at(step)
        num_parts = math.ceil(max(map(len, of_all)) / self._micro)
        return [self._part(part, of_all) for part in split_evenly(of_all[self._rank], num_parts)]

    def _part(self, rows: list[int], of_all: list[list[int]]) -> dict[str, Any]:
        """Rows of a step, or one of them that counts nothing where this rank has none: collectives wait for every rank."""
        if not rows:
            return self._collate(of_all[0][:1], math.inf)
        return self._collate(rows, sum(map(len, of_all)) / self._world)

    def num_tokens(self, step: int) -> int:
        """Tokens of the examples that all ranks together learn from at a step, padding left out."""
        return sum(len(self._ids[k]) for rows in self._rows_at(step) for k in rows)

    def _rows_at(self, step: int) -> list[list[int]]:
        """Rank -> examples."""
        epoch, index = divmod(step, self.num_batches())
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._plan(epoch)
        return [self._batches[index][rank :: self._world] for rank in range(self._world)]

    def _plan(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self._seed}:{epoch}")
        lengths = [len(ids) for ids in self._ids]
        return plan_batches(lengths, self._step_examples, rng, 1 if self._is_packed else _WINDOW)

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
