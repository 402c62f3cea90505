"""Spans for OpenTelemetry: one per call, below the caller's, and below it what the time went to.

A call has a span of each kind of step at most (`kvcodec_server._steps`), however many pages it is
about. Names and attributes of the call follow OpenTelemetry's conventions for RPC. Extra ``otel``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from google.protobuf.runtime_version import VersionError

from kvcodec.errors import ConfigError
from kvcodec_server._steps import Steps, Total, steps_go_to
from kvcodec_server.access import rewrapped
from kvcodec_server.config import Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

__all__ = ["Traces", "open_traces"]

_FLUSH_SECONDS = 2.0
_TRACED = "/kvcodec.v1.PageService/"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class _Call:
    """A call whose span is being made."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.steps = Steps() if span.is_recording() else None
        self.error = ""


class Traces(grpc.ServerInterceptor):
    """Makes the spans of calls. To be told by `observe` what came of each, on its thread."""

    def __init__(self, processor: SpanProcessor, sample_ratio: float) -> None:
        """`processor` gets the spans. Raises `ImportError` without OpenTelemetry."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "kvcodec-sidecar"}),
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("kvcodec")
        self._propagator = TraceContextTextMapPropagator()
        self._thread = threading.local()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Part of gRPC's interface."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_TRACED):
            return handler
        name, answers, asks = method[1:], handler.response_streaming, handler.request_streaming

        def wrapped(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            def single(request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ANN401
                with self._traced(name, context) as call:
                    if not asks or call.steps is None:
                        return behaviour(request, context)
                    requests = _Requests(request)
                    try:
                        return behaviour(requests, context)
                    finally:
                        requests.tell(call.steps)

            def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: ANN401
                with self._traced(name, context) as call:
                    yield from _timed_answers(behaviour(request, context), call.steps)

            return stream if answers else single

        return rewrapped(handler, wrapped)

    def observe(
        self, operation: str, outcome: str, seconds: float, raw_bytes: int, encoded_bytes: int
    ) -> None:
        """What came of the call that this thread serves, for its span."""
        del seconds
        call: _Call | None = getattr(self._thread, "call", None)
        if call is None:
            return
        call.error = "" if outcome == "ok" else outcome
        call.span.set_attributes(
            {
                "kvcodec.operation": operation,
                "kvcodec.outcome": outcome,
                "kvcodec.raw_bytes": raw_bytes,
                "kvcodec.encoded_bytes": encoded_bytes,
            }
        )

    def close(self) -> None:
        """Send what is left, for two seconds at most."""
        self._provider.force_flush(int(_FLUSH_SECONDS * 1000))

    @contextmanager
    def _traced(self, method: str, context: grpc.ServicerContext) -> Iterator[_Call]:
        """The span of a call, as long as the body; what the thread does meanwhile is below it."""
        from opentelemetry.trace import SpanKind

        call = _Call(
            self._tracer.start_span(
                method,
                context=self._caller(context),
                kind=SpanKind.SERVER,
                attributes={
                    "rpc.system.name": "grpc",
                    "rpc.system": "grpc",  # of conventions that many still know
                    "rpc.method": method,
                    "network.transport": ("unix" if context.peer().startswith("unix:") else "tcp"),
                },
            )
        )
        before, self._thread.call = getattr(self._thread, "call", None), call
        code = grpc.StatusCode.OK
        try:
            with steps_go_to(call.steps):
                yield call
        except GeneratorExit:
            code = grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            # Whoever aborts a call has set its code; a bug has not.
            found = context.code()  # type: ignore[attr-defined]
            code = found if isinstance(found, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
            raise
        finally:
            self._thread.call = before
            self._end(call, code)

    def _end(self, call: _Call, code: grpc.StatusCode) -> None:
        from opentelemetry.trace import Status, StatusCode

        span = call.span
        if call.steps is not None:
            for name, total in call.steps.close().items():
                self._write_step(span, name, total)
        span.set_attribute("rpc.response.status_code", code.name)
        error = call.error or ("" if code is grpc.StatusCode.OK else code.name)
        if error:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR, error))
        span.end()

    def _write_step(self, parent: Span, name: str, total: Total) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        attributes: Mapping[str, int | float] = {
            "kvcodec.steps": total.count,
            "kvcodec.busy_seconds": total.busy_ns / 1e9,
            "kvcodec.pages": total.pages,
            "kvcodec.bytes": total.byte_count,
        }
        span = self._tracer.start_span(
            f"kvcodec.{name}",
            context=set_span_in_context(parent),
            kind=SpanKind.CLIENT if name.startswith("store.") else SpanKind.INTERNAL,
            start_time=total.started_ns,
            attributes={key: number for key, number in attributes.items() if number},
        )
        if total.error:
            span.set_attribute("error.type", total.error)
            span.set_status(Status(StatusCode.ERROR, total.error))
        span.end(max(total.started_ns, total.ended_ns))

    def _caller(self, context: grpc.ServicerContext) -> Any:  # noqa: ANN401
        """The context that the caller says it is in; an empty one otherwise."""
        from opentelemetry.context import Context

        carrier = {
            name: value
            for name, value in context.invocation_metadata() or ()
            if name in ("traceparent", "tracestate") and isinstance(value, str)
        }
        return self._propagator.extract(carrier, context=Context())


class _Requests:
    """The messages of a caller; waiting for them is the step ``receive``."""

    def __init__(self, requests: Iterator[Any]) -> None:
        self._requests = requests
        self._started_ns = time.time_ns()
        self._waited_ns = self._count = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:  # noqa: ANN401
        before = time.perf_counter_ns()
        try:
            message = next(self._requests)
            self._count += 1
            return message
        finally:
            self._waited_ns += time.perf_counter_ns() - before

    def tell(self, steps: Steps) -> None:
        """No more is read. One message is no stream, whatever brings it."""
        if self._count > 1:
            steps.add("receive", self._started_ns, self._waited_ns, self._count)


def _timed_answers(answers: Any, steps: Steps | None) -> Iterator[Any]:  # noqa: ANN401
    """The same messages; the time until each is on its way is the step ``send``."""
    started_ns = waited_ns = count = 0
    with closing(answers):
        if steps is None:
            yield from answers
            return
        try:
            for message in answers:
                before = time.perf_counter_ns()
                started_ns = started_ns or time.time_ns()
                count += 1
                try:
                    yield message
                finally:
                    waited_ns += time.perf_counter_ns() - before
        finally:
            if count:
                steps.add("send", started_ns, waited_ns, count)


def open_traces(settings: Tracing) -> Traces | None:
    """None unless an endpoint is set. Raises `ConfigError` if OpenTelemetry is not installed, or
    not in a version that fits.
    """
    if not settings.endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = OTLPSpanExporter(
            endpoint=settings.endpoint,
            insecure=not settings.endpoint.startswith("https://"),
            timeout=5,
        )
        return Traces(BatchSpanProcessor(exporter), settings.sample_ratio)
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint is set, but {error}; pip install 'kvcodec[otel]' brings it"
        ) from error
    except VersionError as error:
        raise ConfigError(
            f"tracing.endpoint is set, but its libraries do not fit the protobuf that is "
            f"installed: {error} pip install --upgrade 'kvcodec[otel]' chooses those that do"
        ) from error
