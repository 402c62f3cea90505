"""Spans for OpenTelemetry: one per call, below the caller's, with its bytes. Extra ``otel``."""

from __future__ import annotations

import threading
import time

import grpc

from kvcodec.errors import ConfigError
from kvcodec_server.config import Tracing

__all__ = ["Traces", "open_traces"]

_FLUSH_SECONDS = 2.0


class Traces:
    """Makes the span of a call when it is over, from what `Observe` says.

    `arrived` and `observe` are called on the thread that serves the call.
    """

    def __init__(self, endpoint: str, sample_ratio: float) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "kvcodec-sidecar"}),
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
        )
        exporter = OTLPSpanExporter(
            endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=5
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvcodec")
        self._propagator = TraceContextTextMapPropagator()
        self._call = threading.local()

    def arrived(self, context: grpc.ServicerContext) -> None:
        """Remember whose call this is."""
        carrier = {
            name: value
            for name, value in context.invocation_metadata()
            if name in ("traceparent", "tracestate") and isinstance(value, str)
        }
        self._call.parent = self._propagator.extract(carrier) if carrier else None

    def observe(
        self, operation: str, outcome: str, seconds: float, raw_bytes: int, encoded_bytes: int
    ) -> None:
        """Write the span of a call that ends now."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now = time.time_ns()
        parent, self._call.parent = getattr(self._call, "parent", None), None
        span = self._tracer.start_span(
            f"kvcodec.{operation}",
            context=parent or Context(),
            kind=SpanKind.SERVER,
            start_time=now - int(seconds * 1e9),
            attributes={
                "kvcodec.outcome": outcome,
                "kvcodec.raw_bytes": raw_bytes,
                "kvcodec.encoded_bytes": encoded_bytes,
            },
        )
        if outcome != "ok":
            span.set_status(Status(StatusCode.ERROR, outcome))
        span.end(now)

    def close(self) -> None:
        """Send what is left, for two seconds at most."""
        self._provider.force_flush(int(_FLUSH_SECONDS * 1000))


def open_traces(settings: Tracing) -> Traces | None:
    """None unless an endpoint is set. Raises `ConfigError` if OpenTelemetry is not installed."""
    if not settings.endpoint:
        return None
    try:
        return Traces(settings.endpoint, settings.sample_ratio)
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint is set, but {error}; pip install 'kvcodec[otel]' brings it"
        ) from error
