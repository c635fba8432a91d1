"""Replaceability: an interval that holds, ignorance that shows, and the paper's guesses beside it."""

import random

import pytest

from training.replaceability import PAPER_GUESSES, SiteFacts, guess_for, replaceability


def test_sites_weigh_by_the_agents_own_calls_and_what_stays_counts_as_none():
    facts = [
        SiteFacts("a", "route", 600, num_measured=100, num_kept=90),
        SiteFacts("a", "chat", 400, stays="answers a person"),
        SiteFacts("b", "route", 10, num_measured=100, num_kept=90),
    ]
    one, other = replaceability(facts)
    assert (one.agent, one.num_calls, other.agent) == ("a", 1000, "b")
    assert one.share == pytest.approx(0.54) and other.share == pytest.approx(0.9)
    assert one.share_known == pytest.approx(1.0)
    assert one.interval[0] < 0.54 < one.interval[1] < 0.6, "what stays cannot be above 60%"


def test_what_nothing_is_known_of_is_not_claimed_and_widens_the_interval_in_full():
    (found,) = replaceability([SiteFacts("a", "new", 300), SiteFacts("a", "old", 700, stays="refused")])
    assert (
        found.share == 0.0 and found.interval == (0.0, pytest.approx(0.3)) and found.share_known == pytest.approx(0.7)
    )


def test_an_agent_without_calls_says_nothing():
    (found,) = replaceability([SiteFacts("a", "none", 0)])
    assert (found.share, found.interval) == (0.0, (0.0, 1.0))
    assert replaceability([]) == []


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    truth = {"x": (500, 40, 0.95), "y": (300, 25, 0.6), "z": (200, 60, 0.1)}
    value = sum(calls * rate for calls, _, rate in truth.values()) / 1000
    draw, num_held = random.Random(7), 0
    for _ in range(400):
        facts = [
            SiteFacts("a", site, calls, num_measured=n, num_kept=sum(draw.random() < rate for _ in range(n)))
            for site, (calls, n, rate) in truth.items()
        ]
        low, high = replaceability(facts)[0].interval
        num_held += low <= value <= high
    assert num_held >= 0.93 * 400


def test_many_sites_are_known_better_than_one_but_never_better_than_their_sum():
    many = [SiteFacts("a", str(k), 100, num_measured=50, num_kept=40) for k in range(9)]
    (wide,), (narrow,) = replaceability(many[:1]), replaceability(many)
    assert wide.share == pytest.approx(narrow.share) == pytest.approx(0.8)
    assert wide.interval[0] < narrow.interval[0] < 0.8 < narrow.interval[1] < wide.interval[1]


def test_the_papers_guesses_stand_beside_the_agents_it_names():
    assert set(PAPER_GUESSES.values()) == {0.6, 0.4, 0.7}
    assert guess_for("open-operator") == 0.4 and guess_for("metagpt") == 0.6 and guess_for("helpdesk") is None
    assert replaceability([SiteFacts("CRADLE", "s", 1)])[0].guess == 0.7
