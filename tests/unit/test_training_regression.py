"""training/regression.py: a specialist that is worse by the margin rarely passes, and an equal one passes with enough calls."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from training.gate import Outcome
from training.regression import compare, noninferiority_p

LIMITS = {"epsilon": 0.05, "margin": 0.05, "level": 0.05}


def answers(*groups: tuple[int, float, bool]) -> list[Outcome]:
    """(number, confidence, agrees) one after another, each of a session of its own."""
    flat = [(confidence, agrees) for number, confidence, agrees in groups for _ in range(number)]
    return [Outcome(confidence=c, agrees=a, session_id=str(k)) for k, (c, a) in enumerate(flat)]


@pytest.mark.parametrize("num_calls", [60, 150])
@pytest.mark.parametrize("margin", [0.05, 0.1])
@pytest.mark.parametrize("better", [0.001, 0.02, 0.1])
def test_one_that_is_worse_by_exactly_the_margin_passes_as_rarely_as_the_level_says(num_calls, margin, better):
    worse, rest, passes = better + margin, 1 - 2 * better - margin, 0.0
    for b in range(num_calls + 1):
        for c in range(num_calls + 1 - b):
            if noninferiority_p(b, c, num_calls, margin) <= 0.05:
                ways = math.lgamma(num_calls + 1) - sum(math.lgamma(n + 1) for n in (b, c, num_calls - b - c))
                passes += math.exp(
                    ways + b * math.log(better) + c * math.log(worse) + (num_calls - b - c) * math.log(rest)
                )
    # A score test's level is asymptotic: a little above in places.
    assert passes < 0.06


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 200), st.floats(0.01, 0.3))
def test_a_p_value_is_one_and_falls_with_what_speaks_for_the_new_one(better, worse, same, margin):
    total = better + worse + same
    p = noninferiority_p(better, worse, total, margin)
    assert 0 <= p <= 1
    assert noninferiority_p(better + 1, worse, total + 1, margin) <= p + 1e-6
    assert noninferiority_p(better, worse, total, margin * 1.5) <= p + 1e-6


def test_an_equal_one_replaces_and_one_that_answers_wrongly_more_does_not():
    old = answers((190, 0.9, True), (10, 0.1, False))
    assert compare("t@1", old, 0.5, old, 0.5, **LIMITS).failed is None
    worse = answers((165, 0.9, True), (25, 0.9, False), (10, 0.1, False))
    failed = compare("t@1", old, 0.5, worse, 0.5, **LIMITS).failed
    assert failed and "answered wrongly 12.5% of 200 calls beside 0.0%" in failed


def test_one_that_keeps_much_less_does_not_replace_unless_the_old_one_breaks_its_promise():
    careful = answers((120, 0.9, True), (80, 0.1, True))
    old = answers((200, 0.9, True))
    failed = compare("t@1", old, 0.5, careful, 0.5, **LIMITS).failed
    assert failed and "kept and right 60.0% of 200 calls beside 100.0%" in failed
    broken = answers((150, 0.9, True), (50, 0.9, False))
    found = compare("t@1", broken, 0.5, careful, 0.5, **LIMITS)
    assert found.failed is None and found.right is None


def test_a_few_calls_show_nothing():
    few = answers((10, 0.9, True))
    assert compare("t@1", few, 0.5, few, 0.5, **LIMITS).failed is not None


def test_answers_to_other_calls_are_not_compared():
    with pytest.raises(InputError, match="answers to the same calls"):
        compare("t@1", answers((3, 0.9, True)), 0.5, answers((4, 0.9, True)), 0.5, **LIMITS)
