"""`understudy plan`: the arithmetic of every base's training, and exit code 2 with numbers where one fits nowhere."""

import json

import pytest
from fakes import make_specialist

from cluster import registry
from cluster.calls import write_calls
from cluster.errors import KeyAccessError
from cluster.records import AgentCall, Release
from cluster.store import Store
from jobs.__main__ import main
from jobs.provenance import save_config
from jobs.recipe import load_recipe

GPUS = ["finetune.gpus_per_worker=1", "finetune.bf16=true", "specialists.max_model_tokens=1024"]


@pytest.fixture
def plan(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["plan", f"store={tmp_path / 'store'}", *words])
        return code, *capsys.readouterr()

    return run


def test_a_scratch_base_shows_both_of_its_trainings(plan):
    code, out, _ = plan("recipe=demo", "fleet.max_parallel=1")
    assert code == 0
    assert "scratch-tiny, pretrain:" in out and "of which full trains 688,768" in out
    assert "scratch-tiny, finetune:" in out and "of which lora trains 40,960" in out
    assert "fine-tunes: 1 x 1 workers of 1 CPUs" in out


def test_a_fleet_that_takes_all_there_is_room_for_is_planned_by_this_machine(plan):
    code, out, _ = plan("recipe=local", "select.base=scratch-tiny")
    assert code == 0 and "scratch-tiny, finetune:" in out


def test_many_adapters_in_one_run_are_planned_as_such(plan):
    code, out, _ = plan("recipe=demo", "select.base=scratch-tiny", "fleet.mode=multi_lora", "fleet.max_parallel=1")
    assert code == 0 and "adapters of 40,960 weights beside it, 20 bytes each" in out
    room = int(out.split("room for ")[1].split()[0])
    limit = "finetune.device_gib=4"
    code, out, _ = plan("recipe=demo", "select.base=scratch-tiny", "fleet.mode=multi_lora", limit)
    assert code == 0 and 1 <= int(out.split("room for ")[1].split()[0]) < room
    code, _, err = plan("recipe=demo", "select.base=scratch-tiny", "fleet.mode=multi_lora", "finetune.device_gib=0.1")
    assert code == 2 and "multi-LoRA run of a task: needs" in err


def test_gpus_that_are_elsewhere_are_planned_by_their_size(plan):
    words = [*GPUS, "select.base=qwen3-8b", "finetune.device_gib=16", "finetune.num_workers=4"]
    code, out, _ = plan(*words)
    assert code == 0
    assert "base: about 8,190,735,360 parameters" in out and "ZeRO stage 3, offload none, 4 workers" in out
    assert "of   16.000 GiB on each GPU" in out and "summed to a batch of 16" in out


def test_what_fits_nowhere_is_refused_with_what_would(plan):
    code, out, err = plan(*GPUS, "select.base=qwen3-8b", "finetune.device_gib=8", "finetune.zero_stage=0")
    assert code == 2 and "does not fit" in out
    assert "8,190,735,360 parameters by lora need" in err and "a device has 8.000 GiB" in err and "would fit" in err


def test_gpus_that_nobody_describes_are_asked_for(plan):
    code, _, err = plan(*GPUS, "select.base=qwen3-8b")
    assert code == 2 and "next: finetune.device_gib=80" in err


def convert_once(store: Store, created_ts: float, seconds: dict[str, float], *words: str) -> str:
    """Leave behind what a conversion leaves of its time."""
    recipe = load_recipe(["recipe=demo", f"store={store.uri}", *words])
    release = Release(
        specialists={"triage": make_specialist()},
        refused={},
        route_model="r",
        snapshot=str(created_ts),
        created_ts=created_ts,
    )
    sha = registry.publish_release(store, release)
    save_config(store, sha, recipe)
    store.write_json(f"releases/{sha}.report.json", {"seconds": seconds})
    return sha


