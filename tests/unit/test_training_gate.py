"""The gate opens where a bound that holds says so, stops at the first failure, and says what to do where it refuses."""

import functools
import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import validate
from cluster.errors import ConfigError, InputError
from training.gate import (
    GateConfig,
    Outcome,
    certify,
    clopper_pearson_interval,
    clopper_pearson_upper,
    coverage_curve,
    minimum_calls,
    num_counted,
    one_call_per_session,
    plan_grid,
    refused_gate,
    release_delta,
)

PROMISE = {"epsilon": 0.05, "delta": 0.05, "reference": "llm", "population": "calls as served", "fingerprint": "f"}
CONFIG = GateConfig()


def outcomes(*groups: tuple[float, int, int]) -> list[Outcome]:
    """(confidence, calls, disagreements) groups, one call per session."""
    made = [(c, number >= num_disagreements) for c, num, num_disagreements in groups for number in range(num)]
    return [Outcome(confidence=c, agrees=agrees, session_id=f"s{i}") for i, (c, agrees) in enumerate(made)]


def drawn(confidences: np.ndarray, agrees: np.ndarray) -> list[Outcome]:
    rows = zip(confidences.tolist(), agrees.tolist(), strict=True)
    return [Outcome(confidence=c, agrees=a, session_id=f"s{i}") for i, (c, a) in enumerate(rows)]


@pytest.mark.parametrize(("epsilon", "calls"), [(0.02, 149), (0.05, 59), (0.10, 29)])
def test_minimum_calls_are_the_fewest_whose_bound_passes(epsilon, calls):
    assert minimum_calls(epsilon, 0.05) == calls
    assert clopper_pearson_upper(0, calls, 0.05) <= epsilon < clopper_pearson_upper(0, calls - 1, 0.05)


@pytest.mark.parametrize(
    ("errors", "calls", "delta", "bound"),
    [
        (0, 10, 0.05, 0.2588656),
        (1, 10, 0.05, 0.3941633),
        (2, 100, 0.05, 0.0616192),
        (5, 5, 0.05, 1.0),
        (0, 0, 0.05, 1.0),
    ],
)
def test_clopper_pearson_known_upper_bounds(errors, calls, delta, bound):
    assert clopper_pearson_upper(errors, calls, delta) == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize(
    ("errors", "calls", "lower", "upper"),
    [(0, 10, 0.0, 0.3084971), (1, 10, 0.0025286, 0.4450161), (10, 10, 0.6915029, 1.0)],
)
def test_clopper_pearson_known_intervals(errors, calls, lower, upper):
    assert clopper_pearson_interval(errors, calls) == pytest.approx((lower, upper), abs=1e-6)


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-6, 0.5))
def test_clopper_pearson_inverts_the_binomial_and_is_monotone(calls, share, delta):
    from scipy.stats import beta, binom

    errors = int(share * (calls - 1))
    bound = clopper_pearson_upper(errors, calls, delta)
    assert binom.cdf(errors, calls, bound) == pytest.approx(delta, rel=1e-6)
    assert bound == pytest.approx(beta.ppf(1 - delta, errors + 1, calls - errors), rel=1e-6)
    assert bound > errors / calls
    assert clopper_pearson_upper(errors + 1, calls, delta) > bound
    assert clopper_pearson_upper(errors, calls + 1, delta) < bound
    assert clopper_pearson_upper(errors, calls, delta / 2) > bound
    lower, upper = clopper_pearson_interval(errors, calls)
    assert lower <= errors / calls <= upper


def test_a_release_divides_delta_among_all_its_candidates():
    assert release_delta(0.05, 1) == 0.05
    assert release_delta(0.05, 20) == pytest.approx(0.0025)


@pytest.mark.parametrize("field", ["epsilon", "delta", "start_factor", "max_grid"])
def test_a_gate_config_out_of_bounds_names_the_field(field):
    with pytest.raises(ConfigError, match=field):
        validate(GateConfig, {field: 0})


