"""training/splits.py: a session is in one split, learned splits never swap, and test is the newest where times tell."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.calls import write_calls
from cluster.records import AgentCall
from cluster.store import Store
from training.curate import CurateConfig, curate
from training.snapshot import CurationCounts, read_rows
from training.splits import SPLITS, SplitConfig, learned_split_of, split_of

SHARES = SplitConfig()
BEGAN = 1_750_000_000.0


def make_call(number: int, session: str, ts: float) -> AgentCall:
    return AgentCall(
        call_id=f"call-{session}-{number}",
        ts=ts,
        client_id="client",
        agent="desk",
        session_id=session,
        step=0,
        request={"messages": [{"role": "user", "content": f"question {number} of {session}"}]},
        response={"choices": [{"message": {"role": "assistant", "content": "yes"}}]},
    )


def split_sessions(folder, calls: list[AgentCall]) -> tuple[dict[str, str], CurationCounts]:
    """Session -> split, by what is stored."""
    store = Store(str(folder))
    write_calls(store, calls)
    snapshot = curate(store, CurateConfig(), b"k" * 32)
    pairs = {
        (row["session_id"], split)
        for split in SPLITS
        for row in read_rows(store, snapshot.id, split, ["session_id"]).to_pylist()
    }
    assert len(pairs) == len(dict(pairs)), "a session in two splits"
    return dict(pairs), snapshot.counts


@given(session_id=st.text())
def test_a_session_has_one_split(session_id):
    assert split_of(session_id, SHARES) in SPLITS
    assert split_of(session_id, SHARES) in ("test", learned_split_of(session_id, SHARES))


def test_known_sessions_never_move():
    """Moving a session would put calls that a model was trained on into its calibration."""
    known = {
        "": "train",
        "s0": "train",
        "s1": "calibration",
        "s2": "train",
        "session 7": "calibration",
        "d0f1c2": "train",
    }
    assert {name: learned_split_of(name, SHARES) for name in known} == known


def test_splits_have_their_shares():
    splits = [split_of(f"session {i}", SHARES) for i in range(20_000)]
    for split in SPLITS:
        assert splits.count(split) / 20_000 == pytest.approx(getattr(SHARES, split), abs=0.015)


def test_test_is_the_newest_sessions_by_their_first_call(tmp_path):
    began = {f"s{i}": BEGAN + 3600 * i for i in range(40)}
    calls = [make_call(n, name, ts + n * 500_000) for name, ts in began.items() for n in range(2)]
    random.Random(0).shuffle(calls)
    found, counts = split_sessions(tmp_path, calls)
    assert {name for name, split in found.items() if split == "test"} == {f"s{i}" for i in range(34, 40)}
    assert all(found[name] == learned_split_of(name, SHARES) for name, split in found.items() if split != "test")
    assert counts.test_drawn == {"by time": 40, "by hash": 0} and counts.num_sessions["test"] == 6


def test_an_import_without_times_is_drawn_by_hash(tmp_path):
    calls = [make_call(0, f"s{i}", BEGAN + i / 1000) for i in range(60)]
    dated = [make_call(0, f"d{i}", BEGAN - 1000 + 7 * i) for i in range(20)]
    found, counts = split_sessions(tmp_path, calls + dated)
    assert counts.test_drawn == {"by time": 20, "by hash": 60}
    assert {name: found[name] for name in found if name[0] == "s"} == {
        f"s{i}": split_of(f"s{i}", SHARES) for i in range(60)
    }
    assert {name for name in found if name[0] == "d" and found[name] == "test"} == {"d17", "d18", "d19"}


def test_four_sessions_give_test_one(tmp_path):
    found, _ = split_sessions(tmp_path, [make_call(0, f"s{i}", BEGAN + 60 * i) for i in range(4)])
    assert [name for name, split in found.items() if split == "test"] == ["s3"]


@settings(max_examples=15)
@given(
    times=st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True),
    later=st.lists(st.integers(0, 2 * 10**6), max_size=30, unique=True),
)
def test_when_more_arrives_nothing_moves_between_train_validation_and_calibration(tmp_path_factory, times, later):
    folder = tmp_path_factory.mktemp("splits")
    first = [make_call(0, f"a{i}", BEGAN + ts) for i, ts in enumerate(times)]
    second = [make_call(0, f"b{i}", BEGAN + ts + 0.5) for i, ts in enumerate(later)]
    before, _ = split_sessions(folder / "before", first)
    after, _ = split_sessions(folder / "after", first + second)
    for name, split in before.items():
        assert "test" in (split, after[name]) or split == after[name]
