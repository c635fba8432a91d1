"""The demo from end to end: agent -> gateway -> capture -> convert -> promote -> fresh traffic -> summary.

The LLM is scripted and says so. Fresh traffic uses held-out templates and values. Every kept answer of the fresh
traffic is compared with what the LLM answers to the same request, asked directly and not counted as traffic.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from typing import Any

from cluster import answers
from cluster.access import ApiKeys, keys_folder
from cluster.errors import ConfigError, ReleaseError
from cluster.registry import promote
from cluster.session import connect
from cluster.store import Store
from jobs.convert import Conversion, convert, write_conversion_report
from jobs.demo.agent import CallResult, run_agent
from jobs.demo.world import make_conversations
from jobs.recipe import Recipe, load_recipe
from training.gate import clopper_pearson_interval

NUM_CAPTURED, NUM_FRESH = 1100, 100
MAX_IN_FLIGHT = 48
MODEL = "scripted-llm-v1"
SEED = 7
SCRIPTED = "The LLM of this demo is scripted (jobs/demo/llm.py); it disagrees with itself on 0.3% of the calls with one right answer."
SCRATCH = (
    "The base model was trained from scratch on the captured traffic's train split; no pretrained weights were used."
)
_MARKER = ".understudy-demo"


def run_demo(out: pathlib.Path, words: list[str], summary_path: pathlib.Path | None) -> dict[str, Any]:
    """Run everything below `out`, which is emptied first. Returns the summary.

    Raises:
        ConfigError: `out` holds something that is not an earlier demo.
    """
    began = time.monotonic()
    _empty(out)
    recipe = load_recipe(["recipe=demo", f"store={out / 'store'}", *words])
    process, url = _start_llm()
    try:
        connect()
        port = _start_serve()
        key = ApiKeys(keys_folder(recipe.store) / "api_keys.json").create("demo-agent", "agent")
        _deploy(recipe, url)
        print(f"S1 capture: {NUM_CAPTURED} conversations through the gateway; the LLM is scripted")
        captured = asyncio.run(_drive(port, key, "captured", NUM_CAPTURED))
        _undeploy()
        conversion = convert(recipe)
        promote(Store(recipe.store), conversion.release)
        _deploy(recipe, url)
        _wait_for_release(port, conversion)
        print(f"serve: {NUM_FRESH} fresh conversations, held-out templates and values")
        fresh_began, spent = time.monotonic(), [_spent_usd(url)]
        fresh = asyncio.run(_drive(port, key, "fresh", NUM_FRESH))
        fresh_s = time.monotonic() - fresh_began
        spent.append(_spent_usd(url))
        references = asyncio.run(_ask_llm(url, [r for r in fresh if _is_kept(r)]))
        spent.append(_spent_usd(url))
    finally:
        _stop(process)
    summary = _summarise(conversion, captured, fresh, references)
    summary |= _costs(recipe, spent, fresh_s)
    summary["wall_s"] = round(time.monotonic() - began, 1)
    for path in filter(None, [out / "summary.json", summary_path]):
        path.write_text(json.dumps(summary, indent=1) + "\n")
    (out / "conversion.json").write_text(conversion.model_dump_json(indent=1) + "\n")
    write_conversion_report(out / "report.html", conversion, summary, [SCRIPTED, SCRATCH])
    return summary


def _empty(out: pathlib.Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise ConfigError(f"--out {out}: holds files that are no earlier demo's; allowed: an absent or empty folder")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out / 'store'}.keys", ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARKER).touch()


def _start_llm() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "jobs.demo.llm", "--port", "0", "--seed", str(SEED)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout else ""
    url = next((word for word in line.split() if word.startswith("http://")), None)
    if url is None:
        process.terminate()
        raise ConfigError(f"scripted LLM did not start; it said {line!r}")
    return process, url.rstrip("/")


def _start_serve() -> int:
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return port


def _deploy(recipe: Recipe, url: str) -> None:
    from ray import serve

    from serving.app import ServeArgs, build

    base_url = url if url.endswith("/v1") else f"{url}/v1"
    upstream = [{"base_url": base_url, "prompt_usd_per_million": 2.5, "completion_usd_per_million": 10.0}]
    args = ServeArgs.model_validate(
        {
            "store": recipe.store,
            "upstream": upstream,
            "gateway": recipe.gateway,
            "capture": recipe.capture,
            "audit": recipe.audit,
            "specialists": recipe.specialists,
        }
    )
    serve.run(build(args), name="understudy", route_prefix="/")


def _undeploy() -> None:
    from ray import serve

    serve.delete("understudy")


def _stop(process: subprocess.Popen[str]) -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()
    process.terminate()
    process.wait(timeout=10)


def _client(base_url: str, key: str) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)


async def _drive(port: int, key: str, season: str, count: int) -> list[CallResult]:
    from tqdm import tqdm

    conversations = make_conversations(season, count, SEED)
    async with _client(f"http://127.0.0.1:{port}/v1", key) as client:
        with tqdm(total=count, desc=season, unit="conversation", disable=None) as bar:
            return await run_agent(
                client, MODEL, conversations, MAX_IN_FLIGHT, lambda done, _: bar.update(done - bar.n)
            )


def _wait_for_release(port: int, conversion: Conversion, timeout_s: float = 120.0) -> None:
    """The gateway loads every adapter before it follows a release; wait until it serves this one.

    Raises:
        ReleaseError: it did not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as reply:
            health = json.load(reply)
        if health["release"] == conversion.release:
            return
        if time.monotonic() > deadline:
            raise ReleaseError(f"the gateway did not take up release {conversion.release} within {timeout_s:g} s")
        time.sleep(1.0)


