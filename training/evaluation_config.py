"""What is measured of a candidate beside its gate, and by what free text agrees: the recipe's section `evaluation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Config
from cluster.records import AnswerKind, TextGrader


class EvaluationConfig(Config):
    """By what answers are compared, and what is measured beside the gate."""

    noninferiority_margin: float = Field(default=0.02, gt=0, lt=1)
    """Share of right answers, by gold, that an arm may fall behind the LLM and still count as not inferior."""
    text_grader: Literal["exact", "chrf", "rouge_l", "embedding", "judge"] = "exact"
    """By what free text agrees with the LLM's: equality, a similarity, or an LLM as judge (upstream.0, asked twice a pair)."""
    text_agree_at: float = Field(default=0.8, gt=0, le=1)
    """Similarity from which texts agree, for chrf, rouge_l and embedding."""
    text_encoder: str = "hashed"
    """Encoder of `embedding`: hashed, or a hub id or folder."""
    max_false_agreement: float = Field(default=0.05, ge=0, lt=1)
    """Largest share of unrelated pairs of answers that the grader may find alike; above it a task is refused."""
    judge_max_usd: float = Field(default=1.0, gt=0)
    """What a judge may cost in one run; pairs that it is not asked about any more count as no agreement."""

    teacher_repeats: int = Field(default=0, ge=0, le=1_000)
    """Validation calls of each task that upstream.0 is asked again, to measure how often it agrees with itself; 0 asks none.
    A judge is not asked about them: there free text agrees where it is equal."""
    teacher_max_usd: float = Field(default=1.0, gt=0)
    """What asking again may cost in one run."""

    def grader_of(self, kind: AnswerKind) -> TextGrader | None:
        """For answers of this kind; None compares by value."""
        if kind != "text" or self.text_grader == "exact":
            return None
        is_similarity = self.text_grader != "judge"
        at = self.text_agree_at if is_similarity else 1.0
        return TextGrader(name=self.text_grader, agree_at=at, encoder=self.text_encoder)
