"""Specialists on Ray Serve LLM: one vLLM deployment per base model, its LoRA adapters multiplexed from our store.

A task whose adapter was merged into a copy of the base (training/merged_weights.py) has a deployment of its own, without LoRA.

`SpecialistServer` extends Ray's LLMServer with one method, `answer`: it renders the request to token ids, generates
greedily with the named adapter, and returns the message with its confidence in one hop, so that the gateway needs no
tokenizer. Adapters are named by their store path, which holds their content hash: a name never changes its weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import Any, NamedTuple

from cluster import registry
from cluster.confidence import confidence
from cluster.engine import EngineAnswer
from cluster.errors import EngineError, ReleaseError, StoreError
from cluster.prompts import Prompt, PromptFormat, read_answer, render_prompt
from cluster.session import listen_on_node_alone
from cluster.store import Store
from cluster.tracing import TelemetryConfig, outgoing, start_tracing
from serving.constraint import constraint_of
from serving.engine_options import AdapterMode, engine_environment, engine_kwargs, fingerprint_of
from serving.generation import Generated, generate
from serving.presence import Presence
from serving.scaling import autoscaling_of
from serving.shared_loads import CountedLoads, SharedLoads
from serving.specialist_config import SpecialistConfig
from serving.traces import traced_answers

NO_TELEMETRY = TelemetryConfig()


class _Served(NamedTuple):
    """What a replica is told; see `build_specialists`."""

    store_uri: str
    model: str
    config: SpecialistConfig
    telemetry: TelemetryConfig
    serves_release: bool


def build_specialists(
    model: str,
    config: SpecialistConfig,
    store_uri: str,
    telemetry: TelemetryConfig = NO_TELEMETRY,
    *,
    serves_release: bool = False,
) -> Any:
    """Bind the deployment that serves one base model, or one task's merged one.

    Args:
        model: store path of the model's folder.
        serves_release: whether a replica that starts loads what CURRENT names; not where candidates are validated.
    """
    from ray.serve.llm import LLMConfig, build_llm_deployment

    name, store = deployment_name(model), Store(store_uri)
    is_cpu = config.device == "cpu"
    folder = store.fetch(model)
    environment = engine_environment(config.device, config.kv_cache_gib, config.num_threads)
    # The model is a folder of the store.
    environment |= {"HF_HUB_OFFLINE": "1"} if is_cpu else {}
    llm_config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(folder)},
        accelerator_config={"kind": config.device},
        placement_group_config={"bundles": [{"CPU": 1} if is_cpu else {"GPU": 1}]},
        engine_kwargs=engine_kwargs(config, _mode_of(store, model)),
        deployment_config=deployment_options(config),
        runtime_env={"env_vars": environment},
        log_engine_metrics=False,
    )
    return build_llm_deployment(
        llm_config,
        deployment_cls=_server_class(),
        override_serve_options={"name": name},
        bind_kwargs={"served": _Served(store_uri, model, config, telemetry, serves_release)},
    )


def _mode_of(store: Store, model: str) -> AdapterMode:
    return "merged" if "adapter" in store.manifest(model) else "lora"


def _fingerprint_here(store: Store, model: str, config: SpecialistConfig) -> str:
    return fingerprint_of(store.manifest(model)["sha256"], config, _mode_of(store, model))


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


def deployment_name(model: str) -> str:
    """Ray Serve deployment name of the specialists of one model folder."""
    return f"specialists-{hashlib.sha256(model.encode()).hexdigest()[:12]}"


def find_engine(app: str, model: str, idle_s: float | None = None) -> ServeEngine:
    """The engine of a base, or of a merged model, in a Serve application that runs.

    Args:
        idle_s: see ServeEngine.

    Raises:
        ray.serve.exceptions.RayServeException: there is no such application or deployment.
    """
    from ray import serve

    return ServeEngine(serve.get_deployment_handle(deployment_name(model), app), idle_s)


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
        from ray.serve.exceptions import DeploymentUnavailableError

        with self._presence.watch():
            try:
                await self._handle.options(multiplexed_model_id=adapter).load.remote(adapter)
            except DeploymentUnavailableError as error:
                raise EngineError(f"{adapter}: its engine is not served: {error}") from None

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


def served_adapters(store: Store, model: str) -> list[str]:
    """Adapters that the served release asks engines of this model with; none where no release can be read."""
    try:
        found = registry.current(store)
    except ReleaseError:
        return []
    specialists = found[1].specialists.values() if found else ()
    return sorted({one.lora for one in specialists if one.model == model and one.lora and one.gate.is_open})


async def _load_all(adapters: SharedLoads, wanted: list[str]) -> None:
    for adapter in wanted:
        # The gateway, which asks for each as well, says which does not load and leaves it to the LLM.
        with contextlib.suppress(EngineError):
            await adapters.get(adapter)


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


def _fetch_adapter(store: Store, adapter: str, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    try:
        return LoRARequest(lora_name=adapter, lora_int_id=number, lora_path=str(store.fetch(adapter)))
    except StoreError as error:
        raise EngineError(f"{adapter}: {error}") from None


def _server_class() -> Any:
    """Made in a function, because Ray Serve LLM imports the engine."""
    from ray.llm._internal.serve.core.server.llm_server import LLMServer

    class SpecialistServer(CountedLoads, LLMServer):
        async def __init__(self, llm_config: Any, *, served: _Served) -> None:
            from ray import serve
            from transformers import AutoTokenizer

            model, config = served.model, served.config
            start_tracing(served.telemetry, "understudy-specialist")
            listen_on_node_alone()
            self._store = Store(served.store_uri)
            # On this node too; the path is the one that `build_specialists` gave to the engine.
            self._tokenizer = AutoTokenizer.from_pretrained(self._store.fetch(model), trust_remote_code=False)
            # It would download the model in a Ray task of its own, which imports the engine once more (13 s on a CPU).
            llm_config.get_or_create_callback().ctx.run_init_node = False
            self._numbers: dict[str, int] = {}
            self._fingerprint = _fingerprint_here(self._store, model, config)

            async def load(adapter: str) -> Any:
                return await self._load_adapter(adapter)

            # Serve routes an adapter's requests to replicas that have it; a replica that is new to one loads it here.
            self._adapters = SharedLoads(serve.multiplexed(max_num_models_per_replica=config.num_resident)(load))
            await super().__init__(llm_config)
            # Also where it comes in the middle of load: no call of the served release waits for an adapter here.
            wanted = served_adapters(self._store, model) if served.serves_release else []
            await _load_all(self._adapters, wanted[: config.num_resident])

        async def _start_engine(self) -> None:
            """Without Ray's usage report, whose actor would import the engine once more (13 s on a CPU)."""
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
            limits = {"max_tokens": max_answer_tokens, "stop_below": stop_below}
            constraint = constraint_of(request, prompt_format)
            output = await self._generate(prompt.ids, lora=lora, constraint=constraint, **limits)
            return _to_answer(output, prompt, prompt_format, self._tokenizer)

        async def _load_adapter(self, adapter: str) -> Any:
            """Fetch the adapter, give it to the engine, and run one token through it."""
            number = self._numbers.setdefault(adapter, len(self._numbers) + 1)
            lora = await asyncio.to_thread(_fetch_adapter, self._store, adapter, number)
            await add_adapter(self.engine._engine_client, lora)
            await self._generate([self._tokenizer.eos_token_id], max_tokens=1, lora=lora)
            self.num_loads += 1
            return lora

        async def _generate(self, ids: list[int], **options: Any) -> Generated:
            return await generate(self.engine._engine_client, ids, stop=self._tokenizer.eos_token_id, **options)

    return SpecialistServer
