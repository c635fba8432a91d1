"""A day's money, told by a clock of the test's own."""

from __future__ import annotations

from cluster.spend import DailySpend


def test_a_day_that_is_spent_ends_at_midnight_utc() -> None:
    now = [10 * 86_400 + 80_000.0]
    spend = DailySpend(1.0, lambda: now[0])
    spend.add(0.75)
    assert spend.wait_s == 0
    spend.add(0.5)
    assert spend.wait_s == 6_400
    now[0] = 11 * 86_400.0
    assert spend.wait_s == 0
    spend.add(0.99)
    assert spend.wait_s == 0


def test_no_bound_bounds_nothing() -> None:
    spend = DailySpend(None)
    spend.add(1e9)
    assert spend.wait_s == 0
