"""Capture's contract: nothing waits for the queue, every call is written or counted, and `keep` means what the dial says."""

from __future__ import annotations

import asyncio
import errno
import os
import pathlib
import threading
import time
from typing import Any

import pyarrow as pa
import pytest
from fakes import REQUEST, FakeKms

from cluster.calls import read_call_ids
from cluster.errors import ConfigError, StoreError
from cluster.records import AgentCall
from cluster.store import Store
from cluster.telemetry import Meter
from serving.capture import Capture, CaptureConfig, journal_folder, memory_of
from serving.folding import fold_orphans
from serving.journal_format import JournalReader, decode_call

NEVER_S = 1000.0
KMS = FakeKms()


class MoodyStore(Store):
    """Fails while told to, and takes its time."""

    fails = False
    delay_s = 0.0
    error: Exception = StoreError("away")

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.may_write = threading.Event()
        self.may_write.set()

    def write_table(self, path: str, table: pa.Table, encrypted: tuple[str, ...] = ()) -> None:
        time.sleep(self.delay_s)
        self.may_write.wait(30)
        if self.fails:
            raise self.error
        super().write_table(path, table, encrypted)


def _call(number: int, text: str = "hello") -> AgentCall:
    return AgentCall(
        call_id=f"c{number}", ts=1_700_000_000.0 + number, client_id="c", agent="a", session_id="s", step=0,
        request={**REQUEST, "user": text}, response=None,
    )  # fmt: skip


def _capture(store: Store, **config: Any) -> tuple[Capture, Meter]:
    meter = Meter()
    return Capture(store, CaptureConfig(**config), meter, KMS), meter


async def _until(is_true: Any) -> None:
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.01)


