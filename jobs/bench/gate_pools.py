"""Files of calls, or a formula -> pools: graded answers of a fixed stand-in for a specialist, whose risks are known exactly.

A pool is a whole population: the share that disagrees among its answers of at least some confidence is a fact, and
calibration sets are drawn from it with replacement. The stand-in is scikit-learn's logistic regression on the hashed
encoder, fitted on calls that are in no pool; its confidence is its largest probability. It names an answer's class: the whole
answer where answers repeat, else the tools it calls or the keys it fills, where these differ. The human's answer stands for
the LLM's.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cluster.access import Pseudonyms
from cluster.answers import grade, json_value, read_calls
from cluster.errors import InputError
from cluster.records import AgentCall
from cluster.signature import last_user_text
from training.encoders import fit_hashed
from training.formats import LogReader

SETS = ("banking77", "clinc150", "snips", "restaurant8k")
_PUBLIC_KEY = b"gate benchmark: the data is public"
_MIN_REPEATS = 5
"""Calls that the median class must have to be a class."""
_DIMENSIONS = 256
_INVERSE_REGULARISATION = 30.0
"""Unit vectors need large weights to give sharp probabilities; more or less of it moves coverage, not validity."""
_NUM_SYNTHETIC = 20_000
_MAX_CONTROL = 2_000
_TAU = "agents/tau_airline.sessions.jsonl.gz"


class Pool(NamedTuple):
    """Graded answers of one fixed stand-in."""

    name: str
    confidences: np.ndarray
    """[N], in (0, 1]."""
    agrees: np.ndarray
    """[N], whether the answer is the reference's."""
    classes: np.ndarray
    """[N], number of the reference's class; zeros where there are none."""
    answers: np.ndarray
    """[N], number of the class that the stand-in named; zeros where there are none."""


class StandIn(NamedTuple):
    """A fitted classifier."""

    encode: Callable[[Sequence[str]], np.ndarray]
    model: Any
    """scikit-learn's; its classes are numbers."""

    def answer(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the classes named [N], and confidences [N]."""
        chances = self.model.predict_proba(self.encode(texts))
        return self.model.classes_[chances.argmax(axis=1)], chances.max(axis=1)


class LabelSet(NamedTuple):
    """One file's calls in two parts that share none."""

    name: str
    fit_texts: list[str]
    fit_classes: np.ndarray
    pool_texts: list[str]
    pool_classes: np.ndarray
    class_names: list[str]


def load_sets(fit: Sequence[pathlib.Path], calls: Sequence[pathlib.Path]) -> list[LabelSet]:
    """The label sets of files; a set is called as its file up to the first dot.

    Args:
        fit: what stand-ins are fitted on, one file a set, by the same names; without any, half of each of `calls`.
        calls: pools; without any, the shared sets.

    Raises:
        InputError: a file is missing, has no readable call, or has no file to fit on.
    """
    calls = list(calls) or [shared_file(f"nlu/{name}.calls.jsonl.gz") for name in SETS]
    by_name = {_name(path): path for path in fit}
    found = []
    for path in calls:
        rows = _read(path)
        if by_name:
            if _name(path) not in by_name:
                known = ", ".join(sorted(by_name))
                raise InputError(
                    f"--calls {path}: no file to fit on; allowed: one of {known} with --fit, or no --fit at all"
                )
            fitted, held = _read(by_name[_name(path)]), rows
        else:
            fitted = [call for call in rows if _is_fitted(call.call_id)]
            held = [call for call in rows if not _is_fitted(call.call_id)]
        found.append(_label_set(_name(path), fitted, held))
    return found


def shared_file(name: str) -> pathlib.Path:
    """A file of the shared data (UNDERSTUDY_DATA, default ../shared/data).

    Raises:
        InputError: it is not there.
    """
    path = pathlib.Path(os.environ.get("UNDERSTUDY_DATA", pathlib.Path(__file__).parents[2] / "../shared/data")) / name
    if not path.is_file():
        raise InputError(
            f"{path}: not there; allowed: files given with --calls, or the folder of the shared data in UNDERSTUDY_DATA; "
            "next: UNDERSTUDY_DATA=/PATH understudy bench gate"
        )
    return path


def fit_stand_in(texts: Sequence[str], classes: np.ndarray) -> StandIn:
    """Fit the encoder and the classifier."""
    from sklearn.linear_model import LogisticRegression

    encoder = fit_hashed(texts, _DIMENSIONS)
    model = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=300)
    model.fit(encoder.encode_all(texts), classes)
    return StandIn(encoder.encode_all, model)


def ask(name: str, stand_in: StandIn, texts: Sequence[str], classes: np.ndarray) -> Pool:
    """The pool of a stand-in's answers to these texts."""
    answers, confidences = stand_in.answer(texts)
    return Pool(name, confidences, answers == classes, classes, answers)


def synthetic_pools(epsilon: float) -> list[Pool]:
    """Populations by formula, which are hard for a gate of this epsilon.

    steep: risk falls with confidence through epsilon. edge: everywhere just above epsilon, so that every open gate is a
    broken promise. dip: below epsilon at the very top, above it beneath, and below it again lower down.
    """
    generator = np.random.default_rng(7)
    confidences = np.sort(generator.random(_NUM_SYNTHETIC) * 0.999 + 0.001)[::-1]
    rank = np.arange(_NUM_SYNTHETIC) / _NUM_SYNTHETIC
    risks = {
        "synthetic_steep": 3 * epsilon * rank**1.5,
        "synthetic_edge": np.full(_NUM_SYNTHETIC, 1.02 * epsilon),
        "synthetic_dip": np.where(rank < 0.2, 0.5 * epsilon, np.where(rank < 0.5, 2.0 * epsilon, 0.4 * epsilon)),
    }
    nothing = np.zeros(_NUM_SYNTHETIC, int)
    pools = []
    for name, risk in risks.items():
        # Spread evenly instead of drawn, and rounded up: no part of the population is better than the formula says.
        wrong = np.diff(np.ceil(np.cumsum(risk)), prepend=0.0) > 0
        pools.append(Pool(name, confidences, ~wrong, nothing, nothing))
    return pools


