"""What a call costs that no specialist answers: our gateway, LiteLLM's proxy and the floor for Python, side by side.

All stand before one fake LLM (jobs/bench/fake_llm.py) on loopback and take turns in one run, unary and streaming, over
concurrencies and sizes of request. `ours` is `understudy serve` as it runs on one machine, with keys, async capture and a
release on stage whose tasks do not match; `ours_core` is the same gateway under uvicorn without Ray Serve; `litellm` has
a key and no capture; `floor` is FastAPI and aiohttp that do nothing but pass bytes on. CPU is that of all processes of
a server (for ours with Ray's own), from a turn's begin until what it left to do is done, less what the server uses idle.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jobs.bench.core_gateway import core_command
from jobs.bench.fake_llm import answer_text
from jobs.bench.http_load import Reply, Turn, http_request, load, spread_ms
from jobs.bench.peers import install_peer
from jobs.bench.processes import free_port, module, server, usage_of

Mode = Literal["unary", "stream"]
MODES: tuple[Mode, ...] = ("unary", "stream")
CONCURRENCIES = (1, 8, 32)
BODY_KB = (0.5, 5, 50)
LITELLM = "1.106.2"
MARK = "#17#"
_TURN_S, _QUICK_TURN_S = 2.0, 0.5
_SETTLE_S, _IDLE_S = 1.1, 4.0
"""Capture writes what a turn left within a second."""
_MAX_REQUESTS = 100_000
_LITELLM_KEY = "sk-bench"


class Target(NamedTuple):
    """One server under test."""

    url: str
    key: str
    pid: int
    idle_cpu_share: float
    """CPU seconds per second without a request."""


def measure_passthrough(say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Measure every server at every mode, concurrency and size.

    Returns:
        `cells`, one for each mode, concurrency, size and server; `summary` (see `summarize`); `where_the_cpu_goes`:
        shares of the gateway's CPU by package, from a profile under uvicorn; `facts`.
    """
    from jobs.bench.gateway_profile import profile_gateway

    concurrencies, sizes = (CONCURRENCIES[:2], BODY_KB[:2]) if quick else (CONCURRENCIES, BODY_KB)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="understudy-bench-")))
        _, llm = stack.enter_context(server(module("jobs.bench.fake_llm"), folder / "llm.log"))
        targets = {name: stack.enter_context(open_one) for name, open_one in _targets(folder, llm, say)}
        for name, target in targets.items():
            targets[name] = target._replace(idle_cpu_share=_idle_share(target.pid))
            say(f"{name}: {targets[name].idle_cpu_share:.3f} of a core idle")
        cells = []
        for mode in MODES:
            for concurrency in concurrencies:
                for size in sizes:
                    for name in random.sample(list(targets), len(targets)):
                        cell = _measure_cell(targets[name], mode, concurrency, size, quick)
                        cells.append({"server": name, "mode": mode, "concurrency": concurrency, "kb": size, **cell})
                        say(json.dumps(cells[-1]))
        shares = profile_gateway(folder / "profile", llm, *([100] if quick else []))
    facts = {"litellm": LITELLM, "turn_s": _TURN_S, "num_cpus": os.cpu_count()}
    return {"cells": cells, "summary": summarize(cells), "where_the_cpu_goes": shares, "facts": facts}