def test_close_writes_what_was_put(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        capture, meter = _capture(Store(str(tmp_path)), flush_interval_s=NEVER_S)
        capture.start()
        for number in range(5):
            capture.put(_call(number))
        await capture.close()
        capture.put(_call(9))
        assert meter.total("understudy_calls_captured_total") == 5
        assert meter.counts[("understudy_calls_dropped_total", "closed")] == 1

    asyncio.run(scenario())
    assert read_call_ids(Store(str(tmp_path))) == {f"c{number}" for number in range(5)}


@pytest.mark.parametrize("config", [{"flush_interval_s": 0.02}, {"flush_interval_s": NEVER_S, "flush_calls": 3}])
def test_calls_are_written_by_time_and_by_number(tmp_path: pathlib.Path, config: dict[str, Any]) -> None:
    async def scenario() -> None:
        capture, meter = _capture(Store(str(tmp_path)), **config)
        capture.start()
        for number in range(3):
            capture.put(_call(number))
        await _until(lambda: meter.total("understudy_calls_captured_total") == 3)
        await capture.close()

    asyncio.run(scenario())


def test_a_full_queue_drops_and_counts_without_waiting(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store = MoodyStore(str(tmp_path))
        store.delay_s = 0.3
        capture, meter = _capture(store, flush_interval_s=NEVER_S, flush_calls=2, queue_size=2)
        capture.start()
        capture.put(_call(0))
        capture.put(_call(1))
        await asyncio.sleep(0.05)
        begin = time.perf_counter()
        capture.put(_call(2))
        assert time.perf_counter() - begin < 0.1
        assert meter.counts[("understudy_calls_dropped_total", "queue_full")] == 1
        await capture.close()
        assert meter.total("understudy_calls_captured_total") == 2

    asyncio.run(scenario())


def test_a_failing_store_keeps_the_calls_until_it_works_again(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store = MoodyStore(str(tmp_path))
        store.fails = True
        capture, _ = _capture(store, flush_interval_s=NEVER_S)
        capture.put(_call(0))
        assert not await capture.flush()
        capture.put(_call(1))
        store.fails = False
        assert await capture.flush()
        assert read_call_ids(store) == {"c0", "c1"}

    asyncio.run(scenario())


def test_close_counts_what_the_store_refuses(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store = MoodyStore(str(tmp_path))
        store.fails = True
        capture, meter = _capture(store, flush_interval_s=NEVER_S)
        capture.put(_call(0))
        await capture.close()
        assert meter.counts[("understudy_calls_dropped_total", "store")] == 1

    asyncio.run(scenario())


def test_an_unwritable_call_does_not_take_the_others_with_it(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        capture, meter = _capture(Store(str(tmp_path)), flush_interval_s=NEVER_S)
        for call in (_call(0), _call(1).model_copy(update={"step": 2**70}), _call(2)):
            capture.put(call)
        await capture.close()
        assert meter.counts[("understudy_calls_dropped_total", "unwritable")] == 1
        assert meter.total("understudy_calls_captured_total") == 2

    asyncio.run(scenario())
    assert read_call_ids(Store(str(tmp_path))) == {"c0", "c2"}


def test_idle_times_pass_without_counting_anything(tmp_path: pathlib.Path) -> None:
    """An exported counter refuses 0, and would end the background task."""

    async def scenario() -> None:
        capture, meter = _capture(Store(str(tmp_path)), flush_interval_s=0.01)
        capture.start()
        await asyncio.sleep(0.05)
        await capture.close()
        assert not meter.counts

    asyncio.run(scenario())


def _journaled(store: Store) -> list[str]:
    """Ids in the journals on the disk, whoever writes them."""
    folder = pathlib.Path(store.uri) / "journal"
    return [
        decode_call(record).call_id
        for path in sorted(folder.glob("*.journal"))
        for record in JournalReader(path.read_bytes(), KMS)
    ]


def test_a_queue_of_large_calls_is_bounded_by_memory_too(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        large = "x" * 100_000
        capture, meter = _capture(Store(str(tmp_path)), flush_interval_s=NEVER_S, queue_bytes=1_000_000)
        for number in range(100):
            capture.put(_call(number, f"{large}{number}"))
        num_dropped = meter.counts[("understudy_calls_dropped_total", "queue_bytes")]
        assert 90 <= num_dropped < 95
        assert await capture.flush()
        capture.put(_call(100, large))
        await capture.close()
        assert meter.total("understudy_calls_captured_total") == 100 - num_dropped + 1

    asyncio.run(scenario())


def test_memory_counts_what_is_nested() -> None:
    assert memory_of(_call(0, "x" * 1_000_000)) > 1_000_000
    nested = _call(0).model_copy(update={"response": {"choices": [{"message": {"content": "y" * 50_000}}]}})
    assert 50_000 < memory_of(nested) < 60_000


def test_a_store_that_hangs_holds_up_no_put_and_not_the_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.capture._CLOSE_TIMEOUT_S", 0.05)
    store = MoodyStore(str(tmp_path))
    store.may_write.clear()

    async def scenario() -> None:
        capture, meter = _capture(store, flush_interval_s=0.01, queue_size=3)
        capture.start()
        capture.put(_call(0))
        await asyncio.sleep(0.05)
        for number in range(1, 10):
            capture.put(_call(number))
        assert meter.counts[("understudy_calls_dropped_total", "queue_full")] == 7
        async with asyncio.timeout(5):
            await capture.close()
        assert meter.counts[("understudy_calls_dropped_total", "store")] == 3

    asyncio.run(scenario())
    store.may_write.set()


@pytest.mark.parametrize("error", [ConfigError("no key"), OSError(errno.ENOSPC, "full")])
def test_an_error_of_the_store_is_never_taken_for_one_of_the_call(tmp_path: pathlib.Path, error: Exception) -> None:
    """A ConfigError is a ValueError, and so is what an unwritable call raises."""

    async def scenario() -> None:
        store = MoodyStore(str(tmp_path))
        store.fails, store.error = True, error
        capture, meter = _capture(store, flush_interval_s=NEVER_S)
        capture.put(_call(0))
        assert not await capture.flush()
        store.fails = False
        await capture.close()
        assert not meter.total("understudy_calls_dropped_total")
        assert read_call_ids(store) == {"c0"}

    asyncio.run(scenario())


def test_many_calls_are_written_in_portions(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.capture.MAX_CALLS_PER_PART", 3)

    async def scenario() -> None:
        store = Store(str(tmp_path))
        capture, _ = _capture(store, flush_interval_s=NEVER_S)
        for number in range(7):
            capture.put(_call(number))
        assert await capture.flush()
        assert len(read_call_ids(store)) == 7 and len(store.list("calls", ".parquet")) == 3
        await capture.close()

    asyncio.run(scenario())


def test_keep_is_put_where_durability_is_async(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store = Store(str(tmp_path))
        capture, meter = _capture(store, flush_interval_s=NEVER_S, queue_size=1)
        await capture.keep(_call(0))
        await capture.keep(_call(1))
        assert meter.counts[("understudy_calls_dropped_total", "queue_full")] == 1
        await capture.close()
        assert read_call_ids(store) == {"c0"} and not (tmp_path / "journal").exists()

    asyncio.run(scenario())


def test_keep_returns_once_the_call_is_on_the_disk_where_durability_is_sync(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store = Store(str(tmp_path))
        capture, meter = _capture(store, durability="sync", fold_interval_s=NEVER_S)
        capture.start()
        await asyncio.gather(*(capture.keep(_call(number)) for number in range(20)))
        assert sorted(_journaled(store)) == sorted(f"c{number}" for number in range(20))
        assert meter.total("understudy_calls_journaled_total") == 20 and read_call_ids(store) == set()
        capture.put(_call(20))
        assert await capture.flush()
        assert len(read_call_ids(store)) == 21 and _journaled(store) == []
        await capture.keep(_call(21))
        await capture.close()
        assert len(read_call_ids(store)) == 22
        assert meter.total("understudy_calls_captured_total") == 22
        with pytest.raises(StoreError, match="closed"):
            await capture.keep(_call(22))

    asyncio.run(scenario())


def test_journaled_calls_are_folded_in_the_background(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store = Store(str(tmp_path))
        capture, _ = _capture(store, durability="sync", fold_interval_s=0.02)
        capture.start()
        await capture.keep(_call(0))
        await _until(lambda: read_call_ids(store) == {"c0"})
        await capture.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("durability", ["async", "sync"])
def test_journals_that_others_left_are_folded_from_the_start(tmp_path: pathlib.Path, durability: str) -> None:
    async def scenario() -> None:
        store = MoodyStore(str(tmp_path))
        left, _ = _capture(store, durability="sync", fold_interval_s=NEVER_S)
        await left.keep(_call(0))
        store.fails = True
        await left.close()
        assert _journaled(store) == ["c0"]
        store.fails = False
        capture, _ = _capture(store, durability=durability, flush_interval_s=NEVER_S)
        capture.start()
        await _until(lambda: read_call_ids(store) == {"c0"})
        await capture.close()

    asyncio.run(scenario())


def test_a_disk_that_fails_refuses_the_call_and_takes_the_next_when_it_works(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def scenario() -> None:
        store = Store(str(tmp_path))
        capture, meter = _capture(store, durability="sync", fold_interval_s=NEVER_S)
        await capture.keep(_call(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(StoreError, match="Input/output error"):
                await capture.keep(_call(1))
        await capture.keep(_call(2))
        assert meter.counts[("understudy_calls_dropped_total", "journal")] == 1
        await capture.close()
        assert {"c0", "c2"} <= read_call_ids(store)

    asyncio.run(scenario())


def test_journals_that_a_store_does_not_take_fill_no_disk_and_none_of_their_calls_is_lost(
    tmp_path: pathlib.Path,
) -> None:
    async def scenario() -> None:
        store = MoodyStore(str(tmp_path))
        store.fails = True
        sizes = {"journal_bytes": 1, "journal_max_bytes": 2_000}
        capture, meter = _capture(store, durability="sync", fold_interval_s=NEVER_S, **sizes)
        kept: list[str] = []
        with pytest.raises(StoreError, match="wait for a store"):
            for number in range(100):
                await capture.keep(_call(number))
                kept.append(f"c{number}")
        assert 1 < len(kept) < 20 and sorted(_journaled(store)) == sorted(kept)
        assert meter.counts[("understudy_calls_dropped_total", "journal")] == 1
        store.fails = False
        assert await capture.flush()
        await capture.keep(_call(100))
        await capture.close()
        assert read_call_ids(store) == {*kept, "c100"}

    asyncio.run(scenario())


def test_a_disk_that_hangs_refuses_calls_instead_of_piling_them_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.capture._COMMIT_TIMEOUT_S", 0.05)
    may_sync, sync = threading.Event(), os.fsync

    def hang(fd: int) -> None:
        may_sync.wait(30)
        sync(fd)

    async def scenario() -> None:
        store = Store(str(tmp_path))
        capture, meter = _capture(store, durability="sync", fold_interval_s=NEVER_S, queue_size=2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", hang)
            for number in range(2):
                with pytest.raises(StoreError, match="not answered"):
                    await capture.keep(_call(number))
            with pytest.raises(StoreError, match="queue_full"):
                await capture.keep(_call(2))
            may_sync.set()
            await _until(lambda: meter.total("understudy_calls_journaled_total") == 2)
        await capture.keep(_call(3))
        await capture.close()
        assert read_call_ids(store) == {"c0", "c1", "c3"}

    asyncio.run(scenario())


def test_a_keep_that_is_cancelled_is_written_all_the_same(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store = Store(str(tmp_path))
        capture, _ = _capture(store, durability="sync", fold_interval_s=NEVER_S)
        waiting = asyncio.ensure_future(capture.keep(_call(0)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
        await capture.close()
        assert read_call_ids(store) == {"c0"}

    asyncio.run(scenario())


def test_a_journal_has_a_folder_of_its_own_or_sync_is_refused(tmp_path: pathlib.Path) -> None:
    sync, named = CaptureConfig(durability="sync"), CaptureConfig(durability="sync", journal=str(tmp_path))
    assert journal_folder(sync, str(tmp_path)) == tmp_path / "journal"
    assert journal_folder(named, "s3://bucket/prefix") == tmp_path
    assert journal_folder(CaptureConfig(), "s3://bucket/prefix") is None
    with pytest.raises(ConfigError, match=r"capture\.journal: not given.*s3://bucket/prefix.*next: capture\.journal=/"):
        journal_folder(sync, "s3://bucket/prefix")
    with pytest.raises(ConfigError, match=r"capture\.journal='here': allowed: the whole path"):
        journal_folder(CaptureConfig(journal="here"), str(tmp_path))


def test_two_captures_of_one_store_fold_every_call_once(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        store = Store(str(tmp_path))
        pair = [_capture(store, durability="sync", fold_interval_s=0.005) for _ in range(2)]
        for capture, _ in pair:
            capture.start()
        for number in range(100):
            await pair[number % 2][0].keep(_call(number))
        for capture, _ in pair:
            await capture.close()
        assert sum(meter.total("understudy_calls_captured_total") for _, meter in pair) == 100
        assert read_call_ids(store) == {f"c{number}" for number in range(100)}
        assert fold_orphans(store, KMS, tmp_path / "journal").num_files == 0

    asyncio.run(scenario())
