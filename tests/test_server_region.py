"""The socket for regions: who may come in, and with what memory."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import wait_until

from kvcodec.errors import ConfigError
from kvcodec_server import _region_wire as wire
from kvcodec_server import region as region_module
from kvcodec_server.options import ServerOptions
from kvcodec_server.region import RegionServer
from kvcodec_server.session import Sessions

SIZE = 1 << 20


class Host:
    """A region server whose limits a test may change."""

    def __init__(self, path: Path) -> None:
        self.sessions = Sessions()
        self.options = ServerOptions()
        self.server = RegionServer(path, self.sessions, lambda: self.options, mode=0o666)


@pytest.fixture
def host():
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        host = Host(Path(directory) / "s.region")
        yield host
        host.server.close()


def connect(host) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.settimeout(5)
    client.connect(str(host.server.path))
    return client


def greet(host, packet: bytes | None = None, descriptors: list[int] | None = None):
    """The answer to a greeting, and the socket."""
    region = None
    if descriptors is None:
        region = wire.new_region(SIZE)
    client = connect(host)
    socket.send_fds(
        client,
        [wire.pack_hello(SIZE) if packet is None else packet],
        [region] if descriptors is None else descriptors,
    )
    if region is not None:
        os.close(region)
    return client.recv(1000), client


def refusal(host, packet: bytes | None = None, descriptors: list[int] | None = None) -> str:
    answer, client = greet(host, packet, descriptors)
    assert answer[:1] == bytes([wire.REFUSED]), answer
    assert client.recv(100) == b""
    client.close()
    assert host.sessions.count == 0
    assert host.sessions.mapped_bytes == 0
    return answer[1:].decode()


def memory(size: int, seals: int, flags: int = os.MFD_ALLOW_SEALING) -> int:
    descriptor = os.memfd_create("test", flags)
    os.ftruncate(descriptor, size)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def test_a_region_becomes_a_session_and_ends_with_its_client(host):
    answer, client = greet(host)
    assert answer[:1] == bytes([wire.WELCOME])
    session = host.sessions.find(answer[1:].decode())
    assert session.region_bytes == SIZE
    assert session.uid == os.getuid()
    client.close()
    wait_until(lambda: host.sessions.count == 0)


def test_the_region_is_shared(host):
    region = wire.new_region(SIZE)
    answer, client = greet(host, None, [region])
    ours = mmap.mmap(region, SIZE)
    os.close(region)
    view = host.sessions.find(answer[1:].decode()).view(5, 3)
    view[:] = b"abc"
    assert ours[4:9] == b"\0abc\0"
    client.close()


def test_a_client_may_ask_when_a_call_is_over(host):
    answer, client = greet(host)
    lease = host.sessions.find(answer[1:].decode()).begin(5)
    client.send(wire.pack_call(wire.FENCE, 5))
    client.send(wire.pack_call(wire.FENCE, 6))
    assert wire.unpack_call(client.recv(100), wire.RELEASED) == 6
    lease.release()
    assert wire.unpack_call(client.recv(100), wire.RELEASED) == 5
    client.close()


@pytest.mark.parametrize(
    "seals",
    [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, wire.SEALS & ~1],
)
def test_memory_that_could_change_its_size_is_refused(host, seals):
    descriptor = memory(SIZE, seals)
    assert "seal" in refusal(host, None, [descriptor])
    os.close(descriptor)


def test_memory_that_cannot_be_written_is_refused(host):
    descriptor = memory(SIZE, wire.SEALS | fcntl.F_SEAL_WRITE)
    refusal(host, None, [descriptor])
    os.close(descriptor)


def test_a_file_is_no_region(host, tmp_path):
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(SIZE)
        assert "memfd" in refusal(host, None, [file.fileno()])


def test_a_size_that_is_not_the_regions_is_refused(host):
    small = wire.new_region(SIZE // 2)
    assert str(SIZE // 2) in refusal(host, None, [small])
    os.close(small)


def test_a_region_too_large_or_too_small_is_refused(host):
    host.options = replace(host.options, max_region_bytes=1 << 20)
    large = wire.new_region(2 << 20)
    assert "max_region_bytes" in refusal(host, wire.pack_hello(2 << 20), [large])
    assert "bytes" in refusal(host, wire.pack_hello(0), [large])
    os.close(large)
    assert greet(host)[0][:1] == bytes([wire.WELCOME])


def test_too_many_sessions_are_refused(host):
    host.options = replace(host.options, max_sessions=2)
    clients = [greet(host)[1] for _ in range(2)]
    answer, _ = greet(host)
    assert b"max_sessions" in answer
    clients.pop().close()
    wait_until(lambda: host.sessions.mapped_regions == 1)
    assert greet(host)[0][:1] == bytes([wire.WELCOME])


@pytest.mark.parametrize("count", [0, 2, 4, 9])
def test_a_greeting_has_one_descriptor(host, count):
    regions = [wire.new_region(SIZE) for _ in range(count)]
    before = len(os.listdir("/proc/self/fd"))
    refusal(host, None, regions)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    for region in regions:
        os.close(region)


@pytest.mark.parametrize(
    "packet",
    [
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n",
        # Named, for tests in parallel have to agree on names.
        pytest.param(os.urandom(16), id="noise of the right length"),
        pytest.param(os.urandom(500), id="noise"),
        b"x" * 5000,
        wire.pack_hello(SIZE)[:-1],
        wire.pack_hello(SIZE) + b"\0",
        wire.pack_call(wire.FENCE, SIZE),
    ],
)
def test_garbage_is_refused(host, packet):
    refusal(host, packet)
    assert greet(host)[0][:1] == bytes([wire.WELCOME])


def test_another_version_is_refused_by_name(host):
    packet = bytearray(wire.pack_hello(SIZE))
    packet[5] = 9
    assert "9" in refusal(host, bytes(packet))


def test_garbage_after_the_greeting_ends_the_session(host):
    _, client = greet(host)
    client.send(os.urandom(100))
    assert client.recv(100) == b""
    wait_until(lambda: host.sessions.count == 0)


def test_a_refused_client_learns_why_whatever_it_has_said(host):
    host.options = replace(host.options, max_sessions=1)
    _, first = greet(host)
    for _ in range(50):
        client = connect(host)
        region = wire.new_region(SIZE)
        for _ in range(3):
            try:
                socket.send_fds(client, [wire.pack_hello(SIZE)], [region])
            except BrokenPipeError:
                pass
        os.close(region)
        assert b"max_sessions" in client.recv(1000)
        client.close()
    first.close()


def test_a_stranger_is_told_why_every_time(host, monkeypatch):
    """Whether the refusal overtakes what the client sends, comes between, or after it."""
    monkeypatch.setattr(region_module, "_uid_of", lambda connection: 4242)
    answers: list[bytes] = []

    def come_in(patience: float) -> None:
        for number in range(100):
            client, memory = connect(host), wire.new_region(SIZE)
            time.sleep(patience * (number % 10))
            with suppress(BrokenPipeError):
                for _ in range(1 + number % 3):
                    socket.send_fds(client, [wire.pack_hello(SIZE)], [memory])
            answers.append(client.recv(1000))
            client.close()
            os.close(memory)

    threads = [threading.Thread(target=come_in, args=(patience,)) for patience in (0, 1e-5, 1e-4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [bytes([wire.REFUSED]) + b"uid 4242 may not use this sidecar"] * 300


def test_who_says_nothing_is_sent_away(host, monkeypatch):
    monkeypatch.setattr(region_module, "_GREETING_SECONDS", 0.1)
    client = connect(host)
    assert client.recv(1000)[:1] == bytes([wire.REFUSED])
    assert client.recv(1000) == b""


def test_many_silent_strangers_keep_nobody_out(host, monkeypatch):
    monkeypatch.setattr(region_module, "_GREETING_SECONDS", 0.5)
    strangers = [connect(host) for _ in range(60)]
    assert greet(host)[0][:1] == bytes([wire.WELCOME])
    for stranger in strangers:
        stranger.close()


ANSWER_TO_UID = """
import os, socket, sys
from kvcodec_server import _region_wire as wire
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect(sys.argv[1])
try:
    socket.send_fds(client, [wire.pack_hello(1 << 20)], [wire.new_region(1 << 20)])
