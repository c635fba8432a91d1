"""Redaction on Ray Data gives what it gives in this process: the same function over the same shards."""

import pytest

from cluster.calls import write_calls
from cluster.records import AgentCall
from cluster.store import Store
from training import curate as curate_module
from training.curate import CurateConfig, curate
from training.snapshot import load_split

pytestmark = pytest.mark.integration


def make_call(number: int) -> AgentCall:
    text = f"My name is Ann Miller, my mail is ann{number}@mail.com, my case is {number * 7919}"
    return AgentCall(
        call_id=f"call-{number}",
        ts=1_750_000_000.0 + 60 * number,
        client_id="client",
        agent="desk",
        session_id=f"s{number // 2}",
        step=number % 2,
        request={"messages": [{"role": "user", "content": text}]},
        response={"choices": [{"message": {"role": "assistant", "content": f"mail ann{number}@mail.com"}}]},
    )


def test_ray_data_and_this_process_give_the_same_examples(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(curate_module, "_CALLS_PER_SHARD", 20)
    stores = [Store(str(tmp_path / name)) for name in ("here", "ray")]
    for store in stores:
        write_calls(store, [make_call(i) for i in range(60)])
    asked: list[bool] = []
    original = curate_module.curate_shards

    def watched(work, shards, *, on_ray):
        asked.append(on_ray)
        return original(work, shards, on_ray=on_ray)

    monkeypatch.setattr(curate_module, "curate_shards", watched)
    here = curate(stores[0], CurateConfig(ray_data_min_calls=61), b"k" * 32, work=tmp_path / "work")
    ray = curate(stores[1], CurateConfig(ray_data_min_calls=60), b"k" * 32, work=tmp_path / "work")
    assert asked == [False, True] and here.counts == ray.counts and here.counts.redacted["EMAIL_ADDRESS"] > 0
    for split in ("train", "validation"):
        ours, theirs = (
            load_split(store, one.id, split, as_served=False) for store, one in zip(stores, (here, ray), strict=True)
        )
        assert ours == theirs and "ann1@mail.com" not in str(ours)
    assert list((tmp_path / "work").iterdir()) == [], "nothing of the spill is left"
