"""What capture adds to a call that passes through, by durability, and what `kill -9` of a gateway loses.

    python -m jobs.bench.capture      # prints the numbers as JSON; about four minutes on two cores

A scripted LLM that answers at once, one gateway process for each way of capturing, and the load are processes of
their own on loopback; the gateway is the one of serving/app.py without Ray's proxy in front of it. All ways take turns
in one run, and calls to the LLM without a gateway are the zero that latency is added to. Journals are folded every
second here, ten times as often as by default, so that a turn contains its own folding.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import aiohttp

from cluster.calls import read_call_ids
from cluster.records import AgentCall
from cluster.store import Store

Mode = Literal["off", "async", "sync"]
MODES: tuple[Mode, ...] = ("off", "async", "sync")
FLUSH_INTERVAL_S = 1.0
NUM_ROUNDS, NUM_KILLS = 5, 5
_DIRECT = "direct"
_SETTLE_S = 1.5 * FLUSH_INTERVAL_S
"""Pause after a turn, in which its last calls are written and not during the next turn."""
_START_TIMEOUT_S = 60.0
_PATH = "/v1/chat/completions"
_SYSTEM = "Sort the customer's message into one of the listed intents and answer with its name alone. " * 20
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "scripted",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "card_arrival"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 400, "completion_tokens": 4, "total_tokens": 404},
}


class Turn(NamedTuple):
    """What one turn of load saw."""

    latencies_ms: list[float]
    seconds: float
    finished: dict[str, float]
    """Ids of answered calls, with the time.perf_counter of their last byte."""


def measure_capture(num_requests: int = 3_000, concurrency: int = 16) -> dict[str, Any]:
    """Measure added latency, throughput and losses.

    Args:
        num_requests: for each way of capturing, once one at a time and once `concurrency` at a time.

    Returns:
        `capture_overhead_ms`: median latency that the gateway adds to a call, one call at a time, capture off included;
        `capture_latency`: the whole picture behind it; `fsync_ms`: one record written and fsynced on the same disk
        without anything else, the floor of sync; `sync_lost` and `async_lost_max`: calls that clients saw finished
        and that are not in the store after a kill, in all kills together and in the worst one; `capture_kills` says of
        each kill how long before it the oldest lost call had finished.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch:
        folder = pathlib.Path(scratch)
        with _process("upstream") as (_, llm):
            latency, fsync_ms = _measure_latency(folder, llm, num_requests, concurrency)
            losses = {mode: _measure_losses(folder / f"kill-{mode}", llm, mode, concurrency) for mode in MODES[1:]}
    alone = latency["one_at_a_time"]
    return {
        "capture_overhead_ms": {mode: round(alone[mode]["p50_ms"] - alone[_DIRECT]["p50_ms"], 3) for mode in MODES},
        "capture_latency": latency,
        "capture_facts": {
            "num_cpus": os.cpu_count(),
            "num_requests": num_requests,
            "concurrency": concurrency,
            "request_bytes": len(json.dumps(_request(0))),
            "num_kills": NUM_KILLS,
        },
        "fsync_ms": fsync_ms,
        "sync_lost": sum(one["lost"] for one in losses["sync"]),
        "async_lost_max": max(one["lost"] for one in losses["async"]),
        "capture_kills": losses,
    }


