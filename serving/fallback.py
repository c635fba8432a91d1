"""The LLMs behind the gateway, in the order in which they are asked: chat.completions body -> the first usable answer.

An endpoint that raises UpstreamError passes the call on to the next one; only before the first byte of an answer, so
bytes of two models never mix. Each answer comes with the endpoint that gave it, because prices differ. Retries and
circuit breaking are the endpoint's own (cluster/upstream.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cluster.errors import UpstreamError
from cluster.telemetry import Meter, log_event
from cluster.upstream import Upstream, UpstreamConfig, UpstreamReply, UpstreamStream


class FallbackLLM:
    """Asks endpoints in order. Belongs to one event loop; close it there."""

    def __init__(self, configs: Sequence[UpstreamConfig], meter: Meter | None = None) -> None:
        """Take at least one endpoint; connect to nothing yet.

        Raises:
            ConfigError: an endpoint's key is not set.
        """
        assert configs, "a fallback LLM needs an endpoint"
        self._upstreams = [Upstream(config) for config in configs]
        self._meter = meter or Meter()

    async def chat(self, body: dict[str, Any]) -> tuple[UpstreamReply, UpstreamConfig]:
        """Ask for a whole answer.

        Raises:
            UpstreamError: no endpoint gave one; the last endpoint's error.
        """
        for number, upstream in enumerate(self._upstreams):
            try:
                return await upstream.chat(body), upstream.config
            except UpstreamError as error:
                self._pass_on(number, error)
        raise AssertionError("the last endpoint answers or raises")

    @contextlib.asynccontextmanager
    async def stream(self, body: dict[str, Any]) -> AsyncIterator[tuple[UpstreamStream, UpstreamConfig]]:
        """Start a streamed answer; its first byte is here when the block is entered.

        Raises:
            UpstreamError: no endpoint gave a first byte; the last endpoint's error.
        """
        for number, upstream in enumerate(self._upstreams):
            async with contextlib.AsyncExitStack() as stack:
                try:
                    stream = await stack.enter_async_context(upstream.stream(body))
                except UpstreamError as error:
                    self._pass_on(number, error)
                    continue
                yield stream, upstream.config
                return

    async def list_models(self) -> list[dict[str, Any]]:
        """Model list of the first endpoint that gives one.

        Raises:
            UpstreamError: none did; the last endpoint's error.
        """
        for number, upstream in enumerate(self._upstreams):
            try:
                return await upstream.list_models()
            except UpstreamError as error:
                self._pass_on(number, error)
        raise AssertionError("the last endpoint answers or raises")

    async def close(self) -> None:
        for upstream in self._upstreams:
            await upstream.close()

    def _pass_on(self, number: int, error: UpstreamError) -> None:
        """Count a failure; raise it where no endpoint is left."""
        self._meter.count("understudy_upstream_failures_total", endpoint=str(number))
        log_event("upstream_failed", logging.WARNING, endpoint=number, status=error.status)
        if number == len(self._upstreams) - 1:
            raise error
