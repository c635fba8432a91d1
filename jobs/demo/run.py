"""The demo from end to end: agent -> gateway -> capture -> convert -> promote -> fresh traffic -> summary.

The graph is deployed twice: without specialists to capture, and, once adapters are trained, with the engine that
validation asks and that serves the release afterwards. Fresh traffic uses held-out templates and values.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from cluster.access import ApiKeys, keys_folder
from cluster.calls import read_call_columns, read_calls
from cluster.engine import Engine
from cluster.errors import ConfigError, ReleaseError
from cluster.records import AgentCall, Usage
from cluster.registry import promote_at
from cluster.session import connect, joins_cluster
from cluster.store import Store
from jobs.convert import Conversion, convert, write_conversion_report
from jobs.demo.agent import CallResult, run_agent
from jobs.demo.provider import KEY_VARIABLE, Provider, ProviderName, start_provider, stop_provider
from jobs.demo.summary import LLMAnswer, is_kept, print_summary, summarise_agreement, summarise_costs
from jobs.demo.world import SITES, make_conversations
from jobs.recipe import Recipe, load_recipe
from jobs.serve import serve_args

NUM_CAPTURED, NUM_FRESH = 1100, 100
MAX_IN_FLIGHT = 48
SEED = 7
APP = "understudy"
SCRATCH = (
    "The base model was trained from scratch on the captured traffic's train split; no pretrained weights were used."
)
_MARKER = ".understudy-demo"
_FLUSH_WAIT_S = 10.0


def run_demo(
    out: pathlib.Path, words: list[str], summary_path: pathlib.Path | None, provider_name: ProviderName = "scripted"
) -> dict[str, Any]:
    """Run everything below `out`, which is emptied first. Prints the summary and returns it.

    Raises:
        ConfigError: RAY_ADDRESS is set, `out` holds something that is not an earlier demo, or the provider is not
            described.
    """
    _refuse_cluster()
    began = time.monotonic()
    recipe = load_recipe(["recipe=demo", f"store={out / 'store'}", *words])
    provider = start_provider(provider_name, (NUM_CAPTURED + 2 * NUM_FRESH) * len(SITES), SEED)
    try:
        _empty(out)
        connect()
        summary, conversion = _journey(recipe, provider)
    finally:
        _shut_down()
        stop_provider(provider)
    summary["wall_s"] = round(time.monotonic() - began, 1)
    for path in filter(None, [out / "summary.json", summary_path]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1) + "\n")
    (out / "conversion.json").write_text(conversion.model_dump_json(indent=1) + "\n")
    write_conversion_report(out / "report.html", conversion, summary, [provider.note, SCRATCH])
    print_summary(summary)
    print(f"summary: {out / 'summary.json'}\n{out / 'report.html'}")
    return summary


def _journey(recipe: Recipe, provider: Provider) -> tuple[dict[str, Any], Conversion]:
    store = Store(recipe.store)
    port = _start_serve()
    key = ApiKeys(keys_folder(recipe.store) / "api_keys.json").create("demo-agent", "agent")
    _deploy(recipe, provider)
    print(f"S1 capture: {NUM_CAPTURED} conversations of {len(SITES)} calls through the gateway; {provider.note}")
    captured = asyncio.run(_drive(port, key, provider.model, "captured", NUM_CAPTURED))
    _undeploy()

    @contextlib.contextmanager
    def deployed_engine(base: str) -> Iterator[Engine]:
        """The graph that will serve the release; it stays."""
        from serving.specialist import find_engine

        _deploy(recipe, provider, base)
        yield find_engine(APP, base)

    converting = time.monotonic()
    conversion = convert(recipe, engine_of=deployed_engine)
    conversion_s = time.monotonic() - converting
    _wait_for_release(port, promote_at(store, conversion.release, recipe.rollout.at()))
    print(f"serve: {NUM_FRESH} fresh conversations, held-out templates and values")
    fresh_began, fresh_ts = time.monotonic(), time.time()
    fresh = asyncio.run(_drive(port, key, provider.model, "fresh", NUM_FRESH))
    fresh_s = time.monotonic() - fresh_began
    calls = _captured_since(store, fresh_ts, len(fresh))
    references = asyncio.run(_ask_llm(provider, [result for result in fresh if is_kept(result)]))
    costs = summarise_costs(
        calls,
        references,
        provider.upstream,
        fresh_s=fresh_s,
        conversion_s=conversion_s,
        usd_per_hour=recipe.prices.replica_usd_per_hour,
    )
    summary = summarise_agreement(conversion, captured, fresh, references)
    return {"llm": provider.model, **summary, **costs}, conversion


def _refuse_cluster() -> None:
    """The demo starts a Ray of its own, and takes down all that Ray Serve runs there when it ends."""
    if joins_cluster():
        raise ConfigError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}: the demo ends with a shutdown of Ray Serve and all its "
            "applications, so it runs on a Ray of its own on this machine alone; allowed: RAY_ADDRESS not set; "
            "next: unset RAY_ADDRESS"
        )


def _empty(out: pathlib.Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; allowed: an absent or empty folder")
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise ConfigError(f"--out {out}: holds files that are no earlier demo's; allowed: an absent or empty folder")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out / 'store'}.keys", ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARKER).touch()


def _start_serve() -> int:
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return port


def _deploy(recipe: Recipe, provider: Provider, *bases: str) -> None:
    from ray import serve

    from serving.app import build

    recipe = recipe.model_copy(update={"upstream": (provider.upstream,)})
    serve.run(build(serve_args(recipe, bases)), name=APP, route_prefix="/")


def _undeploy() -> None:
    from ray import serve

    serve.delete(APP)


def _shut_down() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()


def _client(base_url: str, key: str) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)


async def _drive(port: int, key: str, model: str, season: str, count: int) -> list[CallResult]:
    from tqdm import tqdm

    conversations = make_conversations(season, count, SEED)
    async with _client(f"http://127.0.0.1:{port}/v1", key) as client:
        with tqdm(total=count, desc=season, unit="conversation", disable=None) as bar:
            return await run_agent(
                client, model, conversations, MAX_IN_FLIGHT, lambda done, _: bar.update(done - bar.n)
            )


def _wait_for_release(port: int, release: str, timeout_s: float = 120.0) -> None:
    """The gateway loads every adapter before it follows a release; wait until it serves this one.

    Raises:
        ReleaseError: it did not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as reply:
            health = json.load(reply)
        if health["release"] == release:
            return
        if time.monotonic() > deadline:
            raise ReleaseError(f"the gateway did not take up release {release} within {timeout_s:g} s")
        time.sleep(0.2)


