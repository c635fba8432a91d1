"""jobs/task_names.py: the LLM node names tasks over HTTP; ids stay, names persist, failures leave the tasks' own words."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import pathlib
import threading
from collections.abc import Iterator

import pytest
from fakes import FakeLLM

from cluster.config import validate
from cluster.errors import ConfigError
from cluster.records import Example
from cluster.store import Store
from cluster.upstream import UpstreamConfig
from jobs.llm_node import LLMNode
from jobs.recipe import Recipe
from jobs.task_names import NAMES_FILE, name_by_llm, namer_of
from training.discover import DiscoverConfig, Discovery, discover, load_previous, save_discovery
from training.identity import TaskEvent
from training.splits import SPLITS

GOOD = {"name": "order reader", "description": "Reads the fields of an order."}


class LLM:
    """FakeLLM in a loop of its own, asked by code that has none."""

    def __init__(self) -> None:
        self.fake = FakeLLM()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.url = self._run(self.fake.start())

    def node(self) -> LLMNode:
        config = validate(UpstreamConfig, {"base_url": self.url, "model": "m", "max_attempts": 1})
        return LLMNode(config, "discover.llm_naming", "name tasks")

    def close(self) -> None:
        self._run(self.fake.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


@pytest.fixture
def llm() -> Iterator[LLM]:
    found = LLM()
    yield found
    found.close()


def make_examples(kind: str) -> list[Example]:
    return [
        Example(
            example_id=f"{kind}-{index:03}",
            split=SPLITS[index % 4],
            session_id=f"s{index}",
            ts=float(index),
            request={
                "messages": [
                    {"role": "system", "content": f"Read the {kind}.\nAnswer with JSON."},
                    {"role": "user", "content": f"secretword{index} of the {kind}"},
                ]
            },
            target={"role": "assistant", "content": '{"total": 1}'},
            reference="llm",
            source_call_ids=(f"{kind}-{index}",),
        )
        for index in range(40)
    ]


def find(store: Store, *kinds: str) -> tuple[Discovery, list[Example]]:
    examples = [e for kind in kinds for e in make_examples(kind)]
    by_split = {split: [e for e in examples if e.split == split] for split in SPLITS}
    return discover(by_split, DiscoverConfig(), load_previous(store)), by_split["train"]


def name(store: Store, llm: LLM, *kinds: str) -> tuple[Discovery, Discovery, list[str]]:
    found, train = find(store, *kinds)
    said: list[str] = []
    named, own_names = name_by_llm(store, found, train, llm.node(), said.append)
    told = [line for line in said if "keeps the name" in line]
    assert told == [f"discover {key}: keeps the name of its own words: {why}" for key, why in own_names.items()]
    save_discovery(store, "snap", named)
    return found, named, said


def test_names_change_and_ids_do_not_and_a_named_task_is_not_asked_about_again(llm, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    store = Store(str(tmp_path))
    llm.fake.text = json.dumps(GOOD)
    found, named, said = name(store, llm, "order")
    assert [t.task_id for t in named.tasks] == [t.task_id for t in found.tasks]
    assert (named.tasks[0].name, named.tasks[0].description) == ("order reader", GOOD["description"])
    assert named.tasks[0].facts() == found.tasks[0].facts() and named.assignment == found.assignment
    assert said == ["discover: 1 tasks named by the LLM, 0 not"]
    (request,) = llm.fake.requests
    assert request["max_tokens"] <= 200 and "secretword" in request["messages"][1]["content"]
    assert "secretword" not in caplog.text

    llm.fake.text = json.dumps({"name": "invoice reader", "description": "Reads invoices."})
    _, again, _ = name(store, llm, "order", "invoice")
    assert {t.name for t in again.tasks} == {"order reader", "invoice reader"} and len(llm.fake.requests) == 2


@pytest.mark.parametrize(
    "text", ["no idea", '{"name": "", "description": ""}', '{"name": "x", "description": "of secretword0 4"}']
)
def test_what_may_not_stand_leaves_the_own_words_and_is_told(llm, tmp_path, text):
    llm.fake.text = text
    found, named, said = name(Store(str(tmp_path)), llm, "order")
    assert named.tasks == found.tasks
    assert "keeps the name of its own words: " in said[0] and "secretword" not in " ".join(said)
    assert said[-1] == "discover: 0 tasks named by the LLM, 1 not"


def test_a_silent_llm_is_asked_three_times_in_all(llm, tmp_path):
    llm.fake.status = 500
    found, named, said = name(Store(str(tmp_path)), llm, "order", "invoice", "refund", "parcel", "ticket")
    assert named.tasks == found.tasks and len(llm.fake.requests) == 3
    assert said[-1] == "discover: 0 tasks named by the LLM, 3 not, 2 not asked about"


def test_two_tasks_do_not_get_one_name_and_a_split_task_is_asked_about_anew(llm, tmp_path):
    store = Store(str(tmp_path))
    llm.fake.text = json.dumps(GOOD)
    _, named, said = name(store, llm, "order", "invoice")
    assert [t.name for t in named.tasks].count("order reader") == 1 and "the name of another task" in said[0]
    split = next(t.task_id for t in named.tasks if t.name == "order reader")
    found, train = find(store, "order", "invoice")
    changed = dataclasses.replace(found, events=(TaskEvent(kind="split", task_id=split),))
    llm.fake.text = json.dumps({"name": "another reader", "description": "Reads."})
    renamed, _ = name_by_llm(store, changed, train, llm.node(), said.append)
    assert {t.name for t in renamed.tasks if t.task_id == split} & {"another reader", "order reader"} == {
        "another reader"
    }
    assert store.read_json(NAMES_FILE)[split]["name"] == "another reader"


@pytest.mark.parametrize("upstream", [(), ({"base_url": "http://127.0.0.1:9/v1"},)])
def test_without_a_model_to_ask_it_is_refused_before_any_work(upstream, tmp_path: pathlib.Path):
    recipe = validate(Recipe, {"upstream": upstream, "discover": {"llm_naming": True}})
    with pytest.raises(ConfigError, match="discover.llm_naming=true.*next: upstream.0"):
        namer_of(recipe)
    assert namer_of(Recipe()) is None
