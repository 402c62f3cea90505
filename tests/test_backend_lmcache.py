"""lmcache://: the conformance suite and what else it promises, on LMCache's real server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random

import pytest
from real_server import RealServer, free_port
from server_lmcache import MPServer
from waiting import wait_until

from kvcodec.backend import Backend, open_backend
from kvcodec.errors import BackendError, BackendFull, BackendTimeout, ConfigError
from kvcodec.testing import BackendTests
from kvcodec.testing._backend_samples import is_sealed, sealed
from kvcodec_backends.lmcache import LMCacheBackend
from kvcodec_proto.lmcache import ANSWER, ANSWERS, ENTRY, MAGIC, REQUEST, Status, Verb, name_bytes

MEMORY_BYTES = 1 << 28
NAMESPACE = "ab" * 16


def name() -> str:
    return f"{NAMESPACE}/{os.urandom(32).hex()}"


def put(backend: Backend, target: str, data: bytes) -> BackendError | None:
    (result,) = backend.put([target], [memoryview(data)], timeout_seconds=10)
    return result


def get(backend: Backend, target: str, room: int = 1000) -> object:
    buffer = bytearray(room)
    (result,) = backend.get_into([target], [memoryview(buffer)], timeout_seconds=10)
    return bytes(buffer[:result]) if isinstance(result, int) else result


@pytest.fixture(scope="module")
def lmcache() -> Iterator[MPServer]:
    started = MPServer(memory_gb=MEMORY_BYTES / (1 << 30))
    with started.server:
        yield started
        started.server.kill()  # it takes seconds to end by itself


@pytest.fixture
def backend(lmcache: MPServer) -> Iterator[Backend]:
    opened = open_backend(lmcache.url)
    yield opened
    opened.close()


class TestConformance(BackendTests):
    @pytest.fixture(autouse=True)
    def _store(self, lmcache: MPServer) -> None:
        self.url = lmcache.url
        self.server: RealServer = lmcache.server

    def open_backend(self) -> Backend:
        return LMCacheBackend.from_url(self.url)

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return LMCacheBackend, f"{self.url}?max_bytes=1GB"

    def stalled(self) -> AbstractContextManager[None]:
        return self.server.stalled()


# The client


@pytest.mark.parametrize(
    "url",
    [
        "lmcache://",
        "lmcache://localhost",
        "lmcache://localhost:0",
        "lmcache://localhost:99999",
        "lmcache://localhost:65500/path",
        "lmcache://user@localhost:65500",
        "lmcache://localhost:65500#x",
    ],
)
def test_a_url_names_a_host_and_a_port_and_nothing_else(url: str):
    with pytest.raises(ConfigError, match="lmcache://localhost:65500"):
        open_backend(url)


def test_a_password_in_a_url_is_not_shown():
    with pytest.raises(ConfigError) as caught:
        open_backend("lmcache://me:open-sesame@localhost:65500")
    assert "sesame" not in str(caught.value)


def test_the_client_needs_neither_lmcache_nor_torch(lmcache: MPServer):
    code = (
        "import sys; from kvcodec.backend import open_backend\n"
        f"backend = open_backend({lmcache.url!r})\n"
        f"print(backend.exists([{name()!r}], timeout_seconds=10))\n"
        "print(sorted({'lmcache', 'torch', 'zmq', 'msgspec', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == ["[False]", "[]"]


def test_a_server_that_is_something_else_is_named(lmcache: MPServer):
    """LMCache's own port, or its HTTP port, where kvcodec's module was meant."""
    for port in (lmcache.port, lmcache.http_port):
        other = open_backend(f"lmcache://127.0.0.1:{port}")
        try:
            assert isinstance(get(other, name()), BackendError)
            assert isinstance(put(other, name(), b"data"), BackendError)
            assert other.exists([name()], timeout_seconds=2) == [False]
        finally:
            other.close()


def test_a_server_that_is_not_up_answers_with_errors_at_once():
    away = open_backend(f"lmcache://127.0.0.1:{free_port()}")
    started = time.monotonic()
    assert isinstance(put(away, name(), b"data"), BackendError)
    assert isinstance(get(away, name()), BackendError)
    assert away.exists([name()], timeout_seconds=10) == [False]
    with pytest.raises(BackendError):
        list(away.list())
    assert time.monotonic() - started < 8  # a deadline is ten


def test_connections_are_kept_and_reused(backend: Backend):
    for _ in range(20):
        assert put(backend, name(), b"data") is None
    assert backend.counters()["connections"] == 1
    assert backend.counters()["lost_connections"] == 0


def test_a_forked_child_uses_connections_of_its_own(backend: Backend):
    target = name()
    assert put(backend, target, b"parent") is None
    child = os.fork()
    if not child:
        answer = get(backend, target)
        os._exit(0 if answer == b"parent" and put(backend, target, b"child") is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert get(backend, target) == b"child"
    assert backend.counters()["lost_connections"] == 0


# The module in the server


def test_an_object_that_no_memory_holds_is_refused_as_full(backend: Backend):
    # Twice what the server has, never touched.
    data = memoryview(bytearray(2 * MEMORY_BYTES))
    small = name()
    results = backend.put(
        [small, name(), small], [memoryview(b"a"), data, memoryview(b"b")], timeout_seconds=30
    )
    assert isinstance(results[1], BackendFull)
    assert [results[0], results[2]] == [None, None]
    assert get(backend, small) == b"b"


def test_more_than_the_memory_holds_evicts_what_was_used_least(lmcache: MPServer, backend: Backend):
    data = memoryview(os.urandom(8 << 20))
    names = [name() for _ in range(2 * MEMORY_BYTES // len(data))]
    for each in names:
        assert backend.put([each], [data], timeout_seconds=10) == [None]
    left = backend.exists(names, timeout_seconds=10)
    assert left[-1]
    assert not left[0]
    held = {info.name for info in backend.list(NAMESPACE)}
    assert held.issuperset(each for each, is_left in zip(names, left, strict=True) if is_left)
    assert sum(left) * len(data) <= MEMORY_BYTES
    assert lmcache.status()["store"]["evicted_objects"] > 0
    backend.delete(names, timeout_seconds=10)


def test_a_replaced_object_gives_its_memory_back(backend: Backend):
    data = memoryview(os.urandom(16 << 20))
    target = name()
    for _ in range(3 * MEMORY_BYTES // len(data)):
        assert backend.put([target], [data], timeout_seconds=10) == [None]
    assert backend.delete([target], timeout_seconds=10) == [True]


def test_what_lmcache_clears_is_gone(lmcache: MPServer, backend: Backend):
    target = name()
    assert put(backend, target, b"data") is None
    lmcache.clear_memory()
    wait_until(lambda: not backend.exists([target], timeout_seconds=5)[0])
    assert get(backend, target) is None
    assert [info for info in backend.list(NAMESPACE) if info.name == target] == []


def test_nothing_mixes_and_nothing_leaks_where_memory_is_short(lmcache: MPServer):
    """Threads write, read and delete few names; what they write is twice what memory holds."""
    size = MEMORY_BYTES // 16
    names = [name() for _ in range(32)]
    stop_at = time.monotonic() + 2.0
    failures: list[object] = []

    def work(seed: int) -> None:
        random = Random(seed)
        own = open_backend(lmcache.url)
        data = [memoryview(sealed(seed * 10 + n, size - 1000 * n)) for n in range(3)]
        buffer = memoryview(bytearray(size))
        while time.monotonic() < stop_at:
            target, kind = random.choice(names), random.random()
            if kind < 0.4:
                failures.extend(filter(None, own.put([target], [random.choice(data)], **limit)))
            elif kind < 0.9:
                (found,) = own.get_into([target], [buffer], **limit)
                if found is not None and not (
                    isinstance(found, int) and is_sealed(bytes(buffer[:found]))
                ):
                    failures.append(found)
            else:
                own.delete([target], **limit)
        own.close()

    limit = {"timeout_seconds": 20}
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with_all = open_backend(lmcache.url)
    with_all.delete([info.name for info in with_all.list()], **limit)
    with_all.close()
    wait_until(lambda: lmcache.http("status")["storage_manager"]["l1_usage"][0] == 0)


def raw_connection(lmcache: MPServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", lmcache.store_port), timeout=10)


def test_a_writer_that_is_cut_off_changes_nothing(lmcache: MPServer, backend: Backend):
    target = name()
    assert put(backend, target, b"before") is None

    def open_connections() -> int:
        return lmcache.status()["store"]["connections"]

    settled = open_connections()
    for _ in range(12):
        with raw_connection(lmcache) as connection:
            connection.sendall(REQUEST.pack(MAGIC, Verb.PUT, 1, 10_000))
            connection.sendall(ENTRY.pack(name_bytes(target), MEMORY_BYTES // 8) + b"x" * 1000)
            wait_until(lambda: open_connections() > settled)
        wait_until(lambda: open_connections() == settled)
    # Had its memory not been given back, the object would have had to make room.
    assert get(backend, target) == b"before"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        REQUEST.pack(b"KVL9", Verb.STAT, 1, 1000),
        REQUEST.pack(MAGIC, 99, 1, 1000),
        REQUEST.pack(MAGIC, Verb.STAT, 1 << 31, 1000),
        REQUEST.pack(MAGIC, Verb.PUT, 1, 1000) + ENTRY.pack(bytes(48), 0),
        REQUEST.pack(MAGIC, Verb.PUT, 1, 1000) + ENTRY.pack(bytes(48), 1 << 63),
        REQUEST.pack(MAGIC, Verb.LIST, 0, 1000),
    ],
)
def test_a_request_that_is_none_ends_its_connection_and_no_other(
    lmcache: MPServer, backend: Backend, request_bytes: bytes
):
    with raw_connection(lmcache) as connection:
        connection.sendall(request_bytes)
        try:
            while connection.recv(1000):
                pass
        except ConnectionResetError:
            pass  # it had not read all of it
    assert put(backend, name(), b"data") is None


def test_a_request_without_time_is_answered_as_late(lmcache: MPServer):
    with raw_connection(lmcache) as connection:
        connection.sendall(REQUEST.pack(MAGIC, Verb.PUT, 1, 0))
        connection.sendall(ENTRY.pack(bytes(48), 2 * MEMORY_BYTES))
        connection.sendall(bytes(2 * MEMORY_BYTES))
        answer = connection.recv(ANSWERS.size + ANSWER.size, socket.MSG_WAITALL)
    assert ANSWER.unpack(answer[ANSWERS.size :])[0] == Status.LATE


def test_the_status_of_lmcache_counts_what_is_stored(lmcache: MPServer, backend: Backend):
    before = lmcache.status()["store"]
    target = name()
    assert put(backend, target, b"x" * 1000) is None
    after = lmcache.status()["store"]
    assert after["stored_objects"] == before["stored_objects"] + 1
    assert after["stored_bytes"] == before["stored_bytes"] + 1000
    assert after["objects"] == before["objects"] + 1
    assert after["connections"] >= 1


# A server of its own: behind LMCache's memory, and through a restart


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[tuple[MPServer, Path]]:
    """A server with a directory behind its memory."""
    adapter = {"type": "fs", "base_path": str(tmp_path / "l2")}
    started = MPServer("--l2-adapter", json.dumps(adapter))
    with started.server:
        yield started, tmp_path / "l2"
        started.server.kill()


def test_objects_move_to_lmcaches_l2_and_back_and_a_restart_forgets_them(
    deep: tuple[MPServer, Path],
):
    """One test, because a server takes seconds to start."""
    server, directory = deep
    backend = open_backend(server.url)
    names = [name() for _ in range(6)]
    objects = [os.urandom(5000 + 1000 * (index % 3)) for index in range(6)]
    views = [memoryview(data) for data in objects]

    def files() -> int:
        return sum(1 for path in directory.rglob("*.data") if path.is_file())

    try:
        assert backend.put(names, views, timeout_seconds=10) == [None] * 6
        wait_until(lambda: files() == 6)  # LMCache copies objects to its L2
        server.clear_memory()
        time.sleep(0.5)
        assert backend.exists(names, timeout_seconds=10) == [True] * 6
        assert [get(backend, each, 10_000) for each in names] == objects
        assert server.status()["store"]["loaded_from_l2"] == 6
        # Of a replaced object the new version alone is left, of a deleted one none.
        assert put(backend, names[0], b"new") is None
        assert backend.delete(names[1:3], timeout_seconds=10) == [True, True]
        wait_until(lambda: files() == 4)  # old versions leave the L2 too
        server.clear_memory()
        assert get(backend, names[0]) == b"new"
        assert get(backend, names[1]) is None

        server.server.kill()
        assert isinstance(get(backend, names[0]), BackendError)
        assert backend.exists(names, timeout_seconds=1) == [False] * 6
        server.server.start()
        assert get(backend, names[0]) is None
        assert put(backend, names[0], b"again") is None
        assert get(backend, names[0]) == b"again"
        assert backend.counters()["lost_connections"] >= 1
        with server.server.stalled():
            (late,) = backend.put([names[1]], [memoryview(b"data")], timeout_seconds=0.3)
        assert isinstance(late, BackendTimeout)
    finally:
        backend.close()
