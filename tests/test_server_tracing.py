"""Spans: what a call is made of, in memory and at a collector; without an endpoint nothing is
imported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from fake_backend import FakeBackend
from google.protobuf.runtime_version import VersionError
from sidecar_process import NAME, SidecarProcess
from test_server_service import CASES, get, header, name, put, raw_request, start
from waiting import wait_until

from kvcodec.backend import open_backend
from kvcodec.errors import ConfigError
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1 import service_pb2_grpc as pb_grpc
from kvcodec_server._steps import steps_of_call
from kvcodec_server.config import Tracing
from kvcodec_server.options import ServerOptions
from kvcodec_server.service import PageServer, new_grpc_server
from kvcodec_server.tracing import Traces, open_traces

export = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
collector_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
collector_grpc = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc"
)

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVICE = "kvcodec.v1.PageService"
CASE = CASES[0]
RAW = bytes(CASE.layout.raw_bytes)


class Host:
    """A traced sidecar in this process, on TCP and on a Unix socket."""

    def __init__(self, sample_ratio: float = 1.0) -> None:
        self.store = FakeBackend(batch_size=4)
        self.exporter = in_memory.InMemorySpanExporter()
        traces = Traces(export.SimpleSpanProcessor(self.exporter), sample_ratio)
        options = ServerOptions(breaker_failures=0)
        self.pages = PageServer(self.store, options, traces.observe)
        self.server = new_grpc_server(options, [traces])
        self.pages.add_to(self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.directory = tempfile.TemporaryDirectory()
        self.socket = Path(self.directory.name) / "s"
        self.server.add_insecure_port(f"unix:{self.socket}")
        self.server.start()
        self.pages.listen(f"{self.socket}.region")
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.stub = pb_grpc.PageServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()
        self.pages.close()
        self.server.stop(0.5).wait()
        self.directory.cleanup()

    def call(self, method: str):
        """The span of the only call of a method, and those below it by name."""
        spans: Sequence = ()

        def is_over() -> bool:
            nonlocal spans
            spans = self.exporter.get_finished_spans()
            return any(span.name == f"{SERVICE}/{method}" for span in spans)

        wait_until(is_over)
        (own,) = [span for span in spans if span.name == f"{SERVICE}/{method}"]
        below = [
            span for span in spans if span.parent and span.parent.span_id == own.context.span_id
        ]
        names = [span.name.removeprefix("kvcodec.") for span in below]
        assert len(set(names)) == len(names), "one span for each kind of step"
        for span in below:
            assert own.start_time <= span.start_time <= span.end_time <= own.end_time
            assert span.context.trace_id == own.context.trace_id
        return own, dict(zip(names, below, strict=True))


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


class TestSpans:
    def test_a_call_is_named_and_described_as_the_conventions_say(self, host):
        host.store.objects[name(1)] = b"x"
        host.stub.Exists(pb.ExistsRequest(names=[name(1), name(2), name(3)]), timeout=5)
        span, below = host.call("Exists")
        assert span.kind.name == "SERVER" and span.parent is None
        assert dict(span.attributes) == {
            "rpc.system.name": "grpc",
            "rpc.system": "grpc",
            "rpc.method": f"{SERVICE}/Exists",
            "rpc.response.status_code": "OK",
            "network.transport": "tcp",
            "kvcodec.operation": "exists",
            "kvcodec.outcome": "ok",
            "kvcodec.raw_bytes": 0,
            "kvcodec.encoded_bytes": 0,
        }
        assert span.status.status_code.name == "UNSET"
        assert set(below) == {"wait", "store.exists"}
        assert below["store.exists"].kind.name == "CLIENT"
        assert below["store.exists"].attributes["kvcodec.pages"] == 3

    def test_two_methods_of_one_operation_are_told_apart(self, host):
        host.stub.ExistsPrefix(pb.ExistsPrefixRequest(names=[name(1)]), timeout=5)
        span, _ = host.call("ExistsPrefix")
        assert span.attributes["kvcodec.operation"] == "exists"

    def test_streams_are_received_stored_read_and_sent(self, host):
        objects = {name(number): bytes([number]) * 150_000 for number in range(20)}
        put(host, objects)
        span, below = host.call("PutStream")
        assert set(below) == {"receive", "wait", "store.put"}
        assert span.attributes["kvcodec.encoded_bytes"] == 3_000_000
        assert below["receive"].attributes["kvcodec.steps"] == 41
        assert below["store.put"].attributes["kvcodec.pages"] == 20
        get(host, *objects, capacity=150_000)
        span, below = host.call("GetStream")
        assert set(below) == {"wait", "store.get", "send"}
        assert below["send"].attributes["kvcodec.steps"] == 20
        read = below["store.get"].attributes
        assert (read["kvcodec.pages"], read["kvcodec.bytes"]) == (20, 3_000_000)
        assert read["kvcodec.steps"] < 20
        assert read["kvcodec.busy_seconds"] > 0

    def test_raw_pages_are_encoded_and_decoded(self, host):
        keys = [f"key-{number}" for number in range(10)]
        put(host, dict.fromkeys(keys, RAW), raw_request(CASE, spec="kv4"))
        _, below = host.call("PutStream")
        assert set(below) == {"receive", "encode", "wait", "store.put"}
        encoded = below["encode"].attributes
        assert (encoded["kvcodec.pages"], encoded["kvcodec.bytes"]) == (10, 10 * len(RAW))
        get(host, *keys, capacity=len(RAW), raw=raw_request(CASE))
        _, below = host.call("GetStream")
        assert set(below) == {"wait", "store.get", "decode", "send"}
        assert below["decode"].attributes["kvcodec.pages"] == 10

    def test_shared_memory_is_lent_as_long_as_a_call_uses_it(self, host):
        backend = open_backend(f"sidecar+unix://{host.socket}")
        data = backend.staging_memory(1000) or memoryview(bytearray(1000))
        assert backend.put([name(1)], [data], timeout_seconds=5) == [None]
        span, below = host.call("Put")
        assert span.attributes["network.transport"] == "unix"
        assert set(below) == {"region", "wait", "store.put"}
        assert below["region"].start_time <= below["store.put"].start_time
        assert backend.get_into([name(1)], [data], timeout_seconds=5) == [1000]
        _, below = host.call("Get")
        assert set(below) == {"region", "wait", "store.get"}
        backend.close()

    def test_pages_are_verified(self, host):
        host.store.objects[name(1)] = CASE.page()
        host.stub.Inspect(pb.InspectRequest(names=[name(1)], verify=True), timeout=5)
        _, below = host.call("Inspect")
        assert set(below) == {"wait", "store.stat", "store.get", "verify"}
        assert below["verify"].attributes["kvcodec.bytes"] == len(CASE.page())

    def test_calls_at_a_time_keep_to_themselves(self, host):
        host.store.objects[name(1)] = b"x" * 1000
        meet = threading.Barrier(2)
        host.store.hook = lambda operation, names: meet.wait(20)
        request = pb.ExistsRequest(names=[name(1)])
        other = host.stub.Exists.future(request, timeout=20)
        get(host, name(1))
        other.result()
        assert set(host.call("Exists")[1]) == {"wait", "store.exists"}
        assert set(host.call("GetStream")[1]) == {"wait", "store.get", "send"}


class TestErrors:
    def test_a_call_that_is_refused_says_so(self, host):
        with pytest.raises(grpc.RpcError):
            host.stub.Exists(pb.ExistsRequest(names=["no name"]), timeout=5)
        span, below = host.call("Exists")
        assert span.status.status_code.name == "ERROR"
        assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
        assert span.attributes["error.type"] == span.attributes["kvcodec.outcome"] == "invalid"
        assert below == {}

    def test_a_store_that_raises_is_an_error_of_its_step(self, host):
        def broken(operation, names):
            raise RuntimeError("a bug")

        host.store.hook = broken
        get(host, name(1))
        span, below = host.call("GetStream")
        assert below["store.get"].attributes["error.type"] == "raised"
        assert below["store.get"].status.status_code.name == "ERROR"
        assert span.status.status_code.name == "ERROR"
        assert span.attributes["rpc.response.status_code"] == "OK"

    def test_a_store_that_hangs_leaves_an_unfinished_step(self, host):
        going_on = threading.Event()
        host.store.hook = lambda operation, names: going_on.wait(10)
        with pytest.raises(grpc.RpcError):
            host.stub.Stat(pb.StatRequest(name=name(1)), timeout=0.3)
        span, below = host.call("Stat")
        going_on.set()
        assert below["store.stat"].attributes["error.type"] == "unfinished"
        assert span.attributes["error.type"] == "timeout"
        assert span.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"

    def test_a_damaged_page_is_an_error_of_decoding(self, host):
        put(host, {"key": RAW}, raw_request(CASE, spec="kv4"))
        (stored,) = host.store.objects
        damaged = bytearray(host.store.objects[stored])
        damaged[-100] ^= 1
        host.store.objects[stored] = bytes(damaged)
        get(host, "key", capacity=len(RAW), raw=raw_request(CASE))
        _, below = host.call("GetStream")
        assert below["decode"].attributes["error.type"] == "corrupt:section_checksum"

    def test_a_writer_that_breaks_the_form_is_described_with_what_it_sent(self, host):
        broken = [header(), start(1, 4, b"abc"), start(2, 1, b"a")]
        with pytest.raises(grpc.RpcError):
            host.stub.PutStream(iter(broken), timeout=5)
        span, below = host.call("PutStream")
        assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
        assert below["receive"].attributes["kvcodec.steps"] == 3

    def test_a_reader_that_leaves_ends_its_span(self, host):
        host.store.objects = {name(number): bytes(1 << 20) for number in range(40)}
        rooms = [pb.ObjectRoom(name=key, capacity=1 << 20) for key in host.store.objects]
        answers = host.stub.GetStream(pb.GetStreamRequest(objects=rooms), timeout=10)
        next(answers)
        answers.cancel()
        span, below = host.call("GetStream")
        assert span.attributes["rpc.response.status_code"] == "CANCELLED"
        assert "send" in below and "kvcodec.outcome" in span.attributes


def test_calls_that_are_not_sampled_gather_nothing():
    host = Host(sample_ratio=0.0)
    gathered = []
    host.store.hook = lambda operation, names: gathered.append(steps_of_call())
    host.stub.Exists(pb.ExistsRequest(names=[name(1)]), timeout=5)
    get(host, name(1))
    assert gathered == [None, None]
    host.close()
    assert host.exporter.get_finished_spans() == ()


# A collector


class Collector(collector_grpc.TraceServiceServicer):
    """Takes spans, as OpenTelemetry's collector does."""

    def __init__(self):
        self.spans = []
        self.services = set()
        self._lock = threading.Lock()

    def Export(self, request, context):  # noqa: N802 - the name is the interface
        with self._lock:
            for resource in request.resource_spans:
                self.services |= {
                    each.value.string_value
                    for each in resource.resource.attributes
                    if each.key == "service.name"
                }
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


