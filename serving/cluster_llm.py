"""The LLM node as a model on this Ray cluster: chat.completions body -> the same replies as an endpoint over HTTP.

`ClusterLLMServer` extends Ray's LLMServer with one method, `complete`, that takes and gives OpenAI's JSON, so that
the gateway loads no engine; `ClusterLLM` is its client and stands in `upstream` beside endpoints, in the config's
order. The model renders with its own chat template; it knows nothing of tasks or adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import Field

from cluster.breaker import Breaker
from cluster.errors import UpstreamError
from cluster.opening import Opening, error_status
from cluster.retries import is_retryable
from cluster.session import listen_on_node_alone
from cluster.sse import parse_object
from cluster.stream_usage import with_usage
from cluster.upstream import EVENT_STREAM, JSON, LLMNodeConfig, UpstreamReply, UpstreamStream
from serving.engine_options import engine_environment
from serving.openai_wire import error_body
from serving.scaling import ScaleConfig, autoscaling_of


class ClusterLLMConfig(ScaleConfig, LLMNodeConfig):
    """A chat model served on the cluster. It has no price of its own: give what its tokens cost on your machines."""

    cluster_model: str = Field(min_length=1)
    """Folder that every node can read, or hub id, of a model with a chat template."""
    name: str | None = Field(default=None, min_length=1)
    """Id of the model in replies and in the model list; None takes the last part of cluster_model."""
    device: str = Field(default="cpu", pattern="^(cpu|gpu)$")
    """What the engine runs on."""
    num_gpus: int = Field(default=1, ge=1)
    """GPUs of one replica, over which the weights are split; unused on CPU."""
    dtype: str = Field(default="bfloat16", pattern="^(float32|bfloat16|float16)$")
    """Weights and arithmetic."""
    max_model_tokens: int = Field(default=4096, ge=64)
    """Prompt and answer together."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Requests in one batch."""
    tool_call_parser: str | None = None
    """vLLM's parser for this model's tool calls, e.g. hermes; None refuses tools unless tool_choice names one."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Memory for keys and values; CPU only (a GPU engine takes its share of device memory)."""
    num_threads: int = Field(default=1, ge=1)
    """CPUs and OpenMP threads of a CPU engine."""

    @property
    def model_name(self) -> str:
        return self.name or self.cluster_model.rstrip("/").rpartition("/")[2]

    @property
    def own_model(self) -> str | None:
        return self.model_name


def build_cluster_llm(config: ClusterLLMConfig) -> Any:
    """Bind the deployment that serves the model."""
    from ray.serve.llm import LLMConfig, build_llm_deployment

    is_cpu = config.device == "cpu"
    bundles = [{"CPU": config.num_threads}] if is_cpu else [{"GPU": 1}] * config.num_gpus
    llm_config = LLMConfig(
        model_loading_config={"model_id": config.model_name, "model_source": config.cluster_model},
        accelerator_config={"kind": config.device},
        placement_group_config={"bundles": bundles},
        engine_kwargs=_engine_kwargs(config),
        deployment_config={
            "autoscaling_config": autoscaling_of(config, config.max_num_seqs),
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": 4 * config.max_num_seqs,
            # One caller's queue; beyond it the next LLM is asked at once instead of after the timeout.
            "max_queued_requests": 4 * config.max_num_seqs,
        },
        runtime_env={"env_vars": engine_environment(config.device, config.kv_cache_gib, config.num_threads)},
        log_engine_metrics=False,
    )
    return build_llm_deployment(llm_config, deployment_cls=_server_class())


