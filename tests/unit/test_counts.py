"""What the code does, counted: numbers that are the same on every machine, against tests/unit/baseline.json.

Speeds differ between machines and hours, so that a test of them either fails by chance or sees nothing. These counts tell of
the same losses: a decision that does more, a call that is written twice, a step that passes a model once more, a verb that
loads torch. A count that grew fails; one that shrank fails too, so that the baseline stays what the code does. After a
change that means it: `UPDATE_BASELINE=1 pytest tests/unit/test_counts.py`, and say in the commit why.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import PATH, REQUEST, engine_answer, gateway

from cluster.prompts import PromptFormat
from cluster.records import AgentCall
from cluster.route_model import NUM_BUCKETS, RouteModel, TextEncoder, TopicMap
from cluster.signature import signature_of
from cluster.sites import SiteMap

BASELINE = pathlib.Path(__file__).with_name("baseline.json")
ROOT = pathlib.Path(__file__).parents[2]
FORMAT = PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100)


def check(name: str, found: float) -> None:
    """Compare with the baseline, or write it there where the environment says so."""
    known = json.loads(BASELINE.read_text())
    if os.environ.get("UPDATE_BASELINE") == "1":
        known[name] = {**known.get(name, {"tolerance": 0.0}), "count": found}
        BASELINE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return
    expected, tolerance = known[name]["count"], known[name]["tolerance"]
    assert abs(found - expected) <= tolerance * expected, (
        f"{name}: {found:g}, and tests/unit/baseline.json has {expected:g} (tolerance {tolerance:.0%}). "
        f"{'It does more than before' if found > expected else 'It does less than before, which is to be kept'}. "
        f"Meant? Then UPDATE_BASELINE=1 pytest {pathlib.Path(__file__).relative_to(ROOT)}, and the commit says why"
    )


def num_calls_of(act: Callable[[], object]) -> int:
    """Functions called, Python's and C's."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def peak_bytes_of(act: Callable[[], object]) -> int:
    """Most bytes that it held at once, beyond what was there."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        act()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def request(number: int, system: str) -> dict[str, Any]:
    said = f"please look up order {number} of the green house and tell me when it comes"
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": said}]}


def test_a_route_decision_calls_and_holds_what_it_did() -> None:
    encoder = TextEncoder(np.random.default_rng(0).standard_normal((NUM_BUCKETS, 32)).astype(np.float32))
    centroids = np.eye(8, 32, dtype=np.float32)
    topics = TopicMap(encoder, centroids, np.full(8, 2.0), [f"task-{k}" for k in range(8)])
    sites = {"known": "Sort the mail.", "topic": "Answer what is asked."}
    known = {signature_of(request(0, sites["known"])): "mail"}
    model = RouteModel(known, {signature_of(request(0, sites["topic"])): topics}, SiteMap())
    for name, system in sites.items():
        requests = [request(number, system) for number in range(20)]
        # Once before, so that caches of the system prompt and lazy imports are not counted.
        model.task_of(request(99, system))
        assert model.task_of(requests[0]).task_id
        check(f"route decision, {name}: calls of 20", num_calls_of(lambda own=requests: [*map(model.task_of, own)]))
        check(f"route decision, {name}: peak bytes", peak_bytes_of(lambda own=requests: [*map(model.task_of, own)]))


def test_a_captured_call_takes_the_bytes_that_it_did() -> None:
    from serving.journal_format import JournalSealer, encode_call

    message = {"role": "assistant", "content": "It comes on Monday."}
    call = AgentCall(
        call_id="c" * 32, ts=1_750_000_000.5, client_id="a" * 16, agent="desk", session_id="s" * 16, step=3,
        request=request(1, "Sort the mail."), response={"choices": [{"message": message, "finish_reason": "stop"}]},
    )  # fmt: skip
    encoded = encode_call(call)
    assert isinstance(encoded, bytes)
    check("captured call: bytes in the journal", len(JournalSealer(b"k" * 32, "wrapped").seal([encoded])))


def test_a_small_training_passes_the_model_as_often_as_it_did(tmp_path: pathlib.Path) -> None:
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.dataset import save_dataset
    from training.multi_loop import ManyRun

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(tmp_path / "base")
    save_dataset([{"input_ids": [3 + k, 4, 5, 6], "num_prompt": 2} for k in range(12)], tmp_path / "rows")
    common = {"pad_token_id": 0, "method": "lora", "patience": 0, "checkpoint_every": 4, "max_tokens": 100}
    common |= {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": ["q_proj"], "learning_rate": 1e-2, "seed": 1}
    common |= {"batch_size": 4, "num_steps": 5, "warmup_steps": 0, "base_path": str(tmp_path / "base")}
    common |= {"train_path": str(tmp_path / "rows"), "validation_path": None}
    passes = 0

    def count(module: Any, given: Any, output: Any) -> None:
        nonlocal passes
        passes += isinstance(module, LlamaForCausalLM)

    hook = register_module_forward_hook(count)
    try:
        settings = many_settings(common, tmp_path)
        ManyRun(settings, torch.device("cpu"), 0, 1).train(lambda metrics, folder: None)
    finally:
        hook.remove()
    check("training of 2 adapters over 5 steps: forward passes", passes)


def many_settings(common: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    paths = {"progress_path": str(folder / "progress"), "yield_path": str(folder / "yield")}
    adapters = [{**common, "name": f"task{k}"} for k in range(2)]
    return {
        "adapters": adapters,
        "base_path": common["base_path"],
        "tokens_per_pass": 400,
        "zero_stage": 0,
        "bf16": False,
        **paths,
    }


STARTED = """
import sys
starts = []
sys.addaudithook(lambda event, given: starts.append(event) if event in (
    "subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "os.exec") else None)
from jobs.__main__ import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = sorted({"torch", "ray", "transformers", "vllm", "pandas", "scipy", "sklearn"} & set(sys.modules))
ours = [name for name in sys.modules if name.split(".")[0] in ("cluster", "training", "serving", "jobs")]
print(len(starts), len(ours), *heavy, sep=" ", file=sys.stderr)
"""


def test_help_starts_no_process_and_loads_no_more_of_us_than_it_did() -> None:
    run = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True, check=True)
    starts, ours, *heavy = run.stderr.split()
    assert heavy == [], "a verb's heavy packages are to be loaded in its run alone"
    check("understudy --help: process starts", int(starts))
    check("understudy --help: own modules loaded", int(ours))


def test_a_request_asks_the_engine_once_and_a_promotion_loads_each_adapter_once(tmp_path: pathlib.Path) -> None:
    async def scenario() -> tuple[int, int, int]:
        async with gateway(tmp_path) as run:
            for _ in range(5):
                assert (await run.http.post(PATH, json=REQUEST)).status_code == 200
            return run.engine.num_asked, len(run.engine.loaded), len(run.llm.requests)

    asked, loaded, by_llm = asyncio.run(scenario())
    check("5 accepted requests: engine calls", asked)
    check("5 accepted requests: LLM calls", by_llm)
    check("a promoted release of one specialist: adapter loads", loaded)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_engine_call_is_one_hop_over_a_serve_handle() -> None:
    from ray import serve

    from serving.specialist import ServeEngine

    hops: list[str] = []

    @serve.deployment
    class Server:
        async def fingerprint(self) -> str:
            hops.append("fingerprint")
            return "f"

        async def load(self, adapter: str) -> None:
            hops.append("load")

        async def answer(self, *words: Any) -> Any:
            hops.append("answer")
            return engine_answer("refund", 0.9)

    handle = serve.run(Server.bind(), name="counts", _local_testing_mode=True)

    async def scenario() -> None:
        engine = ServeEngine(handle)
        await engine.load("adapter")
        for _ in range(3):
            assert (await engine.answer("adapter", FORMAT, REQUEST, 10)).text == "refund"

    asyncio.run(scenario())
    check("3 engine calls: handle hops to load", hops.count("load"))
    check("3 engine calls: handle hops to answer", hops.count("answer"))
    check("3 engine calls: other handle hops", len(hops) - hops.count("load") - hops.count("answer"))


@pytest.mark.parametrize(("found", "told"), [(1_000, "more than before"), (1, "less than before")])
def test_a_count_that_moved_is_told_with_what_to_do(found: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPDATE_BASELINE", raising=False)
    with pytest.raises(AssertionError, match=rf"{told}.*UPDATE_BASELINE=1 pytest tests/unit/test_counts\.py"):
        check("3 engine calls: handle hops to answer", found)
