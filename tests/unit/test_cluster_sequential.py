"""cluster/sequential.py: evidence never cheats a true claim, however one looks, and finds a false one soon."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.sequential import RiskTest, SafetyTest, confidence_sequence
from training.gate import clopper_pearson_interval

ALPHA = 0.05
NUM_STREAMS = 200


def stream(seed: int, *parts: tuple[int, float]) -> list[bool]:
    """Independent outcomes: so many of such a risk, one part after another."""
    generator = np.random.default_rng(seed)
    return [bool(wrong) for number, risk in parts for wrong in generator.random(number) < risk]


@pytest.mark.parametrize("test", [RiskTest, SafetyTest])
@pytest.mark.parametrize("epsilon", [0.02, 0.3])
def test_the_expected_e_value_is_one_at_the_edge_of_the_claim_after_every_observation(
    test: type[RiskTest] | type[SafetyTest], epsilon: float
) -> None:
    for number in range(8):
        expected = 0.0
        for outcomes in itertools.product([False, True], repeat=number):
            wrong = sum(outcomes)
            chance = epsilon**wrong * (1 - epsilon) ** (number - wrong)
            expected += chance * test(epsilon=epsilon, alpha=ALPHA).after(outcomes).e_value
        assert expected == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("test", "risks"), [(RiskTest, (0.0, 0.1, 0.2)), (SafetyTest, (0.2, 0.4, 1.0))])
def test_whatever_happened_the_next_observation_is_no_gain_under_the_claim(
    test: type[RiskTest] | type[SafetyTest], risks: tuple[float, ...]
) -> None:
    for seed in range(20):
        past = test(epsilon=0.2, alpha=ALPHA).after(stream(seed, (50, 0.4)))
        right, wrong = past.after([False]).e_value, past.after([True]).e_value
        assert all(risk * wrong + (1 - risk) * right <= past.e_value * (1 + 1e-12) for risk in risks)


def test_the_mixture_is_the_sum_over_all_beginnings() -> None:
    outcomes, epsilon = stream(3, (30, 0.3)), 0.05
    unspent = [1.0, *(0.6 / (1 + math.log(1 + n / 100)) for n in range(1, len(outcomes) + 1))]
    total = unspent[-1]
    for begin in range(len(outcomes)):
        for step in (0.02, 0.05, 0.15, 0.4):
            risk = epsilon + step * (1 - epsilon)
            gains = [risk / epsilon if wrong else (1 - risk) / (1 - epsilon) for wrong in outcomes[begin:]]
            total += (unspent[begin] - unspent[begin + 1]) / 4 * math.prod(gains)
    assert RiskTest(epsilon=epsilon, alpha=ALPHA).after(outcomes).e_value == pytest.approx(total)


def test_a_test_reads_back_and_goes_on_as_if_it_had_never_stopped() -> None:
    outcomes = stream(1, (300, 0.1))
    whole = RiskTest(epsilon=0.05, alpha=ALPHA).after(outcomes)
    half = RiskTest(epsilon=0.05, alpha=ALPHA).after(outcomes[:120])
    assert RiskTest.model_validate_json(half.model_dump_json()).after(outcomes[120:]) == whole
    assert (whole.num_observed, whole.num_disagreements) == (300, sum(outcomes))
    with pytest.raises(ValidationError, match="wealth: 1 numbers; allowed: none or 4"):
        RiskTest(epsilon=0.05, alpha=ALPHA, wealth=(1.0,))


def test_a_jump_after_a_long_good_past_is_found_within_200_audits() -> None:
    delays = []
    for seed in range(NUM_STREAMS):
        test = RiskTest(epsilon=0.05, alpha=ALPHA).after(stream(seed, (5_000, 0.02)))
        assert not test.is_rejected
        after = stream(10_000 + seed, (1_000, 0.2))
        delays.append(next(n for n in itertools.count(1) if (test := test.after(after[n - 1 : n])).is_rejected))
    assert statistics.median(delays) <= 200


def test_a_risk_of_exactly_epsilon_is_rarely_rejected() -> None:
    rejected = sum(
        RiskTest(epsilon=0.05, alpha=ALPHA).after(stream(seed, (3_000, 0.05))).is_rejected
        for seed in range(NUM_STREAMS)
    )
    lower, _ = clopper_pearson_interval(rejected, NUM_STREAMS, level=0.9)
    assert lower <= ALPHA
    assert 0 < rejected, "a test that never rejects would pass, too"


def test_rejection_stays_and_wealth_stays_finite() -> None:
    endless = RiskTest(epsilon=0.02, alpha=ALPHA).after([True] * 2_000)
    assert endless.is_rejected and math.isfinite(endless.e_value)
    few = RiskTest(epsilon=0.02, alpha=ALPHA).after([True] * 10)
    calmed = few.after([False] * 5_000)
    assert few.is_rejected and calmed.e_value < 1 / ALPHA and calmed.is_rejected


def test_safety_is_shown_by_few_errors_and_never_by_a_risk_above() -> None:
    perfect = SafetyTest(epsilon=0.05, alpha=ALPHA)
    assert not perfect.after([False] * 58).is_rejected, "without an error 59 calls suffice for no bound that is exact"
    assert perfect.after([False] * 75).is_rejected
    shown = sum(
        SafetyTest(epsilon=0.05, alpha=ALPHA).after(stream(seed, (1_000, 0.05))).is_rejected
        for seed in range(NUM_STREAMS)
    )
    lower, _ = clopper_pearson_interval(shown, NUM_STREAMS, level=0.9)
    assert lower <= ALPHA and shown > 0


def test_the_confidence_sequence_holds_the_risk_at_all_times_and_narrows() -> None:
    risk, missed = 0.05, 0
    for seed in range(NUM_STREAMS):
        counts = np.cumsum(stream(seed, (1_000, risk)))
        looks = (confidence_sequence(int(counts[n - 1]), n, ALPHA) for n in range(10, 1_001, 30))
        missed += any(not lower <= risk <= upper for lower, upper in looks)
    lower, _ = clopper_pearson_interval(missed, NUM_STREAMS, level=0.9)
    assert lower <= ALPHA
    widths = [upper - lower for lower, upper in (confidence_sequence(n // 20, n, ALPHA) for n in (40, 400, 4_000))]
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.03


def test_the_confidence_sequence_at_its_ends() -> None:
    assert confidence_sequence(0, 0, ALPHA) == (0.0, 1.0)
    lower, upper = confidence_sequence(0, 100, ALPHA)
    assert lower == 0.0 and 0.03 < upper < 0.1
    lower, upper = confidence_sequence(100, 100, ALPHA)
    assert upper == 1.0 and 0.9 < lower < 0.97
    # Wider than what holds at one look alone.
    assert confidence_sequence(5, 100, ALPHA)[1] > clopper_pearson_interval(5, 100)[1]
    with pytest.raises(ValueError, match="num_disagreements=3; allowed: 0 to num_observed=2"):
        confidence_sequence(3, 2, ALPHA)
