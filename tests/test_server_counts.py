"""What a sidecar counts about its calls to the store and its codec, each by making it happen."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from test_server_metrics import metrics_of, series, value
from test_server_service import CASES, Host, get, name, put, raw_request
from waiting import wait_until

from kvcodec.backend import open_backend
from kvcodec.format import EncodedPage
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server.namespaces import ServedNamespaces
from kvcodec_server.options import ServerOptions
from kvcodec_server.service import PageServer

CASE = CASES[0]
RAW = bytes(CASE.layout.raw_bytes)


class Watched(Host):
    """A sidecar in this process, and what Prometheus reads of it."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.metrics = metrics_of(server=self.pages)

    def value(self, metric: str, **labels: str) -> float:
        """Of one series, 0 if there is none."""
        found: float = series(self.metrics).get((metric, tuple(sorted(labels.items()))), 0.0)
        return found

    def dropped(self, op: str, reason: str) -> float:
        return self.value("kvcodec_dropped_pages_total", op=op, reason=reason)


@pytest.fixture
def watched():
    hosts: list[Watched] = []

    def make(**options: object) -> Watched:
        hosts.append(Watched(**options))
        return hosts[-1]

    yield make
    for host in hosts:
        host.store.hook = lambda operation, names: None
        host.close()


def test_bytes_of_headers_are_those_of_the_pages_that_moved(watched):
    host = watched()
    page = CASE.page()
    header_bytes = EncodedPage.parse(page).header.header_bytes
    put(host, {name(1): page, name(2): page})
    put(host, {name(3): b"no page at all" * 100})
    assert host.value("kvcodec_bytes_total", op="put", kind="meta") == 2 * header_bytes
    get(host, name(1), name(9), capacity=len(page))
    assert host.value("kvcodec_bytes_total", op="get", kind="meta") == header_bytes
    get(host, name(1), name(2), capacity=len(page))
    assert host.value("kvcodec_bytes_total", op="get", kind="meta") == 3 * header_bytes
    put(host, {name(3): page[:40]})
    assert host.value("kvcodec_bytes_total", op="put", kind="meta") == 2 * header_bytes


@pytest.mark.parametrize(
    ("spec", "codec"), [("kv4", "int4"), ("k8v4", "int4+int8"), ("raw", "raw")]
)
def test_the_codec_is_timed_by_page_and_codec(watched, spec, codec):
    host = watched()
    started = time.perf_counter()
    put(host, dict.fromkeys(("a", "b", "c"), RAW), raw_request(CASE, spec=spec))
    found = get(host, "a", "b", "missing", capacity=len(RAW), raw=raw_request(CASE))
    elapsed = time.perf_counter() - started
    assert [outcome.status for outcome, _ in found] == [1, 1, pb.STATUS_NOT_FOUND]
    for op, count in (("encode", 3), ("decode", 2)):
        assert host.value("kvcodec_codec_seconds_count", op=op, codec=codec) == count
        assert 0 < host.value("kvcodec_codec_seconds_sum", op=op, codec=codec) < elapsed
    assert len([key for key, _ in series(host.metrics) if key.endswith("seconds_sum")]) == 2


def test_a_damaged_page_is_removed_and_counted(watched):
    host = watched()
    put(host, {"key": RAW}, raw_request(CASE, spec="kv4"))
    (stored,) = host.store.objects
    damaged = bytearray(host.store.objects[stored])
    damaged[-100] ^= 1
    host.store.objects[stored] = bytes(damaged)
    ((outcome, _),) = get(host, "key", capacity=len(RAW), raw=raw_request(CASE))
    assert outcome.status == pb.STATUS_CORRUPT_PAGE
    wait_until(lambda: host.value("kvcodec_removed_pages_total", reason="corrupt_page") == 1)
    assert host.store.objects == {}
    assert host.value("kvcodec_codec_seconds_count", op="decode", codec="none") == 1


def test_a_page_of_another_codec_or_model_stays(watched):
    host = watched()
    put(host, {"key": RAW}, raw_request(CASE, spec="kv4"))
    for request in (
        raw_request(CASE, minimum_bits=8),
        raw_request(CASES[-1], minimum_bits=8),
    ):
        get(host, "key", capacity=len(RAW), raw=request)
    time.sleep(0.2)
    assert len(host.store.objects) == 1
    assert host.value("kvcodec_removed_pages_total", reason="corrupt_page") == 0