@given(st.lists(st.sampled_from("abcdef")), st.integers(0, 5))
def test_one_call_of_every_session_is_drawn_in_order_whatever_the_others_do(sessions, seed):
    calls = [Outcome(confidence=i / 100, agrees=True, session_id=s) for i, s in enumerate(sessions)]
    kept = one_call_per_session(calls, seed)
    assert sorted(c.session_id for c in kept) == sorted(set(sessions))
    assert [c for c in calls if c in kept] == kept
    alone = one_call_per_session([c for c in calls if c.session_id == "a"], seed)
    assert alone == [c for c in kept if c.session_id == "a"]


def test_every_call_of_a_session_is_drawn_about_as_often():
    calls = [Outcome(confidence=i / 4, agrees=True, session_id="s") for i in range(4)]
    picks = [one_call_per_session(calls, seed)[0].confidence for seed in range(400)]
    assert all(60 < picks.count(i / 4) < 140 for i in range(4))


def test_two_calibration_calls_of_one_session_are_refused():
    twice = [Outcome(confidence=0.9, agrees=True, session_id="s")] * 2
    with pytest.raises(InputError, match="2 calls of 1 sessions.*one_call_per_session"):
        certify([0.5], twice, **PROMISE)


@pytest.mark.parametrize("grid", [[], [0.5, 0.9], [0.9, 0.9], [0.5, 0.0]])
def test_a_grid_that_does_not_go_down_is_refused(grid):
    with pytest.raises(InputError, match="grid"):
        certify(grid, outcomes((0.9, 100, 0)), **PROMISE)


def test_a_perfect_specialist_opens_with_the_minimum_of_calls_and_not_with_one_less():
    validation = outcomes((0.9, 40, 0))
    assert plan_grid(validation, 59, CONFIG, 0.05) == [0.9]
    gate = certify([0.9], outcomes((0.9, 59, 0)), **PROMISE)
    assert gate.is_open and gate.threshold == 0.9 and gate.coverage == 1.0
    assert gate.upper_bound == pytest.approx(0.0495, abs=1e-4)
    assert "needs 36 more examples" in plan_grid(validation, 58, CONFIG, 0.05)
    assert "needs 1 more examples" in certify([0.9], outcomes((0.9, 58, 0)), **PROMISE).refused


def test_the_grid_starts_where_enough_calls_are_expected_and_goes_down_to_the_lowest():
    validation = drawn(np.linspace(0.001, 1, 1000), np.ones(1000, bool))
    grid = plan_grid(validation, 500, CONFIG, 0.05)
    assert CONFIG.max_grid // 2 < len(grid) <= CONFIG.max_grid
    assert grid == sorted(set(grid), reverse=True)
    accepted = [sum(o.confidence >= t for o in validation) for t in grid]
    assert 1.6 * 58.4 <= accepted[0] * 0.5 < 3 * 58.4
    assert accepted[-1] == 1000
    assert np.ptp(np.diff(accepted)) <= 1


def test_errors_spread_over_the_ranking_start_the_grid_where_calibration_forgives_some():
    clean = drawn(np.linspace(0.001, 1, 1000), np.ones(1000, bool))
    noisy = drawn(np.linspace(0.001, 1, 1000), np.arange(1000) % 50 > 0)
    starts = {name: plan_grid(v, 500, CONFIG, 0.05)[0] for name, v in (("clean", clean), ("noisy", noisy))}
    assert starts["noisy"] < starts["clean"]

    def share_opened(start_at: float | None) -> float:
        opened = 0
        for seed in range(200):
            rng = np.random.default_rng([11, seed])
            calibration = drawn(rng.random(500), rng.random(500) >= 0.02)
            opened += certify([start_at], calibration, **PROMISE).is_open
        return opened / 200

    assert share_opened(starts["noisy"]) > share_opened(0.813) + 0.1, "0.813 is where 1.6 times the calls are accepted"


def test_the_grid_leaves_out_what_validation_rules_out():
    validation = outcomes((0.99, 300, 150), (0.9, 3000, 0), (0.5, 300, 2), (0.2, 2000, 2000))
    # 0.99 is ruled out, 0.2 too; at 0.5 calibration passes a little more likely than at 0.9.
    assert plan_grid(validation, 5600, CONFIG, 0.05) == [0.5]
    assert plan_grid(outcomes((0.9, 3000, 0), (0.5, 300, 2), (0.2, 2000, 2000)), 5600, CONFIG, 0.05) == [0.9, 0.5]