def test_time_and_money_are_those_of_the_store_s_own_conversions(plan, tmp_path):
    words = ["recipe=demo", "fleet.max_parallel=1"]
    code, out, _ = plan(*words)
    assert code == 0 and "time: not known before a first conversion of this store" in out
    assert not (tmp_path / "store").exists()
    store = Store(str(tmp_path / "store"))
    full = {"curate": 10.0, "base": 300.0, "finetune": 100.0, "validate": 50.0}
    convert_once(store, 1.0, full)
    # The second one found its base trained; it does not count as quick training. One of another base says nothing.
    sha = convert_once(store, 2.0, {**full, "curate": 20.0, "base": 0.1})
    convert_once(store, 3.0, {"curate": 900.0}, "select.base=scratch-small")
    store.write_json("releases/x.report.json", {})
    demo = load_recipe(["recipe=demo", f"store={store.uri}"])
    twice = [f"{part}.num_steps={2 * getattr(demo, part).num_steps}" for part in ("pretrain", "finetune")]
    _, out, _ = plan(*words, *twice, "prices.replica_usd_per_hour=3.6", "--json")
    time = json.loads(out)["time"]
    assert time["by_stage"] == {"curate": 20.0, "base": 600.0, "finetune": 200.0, "validate": 50.0}
    assert time["seconds"] == 870.0 and time["usd"] == pytest.approx(0.87) and time["from_release"] == sha
    _, out, _ = plan(*words)
    assert (
        "time: about 7.8 min (curate 20 s, base 5.0 min" in out and f"as release {sha[:12]} took; money: $0.0131" in out
    )


def call_of(number: int, agent: str, question: str, answer: str) -> AgentCall:
    messages = [{"role": "system", "content": agent}, {"role": "user", "content": question}]
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
    return AgentCall(
        call_id=f"{agent} {number}",
        ts=1000.0 + number,
        client_id="ann",
        agent=agent,
        session_id=f"{agent} {number}",
        step=0,
        request={"model": "m", "messages": messages},
        response={"choices": [choice]},
    )


def store_calls(uri: str) -> Store:
    """Two tasks of short questions, one of which has a question that is longer than all others."""
    store, colors = Store(uri), ("red", "green", "blue")
    calls = [
        call_of(n, agent, f"{agent} thing {n} is {colors[n % 3]} all over" + " again" * (90 if n == 0 else 0), answer)
        for n in range(60)
        for agent, answer in (("Name its colour.", colors[n % 3]), ("Is it red?", "yes" if n % 3 == 0 else "no"))
    ]
    write_calls(store, calls)
    return store


