"""training/spill.py: what leaves the memory comes back whole, rests encrypted, and is never read once it was changed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.calls import write_calls
from cluster.errors import StoreError
from cluster.records import AgentCall
from cluster.store import Store
from training import curate as curate_module
from training import spill as spill_module
from training.curate import CurateConfig, curate
from training.spill import SpillWriter, read_spill

KEY = b"0" * 32
SECRET = "sesame seeds and poppy seeds"

records = st.lists(st.tuples(st.sampled_from("abc"), st.text() | st.lists(st.integers())), max_size=30)


@given(said=records)
def test_records_come_back_in_order(tmp_path_factory, said):
    folder = tmp_path_factory.mktemp("spill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill_module, "_MAX_BUFFERED_BYTES", 40)
        writer = SpillWriter(folder, KEY)
        for stream, record in said:
            writer.append(stream, record)
        writer.close()
    for stream in "abc":
        assert list(read_spill(folder, KEY, stream)) == [record for name, record in said if name == stream]


def test_what_was_changed_swapped_or_sealed_with_another_key_is_refused(tmp_path):
    writer = SpillWriter(tmp_path, KEY)
    for stream in ("one", "two"):
        writer.append(stream, SECRET)
    writer.close()
    data = (tmp_path / "one").read_bytes()
    assert SECRET.encode() not in data
    with pytest.raises(StoreError):
        list(read_spill(tmp_path, b"1" * 32, "one"))
    (tmp_path / "two").write_bytes(data)
    with pytest.raises(StoreError):
        list(read_spill(tmp_path, KEY, "two"))
    (tmp_path / "one").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError):
        list(read_spill(tmp_path, KEY, "one"))


def test_nothing_that_was_said_rests_in_the_clear_while_curation_runs(tmp_path, monkeypatch):
    store, work = Store(str(tmp_path / "store")), tmp_path / "work"
    calls = [
        AgentCall(
            call_id=f"call-{i}",
            ts=1_750_000_000.0 + 60 * i,
            client_id="c",
            agent="a",
            session_id=f"s{i}",
            step=0,
            request={"messages": [{"role": "user", "content": f"{SECRET} {i}"}]},
            response={"choices": [{"message": {"role": "assistant", "content": SECRET}}]},
        )
        for i in range(30)
    ]
    write_calls(store, calls)
    seen: dict[str, bytes] = {}
    original = curate_module.curate_shards

    def look(shards, numbers, *, on_ray):
        seen.update({str(path): path.read_bytes() for path in work.rglob("*") if path.is_file()})
        return original(shards, numbers, on_ray=on_ray)

    monkeypatch.setattr(curate_module, "curate_shards", look)
    curate(store, CurateConfig(), b"k" * 32, work=work)
    assert len(seen) >= 3
    assert not any(word in data for data in seen.values() for word in (b"sesame", b"poppy"))
    assert list(work.iterdir()) == []