def test_answers_of_confidence_zero_are_never_in_the_grid():
    validation = outcomes((0.9, 200, 0), (0.0, 10, 0))
    assert plan_grid(validation, 500, CONFIG, 0.05) == [0.9]
    assert "none of 10 validation answers" in plan_grid(outcomes((0.0, 10, 10)), 500, CONFIG, 0.05)
    assert "none of 0 validation answers" in plan_grid([], 500, CONFIG, 0.05)


def test_too_few_calibration_calls_say_how_many_more_would_do():
    validation = outcomes((0.9, 100, 1), (0.4, 300, 150))
    refusal = plan_grid(validation, 200, CONFIG, 0.05)
    missing = int(re.search(r"needs (\d+) more examples", refusal).group(1))
    assert missing == 174
    assert plan_grid(validation, 200 + missing, CONFIG, 0.05) == [0.9]
    assert isinstance(plan_grid(validation, 200 + missing - 1, CONFIG, 0.05), str)


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0, 0.3), st.integers(0, 99))
def test_a_plan_is_a_valid_grid_or_a_reason_that_holds(num_validation, num_calibration, risk, seed):
    rng = np.random.default_rng(seed)
    validation = drawn(rng.random(num_validation).round(2), rng.random(num_validation) >= risk)
    plan = plan_grid(validation, num_calibration, CONFIG, 0.05)
    if isinstance(plan, list):
        assert 0 < len(plan) <= CONFIG.max_grid
        certify(plan, outcomes((0.5, 30, 0)), **PROMISE)
    elif "needs" in plan:
        missing = int(re.search(r"needs (\d+) more examples", plan).group(1))
        assert missing > 0
        assert isinstance(plan_grid(validation, num_calibration + missing, CONFIG, 0.05), list)
    else:
        share, num = re.search(r"agreement too low: at best (.*)% of the (\d+) most confident", plan).groups()
        num_disagreements = round((1 - float(share) / 100) * int(num))
        assert clopper_pearson_interval(num_disagreements, int(num))[0] > CONFIG.epsilon


def test_low_validation_agreement_refuses_before_calibration_is_spent():
    refusal = plan_grid(outcomes((0.9, 200, 30), (0.5, 200, 100)), 1000, CONFIG, 0.05)
    assert refusal.startswith(
        "validation agreement too low: at best 85.0% of the 200 most confident answers agree and 95.0%"
    )


def test_a_small_validation_split_is_given_the_benefit_of_its_sampling_error():
    assert plan_grid(outcomes((0.9, 20, 2)), 1000, CONFIG, 0.05) == [0.9]
    assert "agreement too low" in plan_grid(outcomes((0.9, 200, 20)), 1000, CONFIG, 0.05)


def test_the_last_threshold_before_the_first_failure_is_taken():
    gate = certify([0.9, 0.8, 0.7], outcomes((0.9, 100, 0), (0.8, 100, 1), (0.7, 100, 50), (0.1, 100, 0)), **PROMISE)
    assert (gate.threshold, gate.num_accepted, gate.num_disagreements) == (0.8, 200, 1)
    assert gate.coverage == 0.5 and gate.num_calibration == 400
    # Of 200 calls 181 are counted: 4 errors pass among them, and no fewer calls would forgive as many.
    assert gate.num_counted == 181 and gate.num_counted_disagreements in (0, 1)
    assert gate.upper_bound == pytest.approx(clopper_pearson_upper(gate.num_counted_disagreements, 181, 0.05))


def test_a_lower_threshold_that_would_pass_does_not_count_after_a_failure():
    calibration = outcomes((0.9, 100, 0), (0.8, 100, 15), (0.7, 2000, 0))
    assert clopper_pearson_upper(15, 2200, 0.05) < 0.05
    assert certify([0.9, 0.8, 0.7], calibration, **PROMISE).threshold == 0.9
    gate = certify([0.8, 0.7], calibration, **PROMISE)
    assert gate.threshold is None and not gate.is_open


