"""training/leakage.py: what a held-out call says leaves train; what everybody says stays."""

from collections import Counter

import pytest

from cluster.records import AgentCall, Split
from training.leakage import LEAKED, SHARED_TEXT, without_leaks

LONG = "When will my new blue tent arrive?"
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "test")


def make_call(index: int, task: str, text: str, session: str = "") -> AgentCall:
    return AgentCall(
        call_id=f"call-{index}",
        ts=float(index),
        client_id="client",
        agent="desk",
        session_id=session or f"s{index}",
        step=0,
        request={"messages": [{"role": "system", "content": task}, {"role": "user", "content": text}]},
        response=None,
    )


def clean(**by_split: list[AgentCall]) -> tuple[list[str], Counter[str]]:
    dropped: Counter[str] = Counter()
    kept = without_leaks({split: by_split.get(split, []) for split in SPLITS}, dropped)
    return [call.call_id for call in kept], dropped


@pytest.mark.parametrize("split", ["calibration", "test"])
def test_a_user_text_of_a_held_out_call_of_another_task_leaves_train(split):
    train = [
        make_call(0, "Name the intent.", LONG.replace(" ", "\n  ")),
        make_call(1, "Name the intent.", LONG + "!"),
    ]
    assert clean(train=train, **{split: [make_call(2, "Write a reply.", LONG)]}) == (["call-1"], {SHARED_TEXT: 1})


def test_a_user_text_of_validation_stays_and_its_request_does_not():
    train = [make_call(0, "Name the intent.", LONG), make_call(1, "Write a reply.", LONG)]
    assert clean(train=train, validation=[make_call(2, "Write a reply.", LONG)]) == (["call-0"], {LEAKED: 1})


def test_short_texts_stay():
    train = [make_call(0, "Name the intent.", "yes please")]
    assert clean(train=train, test=[make_call(1, "Write a reply.", "yes please")]) == (["call-0"], {})


@pytest.mark.parametrize(("num_others", "is_kept"), [(4, False), (5, True)])
def test_a_text_that_many_sessions_say_stays(num_others, is_kept):
    """Many steps of one session are one session."""
    test = [
        make_call(i, f"step {i} of {other}", LONG, session=f"t{other}") for other in range(num_others) for i in (1, 2)
    ]
    kept, dropped = clean(train=[make_call(0, "Name the intent.", LONG)], test=test)
    assert (kept, dropped) == ((["call-0"], {}) if is_kept else ([], {SHARED_TEXT: 1}))


def test_many_sessions_are_a_share_of_a_big_store():
    others = [make_call(i, "Name the intent.", f"another question {i}") for i in range(100, 1100)]
    test = [make_call(i, f"case {i}", LONG) for i in range(1, 10)]
    assert clean(train=[make_call(0, "Name the intent.", LONG), *others], test=test)[1] == {SHARED_TEXT: 1}
