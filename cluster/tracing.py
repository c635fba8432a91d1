"""OpenTelemetry traces: spans of one process, sent by OTLP/HTTP in the background; off unless a recipe names a collector.

A span has names, numbers and ids; never give message content to one. An error is its type, never its text. Off, a span is
a shared object that does nothing, and nothing of OpenTelemetry is imported. On, spans wait in a bounded queue for a thread
that sends them: a collector that is slow or away costs spans, never a call. The state is the process's, like logging's;
OpenTelemetry's own global provider is left to Ray and vLLM.
Source: W3C Trace Context (traceparent, tracestate); OpenTelemetry semantic conventions for HTTP and generative AI.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from cluster.config import Config, has_credentials

Kind = Literal["internal", "server", "client"]
Facts = Mapping[str, Any]
_QUEUE_SPANS = 8_192
_SEND_EVERY_MS = 1_000
_SEND_TIMEOUT_S = 2.0
"""Of one batch with its retries; a stopping gateway waits for it."""
_NO_HEADERS: dict[str, str] = {}


class TelemetryConfig(Config):
    """Where traces go."""

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s/]+")
    """Address of an OTLP/HTTP collector, without /v1/traces; off unless set. Headers it asks for are read from
    OTEL_EXPORTER_OTLP_HEADERS where gateways and engines run."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is not None and has_credentials(address):
            raise ValueError(
                "the address carries credentials, which would be shown; allowed: http://HOST:4318; next: take them out, "
                "and put what the collector asks for into OTEL_EXPORTER_OTLP_HEADERS"
            )
        return address


class Span:
    """One step of a call. Belongs to whoever began it, who ends it."""

    def __init__(self, inner: Any) -> None:
        """`inner` is OpenTelemetry's."""
        self.inner = inner

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Spans begun in the block, and in tasks begun there, are this one's children."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def note(self, facts: Facts) -> None:
        """Add attributes; None is left out. Does nothing once the span has ended."""
        if self.inner.is_recording():
            self.inner.set_attributes({name: value for name, value in facts.items() if value is not None})

    def fail(self, error_type: str) -> None:
        """Say that the step failed, by a type or a status and never by a text."""
        from opentelemetry.trace import Status, StatusCode

        if self.inner.is_recording():
            self.inner.set_attribute("error.type", error_type)
            self.inner.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        self.inner.end()

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        self.end()


class _NoSpan(Span):
    """What there is while tracing is off."""

    def __init__(self) -> None:
        super().__init__(None)

    def current(self) -> Any:
        return _NOTHING

    def note(self, facts: Facts) -> None:
        pass

    def fail(self, error_type: str) -> None:
        pass

    def end(self) -> None:
        pass


_NO_SPAN = _NoSpan()
_NOTHING: contextlib.nullcontext[Span] = contextlib.nullcontext(_NO_SPAN)
_CURRENT: contextvars.ContextVar[Span] = contextvars.ContextVar("understudy_span", default=_NO_SPAN)
_provider: Any = None
_tracer: Any = None


def start_tracing(config: TelemetryConfig, service: str) -> None:
    """Send this process's spans to the configured collector from now on; nothing where none is named or it runs already.

    Starts a thread. What is in the queue when the process exits is sent then, if it exits by itself.

    Args:
        service: the name of what runs here, as service.name.
    """
    global _provider, _tracer
    if config.otlp_endpoint is None or _provider is not None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(f"{config.otlp_endpoint.rstrip('/')}/v1/traces", timeout=_SEND_TIMEOUT_S)
    _provider = TracerProvider(resource=Resource.create({"service.name": service}))
    _provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=_QUEUE_SPANS, schedule_delay_millis=_SEND_EVERY_MS)
    )
    _tracer = _provider.get_tracer("understudy")


def stop_tracing() -> None:
    """Send what waits and end the thread; blocks for that. A no-op where tracing is off."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


def is_tracing() -> bool:
    """Whether this process sends spans."""
    return _tracer is not None


def begin_span(name: str, kind: Kind = "internal", facts: Facts | None = None, carrier: Facts | None = None) -> Span:
    """Begin a step; who calls ends it.

    Args:
        carrier: traceparent and tracestate as they came in, which this step goes on from; one that does not parse begins a
            trace of its own. Without one the step is part of the current one.
    """
    if _tracer is None:
        return _NO_SPAN
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    current = _CURRENT.get()
    if carrier is not None:
        context = TraceContextTextMapPropagator().extract(carrier, trace.set_span_in_context(trace.INVALID_SPAN))
    else:
        context = trace.set_span_in_context(trace.INVALID_SPAN if current is _NO_SPAN else current.inner)
    span = Span(_tracer.start_span(name, context, trace.SpanKind[kind.upper()]))
    span.note(facts or {})
    return span


def span(
    name: str, kind: Kind = "internal", facts: Facts | None = None, carrier: Facts | None = None
) -> contextlib.AbstractContextManager[Span]:
    """A step that is the block, and the current one in it; arguments as `begin_span`."""
    return _NOTHING if _tracer is None else _spanned(name, kind, facts, carrier)


def current_span() -> Span:
    """The step that runs here; one that does nothing where there is none."""
    return _CURRENT.get()


def outgoing() -> dict[str, str]:
    """The headers by which whoever is asked now goes on with this trace; none where there is no step."""
    current = _CURRENT.get()
    if current is _NO_SPAN:
        return _NO_HEADERS
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers, trace.set_span_in_context(current.inner))
    return headers


@contextlib.contextmanager
def _spanned(name: str, kind: Kind, facts: Facts | None, carrier: Facts | None) -> Iterator[Span]:
    with begin_span(name, kind, facts, carrier) as begun, begun.current():
        yield begun
