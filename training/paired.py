"""What one probe answered rightly, example by example, so that probes can be compared on the same calls.

A row is known by its tokens: batches come in an order of their own, and equal rows get equal answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from training.batches import Rows
from training.grading import Graded


def row_key(input_ids: Sequence[int]) -> str:
    """What a tokenised row, prompt and answer, is known by."""
    return hashlib.sha256(",".join(map(str, input_ids)).encode()).hexdigest()[:16]


def answers_by_row(
    graded: Mapping[str, Graded], paths: Mapping[str, str], settings: dict[str, Any]
) -> list[tuple[str, str, bool]]:
    """(task_id, row key, whether it was answered rightly) of every scored row."""
    found = []
    for task_id, path in paths.items():
        keys = keys_in_order(path, settings)
        found += [(task_id, key, right) for key, right in zip(keys, graded[task_id].is_right, strict=True)]
    return found


def keys_in_order(path: str, settings: dict[str, Any]) -> list[str]:
    """Keys of all rows of a dataset in the order in which they are graded."""
    rows, keys = Rows(path, {**settings, "packing": False}, 0, 1), []
    for number in range(rows.num_batches()):
        batch = rows.batch(number)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            # The last label is the answer's last token; padding behind it is not of the row.
            end = int((labels != -100).nonzero()[-1]) + 1
            keys.append(row_key(ids[:end].tolist()))
    return keys
