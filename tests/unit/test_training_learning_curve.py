"""training/learning_curve.py: a known law is found inside the interval as often as the interval says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.learning_curve import Point, predict_share

SIZES, ASKED = (50, 200, 800), 3200
LAWS = [(0.0, 1.0, 0.3), (0.05, 2.0, 0.5), (0.0, 5.0, 0.7), (0.3, 1.0, 0.5)]


def error_of(law: tuple[float, float, float], size: float) -> float:
    floor, scale, rate = law
    return min(1.0, floor + scale * size**-rate)


def points_of(shares: list[float], num_scored: int) -> list[Point]:
    return [
        Point(size=size, num_scored=num_scored, num_right=round(share * num_scored))
        for size, share in zip(SIZES, shares, strict=True)
    ]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("is_shared", [False, True], ids=["own examples", "same examples at every size"])
def test_a_known_law_lies_inside_the_interval_at_the_nominal_rate(law, is_shared):
    rng, num_scored, num_runs, num_inside = np.random.default_rng(1), 128, 150, 0
    errors = np.array([error_of(law, size) for size in SIZES])
    for _ in range(num_runs):
        draws = rng.random((1 if is_shared else len(SIZES), num_scored))
        right = (draws > errors[:, None]).mean(axis=1)
        found = predict_share(points_of(list(right), num_scored), ASKED, level=0.9)
        num_inside += found.low <= 1 - error_of(law, ASKED) <= found.high
    # Three standard errors of a rate of 0.9 in 150 runs.
    assert num_inside / num_runs > 0.9 - 3 * (0.09 / num_runs) ** 0.5


def test_more_scored_examples_narrow_the_interval():
    shares = [1 - error_of(LAWS[1], size) for size in SIZES]
    few, many = (predict_share(points_of(shares, n), ASKED) for n in (50, 2000))
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert many.value == pytest.approx(1 - error_of(LAWS[1], ASKED), abs=0.03)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(800, 1e6))
@settings(max_examples=25)
def test_the_interval_holds_the_value_and_stays_a_share(shares, asked):
    found = predict_share(points_of(shares, 64), asked)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_one_size_foretells_nothing():
    assert predict_share([Point(size=50, num_scored=64, num_right=32)] * 2, ASKED) is None


def test_nothing_learned_says_little_about_a_much_larger_training():
    found = predict_share(points_of([0.0, 0.0, 0.0], 64), 100 * ASKED)
    assert found.low == pytest.approx(0.0, abs=0.01)
