"""What a fine-tune minimises: the mean over examples of the mean cross-entropy of the answer's tokens.

A gate counts answers and not tokens, so a long answer weighs no more than a short one. The same code serves padded and
packed batches, parts of batches, and the reading of logits for grading.
"""

from __future__ import annotations

from typing import Any

from training.packing import IGNORED


def answer_loss(engine: Any, batch: dict[str, Any], device: Any) -> Any:
    """Loss of a batch, or a micro-batch's share of it.

    Args:
        batch: input_ids and labels [B, T]; position_ids where rows are packed; num_examples to divide by, where that
            is another number than its own.
    """
    logits, labels = answer_logits(engine, batch, device)
    return mean_loss(token_losses(logits, labels), batch, device)


def answer_logits(engine: Any, batch: dict[str, Any], device: Any) -> tuple[Any, Any]:
    """Logits [B, K, V] at the K places from which some row's answer token is foretold, and those tokens [B, K].

    Logits are the dear part of a small model: no others are computed. Right padding needs no mask under causal attention.
    """
    columns = kept_columns(batch)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids") if name in batch}
    logits = engine(**inputs, logits_to_keep=columns.to(device)).logits
    return logits, batch["labels"][:, columns + 1].to(device)


def kept_columns(batch: dict[str, Any]) -> Any:
    """[K] places before an answer token of any row."""
    return (batch["labels"][:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]


def token_losses(logits: Any, labels: Any) -> Any:
    """Cross-entropy [N] of the answer tokens of [B, K], row by row."""
    import torch.nn.functional as F

    is_answer = labels != IGNORED
    return F.cross_entropy(logits[is_answer].float(), labels[is_answer], reduction="none")


def mean_loss(losses: Any, batch: dict[str, Any], device: Any) -> Any:
    """Mean over examples of the mean of their tokens' losses.

    Args:
        losses: [N], one for each answer token of the batch, row by row.
    """
    owners, num_examples = _owners(batch)
    lengths = owners.bincount()[owners].to(device)
    return (losses / lengths).sum() / batch.get("num_examples", num_examples)


def _owners(batch: dict[str, Any]) -> tuple[Any, int]:
    """Which example each answer token belongs to, [N], and how many examples there are."""
    labels = batch["labels"]
    if "position_ids" in batch:
        number = (batch["position_ids"] == 0).flatten().cumsum(0).view_as(labels)
    else:
        import torch

        number = torch.arange(len(labels)).unsqueeze(1).expand_as(labels)
    # The first token of a row is foretold by nothing.
    owners = number[:, 1:][labels[:, 1:] != IGNORED]
    return owners, int(owners.unique().numel())
