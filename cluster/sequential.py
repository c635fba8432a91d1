"""A stream of agreements and disagreements -> evidence about a risk that may be looked at after every one of them.

`RiskTest` bets against "the risk is at most epsilon"; `SafetyTest` against "it is at least epsilon". Each is an e-process:
a non-negative number that begins at 1 and whose expectation stays at most 1 while the claim holds, however often one looks
and whenever one stops, so that it reaches 1/alpha with probability at most alpha (Ville 1939). The claim is about the
expectation of an outcome given all earlier ones: they must come in an order that does not depend on what they are, and one
a conversation, because calls of one conversation tell of each other. An outcome is a share in [0, 1], such as that of a
conversation's answers which disagree; a single answer's is 0 or 1. Bets are linear in it, so they are as valid for shares.

`RiskTest` mixes bets that begin at every observation, with weights that sum to 1: a good past cannot hide a late change.
With bets of fixed size the mixture needs no list of its beginnings: S_n = (S_{n-1} + w_n) * factor_n, one number for each
size of bet, exactly the sum over all beginnings. Knows nothing of calls, specialists or storage.

Sources: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86; Shin, Ramdas
and Rinaldo, "E-detectors", arXiv 2203.03532 (mixtures over restarts); Howard, Ramdas, McAuliffe and Sekhon 2021,
"Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49 (beta-binomial mixture).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Self

from pydantic import Field, model_validator

from cluster.records import Record

_HARM_STEPS = (0.02, 0.05, 0.15, 0.4)
"""Risks that `RiskTest` bets on, as shares of the way from epsilon to 1."""
_FROM_THE_START, _FEW = 0.4, 100
"""Weight of the bets that begin with the first observation, for a specialist that was never good, and the number of
observations before which a change is hardly less likely for its being early. Chosen on changes from 2% to 20% after 0, 20, 100,
1,000 and 5,000 observations at epsilon .05: medians of 29, 39, 49, 74 and 89 more until it is found; with weights that fall as
1 / (1 + ln(1 + n)) from the first one on, 27, 39, 58, 81 and 97."""
_SAFE_SHARES = (0.0, 0.1, 0.25, 0.5)
"""Risks that `SafetyTest` bets on, as shares of epsilon."""
_MOST = 1e200
"""Wealth beyond it is given away, which keeps an e-process one and a float finite."""
_PRIOR = 0.5
"""Both parameters of the beta distribution that the confidence sequence mixes over (Jeffreys)."""


class _Bets(Record):
    """What two tests share: fixed bets on some risks, each with an equal part of the wealth."""

    epsilon: float = Field(gt=0, lt=1)
    alpha: float = Field(gt=0, lt=1)
    """Probability with which a true claim may ever be rejected."""
    num_observed: int = Field(default=0, ge=0)
    num_disagreements: float = Field(default=0.0, ge=0)
    """Sum of the outcomes."""
    wealth: tuple[float, ...] = ()
    """Of each bet that has begun, before it is divided by their number."""
    peak: float = Field(default=1.0, ge=1)
    """Largest e-value so far."""

    @model_validator(mode="after")
    def _check_wealth(self) -> Self:
        if len(self.wealth) not in (0, len(self._risks())):
            raise ValueError(f"wealth: {len(self.wealth)} numbers; allowed: none or {len(self._risks())}")
        return self

    def _risks(self) -> tuple[float, ...]:
        raise NotImplementedError

    def _unspent(self, num_observed: int) -> float:
        """Weight of the bets that have not begun after so many observations; 1 at 0 and never growing."""
        raise NotImplementedError

    @property
    def e_value(self) -> float:
        """Evidence against the claim now; at least 0."""
        return sum(self.wealth) / len(self._risks()) + self._unspent(self.num_observed)

    @property
    def is_rejected(self) -> bool:
        """Whether the evidence was ever enough; it stays so."""
        return self.peak >= 1 / self.alpha

    def after(self, outcomes: Iterable[float]) -> Self:
        """The test once it has seen these too, in their order; each in [0, 1], 1 is a disagreement."""
        number, wrong, peak = self.num_observed, self.num_disagreements, self.peak
        wealth, size, unspent = (
            list(self.wealth) or [0.0] * len(self._risks()),
            len(self._risks()),
            self._unspent(number),
        )
        factors = [((1 - risk) / (1 - self.epsilon), risk / self.epsilon) for risk in self._risks()]
        for outcome in outcomes:
            number, wrong, before = number + 1, wrong + outcome, unspent
            unspent = self._unspent(number)
            begun = before - unspent
            for bet, (right, left) in enumerate(factors):
                wealth[bet] = min((wealth[bet] + begun) * ((1 - outcome) * right + outcome * left), _MOST)
            peak = max(peak, sum(wealth) / size + unspent)
        changed = {"num_observed": number, "num_disagreements": wrong, "wealth": tuple(wealth), "peak": peak}
        return self.model_copy(update=changed)


class RiskTest(_Bets):
    """Evidence against "the risk is at most epsilon", whenever it began to be more."""

    def _risks(self) -> tuple[float, ...]:
        return tuple(self.epsilon + step * (1 - self.epsilon) for step in _HARM_STEPS)

    def _unspent(self, num_observed: int) -> float:
        # Falls so slowly that a change after n observations costs about ln(n) + 2 ln(ln(n / 100)) of log-evidence.
        later = 1 - _FROM_THE_START
        return 1.0 if num_observed == 0 else later / (1 + math.log1p(num_observed / _FEW))


class SafetyTest(_Bets):
    """Evidence against "the risk is at least epsilon", from the first observation on."""

    def _risks(self) -> tuple[float, ...]:
        return tuple(share * self.epsilon for share in _SAFE_SHARES)

    def _unspent(self, num_observed: int) -> float:
        return float(num_observed == 0)


def confidence_sequence(num_disagreements: float, num_observed: int, alpha: float) -> tuple[float, float]:
    """Interval that holds the risk after every observation at once, except with probability alpha.

    For a constant risk: what it says after a change is about neither side of it. (0, 1) without observations. Of outcomes
    that are shares it is as valid and wider than it need be (r^x (1-r)^(1-x) is at most what a linear bet gives).

    Raises:
        ValueError: more disagreements than observations.
    """
    if not 0 <= num_disagreements <= num_observed:
        raise ValueError(f"num_disagreements={num_disagreements}; allowed: 0 to num_observed={num_observed}")
    if not num_observed:
        return 0.0, 1.0
    rate = num_disagreements / num_observed
    limit = math.log(1 / alpha)

    def is_outside(risk: float) -> bool:
        return _log_evidence(risk, num_disagreements, num_observed) >= limit

    # The evidence against a risk falls towards the observed rate and grows beyond it.
    return _border(rate, 0.0, is_outside), _border(rate, 1.0, is_outside)


def _log_evidence(risk: float, num_disagreements: float, num_observed: int) -> float:
    """Logarithm of the mixture's likelihood over that of `risk`."""
    num_agreements = num_observed - num_disagreements
    if (risk <= 0 and num_disagreements) or (risk >= 1 and num_agreements):
        return math.inf
    mixture = _log_beta(num_disagreements + _PRIOR, num_agreements + _PRIOR) - _log_beta(_PRIOR, _PRIOR)
    own = num_disagreements * math.log(risk) if num_disagreements else 0.0
    own += num_agreements * math.log1p(-risk) if num_agreements else 0.0
    return mixture - own


def _border(inside: float, end: float, is_outside: Callable[[float], bool]) -> float:
    """The outermost risk between `inside` and `end` that is not ruled out, rounded outwards."""
    if not is_outside(end):
        return end
    outside = end
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if is_outside(middle) else (middle, outside)
    return outside


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
