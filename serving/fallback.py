"""The LLMs behind the gateway, in the order in which they are asked: chat.completions body -> the first usable answer.

An LLM is an endpoint over HTTP (cluster/upstream.py) or a model on this cluster (serving/cluster_llm.py). One that
raises UpstreamError passes the call on to the next; only before anything of an answer was given out, so bytes of two
models never mix. Each answer comes with the config of the LLM that gave it, because prices differ; who takes it counts
what it cost (`spending`). Retries and circuit breaking are the LLM's own. An LLM that is left before it answers has read
the request, which is counted here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Protocol

from pydantic import Discriminator, Tag
from typing_extensions import TypeAliasType

from cluster.errors import UpstreamError
from cluster.telemetry import Meter, log_event
from cluster.upstream import LLMNodeConfig, UpstreamConfig, UpstreamReply, UpstreamStream
from cluster.upstream_errors import LISTS_NONE
from serving.billing import Bill, Spending, spent_error, was_at_work
from serving.cluster_llm import ClusterLLMConfig
from serving.limits import UNLIMITED, Limits, fit_budget
from serving.openai_wire import error_body, error_code
from serving.policy import MODEL_PREFIX


def _kind(value: Any) -> str:
    is_cluster = "cluster_model" in value if isinstance(value, dict) else isinstance(value, ClusterLLMConfig)
    return "<cluster>" if is_cluster else "<endpoint>"


AnyLLMConfig = TypeAliasType(
    "AnyLLMConfig",
    Annotated[
        Annotated[UpstreamConfig, Tag("<endpoint>")] | Annotated[ClusterLLMConfig, Tag("<cluster>")],
        Discriminator(_kind),
    ],
)
"""An endpoint, known by its base_url, or a model on the cluster, known by its cluster_model."""


class LLM(Protocol):
    """One LLM as `Upstream` and `ClusterLLM` are one."""

    @property
    def config(self) -> LLMNodeConfig: ...

    async def chat(self, body: dict[str, Any], *, until: float) -> UpstreamReply: ...

    def stream(self, body: dict[str, Any], *, until: float) -> AbstractAsyncContextManager[UpstreamStream]: ...

    async def list_models(self) -> list[dict[str, Any]]: ...

    async def close(self) -> None: ...


class FallbackLLM:
    """Asks LLMs in order. Belongs to one event loop; close it there."""

    def __init__(self, llms: Sequence[LLM], meter: Meter | None = None) -> None:
        """Take at least one LLM; ask nothing yet."""
        assert llms, "a fallback needs an LLM"
        self._llms = list(llms)
        self._meter = meter or Meter()
        self.spending = Spending([llm.config for llm in llms], self._meter)
        """What their answers cost."""

    @property
    def has_own_model(self) -> bool:
        """Whether an LLM can be asked without the client naming its model."""
        return any(llm.config.own_model for llm in self._llms)

    @property
    def configs(self) -> tuple[LLMNodeConfig, ...]:
        """Of the LLMs, in the order in which they are asked."""
        return tuple(llm.config for llm in self._llms)

    async def chat(
        self, body: dict[str, Any], bill: Bill | None = None, limits: Limits = UNLIMITED
    ) -> tuple[UpstreamReply, LLMNodeConfig]:
        """Ask for a whole answer.

        Args:
            bill: of the call; gets what LLMs cost that were left before they answered.
            limits: of the call; what is on the bill is no longer of its budget.

        Raises:
            UpstreamError: none gave one: the error of the last one asked; 400, none could be asked within the budget.
        """
        able = await self._able(body)
        for number, llm in able:
            fitted = self._fitted(body, bill, limits)
            try:
                with self._read_by(llm, body, bill):
                    return await llm.chat(fitted, until=limits.deadline_at), llm.config
            except UpstreamError as error:
                is_last = number == able[-1][0] or not self._is_affordable(body, bill, limits)
                self._pass_on(number, error, is_last=is_last)
        raise AssertionError("the last one answers or raises")

    @contextlib.asynccontextmanager
    async def stream(
        self, body: dict[str, Any], bill: Bill | None = None, limits: Limits = UNLIMITED
    ) -> AsyncIterator[tuple[UpstreamStream, LLMNodeConfig]]:
        """Start a streamed answer; its first content is here when the block is entered.

        Args:
            bill: as `chat` takes it.
            limits: as `chat` takes them.

        Raises:
            UpstreamError: as `chat` raises it, where none gave any content.
        """
        able = await self._able(body)
        for number, llm in able:
            fitted = self._fitted(body, bill, limits)
            async with contextlib.AsyncExitStack() as stack:
                try:
                    with self._read_by(llm, body, bill):
                        stream = await stack.enter_async_context(llm.stream(fitted, until=limits.deadline_at))
                except UpstreamError as error:
                    is_last = number == able[-1][0] or not self._is_affordable(body, bill, limits)
                    self._pass_on(number, error, is_last=is_last)
                    continue
                yield stream, llm.config
                return

    async def list_models(self) -> list[dict[str, Any]]:
        """Model list of the first LLM that gives one; of one that has none, the model that its entry in the recipe names.

        Raises:
            UpstreamError: none did; the last one's error.
        """
        for number, llm in enumerate(self._llms):
            try:
                return await llm.list_models()
            except UpstreamError as error:
                if error_code(error.body) == LISTS_NONE:
                    name = llm.config.own_model
                    return [{"id": name, "object": "model", "created": 0, "owned_by": "llm"}] if name else []
                self._pass_on(number, error, is_last=number == len(self._llms) - 1)
        raise AssertionError("the last one answers or raises")

    async def close(self) -> None:
        for llm in self._llms:
            await llm.close()

    @contextlib.contextmanager
    def _read_by(self, llm: LLM, body: dict[str, Any], bill: Bill | None) -> Iterator[None]:
        """Count the request as read where the LLM does not answer in time or is left: it was at work, and is paid."""
        try:
            yield
        except (UpstreamError, asyncio.CancelledError) as error:
            if was_at_work(error):
                cost = self.spending.charge_answer(llm.config, body, None)
                if bill is not None:
                    bill.add(cost)
            raise

    def _fitted(self, body: dict[str, Any], bill: Bill | None, limits: Limits) -> dict[str, Any]:
        """The request within what is left of the budget; raises UpstreamError where it cannot be."""
        return fit_budget(body, limits.budget_usd - (bill.cost.usd if bill else 0.0), self.configs)

    def _is_affordable(self, body: dict[str, Any], bill: Bill | None, limits: Limits) -> bool:
        try:
            self._fitted(body, bill, limits)
        except UpstreamError:
            return False
        return True

    async def _able(self, body: dict[str, Any]) -> list[tuple[int, LLM]]:
        """The LLMs that can be asked, with their numbers: no LLM knows a specialist's name, only one with its own model.

        Raises:
            UpstreamError: 400, none can be; names the models that may be asked. 429, all have spent what a day allows.
        """
        model = body.get("model")
        able = list(enumerate(self._llms))
        if isinstance(model, str) and model.startswith(MODEL_PREFIX):
            able = [(number, llm) for number, llm in able if llm.config.own_model]
            if not able:
                raise await self._unknown(model)
        waits = [self.spending.wait_s(llm.config) for _, llm in able]
        if all(waits):
            raise spent_error(min(waits))
        return [one for one, wait_s in zip(able, waits, strict=True) if not wait_s]

    async def _unknown(self, model: str) -> UpstreamError:
        known = ""
        with contextlib.suppress(UpstreamError):
            known = ", ".join(str(entry.get("id")) for entry in await self.list_models())
        message = (
            f"model={model}: this call is for the LLM, and no upstream has a model of its own to ask; "
            f"allowed: {known or 'a model of the LLM'}; or let upstream.N.model name one"
        )
        return UpstreamError(
            message, 400, error_body(message, kind="invalid_request_error", code="model_not_found", param="model")
        )

    def _pass_on(self, number: int, error: UpstreamError, *, is_last: bool) -> None:
        """Count a failure; raise it where no LLM is left."""
        self._meter.count("understudy_upstream_failures_total", endpoint=str(number))
        log_event("upstream_failed", logging.WARNING, endpoint=number, status=error.status)
        if is_last:
            raise error
