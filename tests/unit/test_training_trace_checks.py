"""training/trace_checks.py: an answer that changed, contradictions and templates out of use do not reach a training."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.records import Example
from training.trace_checks import CHANGED, CONTRADICTED, OUTDATED, check_traces


def example(number: int, question: str, answer: str, ts: float, calls: int = 1) -> Example:
    return Example(
        example_id=f"ex-{number}",
        split="train",
        session_id=f"s{number}",
        ts=ts,
        request={"messages": [{"role": "user", "content": question}], "temperature": number},
        target={"role": "assistant", "content": answer},
        reference="llm",
        source_call_ids=tuple(f"c{number}-{k}" for k in range(calls)),
    )


def check(examples, *, times=None, variants=None, since_ts=0.0, min_recent=1_000):
    return check_traces(
        examples, "label", times or {}, variants or {e.example_id: "v" for e in examples}, since_ts, min_recent
    )


def test_what_the_llm_said_before_it_changed_its_answer_is_left_out():
    found = check([example(1, "q", "old", 1.0, 5), example(2, "q", "new", 9.0), example(3, "other", "old", 2.0)])
    assert found.quarantined == {"ex-1": CHANGED} and found.num_contradicted == 0 and found.num_repeated == 6


def test_an_old_answer_that_came_again_later_is_a_contradiction_and_the_majority_stays():
    examples = [example(1, "q", "red", 1.0, 3), example(2, "q", "blue", 5.0)]
    found = check(examples, times={"c1-2": 8.0})
    assert found.quarantined == {"ex-2": CONTRADICTED} and (found.num_repeated, found.num_contradicted) == (4, 1)
    tie = check([example(1, "q", "red", 1.0, 2), example(2, "q", "blue", 5.0, 2)], times={"c1-1": 8.0})
    assert set(tie.quarantined) == {"ex-1", "ex-2"}


def test_answers_that_only_look_different_are_one_answer():
    examples = [example(1, "q", '{"a":1,"b":2}', 1.0), example(2, "q", '{"b": 2, "a": 1}', 5.0)]
    found = check_traces(examples, "json", {}, {"ex-1": "v", "ex-2": "v"}, 0.0, 1_000)
    assert found.quarantined == {} and found.num_contradicted == 0


def test_a_template_that_no_recent_call_has_is_out_of_use_once_enough_have_another():
    examples = [example(n, f"q{n}", "a", float(n)) for n in range(10)]
    variants = {f"ex-{n}": "old" if n < 6 else "new" for n in range(10)}
    found = check(examples, variants=variants, since_ts=6.0, min_recent=4)
    assert found.outdated == {"old"}
    assert set(found.quarantined) == {f"ex-{n}" for n in range(6)} and set(found.quarantined.values()) == {OUTDATED}
    assert check(examples, variants=variants, since_ts=6.0, min_recent=5).quarantined == {}
    assert check(examples, variants=variants, since_ts=5.0, min_recent=4).quarantined == {}, "the old one is in use"


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from("abc"), st.floats(0, 100), st.integers(1, 3)), max_size=25)
)
def test_what_is_kept_and_what_is_left_out_is_everything_and_no_kept_request_has_two_answers(rows):
    examples = [example(n, f"q{q}", answer, ts, calls) for n, (q, answer, ts, calls) in enumerate(rows)]
    found = check(examples)
    assert {e.example_id for e in found.kept} | set(found.quarantined) == {e.example_id for e in examples}
    assert not {e.example_id for e in found.kept} & set(found.quarantined)
    answers: dict[str, set[str]] = {}
    for e in found.kept:
        answers.setdefault(e.request["messages"][0]["content"], set()).add(e.target["content"])
    assert all(len(one) == 1 for one in answers.values())
    assert sum(found.counts.values()) == len(found.quarantined)
    assert found.num_contradicted <= found.num_repeated <= sum(calls for *_, calls in rows)
