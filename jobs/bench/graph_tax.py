"""What the serving graph adds to an engine: specialists through HTTP, gateway and Ray Serve beside vLLM alone.

The same prompts, adapters and lengths of answer, once given to vLLM's AsyncLLM in a process of its own, and once as chat
completions to the graph of serving/app.py. The base is untrained and large enough that one answer costs an engine 100
ms of CPU or more. Untrained, it never ends its answers, which the gateway then hands on: every call asks the fake LLM as
well, so the tax is that of the longest way through the graph. Needs vLLM.

With two engines there is a choice: conversations that grow, of four turns each, are asked under Ray Serve's own way to choose
a replica and under ours (serving/replica_choice.py). A turn that goes where the last one went finds its beginning there.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.prompts import PromptFormat, render_prompt
from cluster.servable import REJECTED_REASON
from cluster.session import connect, let_ingress_listen
from cluster.store import Store
from jobs.bench.http_load import Reply, http_request, load
from jobs.bench.http_load import connect as open_connection
from jobs.bench.processes import free_port, module, server, usage_of
from jobs.bench.stage import make_key, publish_stage, task_request
from serving.app import ServeArgs, build
from serving.engine_options import AdapterMode, cpu_environment, engine_kwargs, fingerprint_of
from serving.specialist import add_adapter
from serving.specialist_config import SpecialistConfig

BASE = "bases/graph-tax"
SHAPE = {"hidden_size": 512, "intermediate_size": 1_408, "layers": 8, "heads": 8, "vocab_size": 4_096}
PATIENT = {"specialist_timeout_s": 50.0}
"""Of the gateway: a call that is given up says nothing of what one takes, and machines are busy."""
SMALL = {"hidden_size": 256, "intermediate_size": 640, "layers": 6, "heads": 4, "vocab_size": 2_048}
"""Of a base for measurements of more than one engine's speed: an answer takes milliseconds."""
NUM_ADAPTERS = 4
NUM_TOKENS = 16
"""Of each answer."""
_PROMPT_WORDS = 100
_CONCURRENCY = 8
_NUM_REQUESTS, _NUM_QUICK = 96, 16
_MAX_SECONDS = 120.0
_NUM_TURNS, _TURN_WORDS = 4, 60
ROUTERS = ("default", "adapter")
PHASES = (("warm", NUM_ADAPTERS), ("one", 1), ("mixed", NUM_ADAPTERS))
"""What is asked, one after the other, and of how many adapters; each of prompts that no engine has seen."""
CONFIG = {"max_adapters": NUM_ADAPTERS, "max_lora_rank": 8, "max_model_tokens": 512, "max_num_seqs": 16}
FORMAT = PromptFormat(kind="compact", answer_kind="label", max_prompt_tokens=400)
_START_TIMEOUT_S = 240.0