except BrokenPipeError:
    pass
answer = client.recv(1000)
print(answer[0], answer[1:].decode())
"""


CLIENT_OF_UID = """
import os, sys
from kvcodec_server.client import SidecarBackend
os.setgid(65534); os.setuid(65534)
backend = SidecarBackend.from_url("sidecar+unix://" + sys.argv[1].removesuffix(".region"))
print(backend.put(["0" * 32 + "/" + "0" * 64], [memoryview(b"x")], timeout_seconds=5)[0])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_client_of_another_uid_is_told_why_its_calls_fail(host):
    run = subprocess.run(
        [sys.executable, "-c", CLIENT_OF_UID, str(host.server.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "uid 65534 may not use this sidecar" in run.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("allowed", [False, True])
def test_only_known_uids_come_in(host, allowed):
    if allowed:
        host.options = replace(host.options, allowed_uids=frozenset({65533, 65534}))
    run = subprocess.run(
        [sys.executable, "-c", ANSWER_TO_UID, str(host.server.path), "65534"],
        capture_output=True,
        text=True,
        check=True,
    )
    kind, _, text = run.stdout.partition(" ")
    assert int(kind) == (wire.WELCOME if allowed else wire.REFUSED)
    assert allowed or "65534" in text


def test_the_socket_has_its_permissions_and_goes_with_the_server(tmp_path):
    path = tmp_path / "r.region"
    server = RegionServer(path, Sessions(), ServerOptions, mode=0o620)
    assert stat.S_IMODE(path.stat().st_mode) == 0o620
    server.close()
    server.close()
    assert not path.exists()


def test_a_second_server_does_not_take_the_place_of_one_that_lives(tmp_path):
    path = tmp_path / "r.region"
    server = RegionServer(path, Sessions(), ServerOptions)
    with pytest.raises(ConfigError, match="another"):
        RegionServer(path, Sessions(), ServerOptions)
    server.close()


def test_a_socket_that_was_left_behind_is_replaced_but_no_file(tmp_path):
    path = tmp_path / "r.region"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(path))
    server = RegionServer(path, Sessions(), ServerOptions)
    server.close()
    path.write_text("somebody's")
    with pytest.raises(ConfigError, match="no socket"):
        RegionServer(path, Sessions(), ServerOptions)
    assert path.read_text() == "somebody's"


def test_a_server_that_closes_ends_its_sessions(host):
    _, idle = greet(host)
    answer, busy = greet(host)
    lease = host.sessions.find(answer[1:].decode()).begin(1)
    host.server.close()
    assert idle.recv(100) == b""
    busy.settimeout(0.2)
    with pytest.raises(TimeoutError):
        busy.recv(100)
    lease.release()
    assert busy.recv(100) == b""
