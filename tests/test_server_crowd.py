"""Many calls at once: who opens them shuts nobody else out, and nothing grows without bound."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import http2_flood
import pytest
from fake_backend import FakeBackend
from faulty_proxy import FaultyProxy
from sidecar_process import SidecarProcess, health_of
from waiting import wait_until

from kvcodec.backend import open_backend
from kvcodec.errors import BackendTimeout
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1.service_pb2_grpc import PageServiceStub
from kvcodec_server import _receiving, service
from kvcodec_server._places import Crowded, Places
from kvcodec_server.access import Gate
from kvcodec_server.service import PageServer, ServerOptions, new_grpc_server

NAME = f"{'e' * 32}/{'f' * 64}"
STREAMS = 2000


class Host:
    """A server in this process."""

    def __init__(self, interceptors=(), **options: object) -> None:
        server_options = ServerOptions(**options)  # type: ignore[arg-type]
        self.store = FakeBackend()
        self.refused = 0
        self.pages = PageServer(self.store, server_options, crowded=self._crowded)
        self.server = new_grpc_server(server_options, interceptors, self._crowded)
        self.pages.add_to(self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def _crowded(self) -> None:
        self.refused += 1

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.pages.close()
        self.server.stop(0).wait()


@pytest.fixture
def host():
    with Host() as host:
        yield host


def links(port: int, kind: str, calls: int, connections: int = 1):
    """Connections with so many calls each, as they are when nothing more happens to them."""
    opened = [
        http2_flood.Connection("127.0.0.1", port, http2_flood.KINDS[kind])
        for _ in range(connections)
    ]
    settle(opened, 0.1)  # who has not heard of a limit is not held to it
    for link in opened:
        link.begin(calls)
    settle(opened)
    return opened


def settle(opened, seconds: float = 0.5) -> None:
    stop_at = time.monotonic() + seconds
    while time.monotonic() < stop_at:
        for link in opened:
            link.send()
            link.receive()
        time.sleep(0.005)


def exists(port: int, seconds: float = 5.0) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        PageServiceStub(channel).Exists(pb.ExistsRequest(names=[NAME]), timeout=seconds)


# Places


class TestPlaces:
    def test_nobody_leaves_while_there_is_room(self):
        places, left = Places(), []
        held = [places.take(3, "ipv4:1:1", lambda: left.append(1)) for _ in range(3)]
        assert not left
        places.free(held[0])
        places.take(3, "ipv4:1:1", lambda: left.append(1))
        assert not left

    def test_who_has_most_is_refused(self):
        places = Places()
        for _ in range(4):
            places.take(4, "ipv4:1:1", pytest.fail)
        with pytest.raises(Crowded, match="all 4"):
            places.take(4, "ipv4:1:1", pytest.fail)

    def test_oldest_call_of_who_has_most_leaves_for_another_host(self):
        places, left = Places(), []
        for number in range(3):
            places.take(4, "ipv4:1:1", lambda number=number: left.append(number))
        places.take(4, "ipv4:2:7", pytest.fail)
        places.take(4, "ipv4:3:9", pytest.fail)
        assert left == [0]

    def test_equals_do_not_push_each_other(self):
        places = Places()
        for peer in ("ipv4:1:1", "ipv4:1:1", "ipv4:2:1", "ipv4:2:1"):
            places.take(4, peer, pytest.fail)
        for peer in ("ipv4:1:1", "ipv4:2:1"):
            with pytest.raises(Crowded):
                places.take(4, peer, pytest.fail)

    def test_connections_of_one_host_share_as_hosts_do(self):
        places, left = Places(), []
        for number in range(3):
            places.take(4, "ipv4:1:1", lambda number=number: left.append(number))
        places.take(4, "ipv4:1:2", pytest.fail)
        places.take(4, "ipv4:1:3", pytest.fail)
        assert left == [0]
        with pytest.raises(Crowded):
            places.take(4, "ipv4:1:1", pytest.fail)

    def test_connections_of_one_client_share_as_one_does(self):
        places, left = Places(), []
        for number in range(4):
            places.take(
                4, f"ipv4:1:{number}", lambda number=number: left.append(number), client="a"
            )
        places.take(4, "ipv4:1:8", pytest.fail, client="b")
        places.take(4, "ipv4:1:9", pytest.fail)
        assert left == [0, 1]
        with pytest.raises(Crowded):
            places.take(4, "ipv4:1:5", pytest.fail, client="a")

    def test_few_are_told_to_leave_before_they_are_gone(self):
        places, left = Places(), []
        held = [places.take(8, "ipv4:1:1", lambda: left.append(1)) for _ in range(8)]
        for peer in ("ipv4:2:1", "ipv4:3:1"):
            places.take(8, peer, pytest.fail)
        assert len(left) == 2
        with pytest.raises(Crowded):
            places.take(8, "ipv4:4:1", pytest.fail)
        places.free(held[0])
        places.take(8, "ipv4:4:1", pytest.fail)
        assert len(left) == 3

    def test_nothing_is_remembered_of_who_is_gone(self):
        places = Places()
        for number in range(100):
            held = [places.take(4, f"ipv4:{number}:1", lambda: None) for _ in range(4)]
            other = places.take(4, "ipv4:x:1", lambda: None)
            for place in [*held, other]:
                places.free(place)
        assert not any(vars(places)[name] for name in ("_held", "_hosts", "_leaving"))


# Calls that hold their places


@pytest.mark.parametrize("kind", ["silent_call", "silent_put", "silent_get", "unread_get"])
def test_calls_that_never_go_on_hold_nobody_up(kind):
    """As many as there are places, on several connections; gRPC alone would wait for them all."""
    with Host(grpc_threads=16, max_streams=6) as host:
        host.store.objects[NAME] = os.urandom(1 << 20)
        floods = links(host.port, kind, 4, connections=12)
        started = time.monotonic()
        with grpc.insecure_channel(f"127.0.0.1:{host.port}") as channel:
            stub = PageServiceStub(channel)
            for _ in range(20):
                stub.Exists(pb.ExistsRequest(names=[NAME]), timeout=20)
                rooms = [pb.ObjectRoom(name=NAME, capacity=1 << 20)]
                parts = stub.GetStream(pb.GetStreamRequest(objects=rooms), timeout=20)
                assert sum(len(part.chunk) for part in parts) == 1 << 20
        assert time.monotonic() - started < 8
        settle(floods, 0.1)
        seen = sum((link.seen for link in floods), http2_flood.Counter())
        held = sum(len(link.open) for link in floods)
        assert held <= (14 if kind == "silent_call" else 6)
        assert held + sum(seen.values()) == 48
        assert set(seen) <= {"RESOURCE_EXHAUSTED", "CANCELLED", "CANCEL", "REFUSED_STREAM"}
        assert seen["RESOURCE_EXHAUSTED"]
        for link in floods:
            link.socket.close()
        wait_until(lambda: not host.pages.stats()["calls"])


def test_one_connection_may_have_an_eighth_of_the_threads():
    with Host(grpc_threads=16, max_streams=6) as host:
        (link,) = links(host.port, "silent_call", 12)
        assert len(link.open) == 2
        assert link.seen == {"REFUSED_STREAM": 10}
        assert host.refused == 0


def test_refused_calls_are_told_of():
    with Host(grpc_threads=8, max_streams=2) as host:
        floods = links(host.port, "silent_call", 1, connections=12)
        seen = sum((link.seen for link in floods), http2_flood.Counter())
        assert sum(seen.values()) == 5
        assert host.refused == seen["RESOURCE_EXHAUSTED"] > 0


@pytest.mark.parametrize("kind", ["silent_get", "silent_put"])
def test_a_stream_is_refused_before_it_has_said_what_it_wants(kind):
    """Who refuses it later has read and understood a request first: thousands of times a second."""
    with Host(max_streams=2) as host:
        (link,) = links(host.port, kind, 5)
        assert len(link.open) == 2
        assert link.seen == {"RESOURCE_EXHAUSTED": 3}
        assert host.refused == 3
        assert host.pages.stats()["staging_bytes"] == 0
        link.socket.close()


def test_streams_have_no_threads_of_their_own_to_end_them():
    with Host(max_streams=8) as host:
        host.store.objects[NAME] = os.urandom(1 << 20)
        before = {thread.name for thread in threading.enumerate()}
        (link,) = links(host.port, "unread_get", 8)
        assert len(link.open) == 8
        names = {thread.name for thread in threading.enumerate()} - before
        assert not [name for name in names if not name.startswith(("kvcodec-grpc", "kvcodec-io"))]
        link.socket.close()


def test_a_call_without_a_token_is_not_waited_for():
    gate = Gate(lambda reason: None)
    gate.reload((b"t" * 32,), ())
    with Host([gate], grpc_threads=8, max_streams=2) as host:
        (link,) = links(host.port, "silent_call", 1)
        assert link.seen == {"status 16": 1}  # unauthenticated


def test_a_call_without_its_request_is_told_so(host):
    with grpc.insecure_channel(f"127.0.0.1:{host.port}") as channel:
        call = channel.stream_unary("/kvcodec.v1.PageService/Exists")
        with pytest.raises(grpc.RpcError) as raised:
            call(iter([]), timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def flooded(target: str, kind: str, streams: int) -> dict[str, int]:
    """What became of streams that another process has opened."""
    arguments = [target, kind, str(streams), "8", "3000", "2"]
    run = subprocess.run(
        [sys.executable, http2_flood.__file__, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(run.stdout))


def held_by(pid: int) -> tuple[int, int]:
    """MiB of memory and threads of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmRSS"].split()[0]) >> 10, int(status["Threads"])


