"""A collector for tests: takes OTLP/HTTP traces as an OpenTelemetry Collector does and keeps the spans."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cluster.tracing import TelemetryConfig, start_tracing, stop_tracing

KINDS = {1: "internal", 2: "server", 3: "client"}


class Taken(NamedTuple):
    """One span as it came over the wire."""

    name: str
    kind: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    facts: dict[str, Any]
    has_failed: bool
    raw: bytes


class Collector:
    def __init__(self) -> None:
        self.spans: list[Taken] = []
        self.url = ""

    def named(self, name: str) -> list[Taken]:
        return [one for one in self.spans if one.name == name]

    async def take(self, request: web.Request) -> web.Response:
        sent = ExportTraceServiceRequest.FromString(await request.read())
        for of_resource in sent.resource_spans:
            service = _facts(of_resource.resource.attributes)["service.name"]
            for span in (span for scope in of_resource.scope_spans for span in scope.spans):
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                facts, has_failed = _facts(span.attributes), span.status.code == 2
                kind = KINDS[span.kind]
                self.spans.append(Taken(span.name, kind, service, *ids, facts, has_failed, span.SerializeToString()))
        return web.Response()


@contextlib.asynccontextmanager
async def collector(service: str = "test") -> AsyncIterator[Collector]:
    """A collector to which this process sends its spans in the block."""
    async with listening() as found:
        start_tracing(TelemetryConfig(otlp_endpoint=found.url), service)
        try:
            yield found
        finally:
            stop_tracing()


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[Collector]:
    """A collector on a free loopback port."""
    found = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", found.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield found
    finally:
        await runner.cleanup()


def _facts(attributes: Any) -> dict[str, Any]:
    found = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found