def test_rows_are_as_long_as_the_store_s_calls_make_them_and_a_first_conversion_s_time_is_counted_up(
    plan, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.pace.step_seconds", lambda *_: 0.5)
    # An hour for a dollar.
    words = ["recipe=demo", "fleet.max_parallel=1", "gate.epsilon=0.2", "gate.delta=0.2", "curate.split.train=0.5"]
    words += ["curate.split.calibration=0.32", "prices.replica_usd_per_hour=1.0", "--json"]
    _, out, _ = plan(*words)
    empty = json.loads(out)
    assert empty["time"] is None and empty["trainings"][0]["tasks"] == []
    store = store_calls(str(tmp_path / "store"))
    demo = load_recipe(["recipe=demo", f"store={store.uri}"])
    before = store.list("")
    _, out, _ = plan(*words)
    found = json.loads(out)
    assert store.list("") == before, "nothing is written"
    pretrain, finetune = found["trainings"]
    assert len(finetune["tasks"]) == 2
    longest = max(task["longest_tokens"] for task in finetune["tasks"])
    assert finetune["plan"]["load"]["row_tokens"] == longest < empty["trainings"][1]["plan"]["load"]["row_tokens"]
    # Whether it is of train is drawn by its session, so the longest may be held out.
    assert all(task["mean_tokens"] <= task["longest_tokens"] for task in finetune["tasks"])
    assert finetune["plan"]["memory"]["activations"] < empty["trainings"][1]["plan"]["memory"]["activations"] / 5
    time = found["time"]
    assert time["from_release"] is None and time["by_stage"]["base"] > demo.pretrain.num_steps * 0.5
    assert time["usd"] == pytest.approx(time["seconds"] / 3600, rel=1e-3)
    # Twice as many steps of both tasks, one after the other or side by side: half a second each.
    steps = demo.finetune.num_steps
    more = [f"finetune.{name}={2 * steps}" for name in ("num_steps", "checkpoint_every")]
    for places, rounds in ((1, 2), (2, 1)):
        words[1] = f"fleet.max_parallel={places}"
        few, many = (json.loads(plan(*words, *extra)[1])["time"]["by_stage"]["finetune"] for extra in ((), more))
        assert many - few == pytest.approx(rounds * steps * 0.5)
    _, out, _ = plan(*words[:-1])
    assert "time: roughly" in out and "within a factor of 2" in out and f"the longest {longest}" in out
    assert "again" not in out and "colour" not in out, "counts, no content"


def test_what_the_cluster_asks_in_the_background_makes_no_rows(plan, tmp_path):
    store = store_calls(str(tmp_path / "store"))
    words = ["recipe=demo", "fleet.max_parallel=1", "gate.epsilon=0.2", "gate.delta=0.2", "curate.split.train=0.5"]
    words += ["curate.split.calibration=0.32"]

    def rows() -> list[int]:
        return [one["num_train"] for one in json.loads(plan(*words, "--json")[1])["trainings"][1]["tasks"]]

    alone = rows()
    audits = [call_of(n, "Is it red?", f"audit {n}", "no") for n in range(120)]
    of = {"audit_of": "x"}
    write_calls(store, [one.model_copy(update={**of, "call_id": f"audit {n}"}) for n, one in enumerate(audits)])
    assert rows() == alone and len(alone) == 2
    assert "by the store's calls" in plan(*words)[1]


def test_a_base_leaves_out_the_tasks_of_long_answers_unless_there_are_no_others(plan, tmp_path):
    store = store_calls(str(tmp_path / "store"))
    long = [
        call_of(n, "Tell of it.", f"thing {n}", f"this is thing {n} and it has a story of its own") for n in range(60)
    ]
    write_calls(store, long)
    words = ["recipe=demo", "fleet.max_parallel=1", "gate.epsilon=0.2", "gate.delta=0.2", "curate.split.train=0.5"]
    words += ["curate.split.calibration=0.32", "--json"]
    by_bound = {}
    for bound in (1, 4, 48):
        pretrain, finetune = json.loads(plan(*words, f"pretrain.max_answer_tokens={bound}")[1])["trainings"]
        assert len(finetune["tasks"]) == 3
        by_bound[bound] = len(pretrain["tasks"])
    assert by_bound == {1: 3, 4: 2, 48: 3}


def test_what_cannot_be_told_of_a_first_conversion_says_why(plan, tmp_path):
    store_calls(str(tmp_path / "store"))
    code, out, _ = plan("recipe=demo", "gate.epsilon=0.001")
    assert code == 0 and "none of its calls recur often enough to be certified" in out
    code, out, _ = plan("recipe=demo", "finetune.gpus_per_worker=1", "finetune.device_gib=8", "gate.epsilon=0.2")
    assert code == 0 and "does not tell a GPU's speed" in out
    code, out, _ = plan("recipe=demo", "select.base=qwen3-8b", "finetune.device_gib=80", "gate.epsilon=0.2")
    assert code == 0 and "nothing on this machine counts the base's tokens" in out and "tokens on average" not in out


def test_calls_that_this_process_has_no_key_for_leave_the_engine_s_window(plan, tmp_path, monkeypatch):
    store_calls(str(tmp_path / "store"))

    def refuse(*_):
        raise KeyAccessError("store: key k1 is not here; next: ask an admin")

    monkeypatch.setattr("cluster.calls.iterate_calls", refuse)
    code, out, _ = plan("recipe=demo")
    assert code == 0 and "could not be read: store: key k1 is not here" in out and "16 examples of 1024 tokens" in out