def test_thousands_of_streams_are_refused_and_others_are_served(tmp_path):
    data = os.urandom(1 << 16)
    answers: list[object] = []
    ending = threading.Event()

    def read(url: str) -> None:
        backend, buffer = open_backend(url), memoryview(bytearray(len(data)))
        while not ending.is_set():
            answers.extend(backend.get_into([NAME], [buffer], timeout_seconds=3))
            assert buffer == data
            time.sleep(0.01)
        backend.close()

    with SidecarProcess(tmp_path) as sidecar:
        urls = [f"sidecar+unix://{sidecar.socket}", f"sidecar://{sidecar.target}"]
        writer = open_backend(urls[0])
        assert writer.put([NAME], [memoryview(data)], timeout_seconds=5) == [None]
        memory, _ = held_by(sidecar.pid)
        readers = [threading.Thread(target=read, args=(url,), daemon=True) for url in urls]
        for reader in readers:
            reader.start()
        for kind in ("silent_put", "silent_call", "silent_health", "unread_get"):
            seen = flooded(sidecar.target, kind, STREAMS)
            assert seen["streams"] == STREAMS
            assert seen.get("connection closed", 0) == 0
            assert seen["open_at_end"] <= 112
            refused = seen.get("RESOURCE_EXHAUSTED", 0) + seen.get("REFUSED_STREAM", 0)
            assert refused + seen.get("CANCELLED", 0) + seen["open_at_end"] == STREAMS
            assert refused > STREAMS // 2
            with grpc.insecure_channel(sidecar.target) as channel:
                assert health_of(channel) == "SERVING"
        ending.set()
        for reader in readers:
            reader.join()
        most_memory, threads = held_by(sidecar.pid)
        assert most_memory < memory + 200
        assert threads < 230
        assert sidecar.metric('kvcodec_refused_calls_total{reason="crowd"}') > 0
        writer.close()
    assert len(answers) > 50
    assert not [answer for answer in answers if isinstance(answer, BackendTimeout)]
    assert answers.count(len(data)) > 0.95 * len(answers)


