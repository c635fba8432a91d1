"""Forgetting a client: its words leave every file, who learned from them is told, everybody else's stay."""

from __future__ import annotations

import pathlib

import pytest

from cluster.calls import read_calls, write_calls
from cluster.feedback import Feedback, read_feedback, write_feedback
from cluster.records import AgentCall, Gate, Release, Specialist
from cluster.registry import publish_release
from cluster.store import Store
from jobs.forget import forget
from jobs.lineage import find_seen
from training.curate import CurateConfig, curate
from training.discover import DiscoverConfig, discover, save_discovery
from training.redact import RedactConfig
from training.snapshot import load_split
from training.splits import SPLITS, SplitConfig, split_of

SPLIT = SplitConfig(train=0.4, validation=0.2, calibration=0.2, test=0.2, test_by="hash")
NOW = 1_800_000_000.0
FIRST = ("amber", "birch", "cedar", "delta", "ember", "frost", "grove", "hazel", "iris", "jade")


def _call(number: int, client: str) -> AgentCall:
    words = f"{FIRST[number % 10]} {FIRST[number // 10 % 10]} {client}"
    answer = {"role": "assistant", "content": f'{{"tone": "{FIRST[number % 10]}"}}'}
    return AgentCall(
        call_id=f"{client}-{number}", ts=1.7e9 + 60 * number, client_id=client, agent="a", session_id=f"{client}-s{number}",
        step=0, response={"choices": [{"message": answer, "finish_reason": "stop"}], "model": "m"},
        request={"messages": [{"role": "system", "content": "Give the tone."}, {"role": "user", "content": words}],
                 "response_format": {"type": "json_object"}},
    )  # fmt: skip


