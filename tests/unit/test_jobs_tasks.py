"""jobs/tasks.py: a person sees each task with its template, neighbours and events, and content only as a curator."""

import json

import pytest

from cluster.errors import ConfigError, InputError
from cluster.records import Example
from cluster.store import Store
from jobs.__main__ import main
from jobs.tasks import describe_task, list_tasks
from training.discover import DiscoverConfig, discover, load_previous, save_discovery
from training.splits import SPLITS

SHARED = "Answer with JSON and nothing else, please.\nNever invent a number that was not said."


def make_example(index: int, system: str, key: str) -> Example:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": f"item {index}"}]
    return Example(
        example_id=f"{key}-{index:03}",
        split=SPLITS[index % 4],
        session_id=f"s{index}",
        ts=float(index),
        request={"messages": messages},
        target={"role": "assistant", "content": f'{{"{key}": 1}}'},
        reference="llm",
        source_call_ids=(f"{key}-{index}",),
    )


@pytest.fixture
def store(tmp_path) -> Store:
    found = Store(str(tmp_path / "store"))
    for snapshot, kinds in (("one", ["order"]), ("two", ["order", "invoice"])):
        calls = [make_example(i, f"Read the {kind}.\n{SHARED}", kind) for kind in kinds for i in range(60)]
        by_split = {split: [e for e in calls if e.split == split] for split in SPLITS}
        save_discovery(found, snapshot, discover(by_split, DiscoverConfig(), load_previous(found)))
    return found


def test_a_page_shows_volume_template_neighbours_and_events(store) -> None:
    by_name = {task.name: task.task_id for task in list_tasks(store)}
    page = describe_task(store, by_name["invoice"])
    assert (page["num_calls"], page["share_calls"]) == (60, 0.5)
    assert page["template"] == ["Read the invoice.", *SHARED.splitlines(), "<*>"]
    assert [n["task_id"] for n in page["neighbours"]] == [by_name["order"]]
    assert [(e["snapshot"], e["kind"]) for e in page["events"]] == [("two", "birth")]
    assert "examples" not in page and "static_lines" not in page


def test_examples_need_a_curator(store, monkeypatch) -> None:
    task_id = list_tasks(store)[0].task_id
    asked = []

    def refuse(uri: str, role: str) -> None:
        asked.append((uri, role))
        raise ConfigError("role=viewer: this needs role curator")

    monkeypatch.setattr("jobs.tasks.require_role", refuse)
    with pytest.raises(ConfigError, match="curator"):
        describe_task(store, task_id, with_examples=True)
    assert asked == [(store.uri, "curator")]


def test_the_verb_prints_a_table_a_page_and_json(store, capsys) -> None:
    assert main(["tasks", f"store={store.uri}"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["task", "name", "kind"] and len(table) == 3
    task_id = table[1].split()[0]
    assert main(["tasks", task_id, f"store={store.uri}"]) == 0
    assert "  <*>" in capsys.readouterr().out.splitlines()
    assert main(["tasks", task_id, f"store={store.uri}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task_id"] == task_id


def test_unknown_tasks_and_empty_stores_say_what_to_do(store, tmp_path, capsys) -> None:
    with pytest.raises(InputError, match="task-x: not found; allowed: task-"):
        describe_task(store, "task-x")
    assert main(["tasks", f"store={tmp_path / 'other'}"]) == 2
    assert "next: understudy convert" in capsys.readouterr().err
    assert main(["tasks", "--examples", f"store={store.uri}"]) == 2
