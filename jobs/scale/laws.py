"""Graded answers of a grid -> a power law with intervals, and how much of a variable a wanted error needs. Pure.

The law is error = floor + scale * x1 ** -rate1 * x2 ** -rate2 ..., cut at 1 (Hestness et al. 2017, arXiv 1712.00409; the
product of several variables as in Kaplan et al. 2020, arXiv 2001.08361). It is fitted to counts of wrong answers by their
binomial likelihood. A rate below 0 says that more of the variable is worse.

Intervals come from a bootstrap over seeds and calls. Seeds: of S trainings of one size S - 1 are drawn (Rao and Wu 1988,
"Resampling inference with complex survey data", JASA 83: with S draws the variance would be (S - 1) / S of what it is).
Calls: answers of all sizes and seeds to the same calls are drawn together, because they err together. With one seed only
the calls vary, and the interval says nothing of another training. A law that is not of this form gets an interval all
the same: `Law.num_missed` tells. Calls that are all answered alike have no bootstrap; what so many calls would miss is said
instead (Clopper and Pearson).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from cluster.records import Record

LEVEL = 0.9
NUM_DRAWS = 300
_LEAST_ERROR = 1e-4
_SAME = 1e-9
"""Draws that differ less differ by rounding."""
_RATES = (-1.0, 3.0)
_STARTS = (0.1, 0.4, 1.0)
_FALLING = (0.5, 0.98)
"""Shares of the error that still fall with size, where a fit begins."""
_PULL = 1e-3
"""The faintest pull of the falling share to a half: few points cannot tell a law without a floor from one with a small one."""


class Interval(Record):
    """Ends of a two-sided bootstrap interval of level `LEVEL`."""

    low: float
    high: float


class Law(Record):
    """A fitted law."""

    variables: tuple[str, ...]
    rates: tuple[float, ...]
    floor: float = Field(ge=0, le=1)
    scale: float
    rate_intervals: tuple[Interval, ...] = ()
    floor_interval: Interval | None = None
    num_points: int
    """Different sizes; with as many as parameters any law passes through them."""
    num_seeds: int
    residual: float
    """Largest difference of a measured mean error from the law."""
    num_missed: int
    """Of the sizes, those at which the law lies outside the interval of the measured mean error."""

    @property
    def is_fitting(self) -> bool:
        """Whether the law misses no more sizes than intervals of that level do by chance, rounded up."""
        return self.num_missed <= math.ceil((1 - LEVEL) * self.num_points)

    def error_at(self, sizes: Sequence[float]) -> float:
        """What the law says of such sizes, between 0 and 1."""
        fallen = math.prod(size**-rate for size, rate in zip(sizes, self.rates, strict=True))
        return min(1.0, self.floor + self.scale * fallen)


class Need(Record):
    """How much of the first variable an error needs, by the law."""

    error: float
    size: float | None
    """None: the law's floor lies above it, so that no amount would do."""
    low: float | None
    high: float | None
    """None: laws within the interval never reach it."""
    is_measured: bool
    """Whether it lies within the sizes that were measured; else it is where the law goes on, not what was seen."""


class Grid(NamedTuple):
    """What was measured: a row a training."""

    sizes: np.ndarray
    """[K, V] values of the variables."""
    seeds: Sequence[int]
    """[K]"""
    wrong: np.ndarray
    """[K, C] of 0 and 1: wrong answers to the same C calls."""

    @classmethod
    def of(cls, sizes: Sequence[Sequence[float]], seeds: Sequence[int], wrong: Sequence[Sequence[bool]]) -> Grid:
        return cls(np.array(sizes, float), tuple(seeds), np.array(wrong, float))


class Fit(NamedTuple):
    """A law, and the laws of the bootstrap's draws."""

    law: Law
    draws: np.ndarray
    """[B, 2 + V]: floor, scale, rates."""
    smallest: float
    largest: float
    """Of the first variable."""

    def need(self, error: float, others: Sequence[float] = ()) -> Need:
        """How much of the first variable reaches `error`, the other variables being `others`."""
        law = self.law
        size = _solve(law.floor, law.scale, law.rates, error, others)
        found = [_solve(row[0], row[1], tuple(row[2:]), error, others) for row in self.draws]
        ends = sorted(math.inf if one is None else one for one in found)
        tail = (1 - LEVEL) / 2
        low, high = ends[int(tail * len(ends))], ends[min(len(ends) - 1, int((1 - tail) * len(ends)))]
        return Need(
            error=error,
            size=size,
            low=low if math.isfinite(low) else None,
            high=high if math.isfinite(high) else None,
            is_measured=size is not None and self.smallest <= size <= self.largest,
        )


