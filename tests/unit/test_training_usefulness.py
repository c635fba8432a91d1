"""training/usefulness.py: a task is split only where the parts are surely better, on the same calls."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.usefulness import (
    Comparison,
    Usefulness,
    choose_split,
    compare,
    describe_comparison,
    describe_usefulness,
    group_topics,
)

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def of_counts(both: int, gains: int, losses: int, neither: int, num_compared: int = 1) -> Comparison:
    joint = [True] * both + [False] * gains + [True] * losses + [False] * neither
    apart = [True] * both + [True] * gains + [False] * losses + [False] * neither
    return compare(joint, apart, num_parts=2, num_compared=num_compared)


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.integers(1, 20))
def test_the_interval_holds_the_difference_and_turns_round_with_the_sides(pairs, num_compared):
    joint, apart = zip(*pairs, strict=True)
    found = compare(joint, apart, num_parts=2, num_compared=num_compared)
    turned = compare(apart, joint, num_parts=2, num_compared=num_compared)
    low, high = found.interval
    assert -1 <= low <= found.apart - found.joint <= high <= 1
    assert turned.interval == pytest.approx((-high, -low))
    assert not (found.is_better_apart and turned.is_better_apart)


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.integers(1, 20))
def test_more_comparisons_and_ties_never_split_what_fewer_kept_together(pairs, num_compared):
    joint, apart = zip(*pairs, strict=True)
    one, many = (compare(joint, apart, num_parts=2, num_compared=n) for n in (1, num_compared))
    assert many.interval[0] <= one.interval[0] and many.interval[1] >= one.interval[1]
    assert not compare(joint, joint, num_parts=2, num_compared=1).is_better_apart


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_split_that_does_not_help_is_hardly_ever_chosen(more, less):
    """By enumeration of all outcomes: for every truth without gain the chance to split is at most 2.5%."""
    gain, loss = min(more, less), max(more, less)
    chance = sum(
        math.comb(40, gains) * math.comb(40 - gains, losses) * gain**gains * loss**losses
        * max(0.0, 1 - gain - loss) ** (40 - gains - losses)
        for gains, losses in itertools.product(range(41), repeat=2)
        if gains + losses <= 40 and of_counts(0, gains, losses, 40 - gains - losses).is_better_apart
    )  # fmt: skip
    assert chance <= 0.025


def test_a_clear_gain_splits_and_a_tie_keeps_together():
    assert of_counts(100, 60, 5, 35).is_better_apart
    assert not of_counts(180, 6, 5, 9).is_better_apart
    assert of_counts(180, 11, 1, 8).is_better_apart and not of_counts(180, 11, 1, 8, num_compared=8).is_better_apart


def test_of_several_splits_the_surest_wins_and_of_equals_the_one_of_fewest_parts():
    good, better, bad = of_counts(100, 60, 5, 35), of_counts(100, 80, 5, 15), of_counts(180, 6, 5, 9)
    assert choose_split([bad, good, better]) == 2
    assert choose_split([bad]) is None and choose_split([]) is None
    assert choose_split([better.model_copy(update={"num_parts": 3}), better]) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 99))
def test_topics_join_into_every_number_of_parts_there_can_be(num_topics, most, seed):
    vectors = np.random.default_rng(seed).standard_normal((num_topics, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = group_topics(vectors, most)
    assert [len(set(parts)) for parts in found] == list(range(2, min(most, num_topics) + 1))
    for parts in found:
        assert len(parts) == num_topics and list(dict.fromkeys(parts)) == list(range(len(set(parts))))
    for coarse, fine in itertools.pairwise(found):
        assert len(set(zip(fine, coarse, strict=True))) == len(set(fine)), "a part of more is a part of one of fewer"


def test_near_topics_are_one_part():
    vectors = np.array([[1, 0.1, 0], [0, 0.1, 1], [1, 0, 0.1], [0, 0, 1]], dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert group_topics(vectors, 2) == [(0, 1, 0, 1)]


@pytest.mark.parametrize(("chosen", "verb"), [(None, "kept together: "), (0, "split: ")])
def test_a_person_reads_the_decision_and_its_numbers(chosen, verb):
    tie = of_counts(93, 0, 0, 7)
    facts = {"task_ids": ("task-1",), "snapshot": "s", "base": "scratch-micro", "num_steps": 60}
    found = Usefulness(reason="no split is surely better", compared=(tie,), confirmed=tie, chosen=chosen, **facts)
    told = describe_usefulness(found)
    assert told.startswith(verb)
    assert told.count(describe_comparison(tie)) == 2 and "60 steps on scratch-micro" in told
