"""How soon audits notice a specialist that went bad, and how often they accuse one that did not.

Streams of kept answers, of which a share is audited by chance, as serving does it; the test is the steward's. Delays count
from the change to the demotion, in audits and in kept calls; a stream that is not noticed within the horizon counts as the
horizon. jump: 2% to 20% after 5,000 good audits, by formula; gradual: rises from 2% to 40% over 1,000 audits; recurring:
200 audits bad (20%), 200 good, again and again. sessions: the jump in conversations of one to many calls that are wrong
together, of which half are audited, as a canary's; a conversation counts once, with the mean of what was audited in it
(serving/evidence.py), and what would be accused if each call counted is told beside it. The others change what a stand-in for a specialist meets, on real label sets
after 1,000 good audits: renamed_classes (the LLM names a fifth of the answers otherwise, such as tools with a new name),
new_template (each text comes with another one quoted above it) and noisy_teacher (a fifth of the LLM's answers is random).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cluster.sequential import RiskTest
from jobs.bench.gate_pools import LabelSet, Pool, StandIn
from training.gate import clopper_pearson_interval

EPSILON = ALPHA = 0.05
_AUDIT_SHARE = 0.02
_SESSION_AUDIT_SHARE = 0.5
_MEAN_CALLS = 4.0
"""Of a conversation."""
_SESSION_SPREAD = 2.0
"""Of the beta distribution of a conversation's own risk: the smaller, the more its calls are right or wrong together."""
_STABLE_AUDITS = 5_000
_HORIZON = 3_000
_WANTED_AUDITS = 200
_CHUNK = 64


class Sessions(NamedTuple):
    """Conversations of which something was audited, in order."""

    shares: np.ndarray
    """Of the audited calls of each, those that are wrong."""
    num_audited: np.ndarray
    num_calls: np.ndarray
    """With those of the conversations before it of which nothing was audited."""
    is_wrong: np.ndarray
    """Of each audited call, in order."""


def measure_drift(
    sets: Sequence[tuple[LabelSet, StandIn, Pool, float]], say: Callable[[str], object], num_streams: int
) -> dict[str, Any]:
    """False demotions of stable streams, and delays of drifting ones.

    Args:
        sets: with the confidence from which answers are kept.
    """
    stable = sum(
        first_rejection(_test(), _rates(seed, np.full(_STABLE_AUDITS, EPSILON))) is not None
        for seed in range(num_streams)
    )
    found: dict[str, Any] = {
        "alpha": ALPHA,
        "stable_streams": num_streams,
        "false_demotions": stable,
        "false_demotion_lower": clopper_pearson_interval(stable, num_streams, level=0.9)[0],
    }
    found |= _accuse_stable_sessions(num_streams)
    kinds = {**_formulas(), **_changes(sets)}
    delays_of = {kind: [_delay(seed, *kinds[kind]) for seed in range(num_streams)] for kind in kinds}
    delays_of["sessions"] = [_delay_in_sessions(seed) for seed in range(num_streams)]
    found["jump_within_200_audits"] = sum(one[0] <= _WANTED_AUDITS for one in delays_of["jump"]) / num_streams
    audits, calls, noticed = {}, {}, {}
    for kind, delays in delays_of.items():
        audits[kind] = float(np.median([one[0] for one in delays]))
        calls[kind] = float(np.median([one[1] for one in delays]))
        noticed[kind] = sum(one[0] < _HORIZON for one in delays) / num_streams
        say(f"drift {kind}: {audits[kind]:g} audits, {calls[kind]:g} kept calls, noticed in {noticed[kind]:.1%}")
    return found | {"detection_delay_calls": calls, "detection_delay_audits": audits, "detected": noticed}


def draw_sessions(seed: int, number: int, risk: float) -> Sessions:
    """Conversations of which something was audited, whose own risks spread around `risk`."""
    generator = np.random.default_rng([seed, 2])
    # A conversation of which nothing is audited counts nowhere; more than enough of them are drawn.
    num_drawn = 3 * number + 20
    num_calls = generator.geometric(1 / _MEAN_CALLS, num_drawn)
    num_audited = generator.binomial(num_calls, _SESSION_AUDIT_SHARE)
    own = generator.beta(_SESSION_SPREAD * risk, _SESSION_SPREAD * (1 - risk), num_drawn)
    places = np.flatnonzero(num_audited)[:number]
    is_wrong = generator.random(int(num_audited[places].sum())) < np.repeat(own[places], num_audited[places])
    ends = np.cumsum(num_audited[places])
    wrong = np.diff(np.concatenate([[0], np.cumsum(is_wrong)])[np.concatenate([[0], ends])])
    until = np.diff(np.cumsum(num_calls)[places], prepend=0)
    return Sessions(wrong / num_audited[places], num_audited[places], until, is_wrong)


