"""Scaling laws from graded answers: known exponents come back, intervals cover, and what no size reaches is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.scale.laws import Grid, fit_law, joint_mean_interval, mean_interval

SIZES = (50, 100, 200, 400, 800, 1600, 3200)


def draw_grid(
    floor: float, scale: float, rate: float, *, calls: int, seeds: int = 3, spread: float = 0.0, seed: int = 0
) -> Grid:
    """Graded answers of a known law; trainings of one size differ by `spread`, calls by their difficulty."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(calls)
    sizes, numbers, wrong = [], [], []
    for size in SIZES:
        for number in range(seeds):
            error = min(0.999, floor + scale * size**-rate) * float(np.exp(rng.normal(0, spread)))
            sizes.append([size])
            numbers.append(number)
            # Half of what is wrong is wrong because the call is hard, the other half by chance.
            is_hard = difficulty < error / 2
            wrong.append(is_hard | (rng.random(calls) < (error / 2) / (1 - error / 2)))
    return Grid.of(sizes, numbers, wrong)


@settings(max_examples=12, deadline=None)
@given(rate=st.floats(0.2, 0.9), floor=st.sampled_from([0.0, 0.05]), start=st.floats(0.5, 0.9))
def test_a_known_law_comes_back(rate: float, floor: float, start: float) -> None:
    scale = (start - floor) * SIZES[0] ** rate
    found = fit_law(draw_grid(floor, scale, rate, calls=20_000), ["examples"], num_draws=2)
    assert found is not None
    for size in SIZES:
        assert found.law.error_at([size]) == pytest.approx(floor + scale * size**-rate, abs=0.02)
    assert found.law.rates[0] == pytest.approx(rate, abs=0.15)
    assert found.law.floor == pytest.approx(floor, abs=0.06)


def test_intervals_cover_the_rate_as_often_as_they_say() -> None:
    rate, num = 0.5, 16
    covered = 0
    for number in range(num):
        grid = draw_grid(0.0, 0.8 * 50**rate, rate, calls=400, spread=0.05, seed=number)
        found = fit_law(grid, ["examples"], num_draws=25, seed=number)
        assert found is not None
        one = found.law.rate_intervals[0]
        covered += one.low <= rate <= one.high
    # Binomial(16, .9) is below 10 once in 2,000.
    assert covered >= 10


def test_two_variables_are_told_apart_also_where_more_is_worse() -> None:
    rng = np.random.default_rng(0)
    grid = [(n, m) for n in (1e5, 4e5, 1.6e6, 6.4e6) for m in (100, 400, 1600)]
    errors = [0.3 * (m / 400) ** -0.4 * (n / 8e5) ** 0.1 for n, m in grid]
    wrong = [rng.random(20_000) < error for error in errors]
    found = fit_law(Grid.of(grid, [0] * len(grid), wrong), ["parameters", "examples"], num_draws=2)
    assert found is not None
    assert found.law.rates[0] == pytest.approx(-0.1, abs=0.06) and found.law.rates[1] == pytest.approx(0.4, abs=0.15)


def test_what_a_wanted_error_needs_and_where_the_data_stops() -> None:
    found = fit_law(draw_grid(0.05, 0.8 * 50**0.5, 0.5, calls=5_000), ["examples"], num_draws=60)
    assert found is not None
    near, far, never = found.need(0.3), found.need(0.11), found.need(0.001)
    assert near.is_measured and near.size == pytest.approx(50 * (0.8 / 0.25) ** 2, rel=0.2)
    assert near.low is not None and near.high is not None and near.low <= near.size <= near.high
    assert not far.is_measured and far.size is not None and far.size > SIZES[-1]
    assert never.high is None and not never.is_measured
    before = found.need(0.9)
    assert before.size is not None and before.size < SIZES[0] and not before.is_measured


def test_one_seed_or_two_sizes_promise_no_more_than_they_can() -> None:
    grid = draw_grid(0.0, 0.8 * 50**0.5, 0.5, calls=200, seeds=1)
    found = fit_law(grid, ["examples"], num_draws=5)
    assert found is not None and found.law.num_seeds == 1
    few = Grid(grid.sizes[:2], grid.seeds[:2], grid.wrong[:2])
    assert fit_law(few, ["examples"]) is None


def test_a_perfect_grid_and_a_hopeless_one_are_laws_too() -> None:
    for share in (0.0, 1.0):
        grid = Grid.of([[size] for size in SIZES], [0] * len(SIZES), [[share] * 100] * len(SIZES))
        found = fit_law(grid, ["examples"], num_draws=5)
        assert found is not None and found.law.error_at([400]) == pytest.approx(share, abs=0.01)


def test_a_law_that_does_not_fit_says_so() -> None:
    """Error that falls, rises and falls again is no power law, however likely the likeliest one is."""
    rng = np.random.default_rng(0)
    errors = dict(zip(SIZES, (0.95, 0.9, 0.4, 0.3, 0.6, 0.7, 0.2), strict=True))
    wrong = [rng.random(400) < error for error in errors.values() for _ in range(2)]
    sizes, seeds = [[size] for size in SIZES for _ in range(2)], [0, 1] * len(SIZES)
    found = fit_law(Grid.of(sizes, seeds, wrong), ["examples"], num_draws=30)
    assert found is not None and found.law.num_missed >= 3 and not found.law.is_fitting
    good = fit_law(draw_grid(0.0, 0.8 * 50**0.5, 0.5, calls=400), ["examples"], num_draws=30)
    assert good is not None and good.law.is_fitting


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_calls_that_are_all_alike_are_not_sure_for_ever(value: float) -> None:
    """Sixty of sixty right may be 95% right: .95 ** 60 is .046."""
    mean, ends = mean_interval(np.full((3, 60), value))
    assert mean == value and ends.high - ends.low == pytest.approx(1 - 0.05 ** (1 / 60))
    assert 0 <= ends.low <= value <= ends.high <= 1
    _, apart = mean_interval(np.zeros((3, 60)), lowest=-1.0)
    assert apart.low == -apart.high < 0, "nothing differs in 60 calls, which is not that nothing does"
    _, joint = joint_mean_interval([np.zeros((3, 60)), np.zeros((3, 90))])
    assert joint.high == pytest.approx(1 - 0.05 ** (1 / 120)) == -joint.low


def test_trainings_that_differ_widen_the_interval_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    alike = np.stack([rng.random(500) < 0.5 for _ in range(3)])
    apart = np.stack([rng.random(500) < share for share in (0.3, 0.5, 0.7)])
    widths = []
    for values in (alike, apart):
        mean, found = mean_interval(values)
        assert found.low <= mean <= found.high
        widths.append(found.high - found.low)
    assert widths[1] > 2 * widths[0]


def test_the_seeds_of_a_shared_model_vary_the_mean_over_its_tasks() -> None:
    """Every task is off by the seed's own luck: the mean over tasks is no surer of it than one task is."""
    covered = 0
    for world in range(40):
        rng = np.random.default_rng(world)
        luck = rng.normal(0, 0.1, 5)
        tasks = [rng.random((5, 200)) < np.clip(0.5 + luck, 0, 1)[:, None] for _ in range(4)]
        _, ends = joint_mean_interval([task.astype(float) for task in tasks], num_draws=50, seed=world)
        covered += ends.low <= 0.5 <= ends.high
    # Of 90%; five seeds give a little less. With seeds drawn for each task alone it is 25 of 40.
    assert covered >= 28