def fit_law(grid: Grid, variables: Sequence[str], *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Fit | None:
    """Fit, and draw again.

    Args:
        variables: names of the columns of `grid.sizes`.

    Returns:
        None where a variable has fewer than three values, for lack of anything to fit.
    """
    if any(len(set(column)) < 3 for column in grid.sizes.T):
        return None
    pivot = np.exp(np.log(grid.sizes).mean(axis=0))
    points, groups = _group(grid)
    logs = np.log(points / pivot)
    num_calls = grid.wrong.shape[1]
    means = np.array([grid.wrong[rows].mean() for rows in groups])
    best = min(
        (_minimise(logs, means, num_calls, start) for start in _starts(means, logs.shape[1])), key=lambda f: f[1]
    )
    rng = np.random.default_rng(seed)
    drawn = np.array([_redraw(grid, groups, rng) for _ in range(num_draws)])
    draws = [_minimise(logs, one, num_calls, best[0])[0] for one in drawn]
    fitted = _errors(best[0], logs)
    natural = np.array([_natural(theta, pivot) for theta in [best[0], *draws]])
    found = natural[1:]
    law = Law(
        variables=tuple(variables),
        floor=float(natural[0][0]),
        scale=float(natural[0][1]),
        rates=tuple(map(float, natural[0][2:])),
        rate_intervals=tuple(interval(found[:, 2 + v]) for v in range(len(variables))),
        floor_interval=interval(found[:, 0]),
        num_points=len(points),
        num_seeds=len(set(grid.seeds)),
        residual=float(np.abs(fitted - means).max()),
        num_missed=sum(
            not ends.low <= error <= ends.high
            for error, mean, own in zip(fitted, means, drawn.T, strict=True)
            for ends in [_around(float(mean), own, num_calls)]
        ),
    )
    return Fit(law, found, float(grid.sizes[:, 0].min()), float(grid.sizes[:, 0].max()))


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The middle `LEVEL` of some draws."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.asarray(values, float), [tail, 1 - tail])
    return Interval(low=float(low), high=float(high))


def mean_interval(
    values: np.ndarray, *, lowest: float = 0.0, num_draws: int = NUM_DRAWS, seed: int = 0
) -> tuple[float, Interval]:
    """Mean of [S, C] graded calls of S seeds, with an interval over both.

    Args:
        lowest: a call's lowest value; -1 for differences.

    Example:
        >>> round(mean_interval(np.ones((3, 50)))[1].low, 2)
        0.94
    """
    grid = Grid(np.ones((len(values), 1)), tuple(range(len(values))), np.asarray(values, float))
    rng = np.random.default_rng(seed)
    rows = [list(range(len(values)))]
    mean = float(np.mean(values))
    drawn = [_redraw(grid, rows, rng)[0] for _ in range(num_draws)]
    return mean, _around(mean, drawn, grid.wrong.shape[1], lowest)


def joint_mean_interval(
    groups: Sequence[np.ndarray], *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> tuple[float, Interval]:
    """Mean over groups of differences of [S, C] graded calls, C of each group's own, whose seeds err together: these are drawn
    for all groups at once, calls for each."""
    rng = np.random.default_rng(seed)
    num_seeds = len(groups[0])
    found = []
    for _ in range(num_draws):
        rows = rng.choice(num_seeds, size=max(1, num_seeds - 1))
        weights = [rng.multinomial(one.shape[1], np.full(one.shape[1], 1 / one.shape[1])) for one in groups]
        found.append(np.mean([(one[rows] @ own).mean() / own.sum() for one, own in zip(groups, weights, strict=True)]))
    mean = float(np.mean([one.mean() for one in groups]))
    return mean, _around(mean, found, len(groups) * min(one.shape[1] for one in groups), lowest=-1.0)


def _around(mean: float, drawn: Sequence[float] | np.ndarray, num_calls: int, lowest: float = 0.0) -> Interval:
    """The interval of the draws; where all calls are alike, and so all draws, what so many calls may hide."""
    ends = interval(drawn)
    if ends.high - ends.low > _SAME:
        return ends
    hidden = 1 - ((1 - LEVEL) / 2) ** (1 / num_calls)
    return Interval(low=max(lowest, mean - hidden), high=min(1.0, mean + hidden))


def _group(grid: Grid) -> tuple[np.ndarray, list[list[int]]]:
    """Different sizes, and the rows of each."""
    found: dict[tuple[float, ...], list[int]] = {}
    for row, sizes in enumerate(grid.sizes):
        found.setdefault(tuple(sizes), []).append(row)
    return np.array(list(found)), list(found.values())


def _redraw(grid: Grid, groups: Sequence[Sequence[int]], rng: np.random.Generator) -> np.ndarray:
    """Mean error of each size, from seeds and calls drawn anew."""
    num_calls = grid.wrong.shape[1]
    weights = rng.multinomial(num_calls, np.full(num_calls, 1 / num_calls)) / num_calls
    means = grid.wrong @ weights
    drawn = [rng.choice(rows, size=max(1, len(rows) - 1)) for rows in groups]
    return np.array([means[rows].mean() for rows in drawn])


def _starts(means: np.ndarray, num_variables: int) -> list[np.ndarray]:
    height = _logit(np.clip(means.mean(), 0.01, 0.99))
    return [np.array([height, _logit(falling), *[rate] * num_variables]) for falling in _FALLING for rate in _STARTS]


def _minimise(logs: np.ndarray, means: np.ndarray, num_calls: int, start: np.ndarray) -> tuple[np.ndarray, float]:
    """Likeliest law by its parameters (height at the pivot, falling share, rates), and its negative log-likelihood."""
    from scipy.optimize import minimize

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log-likelihood and its gradient."""
        height, falling = _sigmoid(theta[0]), _sigmoid(theta[1])
        fallen = _fallen(theta, logs)
        whole = height * (1 + falling * (fallen - 1))
        errors = np.clip(whole, _LEAST_ERROR, 1 - _LEAST_ERROR)
        likelihood = means * np.log(errors) + (1 - means) * np.log1p(-errors)
        slope = -num_calls * (means / errors - (1 - means) / (1 - errors)) * (whole == errors)
        by_rate = -(slope * height * falling * fallen) @ logs
        gradient = [
            slope @ whole * (1 - height),
            height * falling * (1 - falling) * (slope @ (fallen - 1)) + 2 * _PULL * theta[1],
            *by_rate,
        ]
        return float(-num_calls * likelihood.sum() + _PULL * theta[1] ** 2), np.array(gradient)

    bounds = [(-9.0, 9.0), (-4.0, 6.0), *[_RATES] * logs.shape[1]]
    found: Any = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 200})
    return found.x, float(found.fun)


def _errors(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    height, falling = _sigmoid(theta[0]), _sigmoid(theta[1])
    return np.clip(height * (1 + falling * (_fallen(theta, logs) - 1)), _LEAST_ERROR, 1 - _LEAST_ERROR)


def _fallen(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """By how much each size's error is that of the pivot, without the floor."""
    return np.exp(np.clip(-logs @ theta[2:], -30, 30))


def _natural(theta: np.ndarray, pivot: np.ndarray) -> list[float]:
    """[floor, scale, rates] of the law in the variables themselves."""
    height, falling, rates = _sigmoid(theta[0]), _sigmoid(theta[1]), theta[2:]
    return [height * (1 - falling), height * falling * float(np.exp(np.log(pivot) @ rates)), *rates]


def _solve(floor: float, scale: float, rates: Sequence[float], error: float, others: Sequence[float]) -> float | None:
    """Size of the first variable at which the law is `error`; None where it never is."""
    if error <= floor or rates[0] <= 0:
        return None
    rest = scale * math.prod(size**-rate for size, rate in zip(others, rates[1:], strict=True))
    power = math.log(rest / (error - floor)) / rates[0]
    return math.exp(power) if power < 690 else None


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