def _specialist(task_id: str, base: str, adapter: str) -> Specialist:
    gate = Gate(
        reference="llm", population="p", epsilon=0.05, delta=0.05, threshold=0.5, num_calibration=99, num_accepted=99,
        num_disagreements=0, upper_bound=0.03, coverage=1.0, fingerprint="f",
    )  # fmt: skip
    return Specialist(
        task_id=task_id, sha="a" * 64, base=base, adapter=adapter, prompt_format={}, gate=gate, report="r",
        max_answer_tokens=9,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    store = Store(str(tmp_path / "store"))
    for client in ("stays", "leaves"):
        write_calls(store, [_call(number, client) for number in range(60)])
    return store


def _convert(store: Store, tmp_path: pathlib.Path, **config: object) -> tuple[str, str, str]:
    """A conversion without its training: snapshot, release and the one task."""
    snapshot = curate(store, CurateConfig(split=SPLIT, max_near_duplicates=1000, **config)).id
    by_split = {s: load_split(store, snapshot, s, as_served=s != "train") for s in SPLITS}
    found = discover(by_split, DiscoverConfig(min_calls=2))
    route_model = save_discovery(store, snapshot, found)
    (task,) = found.tasks
    (tmp_path / "empty").mkdir(exist_ok=True)
    store.publish("bases/scratch-1", tmp_path / "empty", {"base": "scratch", "snapshot": snapshot})
    store.publish(f"adapters/{task.task_id}/run1", tmp_path / "empty", {"task_id": task.task_id, "snapshot": snapshot})
    of_both = {"base": "bases/scratch-1", "adapter": f"adapters/{task.task_id}/run1"}
    store.publish(f"merged/{task.task_id}/1", tmp_path / "empty", of_both)
    one = _specialist(task.task_id, "bases/scratch-1", f"adapters/{task.task_id}/run1")
    release = Release(
        specialists={task.task_id: one}, refused={}, route_model=route_model, snapshot=snapshot, created_ts=1.0
    )
    return snapshot, publish_release(store, release), task.task_id


def test_no_file_holds_the_client_and_everybody_else_stays(store, tmp_path):
    snapshot, _, _ = _convert(store, tmp_path)
    write_feedback(
        store,
        [Feedback(feedback_id=c, ts=1.7e9, client_id=c, call_id=f"{c}-1", text="so") for c in ("stays", "leaves")],
    )
    held = {s: len(load_split(store, snapshot, s, as_served=s != "train")) for s in SPLITS}
    done = forget(store, "leaves", clock=lambda: NOW)
    assert (done.calls, done.feedback) == (60, 1)
    assert {call.client_id for call in read_calls(store)} == {"stays"} and len(read_calls(store)) == 60
    assert [row.client_id for row in read_feedback(store)] == ["stays"]
    left = {s: load_split(store, snapshot, s, as_served=s != "train") for s in SPLITS}
    assert sum(done.examples.values()) == sum(held.values()) - sum(map(len, left.values())) > 0
    for path in store.list("", ".parquet"):
        table = store.read_table(path)
        for name in table.column_names:
            if name not in ("task_id", "example_id"):
                assert "leaves" not in str(table[name].to_pylist()), (path, name)
    assert all(call_id.startswith("stays") for part in left.values() for e in part for call_id in e.source_call_ids)


def test_who_had_seen_the_client_is_told_and_marked(store, tmp_path):
    snapshot, release, task_id = _convert(store, tmp_path)
    done = forget(store, "leaves", clock=lambda: NOW)
    assert done.seen.snapshots.keys() == {snapshot}
    assert (done.seen.tasks, done.seen.releases) == ((task_id,), (release,))
    assert (done.seen.adapters, done.seen.bases) == ((f"adapters/{task_id}/run1",), ("bases/scratch-1",))
    assert done.seen.merged == (f"merged/{task_id}/1",)
    (mark,) = store.list("retrain", ".json")
    assert mark == f"retrain/{done.seen.specialists[0]}.json"
    record = store.read_json("forgotten/leaves.json")
    assert record["calls"] == 60 and record["before_ts"] == NOW and record["seen"]["releases"] == [release]


def test_a_client_that_taught_nobody_marks_nobody(store, tmp_path):
    _convert(store, tmp_path)
    write_calls(store, [_call(number, "late") for number in range(3)])
    done = forget(store, "late", clock=lambda: NOW)
    assert done.calls == 3 and not done.seen.specialists and not store.list("retrain", ".json")


def test_a_held_out_example_alone_marks_nobody(store, tmp_path):
    number = next(n for n in range(60) if split_of(f"leaves-s{n}", SPLIT) == "calibration")
    snapshot, _, _ = _convert(store, tmp_path)
    assert find_seen(store, {f"leaves-{number}"}).snapshots == {snapshot: {"calibration": 1}}
    assert find_seen(store, {f"leaves-{number}"}).specialists == ()


def test_datasets_of_runs_that_saw_it_leave_the_work_folder(store, tmp_path):
    _convert(store, tmp_path)
    work = tmp_path / "work"
    for name in ("run1", "scratch-1", "other"):
        (work / name).mkdir(parents=True)
    forget(store, "leaves", work, clock=lambda: NOW)
    assert [path.name for path in work.iterdir()] == ["other"]


def test_what_surrogates_stand_for_is_forgotten_too(store, tmp_path):
    rules = RedactConfig(reversible=True, deny=("leaves", "stays"))
    snapshot, _, _ = _convert(store, tmp_path, redact=rules)
    (paths,) = [store.manifest(f"examples/{snapshot}")["parts"]["mapping"]]
    assert {"leaves", "stays"} <= {value for path in paths for value in store.read_table(path)["original"].to_pylist()}
    forget(store, "leaves", clock=lambda: NOW)
    paths = store.manifest(f"examples/{snapshot}")["parts"]["mapping"]
    kept = {value for path in paths for value in store.read_table(path)["original"].to_pylist()}
    assert "stays" in kept and "leaves" not in kept


def test_forgetting_twice_finds_nothing_more(store, tmp_path):
    _convert(store, tmp_path)
    forget(store, "leaves", clock=lambda: NOW)
    again = forget(store, "leaves", clock=lambda: NOW + 1)
    assert (again.calls, again.examples) == (0, {})


def test_calls_after_the_forgetting_are_new_ones(store, tmp_path):
    forget(store, "leaves", clock=lambda: 1.7e9 + 10_000)
    new = _call(0, "leaves").model_copy(update={"call_id": "new", "ts": 1.7e9 + 20_000})
    write_calls(store, [new])
    assert "new" in {call.call_id for call in read_calls(store)}
