"""A conversion without anything to learn ends in a release that refuses and says why, without Ray."""

import json
import sys

import pytest

from cluster.access import Pseudonyms, load_pseudonym_key
from cluster.errors import ConfigError
from cluster.registry import load_release
from cluster.store import Store
from jobs.convert import convert, write_conversion_report
from jobs.ingest import ingest
from jobs.recipe import Recipe, load_recipe
from jobs.splits import load_usefulness


def _log(path, num_calls: int, num_clients: int) -> None:
    with path.open("w") as stream:
        for i in range(num_calls):
            messages = [{"role": "system", "content": "Say the colour."}, {"role": "user", "content": f"thing {i}"}]
            answer = {"role": "assistant", "content": "red" if i % 2 else "blue"}
            response = {"choices": [{"index": 0, "message": answer, "finish_reason": "stop"}], "model": "m"}
            client = f"client {i % num_clients}"
            line = {
                "id": f"c{i}",
                "session": f"s{i}",
                "client": client,
                "request": {"messages": messages},
                "response": response,
            }
            stream.write(json.dumps(line) + "\n")


def _ingested(folder, num_calls: int, *words: str, num_clients: int = 1) -> tuple[Recipe, Store]:
    recipe = load_recipe(["recipe=local", f"store={folder / 'store'}", *words])
    store = Store(recipe.store)
    _log(folder / "some.calls.jsonl", num_calls, num_clients)
    ingest(store, [folder / "some.calls.jsonl"], Pseudonyms(load_pseudonym_key(recipe.store)))
    return recipe, store


def test_a_task_that_no_training_could_certify_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe, _ = _ingested(tmp_path, 120)
    conversion = convert(recipe, say=lambda line: None)
    (reason,) = conversion.refused.values()
    assert reason.startswith("too few calibration calls: needs ") and "at least 63 can" in reason
    assert conversion.evaluations == () and "base" not in conversion.seconds


def test_splits_are_measured_only_of_tasks_that_could_be_learned(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe, store = _ingested(tmp_path, 120, "discover.measure_splits=true")
    conversion = convert(recipe, say=lambda line: None)
    assert len(conversion.tasks) == 1 and conversion.usefulness == () and load_usefulness(store) == {}


def test_a_recipe_that_wants_names_and_names_no_llm_is_told_before_any_work(tmp_path):
    recipe, store = _ingested(tmp_path, 120, "discover.llm_naming=true")
    with pytest.raises(ConfigError, match="next: upstream.0.base_url=URL"):
        convert(recipe, say=lambda line: None)
    assert not store.list("examples")


def test_a_store_with_nothing_to_learn_gives_a_release_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe, store = _ingested(tmp_path, 8)
    conversion = convert(recipe, say=lambda line: None)
    assert conversion.evaluations == () and conversion.selection is None
    assert conversion.unassigned == {"signature with 8 calls, fewer than discover.min_calls=20": 8}
    release = load_release(store, conversion.release)
    assert release.specialists == {} and store.is_published(release.route_model)
    assert convert(recipe, say=lambda line: None).release == conversion.release, "the same conversion is one release"


@pytest.mark.parametrize(
    ("num_clients", "reason"),
    [
        (3, "too few clients: 3 of the 3, fewer than discover.min_clients=200"),
        (
            1,
            "too few sessions: 120, counted for want of clients (the whole store has one), fewer than discover.min_clients=200",
        ),
    ],
)
def test_a_task_of_too_few_clients_stays_on_the_llm(tmp_path, monkeypatch, num_clients, reason):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe, _ = _ingested(tmp_path, 120, "discover.min_clients=200", num_clients=num_clients)
    conversion = convert(recipe, say=lambda line: None)
    assert list(conversion.refused.values()) == [reason]
    assert (conversion.tasks[0].num_clients, conversion.tasks[0].num_sessions) == (num_clients, 120)
    in_vain = conversion.model_copy(update={"own_names": {conversion.tasks[0].task_id: "the LLM gave no answer"}})
    write_conversion_report(tmp_path / "report.html", in_vain, None, ["a note"])
    page = (tmp_path / "report.html").read_text()
    assert "a note" in page and "keeps the name of its own words: the LLM gave no answer" in page
    assert reason in page and "Calls by split" in page and "120 by hash" in page
    assert ("The whole store has one client" in page) == (num_clients == 1)