# Messages that are too long


SENDS_THREE = """
import grpc, sys
message = bytes(400 << 20)
with grpc.insecure_channel(sys.argv[1], [("grpc.max_send_message_length", -1)]) as channel:
    put = channel.stream_unary("/kvcodec.v1.PageService/PutStream")
    exists = channel.unary_unary("/kvcodec.v1.PageService/Exists")
    calls = [put.future(iter([message]), timeout=40) for _ in range(2)]
    calls.append(exists.future(message, timeout=40))
    print(*(call.code().name for call in calls if call.exception()))
"""


def test_long_messages_are_not_waited_for(tmp_path):
    """gRPC refuses a message that is too long when it has it, all of it."""
    with SidecarProcess(tmp_path) as sidecar:
        before, most = held_by(sidecar.pid)[0], 0
        with subprocess.Popen(
            [sys.executable, "-c", SENDS_THREE, sidecar.target], stdout=subprocess.PIPE, text=True
        ) as client:
            while client.poll() is None:
                most = max(most, held_by(sidecar.pid)[0])
                time.sleep(0.02)
            assert client.stdout is not None
            ended = client.stdout.read().split()
        assert len(ended) == 3
        assert set(ended) <= {"CANCELLED", "RESOURCE_EXHAUSTED"}
        assert most < before + 800
        exists(sidecar.port)