def test_a_failed_first_threshold_says_what_disagreed_and_what_to_do():
    bad = certify([0.9], outcomes((0.9, 200, 40)), **PROMISE)
    assert re.match(
        r"disagreement 40 of 200 at the first threshold 0.9: bound 0.25\d\d > epsilon 0.05; retrain", bad.refused
    )
    close = certify([0.9], outcomes((0.9, 200, 8)), **PROMISE)
    assert "on more fresh examples" in close.refused
    few = certify([0.9], outcomes((0.9, 50, 0), (0.1, 50, 0)), **PROMISE)
    assert few.refused.startswith("too few calibration calls: needs 18 more examples; 50 of 100 reach")
    assert "needs" in certify([0.9], [], **PROMISE).refused


def test_a_refused_gate_accepts_nothing():
    for gate in (
        certify([0.9], outcomes((0.9, 200, 40)), **PROMISE),
        refused_gate("no", num_calibration=200, **PROMISE),
    ):
        assert (gate.threshold, gate.num_accepted, gate.coverage, gate.upper_bound) == (None, 0, 0.0, None)
        assert not gate.is_open and gate.num_calibration == 200


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 80), st.floats(0, 0.1)), max_size=6))
def test_an_open_gate_reports_what_its_calibration_says(groups):
    calibration = outcomes(*[(c / 10, num, int(num * risk)) for c, num, risk in groups])
    gate = certify([0.9, 0.7, 0.5, 0.3, 0.1], calibration, **PROMISE)
    if not gate.is_open:
        return
    accepted = [o for o in calibration if o.confidence >= gate.threshold]
    assert gate.num_accepted == len(accepted) >= minimum_calls(0.05, 0.05)
    assert gate.num_disagreements == sum(not o.agrees for o in accepted)
    assert gate.coverage == len(accepted) / len(calibration)
    assert gate.upper_bound <= gate.epsilon


@given(st.integers(0, 2000), st.floats(0.01, 0.5), st.floats(1e-4, 0.4))
def test_counted_are_the_fewest_calls_that_forgive_as_much(accepted, epsilon, delta):
    calls, errors = num_counted(accepted, epsilon, delta)
    assert calls <= accepted
    if errors < 0:
        assert calls == accepted < minimum_calls(epsilon, delta)
        return
    assert clopper_pearson_upper(errors, calls, delta) <= epsilon * (1 + 1e-9)
    assert clopper_pearson_upper(errors, calls - 1, delta) > epsilon * (1 - 1e-9)
    assert clopper_pearson_upper(errors + 1, accepted, delta) > epsilon * (1 - 1e-9)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=400), st.floats(0, 0.15), st.randoms())
def test_counting_fewer_never_closes_a_gate_and_knows_neither_order_nor_answers(rows, risk, random):
    calibration = drawn(np.array([c / 10 for c, _ in rows]), np.array([a or random.random() > risk for _, a in rows]))
    grid = [0.9, 0.7, 0.5, 0.3, 0.1]
    with_all = None
    for threshold in grid:
        its = [o for o in calibration if o.confidence >= threshold]
        if clopper_pearson_upper(sum(not o.agrees for o in its), len(its), 0.05) > 0.05:
            break
        with_all = threshold
    gate = certify(grid, calibration, **PROMISE)
    assert with_all is None or gate.threshold <= with_all
    random.shuffle(calibration)
    assert certify(grid, calibration, **PROMISE) == gate


def test_over_every_possible_calibration_a_promise_is_broken_with_at_most_delta():
    """Five calls, each high, low or out and right or wrong: all 7,776 gates, weighted by what is true of the population."""
    epsilon, delta, calls = 0.5, 0.51, 5
    kinds = [(confidence, agrees) for confidence in (0.9, 0.5, 0.1) for agrees in (True, False)]
    draws = list(itertools.product(range(6), repeat=calls))
    promise = PROMISE | {"epsilon": epsilon, "delta": delta}
    opened = []
    for draw in draws:
        calibration = drawn(np.array([kinds[k][0] for k in draw]), np.array([kinds[k][1] for k in draw]))
        opened.append(certify([0.9, 0.5], calibration, **promise).threshold or 1.0)
    of_kind, opened = np.array(draws), np.array(opened)
    assert num_counted(calls - 1, epsilon, delta) == (3, 1), "some draws leave calls out"
    for high, low in itertools.product((0.2, 0.5, 0.8), repeat=2):
        for risks in ((0.51, 0.51), (0.6, 0.3), (0.3, 0.9), (0.51, 0.0)):
            shares = np.array([high, (1 - high) * low, (1 - high) * (1 - low)])
            chance = np.array([s * x for s, r in zip(shares, (*risks, 0.5), strict=True) for x in (1 - r, r)])
            weights = chance[of_kind].prod(axis=1)
            below = (shares[:2] @ np.array(risks)) / shares[:2].sum()
            broken = (opened == 0.9) * (risks[0] > epsilon) + (opened == 0.5) * (below > epsilon)
            assert weights.sum() == pytest.approx(1) and weights @ broken <= delta


