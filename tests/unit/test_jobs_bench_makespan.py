"""bench/makespan.py: it orders as the fleet does, and sees an order that is bad."""

import pytest

from jobs.bench.makespan import measure_makespan
from training.fleet import plan_fleet

SECONDS = {"a": 61.0, "b": 40.0, "c": 33.0, "d": 30.0, "e": 18.0, "f": 17.0, "g": 15.0, "h": 14.0}


def test_fleets_of_all_sizes_stay_within_grahams_bound_of_the_least_possible():
    found = measure_makespan(SECONDS, 4)
    assert set(found["fleet_over_bound"]) == {"4", "8", "16", "32"}
    for count, worst in found["fleet_over_bound_worst"].items():
        assert 1 <= found["fleet_over_bound"][count] <= worst
    # The bound may lie below the best schedule, and does where few long runs share the places.
    assert found["fleet_over_bound_worst"]["32"] <= 4 / 3
    assert found["fleet_over_bound"]["4"] == pytest.approx(1.0), "four runs on four places"


def test_an_expectation_that_is_wrong_costs_time():
    right = measure_makespan(SECONDS, 2)["fleet_over_bound"]["8"]
    wrong = measure_makespan(SECONDS, 2, sizes={name: -taken for name, taken in SECONDS.items()})
    assert wrong["fleet_over_bound"]["8"] > right + 0.02
    scaled = measure_makespan(SECONDS, 2, sizes={name: 7 * taken for name, taken in SECONDS.items()})
    assert scaled == measure_makespan(SECONDS, 2)


def test_a_plan_orders_by_what_is_expected_and_counts_what_it_took():
    plan = plan_fleet({"a": 1, "b": 2, "c": 3}, 1, {"a": 9, "b": 8, "c": 7})
    assert plan.places == (("a", "b", "c"),) and plan.makespan_s == 6
