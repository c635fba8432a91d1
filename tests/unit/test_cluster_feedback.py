"""Feedback is read as it was written, and gives a call the latest word of those who may judge it."""

from __future__ import annotations

import pathlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.feedback import (
    CONTENT_COLUMNS,
    FEEDBACK_FOLDER,
    Feedback,
    Outcomes,
    read_feedback,
    read_outcomes,
    write_feedback,
)
from cluster.records import AgentCall
from cluster.store import Store


def feedback(number: int, **extra: Any) -> Feedback:
    return Feedback(**{"feedback_id": f"f{number}", "ts": float(number), "client_id": "mine", **extra})


def make_call(**extra: Any) -> AgentCall:
    facts = {"call_id": "c", "ts": 0.0, "client_id": "mine", "agent": "a", "session_id": "s", "step": 0}
    return AgentCall(**{**facts, "request": {"messages": []}, "response": None, **extra})


def test_feedback_is_read_as_it_was_written_once_for_each_id(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path))
    rows = [
        feedback(1, call_id="c", score=0.5),
        feedback(100_000, session_id="s", label="bad", text="Wrong caf\u00e9 \U0001f600"),
        feedback(2, call_id="c", is_curated=True, score=1.0),
    ]
    paths = write_feedback(store, rows)
    # A retry after a failure may store them twice.
    assert set(paths).isdisjoint(write_feedback(store, rows)) and len(paths) == 2
    assert all(path.startswith(f"{FEEDBACK_FOLDER}/date=1970-01-0") for path in paths)
    assert read_feedback(store) == sorted(rows, key=lambda row: row.ts)
    assert set(CONTENT_COLUMNS) <= set(Feedback.model_fields)
    assert read_outcomes(store).of(make_call()) == {"score": 1.0, "label": "bad", "text": "Wrong caf\u00e9 \U0001f600"}


def test_a_store_without_feedback_changes_no_outcome(tmp_path: pathlib.Path) -> None:
    outcomes = read_outcomes(Store(str(tmp_path)))
    assert outcomes.of(make_call()) is None
    assert outcomes.of(make_call(outcome={"reward": 1.0})) == {"reward": 1.0}


def test_the_latest_word_counts_and_a_calls_own_beats_its_sessions() -> None:
    outcomes = Outcomes(
        [
            feedback(9, session_id="s", score=0.9, label="session"),
            feedback(2, call_id="c", score=0.2),
            feedback(3, call_id="c", score=0.3),
            feedback(1, call_id="c", score=0.1, text="early"),
            feedback(4, call_id="other", score=0.4),
        ]
    )
    assert outcomes.of(make_call()) == {"score": 0.3, "label": "session", "text": "early"}
    assert outcomes.of(make_call(call_id="new", outcome={"score": 0.0, "reward": 1.0})) == {
        "score": 0.9,
        "label": "session",
        "reward": 1.0,
    }
    assert outcomes.of(make_call(call_id="new", session_id="t")) is None


def test_nobody_but_a_curator_judges_anothers_calls() -> None:
    theirs = feedback(1, client_id="theirs", call_id="c", score=0.0)
    assert Outcomes([theirs]).of(make_call()) is None
    assert Outcomes([theirs.model_copy(update={"is_curated": True})]).of(make_call()) == {"score": 0.0}


@given(st.permutations([feedback(n, call_id="c", score=float(n)) for n in range(5)]), st.integers(0, 5))
def test_the_order_of_reading_does_not_matter(rows: list[Feedback], num_twice: int) -> None:
    assert Outcomes([*rows, *rows[:num_twice]]).of(make_call()) == {"score": 4.0}
