"""Confidence is the probability of the whole answer, and 0 for anything that is not a list of log-probabilities."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.confidence import confidence


def test_confidence_is_the_product_of_token_probabilities():
    assert confidence([math.log(0.5), math.log(0.8), 0.0]) == pytest.approx(0.4)


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_no_token_or_a_value_that_is_no_number_gives_zero(broken):
    assert confidence([]) == 0.0
    assert confidence([-0.1, broken, -0.1]) == 0.0
    assert confidence([-math.inf, math.inf]) == 0.0


def test_rounding_above_zero_counts_as_certain_and_lifts_no_other_token():
    assert confidence([1e-6]) == 1.0
    assert confidence([5.0, math.log(0.5)]) == pytest.approx(0.5)


def test_very_unlikely_answers_underflow_to_zero_without_an_error():
    assert confidence([-1e308] * 10) == 0.0


@given(st.lists(st.floats(), max_size=20), st.floats())
def test_confidence_lies_in_the_unit_interval_and_one_more_token_never_raises_it(logprobs, following):
    before, after = confidence(logprobs), confidence([*logprobs, following])
    assert 0.0 <= before <= 1.0
    assert not logprobs or after <= before
