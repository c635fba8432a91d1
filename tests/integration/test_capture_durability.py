"""`kill -9` of a gateway replica under load: `sync` loses nothing that a client saw finished, `async` at most a flush."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import aiohttp
import psutil
import pytest
from fakes import REQUEST, FakeLLM

from cluster.calls import read_call_ids
from cluster.store import Store
from serving.app import ServeArgs, build

pytestmark = pytest.mark.integration

APP = "test-durability"
NUM_CLIENTS, NUM_BEFORE_KILL, NUM_AFTER_KILL, LOAD_TIMEOUT_S = 8, 300, 100, 120.0
FLUSH_INTERVAL_S, FOLD_INTERVAL_S = 1.0, 2.0
WRITE_ALLOWANCE_S = 2.0
"""A flush that has begun is lost too while its write runs, which takes so long where all cores are busy."""


class Load(NamedTuple):
    """What the clients saw: finished calls by id and time, and when the replica was killed."""

    finished: dict[str, float]
    killed_at: float

    def finished_before_kill(self, window_s: float) -> set[str]:
        return {call_id for call_id, at in self.finished.items() if self.killed_at - window_s <= at}


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_kill_of_a_gateway_under_load(serve_port: int, tmp_path: pathlib.Path, durability: str) -> None:
    from ray import serve

    store = Store(str(tmp_path / "store"))
    capture = {
        "durability": durability,
        "flush_interval_s": FLUSH_INTERVAL_S,
        "fold_interval_s": FOLD_INTERVAL_S,
    }

    async def scenario() -> Load:
        llm = FakeLLM()
        args = {
            "store": store.uri,
            "upstream": [{"base_url": await llm.start(), "max_attempts": 1}],
            "gateway": {"auth": "open"},
            "capture": capture,
        }
        try:
            await asyncio.to_thread(serve.run, build(ServeArgs.model_validate(args)), name=APP, route_prefix="/")
            return await _load(f"http://127.0.0.1:{serve_port}/v1/chat/completions")
        finally:
            # The replica that took over writes what it has captured.
            await asyncio.to_thread(serve.delete, APP)
            await llm.close()

    load = asyncio.run(scenario())
    assert len(load.finished) >= NUM_BEFORE_KILL + NUM_AFTER_KILL
    if durability == "sync":
        # The next replica adopts the dead one's journal; what it may leave at its own end waits in another.
        _until(lambda: set(load.finished) <= read_call_ids(store))
    missing = set(load.finished) - read_call_ids(store)
    at_risk = load.finished_before_kill(FLUSH_INTERVAL_S + WRITE_ALLOWANCE_S) if durability == "async" else set()
    assert missing <= at_risk


async def _load(url: str) -> Load:
    """Clients that ask without a pause, whole answers and streams in turn, before and after the kill."""
    finished: dict[str, float] = {}
    killed = asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.timeout(LOAD_TIMEOUT_S):

        async def client(number: int) -> None:
            turn = number
            while not (killed.is_set() and len(finished) >= num_wanted):
                turn += 1
                call_id = await _ask(session, url, bool(turn % 2))
                if call_id is None:
                    await asyncio.sleep(0.05)
                else:
                    finished[call_id] = time.time()

        num_wanted = NUM_BEFORE_KILL
        pid = _gateway_pid()
        async with asyncio.TaskGroup() as clients:
            for number in range(NUM_CLIENTS):
                clients.create_task(client(number))
            while len(finished) < NUM_BEFORE_KILL:
                await asyncio.sleep(0.005)
            os.kill(pid, signal.SIGKILL)
            killed_at = time.time()
            num_wanted = len(finished) + NUM_AFTER_KILL
            killed.set()
    return Load(finished, killed_at)


async def _ask(session: aiohttp.ClientSession, url: str, stream: bool) -> str | None:
    """Id of the call where its client got all of a good answer."""
    try:
        async with session.post(url, json={**REQUEST, "stream": stream}) as reply:
            body = await reply.read()
    except (aiohttp.ClientError, TimeoutError):
        return None
    is_whole = body.rstrip().endswith(b"data: [DONE]") if stream else bool(_parsed(body))
    return reply.headers["x-understudy-call-id"] if reply.status == 200 and is_whole else None


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _gateway_pid() -> int:
    """Process of this Ray's one gateway replica, by the title that Ray Serve gives it."""
    title = f"ray::ServeReplica:{APP}:gateway"
    pids = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            pids += [process.pid] if title in " ".join(process.cmdline()) else []
    (pid,) = pids
    return pid


def _until(is_true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.2)
