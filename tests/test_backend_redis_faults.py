"""RedisBackend when the server is full, read-only, slow, locked, restarted, or was never there."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from real_server import free_port
from server_redis import RedisServer
from waiting import wait_until

from kvcodec.backend import Backend
from kvcodec.errors import (
    BackendError,
    BackendFull,
    BackendReadOnly,
    BackendTimeout,
    ConfigError,
)
from kvcodec_backends.redis import RedisBackend

NAMES = [f"{8:032x}/{number:064x}" for number in range(6)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture
def backend(server: RedisServer) -> Iterator[RedisBackend]:
    server.cli("FLUSHALL")
    with closing(RedisBackend.from_url(server.url)) as opened:
        yield opened


def put(backend: Backend, *names: str, data: bytes = b"data", seconds: float = 10) -> list:
    return backend.put(names, [memoryview(data)] * len(names), timeout_seconds=seconds)


def get(backend: Backend, *names: str, size: int = 100, seconds: float = 10) -> list:
    buffers = [memoryview(bytearray(size)) for _ in names]
    return backend.get_into(names, buffers, timeout_seconds=seconds)


def test_a_full_server_answers_for_each_object(server: RedisServer, backend: RedisBackend):
    assert put(backend, NAMES[0]) == [None]
    server.cli("CONFIG", "SET", "maxmemory", "1")
    try:
        full = put(backend, NAMES[0], NAMES[1])
        assert [type(answer) for answer in full] == [BackendFull, BackendFull]
        assert NAMES[1] in str(full[1])
        assert get(backend, NAMES[0]) == [4]
    finally:
        server.cli("CONFIG", "SET", "maxmemory", "0")
    assert put(backend, NAMES[1]) == [None]
    assert backend.counters()["dropped_connections"] == 0


def test_a_replica_can_be_read_only(server: RedisServer, backend: RedisBackend):
    assert put(backend, NAMES[0]) == [None]
    server.cli("REPLICAOF", "127.0.0.1", "1")
    try:
        assert isinstance(put(backend, NAMES[1])[0], BackendReadOnly)
        assert backend.delete([NAMES[0]], timeout_seconds=5) == [False]
        assert get(backend, NAMES[0]) == [4]
    finally:
        server.cli("REPLICAOF", "NO", "ONE")


def test_a_wrong_password_is_said_at_once_and_never_shown(
    server: RedisServer, backend: RedisBackend
):
    def url(login: str) -> str:
        return server.url.replace("127.0.0.1", f"{login}@127.0.0.1")

    server.cli("ACL", "SETUSER", "kv", "on", ">ri@ght", "~*", "+@all")
    with closing(RedisBackend.from_url(url("kv:ri%40ght"))) as admitted:
        assert put(admitted, NAMES[0]) == [None]
    for login in ("kv:wr%40ng", ":wr%40ng", "nobody:wr%40ng"):
        with pytest.raises(ConfigError) as raised:
            RedisBackend.from_url(url(login))
        assert "***" in str(raised.value)
        assert "wr@ng" not in str(raised.value) + repr(raised.value.__cause__)
    server.cli("CONFIG", "SET", "requirepass", "secret")
    try:
        with pytest.raises(ConfigError, match="NOAUTH"):
            RedisBackend.from_url(server.url)
    finally:
        server.cli("-a", "secret", "CONFIG", "SET", "requirepass", "")


def test_a_password_that_changes_later_is_an_answer(server: RedisServer, backend: RedisBackend):
    assert put(backend, NAMES[0]) == [None]
    server.cli("CONFIG", "SET", "requirepass", "secret")
    try:
        server.cli("-a", "secret", "CLIENT", "KILL", "TYPE", "normal")
        (answer,) = get(backend, NAMES[0])
        assert isinstance(answer, BackendError)
        assert "NOAUTH" in str(answer)
        with pytest.raises(BackendError, match="NOAUTH"):
            list(backend.list())
        with pytest.raises(BackendError, match="NOAUTH"):
            backend.stat(NAMES[0], timeout_seconds=5)
    finally:
        server.cli("-a", "secret", "CONFIG", "SET", "requirepass", "")
    assert get(backend, NAMES[0]) == [4]


def test_a_busy_server_is_an_answer(server: RedisServer, backend: RedisBackend):
    server.cli("CONFIG", "SET", "busy-reply-threshold", "1")
    endless = threading.Thread(target=lambda: _endless_script(server))
    endless.start()
    try:
        wait_until(lambda: "BUSY" in str(put(backend, NAMES[0])))
        (answer,) = put(backend, NAMES[0])
        assert isinstance(answer, BackendError)
        assert "BUSY" in str(answer)
    finally:
        server.cli("SCRIPT", "KILL")
        endless.join()
    assert put(backend, NAMES[0]) == [None]


def _endless_script(server: RedisServer) -> None:
    server.cli("EVAL", "while true do end", "0")


def test_a_cluster_is_refused_when_opened(tmp_path: Path):
    with RedisServer(
        tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())
    ) as cluster:
        with pytest.raises(ConfigError, match="Cluster"):
            RedisBackend.from_url(cluster.url)
        cluster.cli("CLUSTER", "ADDSLOTSRANGE", "0", "8000")


def test_a_cluster_that_appears_later_is_an_answer(tmp_path: Path):
    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with closing(RedisBackend.from_url(server.url)) as backend, server:
        (answer,) = put(backend, NAMES[0])
        assert isinstance(answer, BackendError)
        assert "CLUSTERDOWN" in str(answer)


def test_a_server_may_come_later_and_be_restarted(tmp_path: Path):
    server = RedisServer(tmp_path)
    with closing(RedisBackend.from_url(server.url)) as backend:
        (refused,) = put(backend, NAMES[0])
        assert isinstance(refused, BackendError)
        assert "refused" in str(refused)
        assert get(backend, NAMES[0])[0].__class__ is BackendError
        assert backend.exists(NAMES, timeout_seconds=1) == [False] * 6
        with server:
            assert put(backend, *NAMES) == [None] * 6
            server.kill()
            assert isinstance(get(backend, NAMES[0])[0], BackendError)
            server.socket.unlink()
            server.start()
            # The first call after it finds a new connection by itself.
            assert put(backend, NAMES[0]) == [None]
            server.stop()
            server.start()
            assert get(backend, NAMES[0]) == [None]


def test_a_trickling_server_costs_a_call_its_deadline(server: RedisServer, backend: RedisBackend):
    """Every system call makes progress, so only a deadline of the whole call ends it."""
    for name in NAMES:
        assert put(backend, name, data=os.urandom(50_000)) == [None]
    with FaultyProxy("127.0.0.1", server.port) as proxy:
        proxy.rate = 10_000
        slow = RedisBackend.from_url(server.url.replace(str(server.port), str(proxy.port)))
        with closing(slow):
            started = time.monotonic()
            answers = get(slow, *NAMES, size=60_000, seconds=1.0)
            assert 0.9 < time.monotonic() - started < 5  # the replies would take 30
            assert [type(answer) for answer in answers] == [BackendTimeout] * 6
            # The replies still on the way belong to nobody: no later call may take them.
            assert get(slow, f"{9:032x}/{1:064x}", seconds=5) == [None]
            assert slow.counters()["dropped_connections"] == 1


def test_a_connection_that_takes_no_data_costs_a_call_its_deadline():
    """A peer that accepts and never reads: a put fills the buffers on the way and stands still."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"redis://127.0.0.1:{deaf.getsockname()[1]}"
        started = time.monotonic()
        with closing(RedisBackend.from_url(url)) as backend:
            assert time.monotonic() - started < 5
            started = time.monotonic()
            (answer,) = put(backend, NAMES[0], data=bytes(50_000_000), seconds=0.5)
            assert isinstance(answer, BackendTimeout)
            assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"HTTP/1.1 400 Bad Request", "not Redis's protocol"),
        (b"-LOADING Redis is loading the dataset in memory", "LOADING"),
        (b"-MOVED 3999 127.0.0.1:6381", "part of a cluster"),
        (b"-MISCONF Redis is configured to save RDB snapshots", "MISCONF"),
        (b"x" * 100_000, "is it a Redis server"),
    ],
)
def test_whatever_a_peer_says_is_an_answer(line: bytes, said: str):
    def say(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
                with peer:
                    while commands := peer.recv(10_000):
                        peer.sendall((line + b"\r\n") * commands.count(b"*"))
            except OSError:
                if listener.fileno() < 0:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=say, args=(listener,), daemon=True).start()
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        with closing(RedisBackend.from_url(url)) as backend:
            (answer,) = put(backend, NAMES[0])
            assert isinstance(answer, BackendError)
            assert said in str(answer)
            assert isinstance(answer, BackendReadOnly) == (said == "MISCONF")
            assert isinstance(get(backend, NAMES[0])[0], BackendError)
            assert backend.exists(NAMES, timeout_seconds=2) == [False] * 6
        listener.shutdown(socket.SHUT_RDWR)


def test_results_before_a_lost_connection_stay(server: RedisServer, backend: RedisBackend):
    for name in NAMES:
        assert put(backend, name, data=b"x" * 2000) == [None]
    with FaultyProxy("127.0.0.1", server.port) as proxy:
        proxy.rate = 4_000
        slow = RedisBackend.from_url(server.url.replace(str(server.port), str(proxy.port)))
        with closing(slow):
            answers = get(slow, *NAMES, size=3000, seconds=1.5)
    assert isinstance(answers[-1], BackendTimeout)
    read = [answer for answer in answers if not isinstance(answer, BackendError)]
    assert read[:1] == [2000]


def test_a_child_process_uses_connections_of_its_own(server: RedisServer, backend: RedisBackend):
    assert put(backend, NAMES[0]) == [None]
    child = os.fork()
    if not child:
        sound = put(backend, NAMES[1]) == [None] and get(backend, NAMES[0]) == [4]
        os._exit(0 if sound and backend.counters()["opened_connections"] == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert get(backend, NAMES[1]) == [4]
    assert backend.counters()["opened_connections"] == 1