@pytest.mark.parametrize(("waited", "grown", "ended"), [(9, 1, True), (9, 0, False), (0, 1, False)])
def test_only_who_waits_while_the_process_grows_is_ended(monkeypatch, waited, grown, ended):
    receiving, left = _receiving.Receiving(), threading.Event()
    going_on = threading.Event()

    def requests():
        yield "first"
        going_on.wait(10)
        yield "second"

    messages = receiving.each(requests(), left.set)
    assert next(messages) == "first"
    assert not receiving.waiting
    reader = threading.Thread(target=lambda: list(messages))
    reader.start()
    wait_until(lambda: receiving.waiting)
    monkeypatch.setattr(_receiving, "_PATIENCE_SECONDS", -1.0 if waited else 9.0)
    own_bytes = _receiving._watcher.own_bytes
    receiving.end_those_that_swell(own_bytes + grown * (1 << 30))
    assert left.is_set() == ended
    going_on.set()
    reader.join()
    assert not receiving.waiting


def test_a_call_is_ended_when_its_deadline_has_passed_and_not_before():
    deadlines, left = _receiving.Deadlines(), threading.Event()
    with deadlines.until(time.monotonic() + 60, left.set):
        deadlines.end_those_that_are_late()
        assert not left.is_set()
    with deadlines.until(time.monotonic() - 1, left.set):
        assert left.wait(10)  # the thread that looks at them all has come by
    left.clear()
    deadlines.end_those_that_are_late()
    assert not left.is_set()


# Connections that say nothing


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(service, "_PING_SECONDS", 0.4)
    monkeypatch.setattr(service, "_ANSWER_SECONDS", 0.4)
    monkeypatch.setattr(service, "_HANDSHAKE_SECONDS", 0.5)


@pytest.mark.parametrize("kind", ["silent_put", "silent_call", "unread_get"])
def test_a_client_that_vanished_leaves_nothing_behind(impatient, kind):
    """Half-open: its host is gone, or a firewall has forgotten it, and nobody sends an end."""
    with Host() as host, FaultyProxy("127.0.0.1", host.port) as proxy:
        host.store.objects[NAME] = os.urandom(1 << 20)
        held = links(proxy.port, kind, 4)
        pool = host.server._state.rpc_states  # type: ignore[attr-defined]
        wait_until(lambda: len(pool) == 4)
        assert not held[0].seen
        proxy.rate = 0
        wait_until(lambda: not pool)
        wait_until(lambda: not host.pages.stats()["calls"])
        buffers = host.pages._servicer.calls.pipeline.buffers
        wait_until(lambda: buffers.allocated_bytes == sum(map(len, buffers._free)))


def test_who_does_not_speak_http2_is_left(impatient):
    with Host() as host, socket.create_connection(("127.0.0.1", host.port)) as stranger:
        stranger.settimeout(3)
        try:
            while stranger.recv(1000):
                pass
        except ConnectionResetError:
            pass


def test_a_listener_takes_so_many_connections(monkeypatch):
    monkeypatch.setattr(service, "_MAX_CONNECTIONS", 3)
    with Host() as host:
        held = links(host.port, "silent_call", 1, connections=3)
        with pytest.raises(grpc.RpcError) as raised:
            exists(host.port, 1.0)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        held[0].socket.close()
        wait_until(lambda: not time.sleep(0.05) and len(host.server._state.rpc_states) == 2)
        exists(host.port)


def test_descriptors_are_left_to_the_store(monkeypatch):
    monkeypatch.setattr(service.resource, "getrlimit", lambda _: (400, 400))
    assert service._max_connections() == 100


@pytest.mark.parametrize(("allowed_seconds", "cut_off"), [(0.05, False), (30.0, True)])
def test_clients_may_ask_now_and_then_whether_the_sidecar_is_there(
    monkeypatch, allowed_seconds, cut_off
):
    monkeypatch.setattr(service, "_LEAST_PING_SECONDS", allowed_seconds)
    with Host() as host:
        (link,) = links(host.port, "silent_call", 1)
        for _ in range(5):
            link.out += http2_flood.frame(6, 0, 0, b"12345678")
            settle([link], 0.15)
        assert (link.seen["goaway"] > 0) == cut_off
        link.socket.close()