def ask(host: Watched, count: int, seconds: float) -> None:
    """What comes of it says the server in time, or on a loaded machine the client's own clock."""
    names = [name(number) for number in range(count)]
    try:
        host.stub.Exists(pb.ExistsRequest(names=names), timeout=seconds)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise


def test_pages_wait_for_a_thread_and_then_for_the_store(watched):
    host = watched(io_threads=1)
    assert host.value("kvcodec_queue_pages", state="waiting") == 0
    going_on = threading.Event()
    host.store.hook = lambda operation, names: going_on.wait(30)
    threads = [threading.Thread(target=ask, args=(host, count, 20)) for count in (3, 4)]
    for thread in threads:
        thread.start()
        wait_until(lambda: host.value("kvcodec_queue_pages", state="asked"))
    wait_until(lambda: host.value("kvcodec_queue_pages", state="waiting"))
    assert {host.value("kvcodec_queue_pages", state=s) for s in ("waiting", "asked")} == {3, 4}
    going_on.set()
    for thread in threads:
        thread.join()
    for state in ("waiting", "asked"):
        assert host.value("kvcodec_queue_pages", state=state) == 0
    assert not [key for key, _ in series(host.metrics) if key == "kvcodec_dropped_pages_total"]


def test_pages_for_which_no_thread_came_free_were_dropped(watched):
    host = watched(io_threads=1)
    going_on = threading.Event()
    host.store.hook = lambda operation, names: going_on.wait(10)
    ask(host, 1, 1.0)
    ask(host, 5, 0.2)
    going_on.set()
    wait_until(lambda: host.dropped("exists", "thread") == 5)


def test_pages_that_find_the_queue_full_were_dropped(watched, monkeypatch):
    host = watched()
    monkeypatch.setattr(host.pages._servicer.calls.pipeline.io, "submit", lambda work: False)
    ask(host, 5, 20)
    assert host.dropped("exists", "queue") == 5
    assert host.value("kvcodec_queue_pages", state="waiting") == 0


def test_pages_that_find_the_circuit_open_were_dropped(watched):
    host = watched(breaker_failures=1, breaker_cooldown_seconds=30)
    forever = threading.Event()
    host.store.hook = lambda operation, names: forever.wait(60)
    ask(host, 1, 1.5)
    ask(host, 7, 20)
    forever.set()
    assert host.dropped("exists", "circuit") == 7


@pytest.mark.parametrize("raw", [False, True])
def test_pages_without_staging_memory_were_dropped(watched, monkeypatch, raw):
    host = watched()
    put(host, {"key": RAW}, raw_request(CASE, spec="kv4"))
    request = {"raw": raw_request(CASE)} if raw else {}
    buffers = host.pages._servicer.calls.pipeline.buffers
    monkeypatch.setattr(buffers, "acquire", lambda size, seconds: None)
    names = ["a", "b"] if raw else [name(1), name(2)]
    assert len(get(host, *names, capacity=len(RAW), **request)) == 2
    put(host, dict.fromkeys(names, RAW), request.get("raw"))
    assert (host.dropped("get", "memory"), host.dropped("put", "memory")) == (2, 2)


def test_bytes_of_the_store_come_from_the_store(tmp_path):
    with_memory = f"tier+ram://?bytes=1MiB&store=file://{tmp_path}/store?max_bytes=5MiB"
    for url, places in ((with_memory, ("ram", "store")), ("memory://counted", ("store",))):
        store = open_backend(url)
        pages = PageServer(ServedNamespaces(store, ["7" * 32]), ServerOptions())
        metrics = metrics_of(url, pages)
        store.put([name(1)], [memoryview(bytes(5000))], timeout_seconds=5)
        for place in places:
            assert 5000 <= value(metrics, "kvcodec_store_bytes", place=place) < 8000
            assert value(metrics, "kvcodec_store_limit_bytes", place=place) >= 1 << 20
        pages.close()
        store.close()
