"""training/identity.py: unchanged tasks keep their ids whatever comes and goes beside them, and every change is an event."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from training.identity import Identity, match_tasks, similarity

NAMES = st.sampled_from([f"task-{i}" for i in range(6)])
LINES = {"a": 40, "b": 40, "c": 40, "d": 10}


def identity(variant: str, lines: dict[str, int] | None = None, **fields) -> Identity:
    return Identity(
        **{"surface": "s", "kind": "json", "variants": (variant,), "lines": lines or {variant: 20}, **fields}
    )


def match(previous: dict, current: dict, overlap: dict | None = None, calls: int = 100):
    found = match_tasks(previous, current, overlap or {}, dict.fromkeys(current, calls))
    return found.ids, [(e.kind, e.task_id, e.others) for e in found.events]


@given(st.sets(NAMES), st.sets(NAMES), st.dictionaries(st.tuples(NAMES, NAMES), st.integers(1, 100)))
def test_ids_are_distinct_unchanged_keys_stay_and_everything_is_accounted_for(old, new, overlap) -> None:
    previous, current = ({name: identity(name) for name in sorted(names)} for names in (old, new))
    num_calls = {key: max(1, sum(n for (_, k), n in overlap.items() if k == key)) for key in current}
    found = match_tasks(previous, current, overlap, num_calls)
    assert found.ids.keys() == current.keys() and len(set(found.ids.values())) == len(current)
    assert all(found.ids[key] == key for key in old & new)
    kinds = Counter((e.kind, e.task_id) for e in found.events)
    assert {t for k, t in kinds if k == "birth"} == set(found.ids.values()) - old
    assert {t for k, t in kinds if k == "retirement"} == old - set(found.ids.values())


def test_same_tasks_are_no_event() -> None:
    tasks = {"task-1": identity("x"), "task-2": identity("y")}
    assert match(tasks, tasks, {("task-1", "task-1"): 100, ("task-2", "task-2"): 100}) == ({t: t for t in tasks}, [])


def test_calls_that_went_to_a_task_keep_its_id_under_a_new_key() -> None:
    ids, events = match({"task-1": identity("x")}, {"task-9": identity("y")}, {("task-1", "task-9"): 100})
    assert (ids, events) == ({"task-9": "task-1"}, [])


def test_the_largest_part_of_a_split_keeps_the_id() -> None:
    current = {"task-8": identity("y"), "task-9": identity("z")}
    ids, events = match({"task-1": identity("x")}, current, {("task-1", "task-8"): 70, ("task-1", "task-9"): 30})
    assert ids == {"task-8": "task-1", "task-9": "task-9"}
    assert events == [("birth", "task-9", ("task-1",)), ("split", "task-1", ("task-9",))]


def test_the_largest_parent_of_a_merge_keeps_the_id() -> None:
    previous = {"task-1": identity("x"), "task-2": identity("y")}
    ids, events = match(previous, {"task-9": identity("z")}, {("task-1", "task-9"): 40, ("task-2", "task-9"): 60})
    assert ids == {"task-9": "task-2"}
    assert events == [("merge", "task-2", ("task-1",)), ("retirement", "task-1", ("task-2",))]


def test_an_edited_template_is_the_same_task_and_the_change_is_logged() -> None:
    edited = {**{k: LINES[k] for k in "abc"}, "e": 12}
    found = match_tasks({"task-1": identity("x", LINES)}, {"task-9": identity("y", edited)}, {}, {"task-9": 50})
    assert found.ids == {"task-9": "task-1"}
    assert [(e.kind, e.detail) for e in found.events] == [("drift", "template: 1 lines added, 1 removed")]


def test_other_tools_or_another_kind_of_answer_is_no_version() -> None:
    for changed in ({"surface": "t"}, {"kind": "text"}):
        ids, events = match({"task-1": identity("x", LINES)}, {"task-9": identity("y", LINES, **changed)})
        assert ids == {"task-9": "task-9"}
        assert [kind for kind, *_ in events] == ["birth", "retirement"]


@given(*[st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50))] * 2)
def test_similarity_is_a_share_one_for_equal_and_symmetric_for_equal_sizes(first, second) -> None:
    second = {line: first.get(line, size) for line, size in second.items()}
    assert 0 <= similarity(first, second) <= 1
    assert similarity(first, second) == similarity(second, first)
    assert similarity(first, first) == (1 if first else 0)
