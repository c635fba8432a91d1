"""How alike two texts are, by a stated similarity in [0, 1]: chrF, ROUGE-L, or the cosine of embeddings.

A recipe names one for a kind of answer that has many right wordings, with the similarity from which texts agree; the gate
carries both, so that audits count as calibration did. How often it takes two unrelated answers for the same is measured and
reported (training/text_graders.py). Sources: Popovic 2015, "chrF: character n-gram F-score" (orders 1 to 6, beta 2, no
white space; precision and recall averaged over orders as sacreBLEU does); Lin 2004, "ROUGE" (longest common subsequence of
words, F1); Hyyro 2004, "Bit-parallel LCS-length computation revisited".
"""

from __future__ import annotations

import re
from collections import Counter

from cluster.neural_encoder import neural_encoder
from cluster.records import TextGrader
from cluster.route_model import hashed_features

HASHED = "hashed"
_CHRF_ORDER, _CHRF_BETA = 6, 2
_WORD = re.compile(r"\w+")
_MAX_CHARS = 20_000
"""A longer text is read up to here; an answer of that length is no specialist's."""


def similarity(answer: str, reference: str, grader: TextGrader) -> float:
    """In [0, 1]; 1 for equal texts.

    Args:
        grader: chrf, rouge_l or embedding; the other two are not similarities.

    Raises:
        ConfigError: the grader's encoder cannot be loaded.
    """
    answer, reference = answer[:_MAX_CHARS], reference[:_MAX_CHARS]
    if grader.name == "chrf":
        return chrf(answer, reference)
    if grader.name == "rouge_l":
        return rouge_l(answer, reference)
    assert grader.name == "embedding", grader.name
    return embedding_cosine(answer, reference, grader.encoder)


def chrf(answer: str, reference: str) -> float:
    """Character n-gram F2 of a sentence; orders that one of the texts is too short for are left out."""
    ours, theirs = ("".join(text[:_MAX_CHARS].split()) for text in (answer, reference))
    precisions, recalls = [], []
    for n in range(1, _CHRF_ORDER + 1):
        said, wanted = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (ours, theirs))
        if said and wanted:
            shared = (said & wanted).total()
            precisions.append(shared / said.total())
            recalls.append(shared / wanted.total())
    if not precisions:
        return float(ours == theirs)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    weight = _CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall) if precision + recall else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, case folded."""
    ours, theirs = (_WORD.findall(text.casefold()) for text in (answer, reference))
    if not ours or not theirs:
        return float(answer.split() == reference.split())
    shared = _lcs(ours, theirs)
    return 2 * shared / (len(ours) + len(theirs))


def embedding_cosine(answer: str, reference: str, encoder: str) -> float:
    """Cosine of two embeddings, nothing below 0: of hashed words, word pairs and characters, or of a neural encoder.

    Raises:
        ConfigError: the neural encoder cannot be loaded.
    """
    import numpy as np

    if encoder != HASHED:
        one, other = neural_encoder(encoder).encode_all([answer, reference])
        return float(min(1.0, max(0.0, one @ other)))
    (mine, weights), (its, others) = hashed_features(answer), hashed_features(reference)
    _, here, there = np.intersect1d(mine, its, assume_unique=True, return_indices=True)
    norm = float(np.linalg.norm(weights) * np.linalg.norm(others))
    return min(1.0, float(weights[here] @ others[there]) / norm) if norm else float(answer == reference)


def _lcs(ours: list[str], theirs: list[str]) -> int:
    """Length of the longest common subsequence; a bit of one integer stands for a word of ours."""
    places: dict[str, int] = {}
    for place, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << place
    mask = (1 << len(ours)) - 1
    row = mask
    for word in theirs:
        both = row & places.get(word, 0)
        row = ((row + both) | (row - both)) & mask
    return len(ours) - row.bit_count()
