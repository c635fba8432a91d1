"""When an endpoint may be called, told by a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.breaker import Breaker, Pauses


def _opened(now: list[float]) -> Breaker:
    breaker = Breaker(1, 10.0, lambda: now[0])
    permit = breaker.begin()
    assert permit is not None
    permit.fail()
    return breaker


@given(st.lists(st.sampled_from(["succeed", "fail", "leave"]), max_size=20), st.integers(1, 4))
def test_it_opens_exactly_after_failures_in_a_row(outcomes: list[str], limit: int) -> None:
    breaker, in_a_row = Breaker(limit, 10.0, lambda: 0.0), 0
    for outcome in outcomes:
        permit = breaker.begin()
        if permit is None:
            break
        getattr(permit, outcome)()
        in_a_row = {"succeed": 0, "fail": in_a_row + 1, "leave": in_a_row}[outcome]
    assert (breaker.begin() is not None) == (in_a_row < limit)


def test_one_probe_goes_out_and_no_other_until_it_has_ended() -> None:
    now = [0.0]
    breaker = _opened(now)
    now[0] = 9.0
    assert breaker.begin() is None and breaker.wait_s == 1.0
    now[0] = 10.0
    probe = breaker.begin()
    # However long it takes.
    now[0] = 1000.0
    assert probe is not None and breaker.begin() is None
    probe.succeed()
    assert breaker.begin() is not None and breaker.begin() is not None


def test_a_probe_that_fails_opens_it_again() -> None:
    now = [0.0]
    breaker = _opened(now)
    now[0] = 15.0
    probe = breaker.begin()
    assert probe is not None
    probe.fail()
    now[0] = 24.0
    assert breaker.begin() is None
    now[0] = 25.0
    assert breaker.begin() is not None


def test_a_probe_whose_client_left_makes_room_for_the_next() -> None:
    now = [0.0]
    breaker = _opened(now)
    now[0] = 10.0
    probe = breaker.begin()
    assert probe is not None
    probe.leave()
    assert breaker.begin() is not None


def test_a_call_from_before_that_fails_late_does_not_let_a_second_probe_out() -> None:
    now = [0.0]
    breaker = Breaker(1, 10.0, lambda: now[0])
    first, late = breaker.begin(), breaker.begin()
    assert first is not None and late is not None
    first.fail()
    now[0] = 10.0
    assert breaker.begin() is not None
    late.fail()
    now[0] = 100.0
    assert breaker.begin() is None


def test_a_pause_is_what_the_endpoint_asked_for_with_one_model() -> None:
    now = [0.0]
    pauses = Pauses(lambda: now[0])
    pauses.add("one", 7.0)
    pauses.add("one", 3.0)
    assert (pauses.wait_s("one"), pauses.wait_s("two")) == (7.0, 0.0)
    for number in range(10_000):
        now[0] = number / 1_000
        pauses.add(f"model-{number}", 0.001)
    assert len(pauses._until) <= 1_000 and pauses.wait_s("one") == 0.0