def _measure_latency(
    folder: pathlib.Path, llm: str, num_requests: int, concurrency: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Tables by load and way of capturing, and what an fsync alone took between their turns."""
    fsyncs: list[float] = []
    with contextlib.ExitStack() as stack:
        urls = {_DIRECT: llm}
        for mode in MODES:
            urls[mode] = stack.enter_context(_gateway(folder / mode, llm, mode))[1]
        tables = {}
        for name, num_at_once in (("one_at_a_time", 1), ("loaded", concurrency)):
            turns: dict[str, list[Turn]] = {key: [] for key in urls}
            for url in urls.values():
                asyncio.run(_load(url, num_at_once, max_requests=200))
            for _ in range(NUM_ROUNDS):
                for key in random.sample(list(urls), len(urls)):
                    time.sleep(_SETTLE_S)
                    turns[key].append(asyncio.run(_load(urls[key], num_at_once, num_requests // NUM_ROUNDS)))
                fsyncs += _measure_fsync(folder)
            tables[name] = {key: _summary(turns[key]) for key in urls}
        return tables, _spread(fsyncs)


def _measure_losses(folder: pathlib.Path, llm: str, mode: Mode, concurrency: int) -> list[dict[str, float]]:
    """Kill gateways of one store under load, one after the other; the last one folds what they left, and ends in order."""
    kills: list[tuple[dict[str, float], float]] = []
    for _ in range(NUM_KILLS):
        with _gateway(folder, llm, mode) as (process, url):
            kills.append(asyncio.run(_load_until_killed(url, concurrency, process)))
    with _gateway(folder, llm, mode) as (_, url):
        asyncio.run(_ask_once(url))
    stored = read_call_ids(Store(str(folder / "store")))
    results = []
    for finished, killed_at in kills:
        lost = [killed_at - end for call_id, end in finished.items() if call_id not in stored]
        window_s = round(max(lost, default=0.0), 2)
        results.append({"finished": len(finished), "lost": len(lost), "oldest_lost_s": window_s})
    return results


async def _load_until_killed(
    url: str, concurrency: int, process: subprocess.Popen[str]
) -> tuple[dict[str, float], float]:
    """Calls that clients saw finished, and when the gateway was killed."""
    first = await _ask_once(url)

    async def kill() -> float:
        await asyncio.sleep(random.uniform(1.5, 3.0) * FLUSH_INTERVAL_S)
        process.send_signal(signal.SIGKILL)
        return time.perf_counter()

    killing = asyncio.create_task(kill())
    turn = await _load(url, concurrency, max_requests=1_000_000)
    return first | turn.finished, await killing


async def _ask_once(url: str) -> dict[str, float]:
    """The first call of a gateway waits until it has started."""
    turn = await _load(url, 1, max_requests=1)
    assert turn.finished, f"{url}: does not answer"
    return turn.finished


async def _load(url: str, concurrency: int, max_requests: int) -> Turn:
    """Clients that ask without a pause, until so many are answered or the server is gone."""
    turn = Turn([], 0.0, {})
    numbers = iter(range(max_requests))
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:

        async def client() -> None:
            for number in numbers:
                begin = time.perf_counter()
                try:
                    async with session.post(f"{url}{_PATH}", json=_request(number)) as reply:
                        body = await reply.read()
                except (aiohttp.ClientError, ConnectionError):
                    return
                assert reply.status == 200, f"{url}: answered {reply.status}"
                json.loads(body)
                end = time.perf_counter()
                turn.latencies_ms.append((end - begin) * 1e3)
                turn.finished[reply.headers.get("x-understudy-call-id", "")] = end

        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return turn._replace(seconds=time.perf_counter() - begin)


def _summary(turns: Sequence[Turn]) -> dict[str, float]:
    latencies = [one for turn in turns for one in turn.latencies_ms]
    return {**_spread(latencies), "requests_per_s": round(len(latencies) / sum(turn.seconds for turn in turns), 1)}


def _spread(values_ms: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(values_ms), 3),
        "p99_ms": round(statistics.quantiles(values_ms, n=100)[98], 3),
    }


def _measure_fsync(folder: pathlib.Path, num_writes: int = 200) -> list[float]:
    """Milliseconds of a write with its fsync, one record of a call at a time and nothing else running."""
    record, latencies_ms = os.urandom(len(json.dumps(_request(0))) + 1_000), []
    fd = os.open(folder / "fsync", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for _ in range(num_writes):
            begin = time.perf_counter()
            os.write(fd, record)
            os.fsync(fd)
            latencies_ms.append((time.perf_counter() - begin) * 1e3)
    finally:
        os.close(fd)
    return latencies_ms


def _request(number: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": f"Where is my card {number}?"}]
    return {"model": "scripted", "messages": messages, "temperature": 0.0}


@contextlib.contextmanager
def _gateway(folder: pathlib.Path, llm: str, mode: Mode) -> Iterator[tuple[subprocess.Popen[str], str]]:
    folder.mkdir(exist_ok=True)
    with _process("gateway", str(folder / "store"), llm, mode) as found:
        yield found


@contextlib.contextmanager
def _process(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A part of this benchmark in a process of its own, and its address; ended in order with the block."""
    command = [sys.executable, "-m", "jobs.bench.capture", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, f"{words[0]}: did not start"
            yield process, url
        finally:
            process.terminate()
            process.wait(_START_TIMEOUT_S)


def _serve(app: Any) -> None:
    """Answer on a free loopback port until SIGTERM; prints the address first."""
    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    # From here on clients wait instead of being refused.
    listener.listen(1_024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def _run_upstream() -> None:
    content = json.dumps(ANSWER).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]

    async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    _serve(answer)


def _run_gateway(store: str, llm: str, mode: Mode) -> None:
    from jobs.bench.core_gateway import lone_gateway

    durability = "async" if mode == "off" else mode
    capture = {"durability": durability, "flush_interval_s": FLUSH_INTERVAL_S, "fold_interval_s": FLUSH_INTERVAL_S}
    upstream = [{"base_url": f"{llm}/v1"}]
    args = {"store": store, "upstream": upstream, "gateway": {"auth": "open"}, "capture": capture}
    gateway = lone_gateway(args)
    if mode == "off":
        gateway._core.capture.keep = _keep_nothing
    _serve(gateway.__serve_build_asgi_app__())


async def _keep_nothing(call: AgentCall) -> None:
    """Capture off, which the product does not have: a measuring point."""


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["upstream"]:
            _run_upstream()
        case ["gateway", store, llm, ("off" | "async" | "sync") as mode]:
            _run_gateway(store, llm, mode)
        case _:
            print(json.dumps(measure_capture(), indent=1))