def summarize(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers by mode, concurrency and server, means over the sizes of requests, and ratios over all cells.

    Returns:
        `cpu_ms` and `requests_per_s` by mode, concurrency and server; `vs_litellm`, by mode: how many times LiteLLM's
        requests per CPU second, `worst` of all cells and `mean_cpu`, of the mean CPU; `vs_floor` likewise: how many
        times the floor's CPU; `faster_than_litellm`: share of cells with p50 and p99 below LiteLLM's.
    """
    by_cell: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for cell in cells:
        key = (cell["mode"], cell["concurrency"], cell["kb"])
        by_cell.setdefault(key, {})[cell["server"]] = cell
    numbers: dict[str, Any] = {"cpu_ms": {}, "requests_per_s": {}}
    for name in numbers:
        for mode, concurrency, _ in by_cell:
            of_size = [found for key, found in by_cell.items() if key[:2] == (mode, concurrency)]
            servers = set.intersection(*(set(found) for found in of_size))
            means = {one: _mean([found[one][name] for found in of_size]) for one in sorted(servers)}
            numbers[name].setdefault(mode, {})[str(concurrency)] = means
    for peer, name in (("litellm", "vs_litellm"), ("floor", "vs_floor")):
        numbers[name] = {}
        for mode in {key[0] for key in by_cell}:
            both = [found for key, found in by_cell.items() if key[0] == mode and {"ours", peer} <= found.keys()]
            if both:
                numbers[name][mode] = _ratios(both, peer)
    both = [found for found in by_cell.values() if {"ours", "litellm"} <= found.keys()]
    numbers["faster_than_litellm"] = {
        key: _mean([float(found["ours"][key] < found["litellm"][key]) for found in both])
        for key in ("p50_ms", "p99_ms")
        if both
    }
    return numbers


def _ratios(both: Sequence[Mapping[str, Mapping[str, Any]]], peer: str) -> dict[str, float]:
    """For LiteLLM what we save, its CPU over ours, worst is least; for the floor what we cost, worst is most."""
    ours = [found["ours"]["cpu_ms"] for found in both]
    theirs = [found[peer]["cpu_ms"] for found in both]
    if peer == "litellm":
        return {
            "worst": round(min(b / a for a, b in zip(ours, theirs, strict=True)), 2),
            "mean_cpu": round(sum(theirs) / sum(ours), 2),
        }
    return {
        "worst": round(max(a / b for a, b in zip(ours, theirs, strict=True)), 2),
        "mean_cpu": round(sum(ours) / sum(theirs), 2),
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)


def _measure_cell(target: Target, mode: Mode, concurrency: int, size: float, quick: bool) -> dict[str, Any]:
    seconds = _QUICK_TURN_S if quick else _TURN_S
    request = http_request(target.url, request_body(mode, size), target.key)
    # Connections, code paths and pools that a first request pays for.
    run_turn(target.url, request, mode, concurrency, 2 * concurrency, seconds)
    before, begin = usage_of(target.pid), time.perf_counter()
    turn = run_turn(target.url, request, mode, concurrency, _MAX_REQUESTS, seconds)
    time.sleep(_SETTLE_S)
    used = usage_of(target.pid).cpu_ms_by_name(before)
    cpu_ms = sum(used.values()) - target.idle_cpu_share * (time.perf_counter() - begin) * 1e3
    num_answered = len(turn.whole_ms)
    return {
        "num_requests": num_answered,
        "num_errors": len(turn.errors),
        "first_error": turn.errors[0] if turn.errors else None,
        "requests_per_s": round(num_answered / turn.seconds, 1),
        "cpu_ms": round(cpu_ms / max(1, num_answered), 3),
        # What each process used, idle or not.
        "cpu_ms_by_process": {name: round(one / max(1, num_answered), 3) for name, one in used.items() if one > 1},
        **spread_ms(turn.whole_ms),
        "first_byte_p50_ms": spread_ms(turn.first_byte_ms)["p50_ms"],
    }


def run_turn(url: str, request: bytes, mode: Mode, concurrency: int, max_requests: int, seconds: float) -> Turn:
    """Send one request again and again; every answer is checked."""
    import uvloop

    checked = check_unary if mode == "unary" else check_stream
    turn = load(url, [request], checked, concurrency=concurrency, max_requests=max_requests, max_seconds=seconds)
    return uvloop.run(turn)


def request_body(mode: Mode, kb: float) -> bytes:
    """A request of about so many kilobytes, of which no route model knows anything; its prompt is not compressible."""
    letters = random.Random(kb)
    value: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": MARK}], "temperature": 0.0}
    if mode == "stream":
        value["stream"] = True
    missing = round(kb * 1_000) - len(json.dumps(value)) - 40
    words = " ".join("".join(letters.choices("abcdefghij", k=7)) for _ in range(max(0, missing) // 8))
    value["messages"].insert(0, {"role": "system", "content": words})
    return json.dumps(value).encode()


def check_unary(_: int, reply: Reply) -> str | None:
    """What is wrong with a whole answer to a request of this benchmark."""
    if reply.status != 200:
        return f"status {reply.status}: {reply.body[:200]!r}"
    content = json.loads(reply.body)["choices"][0]["message"]["content"]
    return None if content == answer_text(MARK) else f"another text: {content[:50]!r}"


def check_stream(_: int, reply: Reply) -> str | None:
    """What is wrong with a streamed answer."""
    if reply.status != 200:
        return f"status {reply.status}: {reply.body[:200]!r}"
    # The first word and the last, and the end: parsing all would cost the load more than the servers.
    last = answer_text(MARK).rsplit(" ", 1)[1].encode()
    is_whole = MARK.encode() in reply.body and last in reply.body and reply.body.rstrip().endswith(b"[DONE]")
    return None if is_whole else "the stream is not whole"


def _idle_share(pid: int) -> float:
    before, begin = usage_of(pid), time.perf_counter()
    time.sleep(_IDLE_S)
    return usage_of(pid).cpu_ms_since(before) / 1e3 / (time.perf_counter() - begin)


def _targets(
    folder: pathlib.Path, llm: str, say: Callable[[str], object]
) -> Iterator[tuple[str, contextlib.AbstractContextManager[Target]]]:
    yield "floor", _floor(folder, llm)
    yield "ours_core", _ours_core(folder, llm)
    yield "ours", ours(folder, llm)
    command = litellm_command(say)
    if command is not None:
        yield "litellm", _litellm(folder, llm, command)


@contextlib.contextmanager
def _floor(folder: pathlib.Path, llm: str) -> Iterator[Target]:
    with server(module("jobs.bench.floor_proxy", llm), folder / "floor.log") as (process, url):
        yield Target(url, "none", process.pid, 0.0)


@contextlib.contextmanager
def _ours_core(folder: pathlib.Path, llm: str) -> Iterator[Target]:
    from jobs.bench.stage import make_stage

    store, key = make_stage(folder / "core")
    with server(core_command(store, llm), folder / "core.log") as (process, url):
        yield Target(url, key, process.pid, 0.0)


@contextlib.contextmanager
def ours(folder: pathlib.Path, llm: str, *words: str) -> Iterator[Target]:
    """`understudy serve` with a release on stage that none of the requests here belongs to."""
    from jobs.bench.stage import make_stage

    store, key = make_stage(folder / "serve")
    port = free_port()
    command = module(
        "jobs", "serve", f"store={store}", f"upstream.0.base_url={llm}/v1", f"serve.http.port={port}", *words
    )
    with server(command, folder / "serve.log", port=port) as (process, url):
        yield Target(url, key, process.pid, 0.0)


@contextlib.contextmanager
def _litellm(folder: pathlib.Path, llm: str, command: str) -> Iterator[Target]:
    port = free_port()
    model = {"model": "openai/scripted", "api_base": f"{llm}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "scripted", "litellm_params": model}],
        "general_settings": {"master_key": _LITELLM_KEY},
    }
    # JSON is YAML.
    (folder / "litellm.yaml").write_text(json.dumps(config))
    words = [command, "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_PROXY": "*"}
    with server([*words, "--num_workers", "1"], folder / "litellm.log", environment, port) as (process, url):
        yield Target(url, _LITELLM_KEY, process.pid, 0.0)


def litellm_command(say: Callable[[str], object]) -> str | None:
    """LiteLLM's proxy in a virtual environment of its own, made at the first use; None where it cannot be installed."""
    home = install_peer("litellm", LITELLM, f"litellm[proxy]=={LITELLM}", say)
    return home and str(home / "bin" / "litellm")


if __name__ == "__main__":
    found = measure_passthrough(lambda text: print(text, file=sys.stderr, flush=True), "--quick" in sys.argv)
    print(json.dumps(found["summary"], indent=1))
