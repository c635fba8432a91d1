"""What an evaluation is worth: cost per right answer, non-inferiority to the LLM, a random router's result, an oracle's.

Computed from the counts of the test split (training/arms.py), the recipe's prices and the tokens a second that validation
measured; what a price is missing for is None, never free. A replica is paid by the hour, so its token costs more the less
of the hour it is used. The random router costs as much as the gate and chooses calls by lot: what the gate gains over it is
what confidence is worth. The oracle knows which answers of the specialist are right: what it gains over the gate is what a
better confidence could still bring.

Sources: Tango 1998 (paired non-inferiority; training/regression.py); Efron 1979, "Bootstrap methods", Annals of Statistics 7
(percentile interval, resampling test calls); Clopper and Pearson 1934.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.records import Record, Reference
from training.arms import GATED_ARM, LLM_ARM, Arm, Routed
from training.evaluation import Evaluation
from training.gate import clopper_pearson_interval
from training.regression import noninferiority_p

UTILISATIONS = (0.2, 0.5, 1.0)
"""Shares of its hours that a replica answers in, for the costs that are shown."""
MATCHED_AT = 0.5
"""Utilisation at which the random router costs as much as the gate."""
_NUM_RESAMPLES, _SEED = 2_000, 0


class Rates(Record):
    """What answers cost."""

    replica_usd_per_hour: float = 0.0
    """Of one specialist replica; 0 where the recipe does not say."""
    num_replicas: int = 1
    """How many answered while `tokens_per_s` was measured."""
    tokens_per_s: float | None = None
    """Prompt and answer tokens that they took a second, fully used; None where it was not measured."""
    prompt_usd_per_million: float = 0.0
    """The LLM's, for calls that were captured without a cost; 0 where the recipe does not say."""
    completion_usd_per_million: float = 0.0

    def usd_per_token(self, utilisation: float) -> float | None:
        """Of a specialist at this utilisation in (0, 1]; None where a price or the speed is missing."""
        if not self.replica_usd_per_hour or not self.tokens_per_s:
            return None
        return self.replica_usd_per_hour * self.num_replicas / 3600 / (self.tokens_per_s * utilisation)

    def llm_usd(self, group: Routed) -> float | None:
        """Of the LLM's answers to these calls: as captured, else by tokens and prices."""
        if group.llm_usd:
            return group.llm_usd
        prompt, completion = group.llm_prompt_tokens, group.llm_completion_tokens
        if prompt is None or completion is None or not (self.prompt_usd_per_million or self.completion_usd_per_million):
            return None
        return (prompt * self.prompt_usd_per_million + completion * self.completion_usd_per_million) / 1e6


class ArmCost(Record):
    """What one arm's answers to the test calls cost, at each of UTILISATIONS."""

    name: str
    num_calls: int
    num_right: int | None
    """None where the reference is gold and the LLM was not asked."""
    usd_per_call: tuple[float | None, ...]
    usd_per_right: tuple[float | None, ...]
    """None too where no answer is right."""


class NonInferiority(Record):
    """Whether an arm is shown to be as good as the LLM, both against gold, but for a margin."""

    name: str
    num_calls: int
    llm_share: float
    """Of the calls with gold that the LLM answers as gold does."""
    arm_share: float
    margin: float
    level: float
    p_value: float
    """Of "the arm's share is lower by the margin or more"."""

    @property
    def holds(self) -> bool:
        return self.p_value <= self.level


class Control(Record):
    """A router that sends calls to the specialist by lot and keeps all it says."""

    share_sent: float
    """Of the calls; so many that it costs what the gate costs, or as many as the gate keeps."""
    matched_by: str
    """"cost", or "calls" where a price is missing."""
    random_right: float
    """Share of right answers."""
    gate_right: float
    interval: tuple[float, float]
    """95% of the gate's gain over it."""


