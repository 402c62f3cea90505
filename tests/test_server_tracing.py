"""Spans reach a collector, below their callers; without an endpoint nothing is imported."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from sidecar_process import NAME, SidecarProcess, until

from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1 import service_pb2_grpc as pb_grpc

collector_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
collector_grpc = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc"
)

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(collector_grpc.TraceServiceServicer):
    """Takes spans, as OpenTelemetry's collector does."""

    def __init__(self):
        self.spans = []
        self._lock = threading.Lock()

    def Export(self, request, context):  # noqa: N802 - the name is the interface
        with self._lock:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self.spans += scope.spans
        return collector_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector():
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = Collector()
    collector_grpc.add_TraceServiceServicer_to_server(servicer, server)
    servicer.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer
    server.stop(None)


def ask(sidecar, traced=None):
    metadata = ()
    if traced is not None:
        metadata = (("traceparent", f"00-{TRACE}-{CALLER}-0{int(traced)}"),)
    with grpc.insecure_channel(sidecar.target) as channel:
        pb_grpc.PageServiceStub(channel).Exists(
            pb.ExistsRequest(names=[NAME]), timeout=5, metadata=metadata
        )


@pytest.mark.parametrize(("ratio", "spans"), [("0", 1), ("1", 2)])
def test_calls_become_spans_of_their_callers(tmp_path, collector, ratio, spans):
    settings = {
        "tracing.endpoint": f"http://127.0.0.1:{collector.port}",
        "tracing.sample_ratio": ratio,
    }
    with SidecarProcess(tmp_path, settings) as sidecar:
        ask(sidecar, traced=True)
        ask(sidecar, traced=False)
        ask(sidecar)
        sidecar.stop()  # what is left is sent at the end
    until(lambda: len(collector.spans) >= spans)
    assert len(collector.spans) == spans
    (below,) = [span for span in collector.spans if span.parent_span_id]
    assert below.name == "kvcodec.exists"
    assert (below.trace_id.hex(), below.parent_span_id.hex()) == (TRACE, CALLER)
    attributes = {each.key: each.value for each in below.attributes}
    assert attributes["kvcodec.outcome"].string_value == "ok"
    assert {"kvcodec.raw_bytes", "kvcodec.encoded_bytes"} <= set(attributes)
    assert 0 < below.end_time_unix_nano - below.start_time_unix_nano < 5e9


def test_away_collector_costs_nothing_but_its_spans(tmp_path):
    settings = {"tracing.endpoint": "http://127.0.0.1:1", "tracing.sample_ratio": "1"}
    with SidecarProcess(tmp_path, settings) as sidecar:
        for _ in range(3):
            ask(sidecar)


def test_without_an_endpoint_nothing_is_imported():
    code = "import sys, kvcodec_server.app; print('opentelemetry' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "False\n"