def control_pools(sets: Sequence[LabelSet]) -> list[Pool]:
    """Tasks that no stand-in can do, whose gates must be refused: shuffled labels, pairs that are to be related, and open
    dialogue answered with the answer to the nearest turn (left out where the shared data is not there)."""
    first = sets[0]
    generator = np.random.default_rng(11)
    shuffled = fit_stand_in(first.fit_texts, generator.permutation(first.fit_classes))
    pools = [ask(f"{first.name}, labels shuffled", shuffled, first.pool_texts, first.pool_classes)]
    related = fit_stand_in(*_pairs(first.fit_texts, first.fit_classes, generator))
    pools.append(
        ask(
            f"{first.name}, do two texts mean the same",
            related,
            *_pairs(first.pool_texts, first.pool_classes, generator),
        )
    )
    try:
        path = shared_file(_TAU)
    except InputError:
        return pools
    return [*pools, _dialogue(path)]


def _pairs(texts: Sequence[str], classes: np.ndarray, generator: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Pairs of texts and whether they are of one class, half of them; as natural language inference puts it."""
    by_class = {one: np.flatnonzero(classes == one) for one in np.unique(classes)}
    joined, related = [], []
    for number in generator.permutation(len(texts))[:_MAX_CONTROL]:
        is_related = bool(generator.random() < 0.5)
        places = by_class[classes[number]] if is_related else np.flatnonzero(classes != classes[number])
        joined.append(f"{texts[number]}\nThe same as: {texts[generator.choice(places)]}")
        related.append(int(is_related))
    return joined, np.array(related)


def _dialogue(path: pathlib.Path) -> Pool:
    turns = [call for call in _read(path) if call.message and not call.message.get("tool_calls")]
    fitted = [call for call in turns if _is_fitted(call.session_id)][:_MAX_CONTROL]
    held = [call for call in turns if not _is_fitted(call.session_id)][:_MAX_CONTROL]
    texts = [last_user_text(call.request) for call in fitted]
    encoder = fit_hashed(texts, _DIMENSIONS)
    likeness = encoder.encode_all([last_user_text(call.request) for call in held]) @ encoder.encode_all(texts).T
    agrees = [
        grade(fitted[nearest].message, call.message or {}, "text", call.request).agrees
        for call, nearest in zip(held, likeness.argmax(axis=1), strict=True)
    ]
    nothing = np.zeros(len(held), int)
    confidences = np.clip(likeness.max(axis=1), 1e-6, 1.0)
    return Pool("tau_airline, answers to a person", confidences, np.array(agrees), nothing, nothing)


def _label_set(name: str, fitted: Sequence[AgentCall], held: Sequence[AgentCall]) -> LabelSet:
    described = [[_describe(call) for call in part] for part in (fitted, held)]
    wholes, parts = ([one[level] for one in described[0]] for level in range(2))
    level = 0 if _repeats(wholes) or len(set(parts)) < 2 else 1
    named = [[one[level] for one in part] for part in described]
    numbers = {value: number for number, value in enumerate(sorted({*named[0], *named[1]}))}
    classes = [np.array([numbers[value] for value in part]) for part in named]
    if len(set(named[0])) < 2 or not named[1]:
        raise InputError(
            f"{name}: {len(set(named[0]))} classes of answers to fit on; allowed: at least 2, and calls for a pool"
        )
    texts = [[last_user_text(call.request) for call in part] for part in (fitted, held)]
    return LabelSet(name, texts[0], classes[0], texts[1], classes[1], sorted(numbers, key=numbers.__getitem__))


def _describe(call: AgentCall) -> tuple[str, str]:
    """The answer whole, and its tools or keys alone."""
    message = call.message or {}
    calls = read_calls(message)
    if calls:
        return json.dumps(calls, sort_keys=True), json.dumps(sorted(one["name"] for one in calls))
    content = str(message.get("content") or "")
    value = json_value(content)
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True), json.dumps(sorted(value))
    return content.strip(), content.strip()


def _repeats(values: Sequence[str]) -> bool:
    """Whether the call in the middle, by how often its class comes, is of a class of some size."""
    counts = Counter(values)
    sizes = sorted(counts[value] for value in values)
    return bool(sizes) and sizes[len(sizes) // 2] >= _MIN_REPEATS


def _read(path: pathlib.Path) -> list[AgentCall]:
    found = [call for call in LogReader(Pseudonyms(_PUBLIC_KEY), 0.0).read(path) if isinstance(call, AgentCall)]
    if not found:
        raise InputError(
            f"{path}: no readable call; allowed: one call a line; next: understudy ingest --dry-run {path}"
        )
    return found


def _name(path: pathlib.Path) -> str:
    return path.name.split(".")[0]


def _is_fitted(name: str) -> bool:
    return hashlib.blake2b(name.encode(), key=b"half", digest_size=1).digest()[0] < 128