def measure_graph_tax(say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Ask bare vLLM, then the graph with one engine and with two.

    Returns:
        `graph_tax`: share of bare vLLM's requests per second that the graph loses at one engine, one adapter;
        `merged_vs_one_adapter`: requests per second of bare vLLM with an adapter merged into the weights over those with one
        beside them; `mixed_vs_one_adapter`: requests per second with four adapters over those with one, through the graph;
        `replica_efficiency`: of two engines over twice those of one; `adapter_router_vs_default`: requests per second of
        growing conversations, and engine CPU per request, under our choice of replicas over those under Serve's; and what
        was measured.
    """
    num = _NUM_QUICK if quick else _NUM_REQUESTS
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch:
        folder = pathlib.Path(scratch)
        store = Store(str(folder / "store"))
        facts = make_base(store, folder)
        bare = _run_bare(store, num)
        say(f"bare: {bare}")
        with server(module("jobs.bench.fake_llm"), folder / "llm.log") as (_, llm):
            key = make_key(store)
            graph = {replicas: _run_graph(store, key, llm, replicas, num, say) for replicas in (1, 2)}
            other = _run_graph(store, key, llm, 2, num, say, ROUTERS[1])
    routers = dict(zip(ROUTERS, (graph[2]["turns"], other["turns"]), strict=True))
    return {**compare(bare, graph), **compare_routers(routers), "bare": bare, "graph": graph, "facts": facts}


def compare(bare: dict[str, Any], graph: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The four numbers, from requests per second by `one` and `mixed` adapters, and by engines."""
    one = graph[1]["one"]["requests_per_s"]
    return {
        "graph_tax": round(1 - one / bare["one"]["requests_per_s"], 3),
        "merged_vs_one_adapter": round(bare["merged"]["requests_per_s"] / bare["one"]["requests_per_s"], 3),
        "mixed_vs_one_adapter": round(graph[1]["mixed"]["requests_per_s"] / one, 3),
        "replica_efficiency": round(graph[2]["one"]["requests_per_s"] / (2 * one), 3),
    }


def compare_routers(turns: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Our choice of replicas beside Serve's, from what growing conversations took under each."""
    ours, theirs = turns["adapter"], turns["default"]
    ratios = {key: round(ours[key] / theirs[key], 3) for key in ("requests_per_s", "cpu_ms")}
    return {"adapter_router_vs_default": ratios, "routers": turns}


def turn_of(number: int, num_sessions: int) -> dict[str, Any]:
    """The request of that number among conversations that take turns: each goes on where its last turn ended."""
    turn, session = divmod(number, num_sessions)
    request = task_request(f"task-{session % NUM_ADAPTERS}", len(PHASES) * _NUM_REQUESTS + session)
    request["messages"][1]["content"] += " please" * (_TURN_WORDS * (turn + 1))
    return request


def adapter_of(number: int) -> str:
    """Store path of an adapter."""
    return f"adapters/graph-tax-{number}"


def request_of(adapter: int, number: int) -> dict[str, Any]:
    """A request of the task that has this adapter."""
    request = task_request(f"task-{adapter}", number)
    request["messages"][1]["content"] += " please" * _PROMPT_WORDS
    return request


def make_base(
    store: Store, folder: pathlib.Path, shape: dict[str, int] = SHAPE, num_adapters: int = NUM_ADAPTERS
) -> dict[str, Any]:
    """Publish an untrained base and untrained adapters of it, which cost an engine what trained ones do."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from training.catalog import ScratchModel
    from training.scratch import init_model, train_tokenizer

    entry = ScratchModel(name="graph-tax", kind="scratch", context_window_tokens=1_024, **shape)
    tokenizer = train_tokenizer([json.dumps(request_of(0, number)) for number in range(200)], entry.vocab_size)
    init_model(entry, tokenizer, folder / "base", 0)
    manifest = store.publish(BASE, folder / "base", {"kind": "bench"})
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    num_parameters = sum(one.numel() for one in model.parameters())
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for number in range(num_adapters):
        torch.manual_seed(number)
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.01)
        adapted.save_pretrained(folder / f"adapter-{number}")
        store.publish(adapter_of(number), folder / f"adapter-{number}", {"kind": "bench"})
    # Above a threshold of 0 an engine would give these answers up at their first tokens, and be measured on less than bare vLLM.
    tasks = {f"task-{one}": (adapter_of(one), 0.0, request_of(one, 0)) for one in range(num_adapters)}
    fingerprint = fingerprint_of(manifest["sha256"], SpecialistConfig(**CONFIG | {"max_adapters": num_adapters}))
    publish_stage(store, "graph-tax", tasks, base=BASE, fingerprint=fingerprint, prompt_format=FORMAT)
    return {"parameters": num_parameters, "answer_tokens": NUM_TOKENS, "concurrency": _CONCURRENCY, **CONFIG}


def _run_bare(store: Store, num: int) -> dict[str, Any]:
    command = module("jobs.bench.graph_tax", "bare", store.uri, str(num))
    environment = {**os.environ, **cpu_environment(1, 1), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"bare vLLM: {done.stderr[-2_000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


async def _bare(store: Store, num: int) -> dict[str, Any]:
    from transformers import AutoTokenizer
    from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
    from vllm.config import StructuredOutputsConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    source = str(store.fetch(BASE))
    tokenizer = AutoTokenizer.from_pretrained(source)
    loras = [LoRARequest(adapter_of(one), one + 1, str(store.fetch(adapter_of(one)))) for one in range(NUM_ADAPTERS)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, logprobs=0, stop_token_ids=[tokenizer.eos_token_id])

    async def ask(engine: Any, lora: Any, adapter: int, number: int) -> None:
        prompt = TokensPrompt(prompt_token_ids=render_prompt(request_of(adapter, number), FORMAT, tokenizer).ids)
        async for _ in engine.generate(prompt, params, f"{adapter}-{number}-{time.time()}", lora_request=lora):
            pass

    async def measure(engine: Any, own: Sequence[Any], num_adapters: int, first: int) -> dict[str, Any]:
        numbers = iter(range(first * num, (first + 1) * num))
        before, begin = usage_of(os.getpid()), time.perf_counter()

        async def client() -> None:
            for number in numbers:
                adapter = number % num_adapters
                await ask(engine, own[adapter], adapter, number)

        await asyncio.gather(*(client() for _ in range(_CONCURRENCY)))
        return _rates(num, time.perf_counter() - begin, usage_of(os.getpid()).cpu_ms_since(before))

    def start(mode: AdapterMode) -> Any:
        options = engine_kwargs(SpecialistConfig(**CONFIG), mode)
        # As Ray Serve LLM does for the graph's.
        options["structured_outputs_config"] = StructuredOutputsConfig(**options["structured_outputs_config"])
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=source, **options))

    engine = start("lora")
    for lora in loras:
        await add_adapter(engine, lora)
    found = {name: await measure(engine, loras, adapters, first) for first, (name, adapters) in enumerate(PHASES)}
    engine.shutdown()
    # What a merged model costs is what its base costs.
    engine = start("merged")
    await measure(engine, [None] * NUM_ADAPTERS, NUM_ADAPTERS, 0)
    found["merged"] = await measure(engine, [None], 1, 1)
    engine.shutdown()
    return found


def _run_graph(
    store: Store,
    key: str,
    llm: str,
    replicas: int,
    num: int,
    say: Callable[[str], object],
    router: str = ROUTERS[0],
) -> dict[str, Any]:
    import ray
    from ray import serve

    port = free_port()
    let_ingress_listen(port)
    # A place for each engine and for the gateway, also where there are fewer cores: they are told to share.
    connect(num_cpus=replicas + 1)
    specialists = {**CONFIG, "min_replicas": replicas, "max_replicas": replicas, "request_router": router}
    args = {"store": store.uri, "upstream": [{"base_url": f"{llm}/v1"}], "specialists": specialists, "gateway": PATIENT}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
        serve.run(build(ServeArgs.model_validate(args)), name="graph-tax", route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        asyncio.run(wait_for_specialists(url, key))
        phases = {
            name: [request_of(number % adapters, number) for number in range(first * num, (first + 1) * num)]
            for first, (name, adapters) in enumerate(PHASES)
        }
        # Under our router only what is compared with Serve's.
        phases = phases if router == ROUTERS[0] else {"warm": phases["warm"]}
        if replicas > 1:
            phases["turns"] = [turn_of(number, num // _NUM_TURNS) for number in range(num)]
        found = {}
        for name, requests in phases.items():
            found[name] = asyncio.run(_load_graph(url, key, requests))
            say(f"{replicas} engines, router {router}, {name}: {found[name]}")
        return found
    finally:
        serve.shutdown()
        ray.shutdown()


async def _load_graph(url: str, key: str, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    requests = [http_request(url, json.dumps(body).encode(), key) for body in bodies]
    num = len(requests)

    def checked(_: int, reply: Reply) -> str | None:
        # Else the specialist was not asked, and nothing was measured.
        route, reason = (reply.headers.get(f"x-understudy-{name}") for name in ("route", "reason"))
        was_asked = route in ("escalate", "accept") and reason not in ("the prompt does not fit", REJECTED_REASON)
        return None if reply.status == 200 and was_asked else f"{reply.status}, {route}: {reason}"

    before = others_cpu()
    turn = await load(url, requests, checked, concurrency=_CONCURRENCY, max_requests=num, max_seconds=_MAX_SECONDS)
    if turn.errors:
        raise RuntimeError(f"graph: {len(turn.errors)} of {num} not as they must be; {turn.errors[0]}")
    return _rates(len(turn.whole_ms), turn.seconds, others_cpu() - before)


def others_cpu() -> float:
    """CPU milliseconds of all processes below this one, which is the load."""
    return sum(used for pid, used in usage_of(os.getpid()).cpu_s.items() if pid != os.getpid()) * 1e3


async def wait_for_specialists(url: str, key: str, request: Mapping[str, Any] | None = None) -> None:
    """Ask until a specialist answers.

    Args:
        request: what is asked; None takes one of this benchmark's tasks.

    Raises:
        RuntimeError: none did in four minutes.
    """
    end = time.perf_counter() + _START_TIMEOUT_S
    body = json.dumps(request or request_of(0, 0)).encode()
    while time.perf_counter() < end:
        exchange = await open_connection(url)
        reply = await exchange.ask(http_request(url, body, key))
        exchange.close()
        if reply.headers.get("x-understudy-route") in ("escalate", "accept"):
            return
        await asyncio.sleep(1.0)
    told = {name: reply.headers.get(f"x-understudy-{name}") for name in ("route", "reason")}
    raise RuntimeError(f"no specialist answered in {_START_TIMEOUT_S:.0f} s: {reply.status}, {told}")


def _rates(num: int, seconds: float, cpu_ms: float) -> dict[str, Any]:
    return {"requests_per_s": round(num / seconds, 3), "cpu_ms": round(cpu_ms / num, 1), "requests": num}


def main(words: Sequence[str]) -> None:
    if words[:1] == ["bare"]:
        print(json.dumps(asyncio.run(_bare(Store(words[1]), int(words[2])))))
        return
    print(json.dumps(measure_graph_tax(lambda text: print(text, file=sys.stderr, flush=True), "--quick" in words)))


if __name__ == "__main__":
    main(sys.argv[1:])
