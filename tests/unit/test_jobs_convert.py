"""A conversion without anything to learn ends in a release that refuses and says why, without Ray."""

import json
import sys

from cluster.access import Pseudonyms, load_pseudonym_key
from cluster.registry import load_release
from cluster.store import Store
from jobs.convert import convert
from jobs.ingest import ingest
from jobs.recipe import Recipe, load_recipe


def _log(path, num_calls: int) -> None:
    with path.open("w") as stream:
        for i in range(num_calls):
            messages = [{"role": "system", "content": "Say the colour."}, {"role": "user", "content": f"thing {i}"}]
            answer = {"role": "assistant", "content": "red" if i % 2 else "blue"}
            response = {"choices": [{"index": 0, "message": answer, "finish_reason": "stop"}], "model": "m"}
            line = {"id": f"c{i}", "session": f"s{i}", "request": {"messages": messages}, "response": response}
            stream.write(json.dumps(line) + "\n")


def _ingested(folder, num_calls: int) -> tuple[Recipe, Store]:
    recipe = load_recipe(["recipe=local", f"store={folder / 'store'}"])
    store = Store(recipe.store)
    _log(folder / "some.calls.jsonl", num_calls)
    ingest(store, [folder / "some.calls.jsonl"], Pseudonyms(load_pseudonym_key(recipe.store)))
    return recipe, store


def test_a_task_that_no_training_could_certify_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe, _ = _ingested(tmp_path, 120)
    conversion = convert(recipe, say=lambda line: None)
    (reason,) = conversion.refused.values()
    assert reason.startswith("too few calibration calls: needs ") and "at least 63 can" in reason
    assert conversion.evaluations == () and "base" not in conversion.seconds


def test_a_store_with_nothing_to_learn_gives_a_release_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe, store = _ingested(tmp_path, 8)
    conversion = convert(recipe, say=lambda line: None)
    assert conversion.evaluations == () and conversion.selection is None
    assert conversion.unassigned == {"signature with 8 calls, fewer than discover.min_calls=20": 8}
    release = load_release(store, conversion.release)
    assert release.specialists == {} and store.is_published(release.route_model)
    assert convert(recipe, say=lambda line: None).release == conversion.release, "the same conversion is one release"
