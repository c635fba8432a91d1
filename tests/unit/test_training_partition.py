"""training/partition.py and the splits of training/discover.py: parts cover the task, keep their ids, and are found again."""

import random

import pytest

from cluster.records import Example
from cluster.store import Store
from training.discover import DiscoverConfig, Discovery, Previous, discover, load_previous, save_discovery, split_tasks
from training.partition import part_key, propose_partitions
from training.splits import SPLITS

TEXTS = (
    "The {} weather over the {} harbour brings wind and heavy rain tonight",
    "Your {} parcel from the {} depot was delivered with paper and a ribbon",
)
WORDS = "old new small large second third early late upper lower east west inner outer royal public".split()
MEASURED = "split: 2 parts are better"


def make_examples(num: int, first: int = 0, system: str = "Decide who takes it.") -> list[Example]:
    examples = []
    for index in range(first, first + num):
        rng = random.Random(index)
        text = TEXTS[index % 5 > 2].format(rng.choice(WORDS), rng.choice(WORDS))
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        examples.append(
            Example(
                example_id=f"{system[:4]}{index:05}",
                split=SPLITS[index // 5 % 4],
                session_id=f"s{index}",
                ts=float(index),
                request={"messages": messages},
                target={"role": "assistant", "content": ("alpha", "bravo")[rng.randrange(2)]},
                reference="llm",
                source_call_ids=(f"c{index}",),
            )
        )
    return examples


def find(examples: list[Example], previous: Previous | None = None) -> Discovery:
    return discover({split: [e for e in examples if e.split == split] for split in SPLITS}, DiscoverConfig(), previous)


def split(found: Discovery) -> Discovery:
    group = max(found.grouping.groups, key=lambda g: len(g.examples))
    (cut, parts), *_ = propose_partitions(group, DiscoverConfig(max_parts=2), lambda examples: True)
    assert sum(len(part.examples) for part in parts) == len(group.examples)
    return split_tasks(found, {group.key: cut}, {group.key: MEASURED})


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [*make_examples(400), *make_examples(60, system="Something else entirely.")]


@pytest.fixture(scope="module")
def before(examples: list[Example]) -> Discovery:
    return find(examples)


@pytest.fixture(scope="module")
def after(before: Discovery) -> Discovery:
    return split(before)


def test_parts_hold_every_call_of_the_task_and_the_route_model_finds_them(examples, before, after):
    assert (len(before.tasks), len(after.tasks)) == (2, 3)
    assert sum(t.num_calls for t in after.tasks) == len(examples) and not after.unassigned
    assert {e.example_id: after.route_model.task_of(e.request).task_id for e in examples} == after.assignment
    weather = [e for e in examples[:400] if "weather" in e.request["messages"][1]["content"]]
    parts = {after.assignment[e.example_id] for e in weather}
    assert parts == {max(after.tasks, key=lambda t: t.num_calls).task_id}, "topics are told apart"
    strange = {"messages": [{"role": "system", "content": "Decide who takes it."}, {"role": "user", "content": "9"}]}
    assert after.route_model.task_of(strange).task_id in after.identities, "a call of the site is of one of its parts"


def test_the_largest_part_keeps_the_id_the_other_task_is_untouched_and_the_event_tells_what_was_measured(before, after):
    old = {t.task_id for t in before.tasks}
    whole, other = before.tasks
    assert old < {t.task_id for t in after.tasks}
    assert next(t for t in after.tasks if t.task_id == other.task_id) == other
    assert max(after.tasks, key=lambda t: t.num_calls).task_id == whole.task_id
    (event,) = (e for e in after.events if e.kind == "split")
    (born,) = {t.task_id for t in after.tasks} - old
    assert (event.task_id, event.others, event.detail) == (whole.task_id, (born,), MEASURED)
    key = next(iter(after.grouping.parts))
    assert any(born == f"task-{part_key(key, number)[:12]}" for number in (0, 1)), "its key follows from the task's"


def test_a_split_stands_in_later_runs_with_all_ids_and_without_events(examples, after, tmp_path):
    store = Store(str(tmp_path))
    save_discovery(store, "one", after)
    again = find(examples, load_previous(store))
    assert again.assignment == after.assignment and again.events == ()
    save_discovery(store, "two", again)
    more = find([*examples, *make_examples(300, first=1000)], load_previous(store))
    assert more.events == () and {t.task_id for t in more.tasks} == {t.task_id for t in after.tasks}
    assert all(more.assignment[e.example_id] == after.assignment[e.example_id] for e in examples)


def test_without_the_route_model_the_task_is_one_again_under_its_id(examples, before, after):
    again = find(examples, Previous(after.identities, None, after.grouping.parts))
    assert {t.task_id for t in again.tasks} == {t.task_id for t in before.tasks}
    assert [e.kind for e in again.events] == ["retirement"] and again.grouping.parts == {}


def test_a_cut_with_a_part_that_cannot_stand_is_not_proposed(before):
    group = max(before.grouping.groups, key=lambda g: len(g.examples))
    sizes = []
    assert propose_partitions(group, DiscoverConfig(max_parts=2), lambda examples: sizes.append(len(examples))) == []
    assert 0 < sizes[0] < len(group.examples)