class ClusterLLM:
    """Client of one ClusterLLMServer, with an Upstream's methods. Belongs to one event loop.

    A call is sent once: Serve has already queued it for a replica that works, and the next LLM is a better retry.
    """

    def __init__(self, config: ClusterLLMConfig, handle: Any, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the deployment's handle; ask nothing yet."""
        self.config = config
        self._breaker = Breaker(config.breaker_failures, config.breaker_reset_s, clock)
        self._handle = handle.options(stream=True)

    async def chat(self, body: dict[str, Any], *, until: float = math.inf) -> UpstreamReply:
        """Ask for a whole answer.

        Args:
            until: when its caller leaves, on the event loop's clock.

        Raises:
            UpstreamError: no usable answer; `status` and `body` are fit for the client.
        """
        async with self._opened({**body, "stream": False}, self.config.timeout_s, until) as (status, raw, _, _):
            reply = parse_object(raw)
            if reply is None:
                raise self._error(502, "answered with something that is no JSON object")
            return UpstreamReply(status, reply, raw)

    @contextlib.asynccontextmanager
    async def stream(self, body: dict[str, Any], *, until: float = math.inf) -> AsyncIterator[UpstreamStream]:
        """Start a streamed answer; its first content is here when the block is entered.

        Args:
            until: as `chat` takes it.

        Raises:
            UpstreamError: the model gave no content.
        """
        body = {**body, "stream": True}
        counted = with_usage(body)
        asked = self._opened(counted or body, self.config.first_token_timeout_s, until)
        async with asked as (status, first, rest, deadline):
            kind = EVENT_STREAM if status == 200 else JSON
            yield UpstreamStream(status, kind, self._chunks(first, rest, deadline), counted is not None)

    async def list_models(self) -> list[dict[str, Any]]:
        """The model's entry; it is known without asking."""
        return [{"id": self.config.model_name, "object": "model", "created": 0, "owned_by": "understudy"}]

    async def close(self) -> None:
        """Nothing to close: the handle belongs to Serve."""

    @contextlib.asynccontextmanager
    async def _opened(
        self, body: dict[str, Any], limit_s: float, until: float
    ) -> AsyncIterator[tuple[int, bytes, Any, float]]:
        """Status and beginning of an answer worth having, the iterator of the rest, and when the call has to end."""
        clock = asyncio.get_running_loop().time
        deadline = min(clock() + self.config.total_timeout_s, until)
        permit = self._breaker.begin()
        if permit is None:
            reason = "has failed repeatedly and is being left alone; try again shortly"
            raise self._error(503, reason, "upstream_unavailable", self._breaker.wait_s)
        pieces = self._handle.complete.remote({**body, "model": self.config.model_name})
        try:
            try:
                status, first = await self._begin(pieces, bool(body["stream"]), min(clock() + limit_s, deadline))
                permit.succeed()
            except UpstreamError as error:
                if error.status != 429:
                    permit.fail()
                raise
            finally:
                permit.leave()
            yield status, first, pieces, deadline
        finally:
            # Tells the engine to stop where the client or this call left early; else it changes nothing.
            pieces.cancel()

    async def _begin(self, pieces: Any, is_stream: bool, until: float) -> tuple[int, bytes]:
        """Status and a whole answer, or a stream up to its first content."""
        opening = Opening()
        while (begun := await self._next(pieces, until)) is not None:
            status, piece = begun
            if is_retryable(status):
                raise UpstreamError(f"{self._who()} answered {status}", status, parse_object(piece))
            if not is_stream or status != 200:
                return status, piece
            opening.feed(piece)
            if opening.has_content:
                return 200, opening.held
            if opening.is_over:
                break
        opening.end()
        if opening.error is None:
            raise self._error(502, f"broke off: its stream {opening.fault}" if is_stream else "gave no answer")
        status = error_status(opening.error)
        if is_retryable(status):
            raise UpstreamError(f"{self._who()} reported an error", status, opening.error)
        return status, json.dumps(opening.error).encode()

    async def _chunks(self, first: bytes, rest: Any, deadline: float) -> AsyncIterator[bytes]:
        clock = asyncio.get_running_loop().time
        yield first
        while (piece := await self._next(rest, min(clock() + self.config.timeout_s, deadline))) is not None:
            yield piece[1]

    async def _next(self, pieces: Any, until: float) -> tuple[int, bytes] | None:
        """Status and the next piece, None at the end; raises UpstreamError where Ray or the engine failed."""
        try:
            async with asyncio.timeout_at(until):
                return await anext(pieces, None)
        except _ray_errors() as error:
            raise self._failure(error) from None

    def _failure(self, error: BaseException) -> UpstreamError:
        from ray.exceptions import RayTaskError
        from ray.serve.exceptions import BackPressureError

        if isinstance(error, TimeoutError):
            return self._error(504, "did not answer in time; raise its timeout_s or try again", "upstream_timeout")
        if isinstance(error, BackPressureError):
            return self._error(429, "has too many calls waiting; try again or raise max_replicas", "upstream_busy", 1.0)
        status, name = (502 if isinstance(error, RayTaskError) else 503), type(error).__name__
        return self._error(status, f"failed ({name}); send the request again", "upstream_unavailable")

    def _error(
        self, status: int, reason: str, code: str = "upstream_error", retry_after_s: float | None = None
    ) -> UpstreamError:
        message = f"{self._who()} {reason}"
        kind = "rate_limit_error" if status == 429 else "upstream_error"
        return UpstreamError(message, status, error_body(message, kind=kind, code=code), retry_after_s)

    def _who(self) -> str:
        return f"upstream.cluster_model={self.config.model_name}"


def _engine_kwargs(config: ClusterLLMConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "dtype": config.dtype,
        "enforce_eager": config.device == "cpu",
        "max_model_len": config.max_model_tokens,
        "max_num_seqs": config.max_num_seqs,
        "disable_log_stats": True,
    }
    if config.device == "gpu":
        kwargs["tensor_parallel_size"] = config.num_gpus
    if config.tool_call_parser:
        kwargs |= {"enable_auto_tool_choice": True, "tool_call_parser": config.tool_call_parser}
    return kwargs


def _ray_errors() -> tuple[type[BaseException], ...]:
    """What a handle's call may raise; looked up when something was raised, so that importing this loads no Ray."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return RayError, RayServeException, TimeoutError


def _server_class() -> Any:
    """Made in a function, because Ray Serve LLM imports the engine."""
    from ray.llm._internal.serve.core.server.llm_server import LLMServer

    class ClusterLLMServer(LLMServer):
        async def __init__(self, *args: Any, **options: Any) -> None:
            listen_on_node_alone()
            await super().__init__(*args, **options)

        async def complete(self, body: dict[str, Any]) -> AsyncIterator[tuple[int, bytes]]:
            """Status and next piece: one JSON object, or SSE events as they come."""
            from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest, ErrorResponse

            try:
                request = ChatCompletionRequest(**body)
            except ValueError as error:
                yield 400, json.dumps(error_body(str(error), kind="invalid_request_error")).encode()
                return
            async for piece in await self.chat(request):
                if isinstance(piece, list) and not isinstance(piece[0], str):
                    (piece,) = piece
                if isinstance(piece, list):
                    yield 200, "".join(piece).encode()
                elif isinstance(piece, ErrorResponse):
                    yield piece.error.code, piece.model_dump_json().encode()
                else:
                    yield 200, piece.model_dump_json().encode()

    return ClusterLLMServer
