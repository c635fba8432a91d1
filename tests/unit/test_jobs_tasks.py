"""jobs/tasks.py: a person sees each task with its template, neighbours and events, and content only as a curator."""

import json

import pytest

from cluster.calls import write_calls
from cluster.errors import ConfigError, InputError
from cluster.records import AgentCall, Example
from cluster.store import Store
from jobs.__main__ import main
from jobs.recipe import load_recipe
from jobs.tasks import describe_task, list_tasks
from jobs.validate import save_agreements
from training.arms import Arm, Routed
from training.curate import CurateConfig, curate
from training.discover import DiscoverConfig, discover, load_previous, save_discovery
from training.evaluation import Evaluation
from training.gate import refused_gate
from training.redact import RedactConfig
from training.snapshot import load_split
from training.splits import SPLITS, SplitConfig
from training.text_graders import SelfAgreement
from training.usefulness import Usefulness, compare
from training.worth import Rates

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
    slot = {"after": SHARED.splitlines()[-1], "num_calls": 15, "num_distinct": 15, "median_characters": 7}
    assert page["slots"] == [slot], "what differs is counted and not shown"
    assert [n["task_id"] for n in page["neighbours"]] == [by_name["order"]]
    assert [(e["snapshot"], e["kind"]) for e in page["events"]] == [("two", "birth")]
    assert "examples" not in page and "static_lines" not in page


def test_a_page_shows_how_often_its_specialist_agrees_and_why_it_is_one_task(store, capsys) -> None:
    task_id = list_tasks(store)[0].task_id
    page = describe_task(store, task_id)
    assert page["validation_agreement"] is None and page["usefulness"] == []
    store.write_json("tasks/agreement.json", {task_id: {"snapshot": "two", "agreement": 0.934}})
    tie = compare([True] * 9 + [False], [True] * 9 + [False], num_parts=2, num_compared=1)
    found = Usefulness(task_ids=(task_id,), reason="no split is surely better", compared=(tie,), base="b", num_steps=60)
    store.write_json("tasks/usefulness.json", {"key": found.model_dump(mode="json")})
    assert main(["tasks", task_id, f"store={store.uri}"]) == 0
    said = capsys.readouterr().out
    assert "validation agreement: 93.4% (snapshot two)" in said
    assert "parts: kept together: no split is surely better (joint 0.90, 2 parts 0.90, difference +0.00 [" in said
    other = next(t.task_id for t in list_tasks(store) if t.task_id != task_id)
    assert describe_task(store, other)["usefulness"] == []


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


def test_a_curator_sees_examples_as_they_were_said_where_that_was_kept(tmp_path) -> None:
    pages = {}
    for is_kept in (True, False):
        store = Store(str(tmp_path / str(is_kept)))
        calls = [make_call(number) for number in range(60)]
        write_calls(store, calls)
        shares = SplitConfig(train=0.4, validation=0.2, calibration=0.2, test=0.2, test_by="hash")
        config = CurateConfig(split=shares, max_near_duplicates=1000, redact=RedactConfig(reversible=is_kept))
        snapshot = curate(store, config).id
        by_split = {s: load_split(store, snapshot, s, as_served=s != "train") for s in SPLITS}
        save_discovery(store, snapshot, discover(by_split, DiscoverConfig(min_calls=2)))
        (task,) = list_tasks(store)
        pages[is_kept] = store, task.task_id
    store, task_id = pages[True]
    redacted = describe_task(store, task_id, with_examples=True)["examples"]
    restored = describe_task(store, task_id, with_examples=True, is_restored=True)["examples"]
    assert "Zelda" not in str(redacted) and "zelda.quimby" not in str(redacted)
    for example in restored:
        assert example["user"].startswith("My name is Zelda Quimby, mail zelda.quimby@acme.com")
        assert "zelda.quimby@acme.com" in example["answer"]
    store, task_id = pages[False]
    with pytest.raises(InputError, match="reversible=true"):
        describe_task(store, task_id, with_examples=True, is_restored=True)


def make_call(number: int) -> AgentCall:
    said = f"My name is Zelda Quimby, mail zelda.quimby@acme.com, this is matter {number}"
    answer = {"role": "assistant", "content": json.dumps({"mail": "zelda.quimby@acme.com", "matter": number})}
    return AgentCall(
        call_id=f"c{number}", ts=1.7e9 + 60 * number, client_id="p", agent="a", session_id=f"s{number}", step=0,
        response={"choices": [{"message": answer, "finish_reason": "stop"}], "model": "m"},
        request={"messages": [{"role": "system", "content": "Give mail and matter."}, {"role": "user", "content": said}],
                 "response_format": {"type": "json_object"}},
    )  # fmt: skip


def test_a_page_shows_the_arms_of_its_last_specialist_and_the_ceiling(store, capsys) -> None:
    task_id = list_tasks(store)[0].task_id
    promise = {"epsilon": 0.05, "delta": 0.05, "reference": "llm", "population": "p", "fingerprint": "f"}
    gate = refused_gate("too few", num_calibration=9, **promise)
    routed = Routed(is_kept=False, is_specialist_right=True, is_llm_right=True, num_calls=9, llm_usd=0.9)
    facts = {"num_calls": 9, "coverage": 1.0, "num_kept": 9, "num_disagreements": 0, "disagreement": 0.0}
    names = ("untrained base", "specialist", "specialist + gate")
    arms = tuple(Arm(name=name, interval=(0.0, 0.3), prompt_tokens=90, **facts) for name in names)
    made = Evaluation(task_id=task_id, gate=gate, arms=arms, routed=(routed,), curve=())
    rates = Rates(replica_usd_per_hour=3.6, tokens_per_s=1000.0)
    teacher = {task_id: SelfAgreement(num_answered=50, num_agreements=48, interval=(0.86, 0.99))}
    save_agreements(load_recipe([f"store={store.uri}"]), store, "two", [made], rates, teacher)
    assert main(["tasks", task_id, f"store={store.uri}"]) == 0
    said = capsys.readouterr().out
    assert "the LLM with itself 96.0% of 50 (86.0% to 99.0%)" in said
    assert "untrained base" in said and "LLM (reference)" in said and "specialist + gate" in said
    assert "USD per 1,000 right at 20.0% used" in said and "Regret to the oracle router: 100.0% of calls" in said
    assert main(["tasks", task_id, f"store={store.uri}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"]["tables"][0]["rows"][0][0] == "LLM (reference)"