class Regret(Record):
    """What the gate leaves to a router that knows which of the specialist's answers are right."""

    oracle_right: float
    gate_right: float
    oracle_to_llm: float
    """Share of calls that it sends to the LLM."""
    gate_to_llm: float
    needless: float
    """Share of calls sent to the LLM though the specialist's answer was right."""
    needless_interval: tuple[float, float]
    wrong: float
    """Share of calls kept wrong though the LLM's answer was right."""
    wrong_interval: tuple[float, float]
    usd_per_call: float | None
    """What the gate pays more for a call, all of it the LLM's; None where its price is missing."""


class Worth(Record):
    """All of it for one task."""

    truth: Reference
    """What says that an answer is right."""
    rates: Rates
    costs: tuple[ArmCost, ...]
    noninferiority: tuple[NonInferiority, ...]
    """Empty where no test call has gold beside the LLM's answer."""
    control: Control | None
    """None without an LLM answer, or where the gate keeps nothing."""
    regret: Regret | None


def weigh(evaluation: Evaluation, rates: Rates, margin: float, level: float = 0.05) -> Worth | None:
    """None of an evaluation without test calls, or of one that was written before they were counted."""
    routed = evaluation.routed
    if not routed:
        return None
    has_llm = all(group.is_llm_right is not None for group in routed)
    gated = next(arm for arm in evaluation.arms if arm.name == GATED_ARM)
    keeps = any(group.is_kept for group in routed)
    return Worth(
        truth=evaluation.truth,
        rates=rates,
        costs=tuple(_costs(evaluation, rates)),
        noninferiority=tuple(_noninferiority(arm, margin, level) for arm in evaluation.arms if arm.against_gold),
        control=_control(routed, gated, rates) if has_llm and keeps else None,
        regret=_regret(routed, rates) if has_llm else None,
    )


def _costs(evaluation: Evaluation, rates: Rates) -> list[ArmCost]:
    routed, truth = evaluation.routed, evaluation.truth
    num_calls = sum(group.num_calls for group in routed)
    has_llm = all(group.is_llm_right is not None for group in routed)
    llm_usd = _sum_usd(routed, rates) if has_llm else None
    llm_right = _count(routed, lambda g: bool(g.is_llm_right)) if has_llm else None
    found = [_arm_cost(LLM_ARM, num_calls, llm_right, [llm_usd] * len(UTILISATIONS))]
    escalated = _sum_usd([group for group in routed if not group.is_kept], rates)
    for arm in evaluation.arms:
        own = [rates.usd_per_token(u) for u in UTILISATIONS]
        usd = [None if one is None else one * (arm.prompt_tokens + arm.completion_tokens) for one in own]
        if arm.name == GATED_ARM:
            usd = [None if one is None or escalated is None else one + escalated for one in usd]
            right = _count(routed, _is_gate_right) if has_llm else None
        elif truth == "gold" and arm.against_gold:
            right = arm.against_gold.both + arm.against_gold.only_arm
        else:
            right = arm.num_kept - arm.num_disagreements
        found.append(_arm_cost(arm.name, arm.num_calls, right, usd))
    return found


def _arm_cost(name: str, num_calls: int, num_right: int | None, usd: Sequence[float | None]) -> ArmCost:
    def per(number: int | None) -> tuple[float | None, ...]:
        return tuple(None if one is None or not number else one / number for one in usd)

    facts = {"usd_per_call": per(num_calls), "usd_per_right": per(num_right)}
    return ArmCost(name=name, num_calls=num_calls, num_right=num_right, **facts)


def _noninferiority(arm: Arm, margin: float, level: float) -> NonInferiority:
    pairs = arm.against_gold
    assert pairs is not None
    n = pairs.num_calls
    return NonInferiority(
        name=arm.name,
        num_calls=n,
        llm_share=(pairs.both + pairs.only_llm) / n,
        arm_share=(pairs.both + pairs.only_arm) / n,
        margin=margin,
        level=level,
        p_value=noninferiority_p(pairs.only_arm, pairs.only_llm, n, margin),
    )