def first_rejection(test: RiskTest, outcomes: Sequence[float]) -> int | None:
    """After how many outcomes the test first rejects; None where it never does."""
    for begin in range(0, len(outcomes), _CHUNK):
        after = test.after(outcomes[begin : begin + _CHUNK])
        if after.is_rejected:
            for number, outcome in enumerate(outcomes[begin : begin + _CHUNK], begin + 1):
                test = test.after([outcome])
                if test.is_rejected:
                    return number
        test = after
    return None


def _test() -> RiskTest:
    return RiskTest(epsilon=EPSILON, alpha=ALPHA)


def _delay(seed: int, before: Sequence[float] | np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """Audits and kept calls from the change to the demotion. A demotion before the change is one at once."""
    generator = np.random.default_rng([seed, 99])
    past = _rates(seed, np.asarray(before))
    rejected = first_rejection(_test().after(past), _rates(10_000 + seed, after))
    num_audits = rejected or _HORIZON
    return num_audits, int(generator.geometric(_AUDIT_SHARE, num_audits).sum())


def _accuse_stable_sessions(num_streams: int) -> dict[str, Any]:
    """Streams of conversations whose risk is exactly epsilon: how many are accused by conversations, and by calls."""
    by_session = by_call = 0
    for seed in range(num_streams):
        drawn = draw_sessions(seed, _STABLE_AUDITS, EPSILON)
        by_session += first_rejection(_test(), drawn.shares.tolist()) is not None
        by_call += first_rejection(_test(), drawn.is_wrong.tolist()) is not None
    return {
        "false_demotions_sessions": by_session,
        "false_demotion_lower_sessions": clopper_pearson_interval(by_session, num_streams, level=0.9)[0],
        "false_demotions_if_calls_counted": by_call,
    }


def _delay_in_sessions(seed: int) -> tuple[int, int]:
    """Like `_delay`, in conversations: a good past of as many audited ones as the jump has, then 20%."""
    past = _test().after(draw_sessions(seed, _STABLE_AUDITS, 0.02).shares.tolist())
    drawn = draw_sessions(10_000 + seed, _HORIZON, 0.2)
    rejected = first_rejection(past, drawn.shares.tolist()) or _HORIZON
    return int(drawn.num_audited[:rejected].sum()), int(drawn.num_calls[:rejected].sum())


def _rates(seed: int, risks: np.ndarray) -> list[bool]:
    return (np.random.default_rng([seed, 1]).random(len(risks)) < risks).tolist()


def _formulas() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    good = np.full(5_000, 0.02)
    ramp = 0.02 + 0.38 * np.minimum(np.arange(_HORIZON) / 1_000, 1.0)
    waves = np.where(np.arange(_HORIZON) // 200 % 2 == 0, 0.2, 0.02)
    return {"jump": (good, np.full(_HORIZON, 0.2)), "gradual": (good, ramp), "recurring": (good, waves)}


def _changes(sets: Sequence[tuple[LabelSet, StandIn, Pool, float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Risks before and after, as they are among the answers that are kept."""
    found = {}
    for one, stand_in, pool, threshold in sets:
        generator = np.random.default_rng(5)
        kept = pool.confidences >= threshold
        before = np.full(1_000, _risk(pool.agrees[kept]))
        present = np.unique(pool.answers[kept])
        renamed = generator.choice(present, max(1, round(0.2 * len(present))), replace=False)
        random_answers = generator.choice(present, len(pool.classes))
        noisy = np.where(generator.random(len(pool.classes)) < 0.2, random_answers, pool.classes)
        texts = [
            f"{one.pool_texts[other]}\n{text}"
            for text, other in zip(one.pool_texts, generator.permutation(len(one.pool_texts)), strict=True)
        ]
        answers, confidences = stand_in.answer(texts)
        after = {
            "renamed_classes": pool.agrees[kept] & ~np.isin(pool.answers[kept], renamed),
            "noisy_teacher": pool.answers[kept] == noisy[kept],
            "new_template": (answers == pool.classes)[confidences >= threshold],
        }
        for kind, agrees in after.items():
            if len(agrees):
                found[f"{kind}:{one.name}"] = (before, np.full(_HORIZON, _risk(agrees)))
    return found


def _risk(agrees: np.ndarray) -> float:
    return float((~agrees).mean())
