"""Capture's contract: nothing waits, nothing raises, and every call is written or counted as dropped."""

from __future__ import annotations

import asyncio
import pathlib
import time
from typing import Any

import pyarrow as pa
import pytest
from fakes import REQUEST

from cluster.calls import read_call_ids
from cluster.errors import StoreError
from cluster.records import AgentCall
from cluster.store import Store
from cluster.telemetry import Meter
from serving.capture import Capture, CaptureConfig

NEVER_S = 1000.0


class MoodyStore(Store):
    """Fails while told to, and takes its time."""

    fails = False
    delay_s = 0.0

    def write_table(self, path: str, table: pa.Table, encrypted: tuple[str, ...] = ()) -> None:
        time.sleep(self.delay_s)
        if self.fails:
            raise StoreError("away")
        super().write_table(path, table, encrypted)


def _call(number: int, text: str = "hello") -> AgentCall:
    return AgentCall(
        call_id=f"c{number}", ts=1_700_000_000.0 + number, client_id="c", agent="a", session_id="s", step=0,
        request={**REQUEST, "user": text}, response=None,
    )  # fmt: skip


def _capture(store: Store, **config: Any) -> tuple[Capture, Meter]:
    meter = Meter()
    return Capture(store, CaptureConfig(**config), meter), meter


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
        for call in (_call(0), _call(1, "\ud800"), _call(2)):
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
