"""Calibration calls that were spent leave less delta for the next candidate, and the promise holds over all rounds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.store import Store
from training.gate import Outcome, certify, clopper_pearson_interval
from training.ledger import LEDGER_FOLDER, CalibrationLedger, share_of_round

IDS = [f"ex-{i}" for i in range(20)]


def test_the_shares_of_all_rounds_stay_within_delta():
    shares = [share_of_round(number) for number in range(60)]
    assert sum(shares) <= 1 and all(later < earlier for earlier, later in zip(shares, shares[1:], strict=False))


def test_another_candidate_on_spent_calls_is_a_later_round_and_fresh_calls_are_not(tmp_path):
    ledger = CalibrationLedger(Store(str(tmp_path)))
    assert ledger.spend("a", IDS[:10]) == 0
    assert ledger.round_of("b", IDS[9:]) == 1 and ledger.spend("b", IDS[9:]) == 1
    assert ledger.spend("c", IDS[5:15]) == 2
    assert ledger.round_of("d", ["ex-fresh"]) == 0


def test_a_conversion_that_runs_again_spends_once_and_the_ledger_outlives_the_process(tmp_path):
    store = Store(str(tmp_path))
    assert CalibrationLedger(store).spend("a", IDS) == 0
    assert CalibrationLedger(store).spend("b", IDS) == 1
    for _ in range(3):
        again = CalibrationLedger(store)
        assert (again.spend("a", IDS), again.spend("b", IDS)) == (0, 1)
    assert len(store.list(LEDGER_FOLDER)) == 2


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sets(st.sampled_from(IDS), min_size=1)), max_size=8))
def test_a_round_is_never_lower_than_the_number_of_others_that_met_these_calls(tmp_path_factory, uses):
    ledger = CalibrationLedger(Store(str(tmp_path_factory.mktemp("ledger"))))
    met: list[tuple[str, set[str]]] = []
    for candidate, ids in uses:
        others = {name for name, seen in met if name != candidate and seen & ids}
        known = any(name == candidate and ids <= seen for name, seen in met)
        number = ledger.spend(candidate, sorted(ids))
        assert known or number >= len(others)
        met.append((candidate, ids))


def test_trying_candidate_after_candidate_on_the_same_calls_keeps_the_promise_and_without_shares_breaks_it():
    epsilon, delta, num_calls, num_rounds = 0.05, 0.1, 150, 6
    sessions = [[Outcome(confidence=1, agrees=a, session_id=f"s{i}") for a in (False, True)] for i in range(num_calls)]

    def opens(agrees: np.ndarray, level: float) -> bool:
        calls = [pair[int(a)] for pair, a in zip(sessions, agrees, strict=True)]
        promise = {"epsilon": epsilon, "delta": level, "reference": "llm", "population": "p"}
        return certify([0.5], calls, fingerprint="f", **promise).is_open

    broken = {"shared": 0, "unshared": 0}
    for seed in range(500):
        rng = np.random.default_rng(seed)
        for name in broken:
            draws = rng.random((num_rounds, num_calls)) >= epsilon * 1.01
            shares = [share_of_round(number) if name == "shared" else 1 for number in range(num_rounds)]
            broken[name] += any(opens(draw, delta * share) for draw, share in zip(draws, shares, strict=True))
    assert clopper_pearson_interval(broken["shared"], 500)[0] <= delta
    assert clopper_pearson_interval(broken["unshared"], 500)[0] > delta


def test_what_was_spent_when_a_plan_was_made_is_told_apart_from_what_its_own_run_spends(tmp_path):
    ledger = CalibrationLedger(Store(str(tmp_path)))
    ledger.spend("a", IDS[:10])
    before = ledger.entries
    ledger.spend("b", IDS[5:15])
    assert ledger.spent_by(before) == set(IDS[:10]) and ledger.spent_by(ledger.entries) == set(IDS[:15])
    assert CalibrationLedger(Store(str(tmp_path))).entries == ledger.entries and ledger.spent_by(()) == set()