def _control(routed: Sequence[Routed], gated: Arm, rates: Rates) -> Control:
    import numpy as np

    counts = np.array([group.num_calls for group in routed])
    num_calls = int(counts.sum())
    kept = _count(routed, lambda g: g.is_kept) / num_calls
    share, matched_by = _matched_share(routed, gated, rates, num_calls)
    if share is None:
        share, matched_by = kept, "calls"
    by_lot = np.array([share * g.is_specialist_right + (1 - share) * bool(g.is_llm_right) for g in routed])
    by_gate = np.array([float(_is_gate_right(g)) for g in routed])
    draws = np.random.default_rng(_SEED).multinomial(num_calls, counts / num_calls, _NUM_RESAMPLES)
    low, high = np.quantile(draws @ (by_gate - by_lot) / num_calls, [0.025, 0.975])
    return Control(
        share_sent=share,
        matched_by=matched_by,
        random_right=float(counts @ by_lot) / num_calls,
        gate_right=float(counts @ by_gate) / num_calls,
        interval=(float(low), float(high)),
    )


def _matched_share(routed: Sequence[Routed], gated: Arm, rates: Rates, num_calls: int) -> tuple[float | None, str]:
    """Share q with q * specialist + (1 - q) * LLM = what the gate costs: the specialist for all, the LLM for the rest."""
    llm, escalated = _sum_usd(routed, rates), _sum_usd([g for g in routed if not g.is_kept], rates)
    token = rates.usd_per_token(MATCHED_AT)
    if llm is None or escalated is None or token is None:
        return None, ""
    own = token * (gated.prompt_tokens + gated.completion_tokens)
    if llm <= own:
        return None, ""
    return min(1.0, max(0.0, (llm - escalated - own) / (llm - own))), "cost"


def _regret(routed: Sequence[Routed], rates: Rates) -> Regret:
    num_calls = sum(group.num_calls for group in routed)
    needless = [g for g in routed if not g.is_kept and g.is_specialist_right]
    # Where both are wrong the specialist's answer is as good and costs no LLM.
    hopeless = [g for g in routed if not g.is_kept and not g.is_specialist_right and not g.is_llm_right]
    wrong = [g for g in routed if g.is_kept and not g.is_specialist_right and g.is_llm_right]
    num_needless, num_wrong = (sum(g.num_calls for g in groups) for groups in (needless, wrong))
    to_llm = _count(routed, lambda g: not g.is_specialist_right and bool(g.is_llm_right))
    saved, due = _sum_usd([*needless, *hopeless], rates), _sum_usd(wrong, rates)
    return Regret(
        oracle_right=_count(routed, lambda g: g.is_specialist_right or bool(g.is_llm_right)) / num_calls,
        gate_right=_count(routed, _is_gate_right) / num_calls,
        oracle_to_llm=to_llm / num_calls,
        gate_to_llm=_count(routed, lambda g: not g.is_kept) / num_calls,
        needless=num_needless / num_calls,
        needless_interval=clopper_pearson_interval(num_needless, num_calls),
        wrong=num_wrong / num_calls,
        wrong_interval=clopper_pearson_interval(num_wrong, num_calls),
        usd_per_call=None if saved is None or due is None else (saved - due) / num_calls,
    )


def _is_gate_right(group: Routed) -> bool:
    return group.is_specialist_right if group.is_kept else bool(group.is_llm_right)


def _count(routed: Sequence[Routed], is_counted: Callable[[Routed], bool]) -> int:
    return sum(group.num_calls for group in routed if is_counted(group))


def _sum_usd(routed: Sequence[Routed], rates: Rates) -> float | None:
    """Of the LLM's answers to these calls; None where the price of any is missing."""
    known = [rates.llm_usd(group) for group in routed]
    return None if any(one is None for one in known) else sum(one for one in known if one is not None)
