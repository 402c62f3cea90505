"""PageService as a client of any language sees it: plain gRPC, in process."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from fake_backend import FakeBackend
from pages import Case, decode_page, raw_bytes
from waiting import wait_until

from kvcodec.backend import open_backend
from kvcodec.errors import BackendError, BackendFull, BackendTimeout, ConfigError, MismatchedPage
from kvcodec.format import EncodedPage
from kvcodec.identity import Identity
from kvcodec.layout import DType, PageLayout
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1.service_pb2_grpc import PageServiceStub
from kvcodec_server import _listing, metadata
from kvcodec_server.options import ServerOptions
from kvcodec_server.service import PageServer, new_grpc_server
from kvcodec_server.status import STATUS_TRAILER, error_of, error_of_call

NAMESPACE = "7" * 32
LAYOUT = PageLayout.mha(dtype=DType.BF16, token_count=16, layer_count=3, head_count=2, head_size=64)
CHUNK = 100_000


def name(number: int = 0) -> str:
    return f"{NAMESPACE}/{number:064x}"


class Host:
    """A sidecar in this process, over a store that can be made to fail."""

    def __init__(self, **options: object) -> None:
        self.store = FakeBackend()
        self.seen: list[tuple[str, str, float, int, int]] = []
        self.options = ServerOptions(**{"breaker_failures": 0, **options})  # type: ignore[arg-type]
        self.pages = PageServer(self.store, self.options, lambda *what: self.seen.append(what))
        self.server = new_grpc_server(self.options)
        self.pages.add_to(self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.directory = tempfile.TemporaryDirectory()
        self.socket = Path(self.directory.name) / "s"
        self.server.add_insecure_port(f"unix:{self.socket}")
        self.server.start()
        self.pages.listen(f"{self.socket}.region")
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]
        )
        self.stub = PageServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()
        self.pages.close()
        self.server.stop(0.5).wait()
        self.directory.cleanup()


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


def refused(call) -> Exception:
    """What a call that is refused as a whole is told."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return error_of_call(raised.value)


def put(host, objects: dict[str, bytes], raw: pb.RawPages | None = None) -> list[pb.Outcome]:
    """Store objects as any client would: with the generated messages."""

    def requests():
        yield pb.PutStreamRequest(header=pb.PutStreamHeader(raw=raw))
        for key, data in objects.items():
            start = pb.ObjectStart(name=key, length=len(data))
            yield pb.PutStreamRequest(start=start, chunk=data[:CHUNK])
            for at in range(CHUNK, len(data), CHUNK):
                yield pb.PutStreamRequest(chunk=data[at : at + CHUNK])

    return list(host.stub.PutStream(requests(), timeout=10).outcomes)


def get(host, *names: str, capacity: int = 1 << 20, **request):
    """Outcomes, and the bytes of those that are there."""
    rooms = [pb.ObjectRoom(name=key, capacity=capacity) for key in names]
    found: list[tuple[pb.Outcome, bytearray]] = []
    parts = host.stub.GetStream(pb.GetStreamRequest(objects=rooms, **request), timeout=10)
    for part in parts:
        if part.HasField("outcome"):
            found.append((part.outcome, bytearray()))
        found[-1][1].extend(part.chunk)
    return found


# Streams


@pytest.mark.parametrize("size", [1, 1000, CHUNK, (1 << 20) - 1, 1 << 20, (2 << 20) + 7, 5 << 20])
def test_objects_of_any_size_pass_in_chunks(host, size):
    objects = {name(number): os.urandom(size) for number in range(3)}
    outcomes = put(host, objects)
    assert [(o.status, o.length) for o in outcomes] == [(pb.STATUS_OK, size)] * 3
    assert host.store.objects == objects
    found = get(host, *objects, capacity=size)
    assert [bytes(data) for _, data in found] == list(objects.values())


def test_what_is_missing_or_too_long_has_no_bytes(host):
    put(host, {name(1): b"x" * 100})
    (there, data), (missing, nothing), (long, none) = [
        *get(host, name(1), name(2), capacity=100),
        *get(host, name(1), capacity=99),
    ]
    assert (there.status, bytes(data)) == (pb.STATUS_OK, b"x" * 100)
    assert (missing.status, nothing) == (pb.STATUS_NOT_FOUND, b"")
    assert (long.status, long.length, none) == (pb.STATUS_TOO_LONG, 100, b"")


def header():
    return pb.PutStreamRequest(header=pb.PutStreamHeader())


def start(number: int, length: int, chunk: bytes = b""):
    return pb.PutStreamRequest(start=pb.ObjectStart(name=name(number), length=length), chunk=chunk)