def _captured_since(store: Store, ts: float, num_calls: int) -> list[AgentCall]:
    """The calls captured since `ts`: waits until `num_calls` are flushed, audits not counted, and one flush longer."""
    deadline = time.monotonic() + _FLUSH_WAIT_S
    while time.monotonic() < deadline:
        rows = read_call_columns(store, ["ts", "action"]).to_pylist()
        if sum(row["ts"] >= ts and row["action"] != "audit" for row in rows) >= num_calls:
            break
        time.sleep(0.2)
    time.sleep(2.0)
    return [call for call in read_calls(store) if call.ts >= ts]


async def _ask_llm(provider: Provider, kept: list[CallResult]) -> list[LLMAnswer]:
    """What the LLM itself says to the kept calls; asked directly, so that it is no traffic."""
    slots = asyncio.Semaphore(MAX_IN_FLIGHT)
    async with _client(provider.upstream.base_url, os.environ.get(KEY_VARIABLE) or "none") as client:

        async def ask(result: CallResult) -> LLMAnswer:
            async with slots:
                request = {k: v for k, v in result.request.items() if k not in ("stream", "stream_options")}
                reply = await client.chat.completions.create(**request)
                usage = Usage(prompt_tokens=reply.usage.prompt_tokens, completion_tokens=reply.usage.completion_tokens)
                return LLMAnswer(reply.choices[0].message.model_dump(exclude_none=True), usage)

        return list(await asyncio.gather(*map(ask, kept)))