@pytest.mark.parametrize(("ratio", "calls"), [("0", 1), ("1", 2)])
def test_calls_become_spans_of_their_callers(tmp_path, collector, ratio, calls):
    settings = {
        "tracing.endpoint": f"http://127.0.0.1:{collector.port}",
        "tracing.sample_ratio": ratio,
        "store.ram_bytes": "1MiB",
    }
    with SidecarProcess(tmp_path, settings) as sidecar:
        ask(sidecar, traced=True)
        ask(sidecar, traced=False)
        ask(sidecar)
        sidecar.stop()  # what is left is sent at the end
    wait_until(lambda: len(collector.spans) >= 3 * calls)
    assert collector.services == {"kvcodec-sidecar"}
    assert len(collector.spans) == 3 * calls
    mine = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    (own,) = [span for span in mine if span.parent_span_id.hex() == CALLER]
    assert own.name == f"{SERVICE}/Exists"
    attributes = {each.key: each.value.string_value for each in own.attributes}
    assert attributes["kvcodec.outcome"] == "ok"
    assert attributes["rpc.response.status_code"] == "OK"
    below = [span for span in mine if span.parent_span_id == own.span_id]
    assert {span.name for span in below} == {"kvcodec.wait", "kvcodec.store.exists"}
    for span in mine:
        assert 0 <= span.end_time_unix_nano - span.start_time_unix_nano < 5e9


def test_away_collector_costs_nothing_but_its_spans(tmp_path):
    settings = {"tracing.endpoint": "http://127.0.0.1:1", "tracing.sample_ratio": "1"}
    with SidecarProcess(tmp_path, settings) as sidecar:
        for _ in range(3):
            ask(sidecar)


def test_without_an_endpoint_nothing_is_imported():
    assert open_traces(Tracing()) is None
    code = "import sys, kvcodec_server.app; print('opentelemetry' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "False\n"


@pytest.mark.parametrize("error", [ImportError("no such module"), VersionError("too old")])
def test_libraries_that_are_not_there_or_do_not_fit_are_named(monkeypatch, error):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise error

    module = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
    monkeypatch.setitem(sys.modules, module, Broken(module))
    with pytest.raises(ConfigError, match=rf"{error}.*pip install.*kvcodec\[otel\]"):
        open_traces(Tracing(endpoint="http://127.0.0.1:4317"))
