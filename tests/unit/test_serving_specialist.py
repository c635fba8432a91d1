"""What a gate's fingerprint is made of, and that an adapter is loaded once however many ask for it first."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import engine
from cluster.engine import rendering_version
from cluster.errors import EngineError
from serving import engine_options
from serving.engine_options import engine_environment, engine_kwargs, fingerprint_facts, fingerprint_of
from serving.shared_loads import SharedLoads
from serving.specialist import add_adapter, router_options
from serving.specialist_config import SpecialistConfig

CONFIG = SpecialistConfig()


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions = {"vllm": "1.0", "transformers": "5.0", "tokenizers": "0.1"}
    monkeypatch.setattr(engine_options, "_version", versions.get)
    return versions


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"max_lora_rank": 8},
        {"max_model_tokens": 512},
    ],
)
def test_an_engine_that_runs_otherwise_has_another_fingerprint(change: dict[str, object]) -> None:
    assert fingerprint_of("base", CONFIG) != fingerprint_of("base", CONFIG.model_copy(update=change))


@pytest.mark.parametrize("package", ["vllm", "transformers", "tokenizers"])
def test_another_version_of_what_answers_has_another_fingerprint(installed: dict[str, str], package: str) -> None:
    before = fingerprint_of("base", CONFIG)
    installed[package] += ".1"
    assert fingerprint_of("base", CONFIG) != before


def test_a_fingerprint_names_the_device_as_it_is_and_how_the_engine_runs() -> None:
    facts = fingerprint_facts("base", CONFIG, "NVIDIA H100")
    assert facts["device"] == "NVIDIA H100" and facts["enforce_eager"] is True and facts["base"] == "base"
    assert fingerprint_facts("base", CONFIG, "cpu") != facts


@pytest.mark.parametrize(
    "change", [{"max_adapters": 9}, {"max_num_seqs": 4}, {"max_replicas": 2}, {"request_router": "adapter"}]
)
def test_what_changes_no_answer_keeps_the_fingerprint(change: dict[str, object]) -> None:
    assert fingerprint_of("base", CONFIG) == fingerprint_of("base", CONFIG.model_copy(update=change))


def test_a_merged_model_has_an_engine_without_adapters_and_a_fingerprint_of_its_own() -> None:
    assert not [name for name in engine_kwargs(CONFIG, "merged") if "lora" in name]
    assert fingerprint_of("model", CONFIG, "merged") != fingerprint_of("model", CONFIG)
    # Room for adapters changes no answer of an engine that has none.
    wider = CONFIG.model_copy(update={"max_lora_rank": 64})
    assert fingerprint_of("model", wider, "merged") == fingerprint_of("model", CONFIG, "merged")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_recipe_s_choice_of_router_is_a_class_that_serve_finds_and_the_default_is_serve_s() -> None:
    assert router_options(CONFIG) == {}
    (router,) = router_options(CONFIG.model_copy(update={"request_router": "adapter", "max_adapters": 3})).values()
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import RequestRouter

    made = RequestRouterConfig(**router)
    assert issubclass(made.get_request_router_class(), RequestRouter)
    assert made.request_router_kwargs == {"max_adapters": 3}


def test_without_an_engine_there_is_no_fingerprint(installed: dict[str, str]) -> None:
    del installed["vllm"]
    with pytest.raises(EngineError, match="no vLLM is installed here; allowed.*next"):
        fingerprint_of("base", CONFIG)


@pytest.mark.parametrize("name", ["prompts.py", "confidence.py", "acceptance.py", "answers.py", "servable.py"])
def test_any_change_of_what_renders_and_keeps_answers_changes_the_version(
    tmp_path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import pathlib
    import shutil

    before = rendering_version()
    folder = pathlib.Path(engine.__file__).parent
    for path in folder.glob("*.py"):
        shutil.copyfile(path, tmp_path / path.name)
    monkeypatch.setattr(engine, "__file__", str(tmp_path / "engine.py"))
    assert rendering_version.__wrapped__() == before
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    assert rendering_version.__wrapped__() != before


class _Slow:
    """A load that takes a few turns of the loop, counts, and never may run twice at once for one adapter."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.running: set[str] = set()
        self.done: set[str] = set()
        self.fails = False

    async def __call__(self, adapter: str) -> str:
        if adapter in self.done:
            return adapter
        assert adapter not in self.running, "two loads of one adapter at once"
        self.begun.append(adapter)
        self.running.add(adapter)
        try:
            for _ in range(5):
                await asyncio.sleep(0)
            if self.fails:
                raise EngineError("no")
            self.done.add(adapter)
        finally:
            self.running.remove(adapter)
        return adapter


def test_concurrent_first_requests_load_an_adapter_once() -> None:
    async def scenario() -> None:
        slow = _Slow()
        loads = SharedLoads(slow)
        names = ["a", "b"] * 20
        assert await asyncio.gather(*map(loads.get, names)) == names
        assert await loads.get("a") == "a"
        assert sorted(slow.begun) == ["a", "b"]

    asyncio.run(scenario())


def test_a_caller_that_gives_up_ends_nobodys_load() -> None:
    async def scenario() -> None:
        slow = _Slow()
        loads = SharedLoads(slow)
        impatient = asyncio.ensure_future(loads.get("a"))
        patient = asyncio.ensure_future(loads.get("a"))
        await asyncio.sleep(0)
        impatient.cancel()
        assert await patient == "a"
        assert impatient.cancelled() and slow.begun == ["a"]

    asyncio.run(scenario())


def test_a_load_that_fails_is_begun_anew() -> None:
    async def scenario() -> None:
        slow = _Slow()
        loads = SharedLoads(slow)
        slow.fails = True
        failed = await asyncio.gather(loads.get("a"), loads.get("a"), return_exceptions=True)
        assert [type(error) for error in failed] == [EngineError, EngineError] and slow.begun == ["a"]
        slow.fails = False
        assert await loads.get("a") == "a"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(Exception("Call to add_lora method failed: rank 64"), EngineError), (ConnectionError("gone"), ConnectionError)],
)
def test_only_an_adapter_that_does_not_load_is_the_adapters_fault(raised: Exception, seen: type[Exception]) -> None:
    class Client:
        async def add_lora(self, _: Any) -> None:
            raise raised

    with pytest.raises(seen, match="rank 64|gone"):
        asyncio.run(add_adapter(Client(), SimpleNamespace(lora_name="adapters/a")))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_no_engine_tells_its_makers_what_it_runs_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = engine_environment(device, 1, 1)
    assert ("VLLM_CPU_KVCACHE_SPACE" in environment) == (device == "cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("DO_NOT_TRACK", "VLLM_DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    from vllm import envs

    assert envs.VLLM_NO_USAGE_STATS


def test_an_engine_listens_nowhere_and_ends_at_once() -> None:
    """As Serve reads it in the process of the replica, whatever the environment of its node says."""
    read = "from ray.serve._private import replica as r; print(r.RAY_SERVE_ENABLE_DIRECT_INGRESS, r.RAY_SERVE_ENABLE_HA_PROXY)"
    node = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    environment = {**os.environ, **node, **engine_environment("gpu", 1, 1)}
    run = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