def violation_share_is_within(violations: int, runs: int, delta: float) -> bool:
    """The exact one-sided 95% lower bound of the share does not exceed delta."""
    return clopper_pearson_interval(violations, runs, level=0.9)[0] <= delta


def test_a_specialist_just_above_epsilon_everywhere_opens_in_at_most_delta_of_500_calibrations():
    grid = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    num_opened = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        calibration = drawn(rng.random(600), rng.random(600) >= 0.0501)
        num_opened += certify(grid, calibration, **PROMISE).is_open
    assert 0 < num_opened
    assert violation_share_is_within(num_opened, 500, 0.05)


def test_the_promise_holds_over_500_runs_and_the_lowest_passing_threshold_would_break_it():
    """Risk falls, then rises over epsilon: the whole journey from validation, and the shortcut beside it."""
    cuts = np.array([0.0, 0.5, 0.75, 1.0])
    risks = np.array([0.12, 0.09, 0.0])
    num_open = violations = shortcut_violations = 0
    upper = functools.cache(clopper_pearson_upper)
    for seed in range(500):
        rng = np.random.default_rng([7, seed])
        (c_val, a_val), (c_cal, a_cal) = (_answers(rng, cuts, risks, 400), _answers(rng, cuts, risks, 400))
        grid = plan_grid(drawn(c_val, a_val), 400, CONFIG, 0.05)
        assert isinstance(grid, list)
        gate = certify(grid, drawn(c_cal, a_cal), **PROMISE)
        num_open += gate.is_open
        violations += gate.is_open and _true_risk(gate.threshold, cuts, risks) > 0.05
        every = np.linspace(0.01, 0.99, 99)
        passing = (t for t in every if upper(int((~a_cal[c_cal >= t]).sum()), int((c_cal >= t).sum()), 0.05) <= 0.05)
        lowest = next(passing, None)
        shortcut_violations += lowest is not None and _true_risk(lowest, cuts, risks) > 0.05
    assert num_open > 250
    assert violation_share_is_within(violations, 500, 0.05)
    assert violations < shortcut_violations


def _answers(rng: np.random.Generator, cuts: np.ndarray, risks: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    confidences = rng.random(num)
    return confidences, rng.random(num) >= risks[np.searchsorted(cuts, confidences) - 1]


def _true_risk(threshold: float, cuts: np.ndarray, risks: np.ndarray) -> float:
    widths = np.clip(cuts[1:] - np.maximum(cuts[:-1], threshold), 0, None)
    return float((widths * risks).sum() / widths.sum())


def test_the_coverage_curve_goes_down_in_threshold_with_at_most_100_points():
    rng = np.random.default_rng(3)
    points = coverage_curve(drawn(rng.random(1000), rng.random(1000) >= 0.1))
    assert len(points) == 100
    assert points[-1]["coverage"] == 1.0
    for above, below in itertools.pairwise(points):
        assert above["threshold"] > below["threshold"] and above["coverage"] < below["coverage"]
    assert all(0 <= p["lower"] <= p["disagreement"] <= p["upper"] <= 1 for p in points)


def test_the_coverage_curve_counts_all_calls_and_joins_equal_confidences():
    points = coverage_curve(outcomes((0.9, 10, 1), (0.5, 10, 4), (0.0, 20, 20)))
    assert [(p["threshold"], p["coverage"], p["disagreement"]) for p in points] == [(0.9, 0.25, 0.1), (0.5, 0.5, 0.25)]
    assert coverage_curve([]) == []


@pytest.mark.parametrize("confidence", [float("nan"), -0.1, 1.1])
def test_an_outcome_has_a_confidence_in_the_unit_interval(confidence):
    with pytest.raises(ValueError, match="confidence"):
        Outcome(confidence=confidence, agrees=True, session_id="s")
