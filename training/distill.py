"""Learning from a teacher's probabilities and not only from its answers.

Training on the LLM's answers is sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947) and needs none of this.
Where the teacher's weights are on the cluster and read the same tokens, each answer token's distribution is a target too:
forward KL(teacher || student) covers all that the teacher might say (Hinton et al. 2015, arXiv 1503.02531), reverse
KL(student || teacher) keeps to what it most likely says (Gu et al. 2023, arXiv 2306.08543). Softened
terms are scaled by the square of the temperature, so that their gradients keep their size.

An LLM behind an API gives the likeliest tokens at each place at best, where it was asked for them
(training/stored_logprobs.py). Renormalised they are the teacher's distribution, 0 elsewhere: the forward divergence from
a vector of few entries. A student so taught is surer than its teacher, whose tail it never sees; reverse KL is infinite
there, and refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.config import Config
from cluster.errors import TrainingError
from training.objective import answer_logits, mean_loss, token_losses
from training.packing import IGNORED

Direction = Literal["forward", "reverse"]


class DistillConfig(Config):
    """Whether a fine-tune learns from a teacher's probabilities beside the answers."""

    teacher: str | None = Field(default=None, min_length=1)
    """Folder of a model with the base's own vocabulary, which all nodes see; each worker holds it whole. None learns from
    the answers alone."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the divergence from the teacher in the loss; the rest is the answers' cross-entropy."""
    direction: Direction = "forward"
    """forward covers all that the teacher might say, reverse keeps to what it most likely says."""
    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softened by it; above 1 the unlikely tokens count more."""
    stored: bool = False
    """Learn from the likeliest tokens that captured answers carry (requests with logprobs and top_logprobs), where the
    base cuts an answer into the same tokens; other answers are learned as they are, and the run says how many."""

    @model_validator(mode="after")
    def _check_together(self) -> DistillConfig:
        if self.stored and self.teacher is not None:
            raise ValueError(f"stored=true: teacher={self.teacher!r} is named too; allowed: one of both")
        if self.stored and self.direction == "reverse":
            raise ValueError(
                "stored=true: direction='reverse' needs all of the teacher's distribution; allowed: forward"
            )
        return self


class Distiller:
    """The loss of a run that has a teacher."""

    def __init__(self, settings: dict[str, Any], student: Any) -> None:
        """Load the teacher to the student's device.

        Raises:
            TrainingError: it cannot be read, or speaks other tokens.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        path = settings["teacher"]
        try:
            teacher = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.bfloat16 if settings["bf16"] else torch.float32, trust_remote_code=False
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(f"teacher {path!r} cannot be loaded: {type(error).__name__}: {error}") from None
        sizes = [model.config.get_text_config().vocab_size for model in (teacher, student.module)]
        if sizes[0] != sizes[1]:
            raise TrainingError(
                f"teacher {path!r}: vocabulary of {sizes[0]} tokens, the base has {sizes[1]}; allowed: a model with the "
                "base's own tokenizer; next: finetune.distill.teacher of the base's family, or none"
            )
        teacher.config.use_cache = False
        self._teacher = teacher.to(student.device).eval()
        self._settings = settings

    def loss(self, engine: Any, batch: dict[str, Any], device: Any) -> Any:
        """As `training.objective.answer_loss`, with the divergence from the teacher mixed in token by token."""
        import torch

        logits, labels = answer_logits(engine, batch, device)
        with torch.no_grad():
            targets, _ = answer_logits(self._teacher, batch, device)
        is_answer = labels != IGNORED
        apart = divergence(
            logits[is_answer], targets[is_answer], self._settings["direction"], self._settings["temperature"]
        )
        weight = self._settings["weight"]
        return mean_loss((1 - weight) * token_losses(logits, labels) + weight * apart, batch, device)


class StoredDistiller:
    """The loss of a run that learns from what captured answers say of their tokens."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._weight, self._temperature = settings["weight"], settings["temperature"]

    def loss(self, engine: Any, batch: dict[str, Any], device: Any) -> Any:
        """As `training.objective.answer_loss`, with the divergence mixed in at the tokens that something is known of.

        Args:
            batch: with top_ids and top_logprobs (training/batches.py), where any of the run's answers carries them.
        """
        import torch

        logits, labels = answer_logits(engine, batch, device)
        losses = token_losses(logits, labels)
        if "top_ids" in batch:
            top_ids, top_logprobs = batch["top_ids"].to(device), batch["top_logprobs"].to(device)
            apart = sparse_divergence(logits[labels != IGNORED], top_ids, top_logprobs, self._temperature)
            mixed = (1 - self._weight) * losses + self._weight * apart
            losses = torch.where(top_logprobs[:, 0].isfinite(), mixed, losses)
        return mean_loss(losses, batch, device)


def sparse_divergence(student: Any, top_ids: Any, top_logprobs: Any, temperature: float) -> Any:
    """Forward KL divergence [N] from teachers known at K tokens each, renormalised, times temperature squared.

    Args:
        student: logits [N, V].
        top_ids, top_logprobs: [N, K]; -inf counts as absent. 0 where all of a row are.
    """
    import torch

    own = (student.float() / temperature).log_softmax(dim=-1).gather(1, top_ids)
    is_there = top_logprobs.isfinite()
    # The softmax of a row of which nothing is known would be nan.
    known = torch.where(is_there.any(dim=-1, keepdim=True), top_logprobs, torch.zeros_like(top_logprobs))
    teacher = (known / temperature).log_softmax(dim=-1)
    terms = teacher.exp() * (teacher - own)
    return torch.where(is_there, terms, torch.zeros_like(terms)).sum(dim=-1) * temperature**2


def divergence(student: Any, teacher: Any, direction: Direction, temperature: float) -> Any:
    """KL divergence [N] between the softened distributions of logits [N, V], times temperature squared."""
    own, other = ((logits.float() / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    return _kl(other, own, direction) * temperature**2


def _kl(teacher: Any, student: Any, direction: Direction) -> Any:
    """[N] of log-probabilities [N, V]."""
    of, to = (teacher, student) if direction == "forward" else (student, teacher)
    return (of.exp() * (of - to)).sum(dim=-1)
