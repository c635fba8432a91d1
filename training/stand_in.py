"""How far a classifier that repeats known answers would be trusted at a call site: what is easy, before anything is trained.

The stand-in is logistic regression on the hashed encoder, fitted on the train split; it can say an answer that train holds
twice or more, whole, and nothing else, so it fills in no value that it has not seen. Its answers are graded as a
specialist's are, and the gate's own test (training/gate.py) says what it may keep. What it is refused a fine-tuned model
may still be able to do: it is a floor. Needs no Ray and no GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cluster.answers import grade, to_text
from cluster.records import AnswerKind, Example, Gate, Record, Split
from cluster.signature import message_text, variable_text
from training.encoders import fit_hashed
from training.gate import GateConfig, Outcome, certify, clopper_pearson_interval, one_call_per_session, plan_grid

_DIMENSIONS = 128
_INVERSE_REGULARISATION = 30.0
"""Unit vectors need large weights to give sharp probabilities; it moves what is kept, not whether the promise holds."""
_MIN_REPEATS = 2
_MAX_CLASSES = 400
"""The most frequent answers; a site with more of them is answered by no list of answers."""


class StandInResult(Record):
    """What the stand-in does at one call site."""

    num_train: int
    num_answers: int
    """Distinct answers that it can say."""
    num_test: int
    """Test calls, which neither the fit nor the gate has seen."""
    agreement: float | None
    """Share of the test calls whose answer it says; None without test calls."""
    agreement_interval: tuple[float, float] | None
    """95%, exact, calls taken as independent."""
    coverage: float
    """Share of calibration calls that the gate lets it keep; 0 where refused."""
    num_calibration: int
    """Calls that the coverage was measured on, one a session; 0 where no gate was tested."""
    upper_bound: float | None
    """Certified bound on disagreement among what it keeps."""
    refused: str | None
    """Why it may keep nothing."""


class _Said(NamedTuple):
    confidence: float
    message: dict[str, Any] | None


def measure_stand_in(
    kind: AnswerKind, by_split: dict[Split, list[Example]], config: GateConfig, delta: float
) -> StandInResult:
    """Fit on train, fix thresholds on validation, test them on calibration, report on test. Deterministic.

    Args:
        kind: of the site's answers.
        delta: level of this gate, from `training.gate.release_delta`.
    """
    train = by_split.get("train", [])
    answers = [to_text(e.target) for e in train]
    known = [text for text, n in Counter(answers).most_common(_MAX_CLASSES) if n >= _MIN_REPEATS]
    said = _Repeater(train, answers, known) if known else None
    test = _outcomes(by_split.get("test", []), kind, said)
    num_right = sum(one.agrees for one in test)
    gate = _gate_of(by_split, kind, said, config, delta)
    interval = tuple(1 - end for end in reversed(clopper_pearson_interval(len(test) - num_right, len(test))))
    return StandInResult(
        num_train=len(train),
        num_answers=len(known),
        num_test=len(test),
        agreement=num_right / len(test) if test else None,
        agreement_interval=interval if test else None,
        coverage=gate.coverage if isinstance(gate, Gate) and gate.is_open else 0.0,
        num_calibration=gate.num_calibration if isinstance(gate, Gate) else 0,
        upper_bound=gate.upper_bound if isinstance(gate, Gate) and gate.is_open else None,
        refused=gate if isinstance(gate, str) else gate.refused,
    )


def text_of_call(request: dict[str, Any]) -> str:
    """What the stand-in reads: what varies within a site, and the last message, which may be a tool's."""
    last = request["messages"][-1]
    return f"{variable_text(request)}\n{message_text(last) if last.get('role') != 'user' else ''}"


class _Repeater:
    """Says one of the known answers."""

    def __init__(self, train: Sequence[Example], answers: Sequence[str], known: Sequence[str]) -> None:
        place = {text: number for number, text in enumerate(known)}
        # What was said once is a class of its own kind: a call like it is one that no known answer fits.
        classes = np.array([place.get(text, len(known)) for text in answers])
        first = {text: e.target for e, text in zip(reversed(train), reversed(answers), strict=True)}
        self._messages = [*(first[text] for text in known), None]
        self._constant = int(classes[0]) if len(set(classes.tolist())) == 1 else None
        if self._constant is None:
            from sklearn.linear_model import LogisticRegression

            texts = [text_of_call(e.request) for e in train]
            self._encoder = fit_hashed(texts, _DIMENSIONS)
            self._model = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=300)
            self._model.fit(self._encoder.encode_all(texts), classes)

    def answer(self, examples: Sequence[Example]) -> list[_Said]:
        if self._constant is not None:
            return [_Said(1.0, self._messages[self._constant])] * len(examples)
        vectors = self._encoder.encode_all([text_of_call(e.request) for e in examples])
        chances = self._model.predict_proba(vectors)
        best = chances.argmax(axis=1)
        numbers = self._model.classes_[best]
        return [
            _Said(float(row[place]), self._messages[number])
            for row, place, number in zip(chances, best, numbers, strict=True)
        ]


def _outcomes(examples: Sequence[Example], kind: AnswerKind, said: _Repeater | None) -> list[Outcome]:
    """Graded answers; without confidence where it has none to give."""
    if said is None:
        return [Outcome(confidence=0.0, agrees=False, session_id=e.session_id) for e in examples]
    return [
        Outcome(
            confidence=min(1.0, one.confidence) if one.message else 0.0,
            agrees=grade(one.message, e.target, kind, e.request).agrees,
            session_id=e.session_id,
        )
        for e, one in zip(examples, said.answer(examples) if examples else [], strict=True)
    ]


def _gate_of(
    by_split: dict[Split, list[Example]], kind: AnswerKind, said: _Repeater | None, config: GateConfig, delta: float
) -> Gate | str:
    """The gate of its answers, or why none was tested."""
    if said is None:
        return "no answer occurs twice in train, so a repeater of answers has nothing to say"
    validation, calibration = (
        one_call_per_session(by_split.get(split, []), seed=0) for split in ("validation", "calibration")
    )
    if not validation or not calibration:
        return f"{len(validation)} validation and {len(calibration)} calibration sessions; it needs some of both"
    grid = plan_grid(_outcomes(validation, kind, said), len(calibration), config, delta)
    if isinstance(grid, str):
        return grid
    return certify(
        grid,
        _outcomes(calibration, kind, said),
        epsilon=config.epsilon,
        delta=delta,
        reference="llm",
        population="calls of this site as captured",
        fingerprint="stand-in",
    )
