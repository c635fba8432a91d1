"""How often a model answers held-out examples exactly as their reference does, and how sure it is.

Greedy decoding gives the reference's tokens if and only if each of them is the likeliest after the ones before it, so one
forward pass tells what generation would take a pass per token for; and the same logits give the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from training.batches import Rows
from training.objective import answer_logits, mean_loss, token_losses
from training.packing import IGNORED


class Graded(NamedTuple):
    """Scored examples of one task."""

    is_right: list[bool]
    confidences: list[float]
    """Probability of the answer's tokens, of a wrong one's up to the first that differs from the reference's."""
    loss: float = 0.0
    """Mean over examples of the mean cross-entropy of their answers' tokens."""

    @property
    def agreement(self) -> float:
        return sum(self.is_right) / max(1, len(self.is_right))


def grade_rows(model: Any, rows: Rows, device: Any) -> Graded:
    """Score every example once. The model must be in evaluation mode, the rows not packed."""
    import torch

    is_right, confidences, loss = [], [], 0.0
    with torch.no_grad():
        for k in range(rows.num_batches()):
            for batch in rows.micro_batches(k):
                logits, labels = answer_logits(model, batch, device)
                loss += float(mean_loss(token_losses(logits, labels), batch, device)) * batch["num_examples"]
                right, logprobs = grade(logits, labels)
                is_right.extend(right.tolist())
                confidences.extend(logprobs.exp().tolist())
    return Graded(is_right, confidences, loss / len(is_right))


def grade(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Which answers greedy decoding would give token by token, and how sure it is of what it says instead.

    Args:
        logits: [B, T, V]; at each place for the token that `labels` has there.
        labels: [B, T]; -100 where there is no answer token.

    Returns:
        Booleans [B]; log-probabilities [B] of greedy tokens up to the first that differs from the label, it included.
    """
    import torch

    is_answer = labels != IGNORED
    matches = (logits.argmax(dim=-1) == labels) | ~is_answer
    best = logits.float().amax(dim=-1) - logits.float().logsumexp(dim=-1)
    before = torch.cat([torch.ones_like(matches[:, :1]), matches[:, :-1].cummin(dim=1).values], dim=1)
    return matches.all(dim=1), (best * (is_answer & before)).sum(dim=1)
