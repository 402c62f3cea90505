"""The client of a sidecar: its URLs, its memory, its connections, and who shares what."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest
from pages import Case, raw_bytes
from server_redis import certificates
from server_sidecar import Sidecar

from kvcodec.backend import Deadline, open_backend
from kvcodec.errors import BackendError, ConfigError
from kvcodec.layout import DType, PageLayout
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1.service_pb2_grpc import PageServiceStub
from kvcodec_server import metadata
from kvcodec_server._client_local import LocalDoor
from kvcodec_server.client import DEFAULT_REGION_BYTES, SidecarBackend
from kvcodec_server.options import ServerOptions
from kvcodec_server.service import PageServer, new_grpc_server

NAMESPACE = "9" * 32
LAYOUT = PageLayout.mha(dtype=DType.BF16, token_count=16, layer_count=3, head_count=2, head_size=64)


def name() -> str:
    return f"{NAMESPACE}/{os.urandom(32).hex()}"


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    with Sidecar(tmp_path_factory.mktemp("sidecar"), "memory://") as server:
        yield server


def opened(url: str) -> SidecarBackend:
    backend = open_backend(url)
    assert isinstance(backend, SidecarBackend)
    return backend


@pytest.fixture
def backend(sidecar):
    backend = opened(sidecar.unix_url + "?region_bytes=4MiB")
    yield backend
    backend.close()


def region_of(backend: SidecarBackend):
    door = backend._opened()
    assert isinstance(door, LocalDoor)
    return door.region


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "sidecar+unix://host/run/k.sock",
        "sidecar+unix://",
        "sidecar+unix:///run/k.sock?region_bytes=much",
        "sidecar+unix:///run/k.sock?region_bytes=4095",
        "sidecar+unix:///run/k.sock?region_bytes=1MB",
        "sidecar+unix:///run/k.sock?region_bytes=2TiB",
        "sidecar+unix:///run/k.sock?tls=1",
        "sidecar+unix:///" + "x" * 101,
        "sidecar+unix:///run/k%00.sock",
        "sidecar+tcp://127.0.0.1:1",
        "sidecar://",
        "sidecar://host",
        "sidecar://host:1/path",
        "sidecar://me@host:1",
        "sidecar://host:0",
        "sidecar://host:65536",
        "sidecar://host:1?tls=2",
        "sidecar://host:1?ca_file=/nowhere",
        "sidecar://host:1?server_name=x",
        "sidecar://host:1?tls=1&ca_file=/nowhere",
        "sidecar://host:1?tls=1&key_file=/dev/null",
        "sidecar://host:1?tls=1&certificate_file=/dev/null",
        "sidecar://host:1?region_bytes=1MiB",
        "sidecar://host:1?token_file=/nowhere",
    ],
)
def test_a_url_that_cannot_be_is_a_config_error(url):
    with pytest.raises(ConfigError):
        open_backend(url)


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", "Schl\u00fcssel".encode(), b"a\0b", b"two words"]
)
def test_a_token_that_cannot_be_sent_is_a_config_error(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError, match="first line") as raised:
        open_backend(f"sidecar://host:1?token_file={tmp_path}/token")
    assert "words" not in str(raised.value)


@pytest.mark.parametrize("ca", [b"", b"-----BEGIN CERTIFICATE-----\nnone\n"])
def test_authorities_that_are_none_are_a_config_error(tmp_path, ca):
    """And not everybody whom this machine trusts."""
    (tmp_path / "ca.pem").write_bytes(ca)
    with pytest.raises(ConfigError, match="certificates"):
        open_backend(f"sidecar://host:1?tls=1&ca_file={tmp_path}/ca.pem")


def test_a_region_has_the_size_it_was_asked_for(sidecar, backend):
    assert region_of(backend).size == 4 << 20
    assert backend.staging_memory((3 << 20) + 1) is None
    assert len(backend.staging_memory(3 << 20)) == 3 << 20
    usual = opened(sidecar.unix_url)
    assert region_of(usual).size == DEFAULT_REGION_BYTES
    usual.close()


def test_a_region_beyond_the_servers_limit_says_so(tmp_path):
    with Sidecar(tmp_path, "memory://", max_region_bytes=1 << 20) as small:
        backend = opened(small.unix_url)
        (answer,) = backend.put([name()], [memoryview(b"x")], timeout_seconds=5)
        assert "max_region_bytes" in str(answer)
        backend.close()
        backend = opened(small.unix_url + "?region_bytes=1MiB")
        assert backend.put([name()], [memoryview(b"x")], timeout_seconds=5) == [None]
        backend.close()


class Guarded:
    """A sidecar on TCP with TLS, which looks at what calls bring."""

    def __init__(self, directory, *, client_certificates: bool) -> None:
        certificates(directory)

        def read(file: str) -> bytes:
            return (directory / file).read_bytes()

        guarded = self

        class Look(grpc.ServerInterceptor):
            def intercept_service(self, continuation, details):
                guarded.seen = dict(details.invocation_metadata)
                return continuation(details)

        options = ServerOptions()
        self.seen: dict[str, str] = {}
        self.pages = PageServer(open_backend("memory://"), options)
        self.server = new_grpc_server(options, [Look()])
        self.pages.add_to(self.server)
        credentials = grpc.ssl_server_credentials(
            [(read("server.key"), read("server.pem"))], read("ca.pem"), client_certificates
        )
        self.port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.server.start()

    def put(self, query: str, host: str = "127.0.0.1"):
        backend = opened(f"sidecar://{host}:{self.port}?{query}")
        (answer,) = backend.put([name()], [memoryview(b"x")], timeout_seconds=3)
        backend.close()
        return answer

    def close(self) -> None:
        self.server.stop(0).wait()
        self.pages.close()


def test_tls_proves_who_the_server_is(tmp_path):
    server = Guarded(tmp_path, client_certificates=False)
    (tmp_path / "token").write_text("a-word\nthe next one\n")
    authority = (tmp_path / "ca.pem").read_text()
    (tmp_path / "ca.pem").write_text(f"# Prüfstelle\n{authority}", encoding="utf-8")
    ca = f"tls=1&ca_file={tmp_path}/ca.pem"
    assert server.put(ca) is None
    assert "authorization" not in server.seen
    assert server.put(f"{ca}&token_file={tmp_path}/token") is None
    assert server.seen["authorization"] == "Bearer a-word"
    for query in ("tls=0", "tls=1", f"tls=1&ca_file={tmp_path}/other-ca.pem"):
        assert isinstance(server.put(query), BackendError), query
    assert isinstance(server.put(ca, "localhost"), BackendError)
    assert server.put(f"{ca}&server_name=127.0.0.1", "localhost") is None
    server.close()


def test_tls_proves_who_the_client_is(tmp_path):
    server = Guarded(tmp_path, client_certificates=True)
    ca = f"tls=1&ca_file={tmp_path}/ca.pem"
    own = f"certificate_file={tmp_path}/client.pem&key_file={tmp_path}/client.key"
    assert isinstance(server.put(ca), BackendError)
    assert server.put(f"{ca}&{own}") is None
    server.close()


# Memory


def test_lent_memory_is_read_and_written_in_place(backend, monkeypatch):
    memory = backend.staging_memory(100_000)
    memory[:50_000] = b"a" * 50_000
    region = region_of(backend)
    monkeypatch.setattr(region, "slot", None)  # nothing of this needs a slot
    names = [name(), name()]
    parts = [memory[:20_000], memory[20_000:50_000]]
    assert backend.put(names, parts, timeout_seconds=5) == [None, None]
    memory[:] = bytes(100_000)
    rooms = [memory[1:30_001], memory[50_000:100_000]]
    assert backend.get_into(names, rooms, timeout_seconds=5) == [20_000, 30_000]
    assert bytes(memory[:20_002]) == b"\0" + b"a" * 20_000 + b"\0"
    assert bytes(memory[50_000:80_001]) == b"a" * 30_000 + b"\0"


def test_memory_comes_back_when_nobody_uses_it(backend):
    region = region_of(backend)
    for _ in range(50):
        memory = backend.staging_memory(3 << 20)
        assert memory is not None
        part = memory[5:10].cast("B")
        del memory
        assert backend.staging_memory(3 << 20) is None, "a part of it is in use"
        del part
    data, buffer = memoryview(bytes(1 << 20)), memoryview(bytearray(1 << 20))
    there = name()
    for _ in range(20):
        assert backend.put([there] * 7, [data] * 7, timeout_seconds=5) == [None] * 7
        assert backend.get_into([there] * 7, [buffer] * 7, timeout_seconds=5) == [1 << 20] * 7
    gc.collect()
    assert region.ranges.free_bytes() == region.size


def test_an_object_that_no_region_holds_moves_no_other_result(backend):
    data = [memoryview(b"x"), memoryview(bytes(5 << 20)), memoryview(b"y")]
    started = time.monotonic()
    first, large, last = backend.put([name() for _ in data], data, timeout_seconds=30)
    assert (first, last) == (None, None)
    assert type(large) is BackendError
    assert time.monotonic() - started < 10
    assert "region_bytes" in str(large)


def test_lending_leaves_room_for_objects_elsewhere(backend):
    """A pipeline may have more staging memory than the region has room for."""
    lent = []
    while (memory := backend.staging_memory(100_000)) is not None:
        lent.append(memory)
    data, buffer = memoryview(bytes(900_000)), memoryview(bytearray(900_000))
    there = name()
    assert backend.put([there] * 3, [data] * 3, timeout_seconds=5) == [None] * 3
    assert backend.get_into([there] * 3, [buffer] * 3, timeout_seconds=5) == [900_000] * 3


def test_threads_share_a_small_region(backend):
    failures: list[object] = []

    def work(seed: int) -> None:
        data = bytes([seed]) * 1_500_000
        buffer = memoryview(bytearray(len(data)))
        for _ in range(10):
            there = name()
            put = backend.put([there], [memoryview(data)], timeout_seconds=30)
            got = backend.get_into([there], [buffer], timeout_seconds=30)
            if put != [None] or got != [len(data)] or buffer != data:
                failures.append((put, got))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_raw_pages_pass_through_the_region(backend):
    case = Case(name="client", layout=LAYOUT, spec="kv4")
    raw = raw_bytes(LAYOUT, case.rows())
    pages = pb.RawPages(
        identity=metadata.identity_message(case.identity),
        layout=metadata.layout_message(LAYOUT),
        spec="kv4",
    )
    session = backend._opened()._link.session(Deadline(5))
    memory = backend.staging_memory(len(raw))
    offset = region_of(backend).offset_of(memory)
    memory[:] = raw
    place = [pb.ObjectRange(name=case.key, offset=offset, length=len(raw))]
    request = pb.PutRequest(call_id=1 << 40, objects=place, raw=pages)
    put = session.stub.Put(request, timeout=5, metadata=session.metadata)
    page = case.page()
    assert [(o.status, o.length) for o in put.outcomes] == [(pb.STATUS_OK, len(page))]
    stored = memoryview(bytearray(len(page)))
    names = [case.namespace.object_name(case.key)]
    assert backend.get_into(names, [stored], timeout_seconds=5) == [len(page)]
    assert bytes(stored) == page
    memory[:] = bytes(len(raw))
    request = pb.GetRequest(call_id=1 << 41, objects=place, raw=pages)
    got = session.stub.Get(request, timeout=5, metadata=session.metadata)
    assert [o.status for o in got.outcomes] == [pb.STATUS_OK]
    assert not got.unfinished
    assert bytes(memory) != bytes(len(raw))
    place[0].name = names[0]
    request = pb.GetRequest(call_id=1 << 42, objects=place, with_metadata=True)
    got = session.stub.Get(request, timeout=5, metadata=session.metadata)
    assert got.outcomes[0].metadata.key == case.key


def test_a_range_that_is_not_the_clients_is_refused(backend):
    session = backend._opened()._link.session(Deadline(5))
    for offset, length in ((4 << 20, 1), (0, (4 << 20) + 1), (2**64 - 1, 2), (0, 0)):
        place = [pb.ObjectRange(name=name(), offset=offset, length=length)]
        for call, kind in ((session.stub.Get, pb.GetRequest), (session.stub.Put, pb.PutRequest)):
            with pytest.raises(grpc.RpcError) as raised:
                call(kind(call_id=77, objects=place), timeout=5, metadata=session.metadata)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# Processes


WORKER_OBJECTS = 300


def share(url: str, seed: int, results) -> None:
    """One client process: store, read back, and read what the other one stores."""
    backend = opened(url + "?region_bytes=8MiB")
    lost = wrong = 0
    for number in range(WORKER_OBJECTS):
        own = f"{seed:032x}/{number:064x}"
        data = bytes([seed, number % 256]) * (1000 + 97 * number)
        memory = backend.staging_memory(len(data))
        memory[:] = data
        if backend.put([own], [memory], timeout_seconds=10) != [None]:
            lost += 1
        buffer = memoryview(bytearray(len(data)))
        for whose in (1, 2):
            other = f"{whose:032x}/{number:064x}"
            (size,) = backend.get_into([other], [buffer], timeout_seconds=10)
            if size is not None and bytes(buffer) != bytes([whose, number % 256]) * (
                len(data) // 2
            ):
                wrong += 1
            if size is None and whose == seed:
                lost += 1
    backend.close()
    results.put((lost, wrong))


def test_two_processes_share_a_sidecar_without_loss(sidecar, backend):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=share, args=(sidecar.unix_url, seed, results)) for seed in (1, 2)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [(0, 0), (0, 0)]
    for worker in workers:
        worker.join()
    names = [f"{seed:032x}/{number:064x}" for seed in (1, 2) for number in range(WORKER_OBJECTS)]
    assert backend.exists(names, timeout_seconds=10) == [True] * len(names)
    assert backend.exists_prefix([*names, name()], timeout_seconds=10) == len(names)


FORKED = """
import os, sys
from kvcodec_server.client import SidecarBackend
backend = SidecarBackend.from_url(sys.argv[1])
name = "4" * 32 + "/" + "5" * 64
data, buffer = memoryview(b"parent"), memoryview(bytearray(9))
if sys.argv[2] == "used":
    assert backend.put([name], [data], timeout_seconds=5) == [None]