def _is_kept(result: CallResult) -> bool:
    return result.error is None and result.headers.get("x-understudy-route") == "accept"


async def _ask_llm(url: str, kept: list[CallResult]) -> list[dict[str, Any]]:
    slots = asyncio.Semaphore(MAX_IN_FLIGHT)
    async with _client(url if url.endswith("/v1") else f"{url}/v1", "none") as client:

        async def ask(result: CallResult) -> dict[str, Any]:
            async with slots:
                request = {k: v for k, v in result.request.items() if k not in ("stream", "stream_options")}
                reply = await client.chat.completions.create(**request)
                return reply.choices[0].message.model_dump(exclude_none=True)

        return list(await asyncio.gather(*map(ask, kept)))


def _spent_usd(url: str) -> float:
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/stats", timeout=10) as reply:
        return json.load(reply)["cost_usd"]


def _costs(recipe: Recipe, spent: list[float], fresh_s: float) -> dict[str, Any]:
    """Spend of the fresh traffic against what it had been with every call on the LLM.

    The kept calls were asked of the LLM afterwards to be compared; that is exactly what keeping them saved.
    """
    upstream, saved = spent[1] - spent[0], spent[2] - spent[1]
    machine = fresh_s / 3600 * recipe.prices.replica_usd_per_hour
    return {
        "cost_ratio": (upstream + machine) / (upstream + saved),
        "upstream_usd": upstream,
        "machine_usd": machine,
        "all_llm_usd": upstream + saved,
        "fresh_s": round(fresh_s, 1),
    }


def _summarise(
    conversion: Conversion, captured: list[CallResult], fresh: list[CallResult], references: list[dict[str, Any]]
) -> dict[str, Any]:
    kept = [result for result in fresh if _is_kept(result)]
    kinds = {task.task_id: task.kind for task in conversion.tasks}
    agrees = [
        answers.grade(r.message, reference, kinds[r.headers["x-understudy-task"]], r.request).agrees
        for r, reference in zip(kept, references, strict=True)
    ]
    wrong = agrees.count(False)
    low, high = clopper_pearson_interval(wrong, len(kept)) if kept else (0.0, 1.0)
    latencies = sorted(result.latency_ms for result in fresh)
    routes = Counter(f"{r.site}:{r.headers.get('x-understudy-route', 'error')}" for r in fresh)
    evaluations = {e.task_id: e for e in conversion.evaluations}
    return {
        "llm": "scripted",
        "tasks_released": sum(e.gate.is_open for e in conversion.evaluations),
        "tasks_refused": len(conversion.refused),
        "calls": len(fresh),
        "share_off_llm": len(kept) / len(fresh),
        "agreement_accepted": 1 - wrong / len(kept) if kept else None,
        "agreement_interval": [1 - high, 1 - low],
        "client_errors": sum(r.error is not None for r in [*captured, *fresh]),
        "p50_ms": round(statistics.median(latencies), 1),
        "p99_ms": round(latencies[int(0.99 * (len(latencies) - 1))], 1),
        "routes": dict(sorted(routes.items())),
        "disagreements_by_site": dict(Counter(r.site for r, ok in zip(kept, agrees, strict=True) if not ok)),
        "seconds": conversion.seconds,
        "gates": {t: e.gate.refused or f"open, coverage {e.gate.coverage:.3f}" for t, e in evaluations.items()},
    }
