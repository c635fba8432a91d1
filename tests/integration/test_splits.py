"""A task of one answer form with two topics: its split is measured on real Ray; split, it keeps its ids and stays split."""

from __future__ import annotations

import contextlib
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeEngine

from cluster.calls import write_calls
from cluster.config import validate
from cluster.records import AgentCall
from cluster.store import Store
from jobs.convert import Conversion, convert
from jobs.recipe import Recipe
from jobs.splits import load_usefulness
from jobs.tasks import describe_task, list_tasks
from training.discover import DiscoverConfig, discover, load_previous
from training.snapshot import load_split
from training.split_probe import SplitMeasurement, SplitTrial, measure_splits
from training.splits import SPLITS
from training.usefulness import compare

pytestmark = pytest.mark.integration

SYSTEM = "Decide who takes it. Answer with one word."
TOPICS = (
    "The {adjective} weather over the {place} harbour brings {cue} wind and heavy rain tonight",
    "Your {adjective} parcel from the {place} depot was delivered with {cue} paper and a ribbon",
)
CUES = ("north", "south", "amber", "ivory", "cold", "warm", "loud", "quiet")
WORDS = {
    "adjective": ("old", "new", "small", "large", "second", "third", "early", "late"),
    "place": ("upper", "lower", "east", "west", "inner", "outer", "royal", "public"),
}
NAMES = ("alpha", "bravo", "delta", "gamma")


def make_call(number: int) -> AgentCall:
    rng = random.Random(number)
    topic, cue = number % 2, rng.randrange(len(CUES))
    text = TOPICS[topic].format(cue=CUES[cue], **{name: rng.choice(words) for name, words in WORDS.items()})
    # The same cue means something else in the other topic.
    answer = {"role": "assistant", "content": NAMES[(cue + 2 * topic + cue * topic) % len(NAMES)]}
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return AgentCall(
        call_id=f"call-{number}",
        ts=float(number),
        client_id="client",
        agent="desk",
        session_id=f"session-{number}",
        step=0,
        request={"messages": messages},
        response={"choices": [{"message": answer, "finish_reason": "stop"}]},
    )


def convert_planted(store: Store) -> tuple[Conversion, list[str]]:
    """Capture the planted calls and convert them with splits measured; what it said comes second."""
    write_calls(store, [make_call(number) for number in range(700)])
    split = {"train": 0.5, "validation": 0.25, "calibration": 0.15, "test": 0.1, "test_by": "hash"}
    recipe = validate(
        Recipe,
        {
            "store": store.uri,
            "curate": {"split": split, "max_near_duplicates": 1000},
            "discover": {"measure_splits": True, "max_parts": 2},
            "select": {"base": "scratch-micro", "probe_steps": 40},
            "pretrain": {"num_steps": 4, "warmup_steps": 1, "learning_rate": 3e-3},
            "finetune": {"num_steps": 2, "warmup_steps": 1},
            "gate": {"epsilon": 0.2, "delta": 0.2},
        },
    )
    said: list[str] = []

    @contextlib.contextmanager
    def engine_of(base: str) -> Iterator[FakeEngine]:
        yield FakeEngine(text="alpha")

    return convert(recipe, say=said.append, engine_of=engine_of), said


def test_a_split_is_measured_applied_and_found_again_by_the_next_run(
    ray_cluster: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(trials: list[SplitTrial], *arguments: Any) -> list[SplitMeasurement]:
        """Measured on real Ray, and then said to be what these topics never are: surely better apart at equal cost."""
        (found,) = measure_splits(trials, *arguments)
        real.append(found)
        num = found.compared[0].num_examples
        told = compare([n % 2 == 0 for n in range(num)], [True] * num, num_parts=2, num_compared=1)
        return [SplitMeasurement(0.5, (told,), chosen=0, confirmed=told)]

    real: list[SplitMeasurement] = []
    monkeypatch.setattr("jobs.splits.measure_splits", measured)
    store = Store(str(tmp_path / "store"))
    conversion, said = convert_planted(store)
    assert any("3 probes of 40 steps" in line for line in said), "a joint one, and one for each part"
    (one,) = real[0].compared
    assert real[0].error is None and real[0].chosen is None, "one specialist trained as long as two answers as well"
    assert one.num_parts == 2 and one.joint > 0.2, "answers came back from the probes"
    assert 0 < one.num_examples <= conversion.curation.num_sessions["validation"]
    assert len(conversion.tasks) == 2 and sum(task.num_calls for task in conversion.tasks) == 600
    assert set(conversion.losses) == {task.task_id for task in conversion.tasks}, "each part has its own specialist"
    (found,) = load_usefulness(store).values()
    assert set(found.task_ids) == {task.task_id for task in conversion.tasks} and found.chosen == 0

    first, second = (describe_task(store, task.task_id) for task in list_tasks(store))
    (event,) = [e for e in first["events"] + second["events"] if e["kind"] == "split" and e["detail"]][:1]
    assert "2 parts" in event["detail"] and "[+" in event["detail"]
    served = {s: load_split(store, conversion.snapshot, s, as_served=s != "train") for s in SPLITS}
    again = discover(served, DiscoverConfig(), load_previous(store))
    assert {t.task_id: t.num_calls for t in again.tasks} == {t.task_id: t.num_calls for t in conversion.tasks}
    assert again.events == () and again.grouping.parts.keys() == load_usefulness(store).keys()
    places = {e.example_id: again.route_model.task_of(e.request).task_id for split in served.values() for e in split}
    assert places == again.assignment