@pytest.mark.parametrize(
    "stream",
    [
        [],
        [start(1, 3, b"abc")],
        [header(), pb.PutStreamRequest(chunk=b"abc")],
        [header(), header()],
        [header(), start(1, 4, b"abc")],
        [header(), start(1, 4, b"abc"), start(2, 1, b"a")],
        [header(), start(1, 2, b"abc")],
        [header(), start(1, 3), pb.PutStreamRequest(chunk=b"abc")],
        [header(), start(1, 0)],
        [header(), start(1, 1 << 40, b"abc")],
        [header(), pb.PutStreamRequest(start=pb.ObjectStart(name="x", length=1), chunk=b"a")],
    ],
)
def test_a_stream_without_form_is_refused_and_stores_nothing_of_it(host, stream):
    assert type(refused(lambda: host.stub.PutStream(iter(stream), timeout=5))) is ConfigError
    assert host.store.objects == {}
    assert host.pages.stats()["calls"] == 0


def test_a_writer_that_leaves_stores_no_half_object(host):
    gone = threading.Event()

    def requests():
        yield header()
        yield start(1, 200, b"x" * 100)
        gone.wait(5)

    call = host.stub.PutStream.future(requests(), timeout=5)
    while not host.pages.stats()["streams"]:
        time.sleep(0.01)
    time.sleep(0.05)
    call.cancel()
    gone.set()
    deadline = time.monotonic() + 5
    while host.pages.stats()["streams"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert host.store.objects == {}


def test_a_slow_reader_is_sent_away_and_costs_little_memory(monkeypatch):
    host = Host(max_call_seconds=3.0, staging_bytes=64 << 20, max_streams=2)
    data = os.urandom(8 << 20)
    host.store.objects = {name(number): data for number in range(40)}
    rooms = [pb.ObjectRoom(name=key, capacity=8 << 20) for key in host.store.objects]
    calls = [host.stub.GetStream(pb.GetStreamRequest(objects=rooms), timeout=30) for _ in range(2)]
    for call in calls:
        next(call)
    assert "max_streams" in str(refused(lambda: get(host, name(1))))
    # Others are served meanwhile.
    assert list(host.stub.Exists(pb.ExistsRequest(names=[name(1)]), timeout=5).exists) == [True]
    wait_until(lambda: host.pages.stats()["streams"] == 0)
    assert 0 < host.pages.stats()["staging_bytes"] <= 64 << 20
    assert len(get(host, name(1), capacity=8 << 20)) == 1
    host.close()


# Pages that are raw outside


CASES = [
    Case(name="service", layout=LAYOUT, spec=spec) for spec in ("kv4", "kv8", "kv4-channel", "raw")
] + [Case(name="nonfinite", layout=LAYOUT, spec="kv4", special=True)]


def raw_request(case: Case, **fields) -> pb.RawPages:
    return pb.RawPages(
        identity=metadata.identity_message(case.identity),
        layout=metadata.layout_message(case.layout),
        **fields,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.spec}")
def test_raw_pages_are_encoded_as_the_reference_does_and_decoded(host, case):
    raw = raw_bytes(case.layout, case.rows())
    (outcome,) = put(host, {case.key: raw}, raw_request(case, spec=case.spec))
    assert outcome.status == pb.STATUS_OK
    stored = host.store.objects[case.namespace.object_name(case.key)]
    if not case.special:
        assert stored == case.page()
    assert outcome.length == len(stored)
    ((got, data),) = get(host, case.key, capacity=len(raw), raw=raw_request(case))
    assert (got.status, got.length) == (pb.STATUS_OK, len(raw))
    assert bytes(data) == decode_page(EncodedPage.parse(stored))
    if case.special:
        assert bytes(data) == raw, "what the codec cannot hold is kept as it is"


def test_a_raw_page_that_is_not_what_was_asked_for_says_why(host):
    case = CASES[0]
    raw = raw_bytes(case.layout, case.rows())
    put(host, {case.key: raw}, raw_request(case, spec="kv4"))
    stored = case.namespace.object_name(case.key)
    other = Case(name="other", layout=LAYOUT, spec="kv4", identity=Identity.of(model="other"))
    host.store.objects[other.namespace.object_name(case.key)] = host.store.objects[stored]
    ((outcome, data),) = get(host, case.key, raw=raw_request(other))
    assert type(error_of(outcome)) is MismatchedPage
    assert (outcome.found, outcome.expected, data) == (
        case.identity.as_dict()["model"],
        "other",
        b"",
    )
    ((outcome, _),) = get(host, case.key, raw=raw_request(case, minimum_bits=8))
    assert outcome.status == pb.STATUS_QUALITY_BELOW_MINIMUM
    damaged = bytearray(host.store.objects[stored])
    damaged[-100] ^= 1
    host.store.objects[stored] = bytes(damaged)
    ((outcome, data),) = get(host, case.key, raw=raw_request(case))
    assert (outcome.status, outcome.what) == (pb.STATUS_CORRUPT_PAGE, "section_checksum")
    assert data == b""
    ((outcome, _),) = get(host, "unknown", raw=raw_request(case))
    assert outcome.status == pb.STATUS_NOT_FOUND


@pytest.mark.parametrize(
    ("fields", "data"),
    [({"spec": "kv5"}, 0), ({"spec": "kv4"}, -1), ({"layout": None}, 0)],
)
def test_raw_pages_that_cannot_be_are_refused(host, fields, data):
    case = CASES[0]
    raw = raw_bytes(case.layout, case.rows())
    request = raw_request(case, **{k: v for k, v in fields.items() if v})
    if "layout" in fields:
        request.ClearField("layout")
    objects = {case.key: raw[: len(raw) + data]}
    assert type(refused(lambda: put(host, objects, request))) is ConfigError
    assert host.store.objects == {}


# What pages say about themselves


def test_metadata_comes_with_a_page_where_it_is_asked_for(host):
    case = CASES[0]
    page = case.page()
    put(host, {name(1): page, name(2): b"no page"})
    (first, _), (second, data) = get(host, name(1), name(2), with_metadata=True)
    assert first.metadata == metadata.metadata_of(EncodedPage.parse(page).header)
    assert not second.HasField("metadata")
    assert data == b"no page"
    assert not get(host, name(1))[0][0].HasField("metadata")


def test_inspect_reads_headers_and_verifies_where_asked(host):
    page = CASES[0].page()
    damaged = bytearray(page)
    damaged[-100] ^= 1
    put(host, {name(1): page, name(2): bytes(damaged), name(3): b"no page" * 100})
    names = [name(1), name(2), name(3), name(4)]

    def inspect(verify):
        request = pb.InspectRequest(names=names, verify=verify)
        return list(host.stub.Inspect(request, timeout=5).outcomes)

    quick, full = inspect(False), inspect(True)
    corrupt, missing = pb.STATUS_CORRUPT_PAGE, pb.STATUS_NOT_FOUND
    assert [o.status for o in quick] == [pb.STATUS_OK, pb.STATUS_OK, corrupt, missing]
    assert [o.status for o in full] == [pb.STATUS_OK, corrupt, corrupt, missing]
    assert [o.HasField("metadata") for o in full] == [True, True, False, False]
    assert quick[0].length == len(page)
    assert (full[1].what, full[2].what) == ("section_checksum", "magic")


# Names


def test_names_are_listed_counted_described_and_removed(host):
    put(host, {name(number): b"x" * (number + 1) for number in range(1001)})
    listed = [
        o for r in host.stub.List(pb.ListRequest(prefix=NAMESPACE), timeout=5) for o in r.objects
    ]
    assert {o.name: o.stored_bytes for o in listed} == {name(n): n + 1 for n in range(1001)}
    assert not list(host.stub.List(pb.ListRequest(prefix="8" * 32), timeout=5))
    asked = [name(0), name(1), name(5000), name(2)]
    assert host.stub.ExistsPrefix(pb.ExistsPrefixRequest(names=asked), timeout=5).count == 2
    exists = host.stub.Exists(pb.ExistsRequest(names=asked), timeout=5).exists
    assert list(exists) == [True, True, False, True]
    assert host.stub.Stat(pb.StatRequest(name=name(9)), timeout=5).object.stored_bytes == 10
    assert not host.stub.Stat(pb.StatRequest(name=name(5000)), timeout=5).HasField("object")
    deleted = host.stub.Delete(pb.DeleteRequest(names=asked), timeout=5).deleted
    assert list(deleted) == [True, True, False, True]


def test_a_long_list_may_take_longer_than_a_call(monkeypatch):
    host = Host(max_call_seconds=1.5)
    put(host, {name(number): b"x" for number in range(3)})
    listed = host.store.list

    def slow(prefix=""):
        for info in listed(prefix):
            time.sleep(0.6)
            yield info

    host.store.list = slow
    monkeypatch.setattr(_listing, "_LISTED_AT_ONCE", 1)
    found = [o.name for r in host.stub.List(pb.ListRequest(), timeout=20) for o in r.objects]
    assert found == [name(number) for number in range(3)]
    going_on = threading.Event()
    host.store.list = lambda prefix: iter(lambda: going_on.wait(5), True)
    error = refused(lambda: list(host.stub.List(pb.ListRequest(), timeout=20)))
    assert type(error) is BackendTimeout
    going_on.set()
    host.close()


def test_a_wrong_name_is_refused_everywhere(host):
    calls = [
        lambda: host.stub.Exists(pb.ExistsRequest(names=["x"]), timeout=5),
        lambda: host.stub.ExistsPrefix(pb.ExistsPrefixRequest(names=["../x"]), timeout=5),
        lambda: host.stub.Delete(pb.DeleteRequest(names=["x"]), timeout=5),
        lambda: host.stub.Stat(pb.StatRequest(name=""), timeout=5),
        lambda: host.stub.Inspect(pb.InspectRequest(names=["x"]), timeout=5),
        lambda: get(host, "x"),
    ]
    for call in calls:
        assert type(refused(call)) is ConfigError
    assert host.store.calls == []


def test_errors_of_the_store_are_told_apart(host):
    def fail(operation, names):
        raise BackendTimeout("late")

    put(host, {name(1): b"x"})
    host.store.hook = fail
    host.store.put = lambda names, objects, timeout_seconds: [BackendFull("full")] * len(names)
    assert type(refused(lambda: host.stub.Stat(pb.StatRequest(name=name(1)), timeout=5))) is (
        BackendTimeout
    )
    assert type(refused(lambda: list(host.stub.List(pb.ListRequest(), timeout=5)))) is (
        BackendTimeout
    )
    assert [o.status for o in put(host, {name(1): b"x"})] == [pb.STATUS_BACKEND_FULL]
    assert get(host, name(1))[0][0].status == pb.STATUS_BACKEND_ERROR


# Limits


@pytest.mark.parametrize("option", ["max_objects", "max_object_bytes"])
def test_limits_hold_and_can_be_changed_while_it_runs(host, option):
    objects = {name(number): b"x" * 1000 for number in range(20)}
    put(host, objects)
    limit = {"max_objects": 19, "max_object_bytes": 999}[option]
    host.pages.reconfigure(replace(host.options, **{option: limit}))
    assert option in str(refused(lambda: put(host, objects)))
    if option == "max_objects":
        assert option in str(refused(lambda: get(host, *objects)))
        request = pb.ExistsRequest(names=list(objects))
        assert option in str(refused(lambda: host.stub.Exists(request, timeout=5)))
    else:
        assert {o.status for o, _ in get(host, *objects)} == {pb.STATUS_TOO_LONG}
        inspected = host.stub.Inspect(pb.InspectRequest(names=[name(1)]), timeout=5).outcomes
        assert inspected[0].status == pb.STATUS_TOO_LONG
    host.pages.reconfigure(host.options)
    put(host, objects)


def test_what_only_a_restart_changes_is_refused(host):
    with pytest.raises(ConfigError, match="io_threads"):
        host.pages.reconfigure(replace(host.options, io_threads=3, max_objects=5))
    assert host.pages.options.max_objects == host.options.max_objects


@pytest.mark.parametrize(
    "options",
    [
        {"grpc_threads": 1},
        {"io_threads": 0},
        {"max_streams": 128},
        {"max_object_bytes": 1 << 30},
        {"max_call_seconds": 0},
        {"max_sessions": True},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerOptions(**options)


def test_a_call_without_a_deadline_ends_all_the_same():
    host = Host(max_call_seconds=0.5)
    forever = threading.Event()
    host.store.hook = lambda operation, names: forever.wait(30)
    started = time.monotonic()
    answer = host.stub.Exists(pb.ExistsRequest(names=[name(1)]))
    assert list(answer.exists) == [False]
    assert time.monotonic() - started < 10
    forever.set()
    host.close()


def test_a_store_that_hangs_is_not_asked_again_until_it_answers():
    host = Host(breaker_failures=2, breaker_cooldown_seconds=0.1, io_threads=1)
    put(host, {name(1): b"x"})
    going_on = threading.Event()
    host.store.hook = lambda operation, names: going_on.wait(60)
    stat = pb.StatRequest(name=name(1))
    assert type(refused(lambda: host.stub.Stat(stat, timeout=0.4))) is BackendTimeout
    assert host.pages.stats()["reads_refused"] == 1
    started = time.monotonic()
    assert type(refused(lambda: host.stub.Stat(stat, timeout=30))) is BackendError
    assert time.monotonic() - started < 10
    going_on.set()
    deadline = time.monotonic() + 5
    while host.pages.stats()["reads_refused"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert host.stub.Stat(stat, timeout=5).object.stored_bytes == 1
    host.close()


def test_a_client_in_a_hurry_does_not_close_the_store_to_others():
    host = Host(breaker_failures=1)
    put(host, {name(1): b"x"})
    host.store.hook = lambda operation, names: time.sleep(0.05)
    for _ in range(5):
        refused(lambda: host.stub.Stat(pb.StatRequest(name=name(1)), timeout=0.02))
    time.sleep(0.4)
    assert host.pages.stats()["reads_refused"] == 0
    assert host.stub.Stat(pb.StatRequest(name=name(1)), timeout=5).object.stored_bytes == 1
    host.close()


# Who may come, and when


def test_a_call_over_the_unix_socket_needs_a_session(host):
    with grpc.insecure_channel(f"unix:{host.socket}") as channel:
        stub = PageServiceStub(channel)
        for token in ((), (("kvcodec-session", "0" * 32),)):
            with pytest.raises(grpc.RpcError) as raised:
                stub.Stats(pb.StatsRequest(), timeout=5, metadata=token)
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_wrong_token_is_refused_anywhere(host):
    with pytest.raises(grpc.RpcError) as raised:
        host.stub.Stats(pb.StatsRequest(), timeout=5, metadata=(("kvcodec-session", "0" * 32),))
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_ranges_need_a_region(host):
    request = pb.GetRequest(objects=[pb.ObjectRange(name=name(1), offset=0, length=10)])
    assert type(refused(lambda: host.stub.Get(request, timeout=5))) is ConfigError


def test_a_message_of_a_gibibyte_is_refused(host):
    before = resident_bytes()
    send = host.channel.stream_unary("/kvcodec.v1.PageService/PutStream")
    message = bytes(1 << 30)
    with pytest.raises(grpc.RpcError) as raised:
        send(iter([message]), timeout=20)
    # Cancelled if it is still on its way when it has grown too large.
    refusals = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
    assert raised.value.code() in refusals
    assert host.store.objects == {}
    del message
    assert resident_bytes() - before < 1.5 * (1 << 30)  # this process is the client, too
    put(host, {name(1): b"x"})


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_draining_waits_for_calls_and_takes_no_more(host):
    going_on = threading.Event()
    host.store.hook = lambda operation, names: going_on.wait(10) if operation == "exists" else None
    call = host.stub.Exists.future(pb.ExistsRequest(names=[name(1)]), timeout=10)
    while not host.pages.stats()["calls"]:
        time.sleep(0.01)
    assert not host.pages.drain(0.1)
    assert host.pages.stats()["draining"] == 1
    assert type(refused(lambda: host.stub.Stats(pb.StatsRequest(), timeout=5))) is BackendError
    going_on.set()
    assert host.pages.drain(5)
    assert len(call.result().exists) == 1


def test_the_observer_hears_of_every_call_once(host):
    case = CASES[0]
    raw = raw_bytes(case.layout, case.rows())
    put(host, {name(1): b"x" * 1000})
    get(host, name(1), name(2))
    put(host, {case.key: raw}, raw_request(case, spec="kv4"))
    get(host, case.key, raw=raw_request(case))
    refused(lambda: host.stub.Stat(pb.StatRequest(name="x"), timeout=5))
    deadline = time.monotonic() + 5
    while len(host.seen) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [(*what[:2], *what[3:]) for what in host.seen] == [
        ("put_stream", "ok", 0, 1000),
        ("get_stream", "ok", 0, 1000),
        ("put_stream", "ok", len(raw), len(case.page())),
        ("get_stream", "ok", len(raw), 0),
        ("stat", "invalid", 0, 0),
    ]
    assert all(0 <= what[2] < 5 for what in host.seen)
    counters = host.pages.counters()
    assert (counters["put.ok"], counters["get.ok"], counters["get.not_found"]) == (2, 2, 1)
    assert counters["backend.objects"] == 2
    assert host.stub.Stats(pb.StatsRequest(), timeout=5).counters["put.ok"] == 2


def test_a_refusal_names_its_class(host):
    with pytest.raises(grpc.RpcError) as raised:
        host.stub.Stat(pb.StatRequest(name="x"), timeout=5)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(raised.value.trailing_metadata())[STATUS_TRAILER] == str(pb.STATUS_CONFIG_ERROR)


def test_a_real_store_is_as_good_as_a_fake_one():
    store = open_backend("memory://")
    pages = PageServer(store)
    assert pages.stats()["sessions"] == 0
    pages.close()
    pages.close()
    assert store.put([name(1)], [memoryview(b"x")], timeout_seconds=1) == [None]
