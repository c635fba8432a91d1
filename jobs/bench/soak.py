"""A gateway under mixed load for a while: does its memory grow, does it keep connections.

`understudy serve` before the fake LLM, thirteen shapes of request in turn, bursts of many clients between stretches of
few. Memory and file handles are those of all its processes with Ray's own, looked at between bursts; the slope leaves
out the first quarter, in which pools and caches fill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from jobs.bench.http_load import Reply, Turn, connect, http_request, load, slope, spread_ms
from jobs.bench.passthrough import ours
from jobs.bench.processes import module, server, usage_of

_SOAK_S, _QUICK_S = 1_200.0, 20.0
_ROUND_S, _BURST_S = 4.0, 1.0
_CALM, _BURST = 4, 32
_LEAVE_S = 0.01
SHAPES = (
    *("short", "short stream", "5 KB", "50 KB stream", "near window", "64 tools", "8 turns", "8 turns stream"),
    *("JSON schema", "parts", "the LLM fails", "the stream breaks", "the client leaves"),
)


def measure_soak(say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Load the gateway for twenty minutes.

    Returns:
        `soak_rss_slope_mib_per_h`; memory and handles at the first and last look; requests and unlooked-for errors.
    """
    seconds = _QUICK_S if quick else _SOAK_S
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="understudy-bench-")))
        _, llm = stack.enter_context(server(module("jobs.bench.fake_llm"), folder / "llm.log"))
        target = stack.enter_context(
            ours(folder, llm, "upstream.0.max_attempts=1", "upstream.0.breaker_failures=1000000")
        )
        return asyncio.run(_soak(target.url, target.key, target.pid, seconds, say))


async def _soak(url: str, key: str, pid: int, seconds: float, say: Callable[[str], object]) -> dict[str, Any]:
    shapes = [http_request(url, json.dumps(body).encode(), key) for body in shape_bodies()]
    looks: list[tuple[float, float, int]] = []
    turns: list[Turn] = []
    begin = time.perf_counter()
    while (now := time.perf_counter() - begin) < seconds:
        usage = usage_of(pid)
        looks.append((now, usage.rss_mib, usage.num_handles))
        say(f"{now:.0f} s: {usage.rss_mib:.0f} MiB, {usage.num_handles} handles")
        for num_clients, lasts_s in ((_CALM, _ROUND_S), (_BURST, _BURST_S)):
            turns.append(await _load_some(url, shapes, num_clients, lasts_s))
            await _leave(url, shapes[1], num_clients)
        await asyncio.sleep(1.2)
    usage = usage_of(pid)
    looks.append((time.perf_counter() - begin, usage.rss_mib, usage.num_handles))
    errors = [one for turn in turns for one in turn.errors]
    return {
        **summarize_looks(looks),
        "seconds": round(looks[-1][0]),
        "shapes": SHAPES,
        "requests": sum(len(turn.whole_ms) for turn in turns),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        **spread_ms([one for turn in turns for one in turn.whole_ms]),
    }


def summarize_looks(looks: Sequence[tuple[float, float, int]]) -> dict[str, Any]:
    """What (seconds, MiB, handles) looked at between bursts say, the first quarter of the time left out of the slope."""
    settled = [(at / 3600, rss) for at, rss, _ in looks if at >= looks[-1][0] / 4]
    return {
        "soak_rss_slope_mib_per_h": round(slope(settled), 2),
        "rss_mib": [round(rss, 1) for _, rss, _ in (looks[0], looks[-1])],
        "handles": [handles for _, _, handles in (looks[0], looks[-1])],
    }


async def _load_some(url: str, shapes: Sequence[bytes], num_clients: int, seconds: float) -> Turn:
    def checked(number: int, reply: Reply) -> str | None:
        allowed = {500, 502} if SHAPES[number] == "the LLM fails" else {200}
        return None if reply.status in allowed else f"{SHAPES[number]}: status {reply.status}: {reply.body[:200]!r}"

    # The last shape is a client that leaves, which is done apart.
    return await load(url, shapes[:-1], checked, concurrency=num_clients, max_requests=100_000, max_seconds=seconds)


async def _leave(url: str, request: bytes, num_clients: int) -> None:
    """Clients that are gone before their stream has ended."""
    exchanges = [await connect(url) for _ in range(num_clients)]
    asking = [asyncio.create_task(one.ask(request)) for one in exchanges]
    await asyncio.sleep(_LEAVE_S)
    for exchange in exchanges:
        exchange.close()
    await asyncio.gather(*asking, return_exceptions=True)


def shape_bodies() -> list[dict[str, Any]]:
    """A request of each shape, in the order of SHAPES."""
    talk = [{"role": "system", "content": "Help."}]
    for number in range(8):
        talk += [
            {"role": "user", "content": f"Question {number} " * 40},
            {"role": "assistant", "content": "Yes. " * 40},
        ]
    parameters = {"type": "object", "properties": {name: {"type": "string"} for name in ("first", "second", "third")}}
    tools = [
        {
            "type": "function",
            "function": {"name": f"tool_{number}", "description": "A tool. " * 8, "parameters": parameters},
        }
        for number in range(64)
    ]
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": parameters}}
    parts = [{"type": "text", "text": "One part."}, {"type": "text", "text": "Another part."}]
    return [
        _body("Hello"),
        _body("Hello", stream=True),
        _body("word " * 1_000),
        _body("word " * 10_000, stream=True),
        _body("word " * 100_000),
        _body("Call one", tools=tools),
        {"model": "scripted", "messages": [*talk, {"role": "user", "content": "And?"}]},
        {"model": "scripted", "messages": [*talk, {"role": "user", "content": "And?"}], "stream": True},
        _body("As JSON", response_format=schema),
        _body(parts),
        _body("Fail", user="fate:s500"),
        _body("Break", user="fate:error_event", stream=True),
        _body("Hello", stream=True),
    ]


def _body(content: Any, **extra: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": content}], **extra}


if __name__ == "__main__":
    import sys

    print(
        json.dumps(measure_soak(lambda text: print(text, file=sys.stderr, flush=True), "--quick" in sys.argv), indent=1)
    )