child = os.fork()
if not child:
    answers = backend.put([name], [memoryview(b"child")], timeout_seconds=3)
    print(answers, backend.get_into([name], [buffer], timeout_seconds=3), flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
print(backend.put([name], [data], timeout_seconds=5),
      backend.get_into([name], [buffer], timeout_seconds=5), flush=True)
backend.close()
"""


@pytest.mark.parametrize("door", ["unix_url", "url"])
@pytest.mark.parametrize("when", ["unused", "used"])
def test_a_fork_has_its_own_connection(sidecar, door, when):
    run = subprocess.run(
        [sys.executable, "-c", FORKED, getattr(sidecar, door), when],
        env={key: value for key, value in os.environ.items() if not key.startswith("GRPC_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.splitlines() == ["[None] [5]", "[None] [6]"], run.stderr


def test_a_closed_backend_leaves_nothing_behind(sidecar):
    def one(url: str) -> None:
        backend = opened(url)
        assert backend.put([name()], [memoryview(b"x")], timeout_seconds=5) == [None]
        backend.close()

    one(sidecar.unix_url)
    one(sidecar.url)
    gc.collect()
    time.sleep(0.2)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(10):
        one(sidecar.unix_url)
        one(sidecar.url)
    gc.collect()
    deadline = time.monotonic() + 20
    while True:
        now = len(os.listdir("/proc/self/fd")), threading.active_count()
        if now[0] <= before[0] + 1 and now[1] <= before[1] + 1:
            break
        assert time.monotonic() < deadline, (before, now)
        time.sleep(0.05)


# Garbage


def test_garbage_on_every_socket_disturbs_nobody(sidecar, backend):
    there, data = name(), memoryview(b"data")
    assert backend.put([there], [data], timeout_seconds=5) == [None]
    rubbish = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(2000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\xff" * 5000,
        os.urandom(100_000),
        b"",
    ]
    for target in (("127.0.0.1", sidecar.port), str(sidecar.socket)):
        for data_ in rubbish:
            family = socket.AF_UNIX if isinstance(target, str) else socket.AF_INET
            with socket.socket(family) as stranger:
                stranger.settimeout(2)
                stranger.connect(target)
                try:
                    stranger.sendall(data_)
                    stranger.recv(1000)
                except OSError:
                    pass
            buffer = memoryview(bytearray(4))
            assert backend.get_into([there], [buffer], timeout_seconds=2) == [4]
    for data_ in rubbish[:-1]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(2)
            stranger.connect(str(sidecar.socket) + ".region")
            stranger.send(data_[:60_000])
            assert stranger.recv(1000)
    assert backend.exists([there], timeout_seconds=2) == [True]
    with grpc.insecure_channel(f"127.0.0.1:{sidecar.port}") as channel:
        unknown = channel.unary_unary("/kvcodec.v1.PageService/Nothing")
        with pytest.raises(grpc.RpcError) as raised:
            unknown(b"x", timeout=5)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert PageServiceStub(channel).Stats(pb.StatsRequest(), timeout=5).calls == 1
