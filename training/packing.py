"""Examples of different length -> tensors: side by side with padding, or several in one row without seeing each other.

In a packed row every example's positions begin at 0 again. transformers takes that, where no attention mask is given, as
the border of a sequence and lets no token attend across it (masking_utils.find_packed_sequence_indices; flash attention
does the same for a single row), so each example's logits are those it has alone. The loss stays the mean over examples
of their mean cross-entropy (training/objective.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

IGNORED = -100
"""Label of a token that carries no loss."""


def plan_batches(lengths: Sequence[int], size: int, rng: random.Random, window: int) -> list[list[int]]:
    """A shuffled epoch of batches of `size` examples.

    Args:
        window: batches whose examples are sorted by length together before they are cut; 1 leaves them as shuffled.
            More keeps padding low, and the batches themselves still come in random order.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for begin in range(0, len(order), size * window):
        some = order[begin : begin + size * window]
        if window > 1:
            some.sort(key=lambda k: lengths[k])
        batches += [some[k : k + size] for k in range(0, len(some), size)]
    rng.shuffle(batches)
    return batches


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put examples into as few rows of `capacity` tokens as first-fit decreasing finds; a longer one has its own row.

    Example:
        >>> pack([5, 3, 4, 2], 7)
        [[0, 3], [2, 1]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        row = next((n for n, room in enumerate(free) if room >= lengths[k]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(k)
        free[row] -= lengths[k]
    return rows


def split_evenly(items: Sequence[int], num_parts: int) -> list[list[int]]:
    """`num_parts` runs of neighbours whose sizes differ by one at most; empty ones where there are fewer items.

    Example:
        >>> split_evenly([1, 2, 3, 4, 5], 2)
        [[1, 2, 3], [4, 5]]
    """
    least, longer = divmod(len(items), num_parts)
    bounds = [n * least + min(n, longer) for n in range(num_parts + 1)]
    return [list(items[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def collate_padded(ids: Sequence[Sequence[int]], num_prompts: Sequence[int], pad: int) -> dict[str, Any]:
    """One example a row: input_ids and labels [B, T]; `examples` in the order of the rows."""
    return _lay_out(ids, num_prompts, [[k] for k in range(len(ids))], pad)


def collate_packed(ids: Sequence[Sequence[int]], num_prompts: Sequence[int], pad: int, capacity: int) -> dict[str, Any]:
    """Several examples a row: input_ids, labels and position_ids [R, T]; padding is a sequence of its own. `examples` in
    the order in which they lie in the rows."""
    return _lay_out(ids, num_prompts, pack([len(one) for one in ids], capacity), pad, is_packed=True)


def _lay_out(
    ids: Sequence[Sequence[int]],
    num_prompts: Sequence[int],
    rows: Sequence[Sequence[int]],
    pad: int,
    is_packed: bool = False,
) -> dict[str, Any]:
    import torch

    width = max(sum(len(ids[k]) for k in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    positions = torch.arange(width).repeat(len(rows), 1)
    for line, row in enumerate(rows):
        begin = 0
        for k in row:
            own = torch.tensor(ids[k])
            end = begin + len(own)
            input_ids[line, begin:end] = own
            # The first token of an example is foretold by nothing: in a packed row the one before it is another's.
            first = max(num_prompts[k], 1)
            labels[line, begin + first : end] = own[first:]
            positions[line, begin:end] = torch.arange(len(own))
            begin = end
        positions[line, begin:] = torch.arange(width - begin)
    tensors = {"input_ids": input_ids, "labels": labels, "examples": [k for row in rows for k in row]}
    return {**tensors, "position_ids": positions} if is_packed else tensors
