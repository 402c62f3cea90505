"""lm://: the conformance suite and what else it promises, on LMCache's real older server."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
from real_server import RealServer, free_port
from server_lmcache import legacy_server
from waiting import wait_until

from kvcodec.backend import Backend, open_backend
from kvcodec.errors import BackendError, BackendFull, BackendTimeout, ConfigError
from kvcodec.testing import BackendTests
from kvcodec_backends import lm
from kvcodec_backends.lm import LMServerBackend

NAMESPACE = "cd" * 16


def name() -> str:
    return f"{NAMESPACE}/{os.urandom(32).hex()}"


def get(backend: Backend, names: list[str], room: int = 100) -> list[object]:
    buffers = [bytearray(room) for _ in names]
    results = backend.get_into(names, [memoryview(b) for b in buffers], timeout_seconds=10)
    return [
        bytes(buffer[:result]) if isinstance(result, int) else result
        for result, buffer in zip(results, buffers, strict=True)
    ]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(port: int) -> Iterator[RealServer]:
    with legacy_server(port) as started:
        yield started


class TestConformance(BackendTests):
    can_delete = False
    can_list = False

    @pytest.fixture(autouse=True)
    def _store(self, server: RealServer, port: int) -> None:
        self.server, self.url = server, f"lm://127.0.0.1:{port}"

    def open_backend(self) -> Backend:
        return LMServerBackend.from_url(self.url)

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return LMServerBackend, f"{self.url}?max_bytes=1GB"

    def stalled(self) -> AbstractContextManager[None]:
        return self.server.stalled()


@pytest.fixture
def backend(server: RealServer, port: int) -> Iterator[Backend]:
    opened = open_backend(f"lm://127.0.0.1:{port}")
    yield opened
    opened.close()


def plant_broken_object(port: int, target: str) -> None:
    """What a writer that is cut off leaves: a length, and nothing of that length."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(lm._request(lm._PUT, target, 1000) + b"x" * 10)


@pytest.mark.parametrize("url", ["lm://", "lm://host", "lm://host:1/path", "lm://me@host:1"])
def test_a_url_names_a_host_and_a_port_and_nothing_else(url: str):
    with pytest.raises(ConfigError, match="lm://localhost:65432"):
        open_backend(url)


def test_a_broken_object_is_an_error_once_and_then_missing_until_it_is_put_again(
    backend: Backend, port: int
):
    before, broken, after = name(), name(), name()
    views = [memoryview(b"before"), memoryview(b"after")]
    assert backend.put([before, after], views, timeout_seconds=10) == [None, None]
    plant_broken_object(port, broken)
    wait_until(lambda: backend.exists([broken], timeout_seconds=5)[0])
    found = get(backend, [before, broken, after, broken])
    assert [found[0], found[2]] == [b"before", b"after"]
    assert isinstance(found[1], BackendError)
    assert isinstance(found[3], BackendError)
    assert backend.exists([before, broken, after], timeout_seconds=5) == [True, False, True]
    assert backend.counters()["broken_objects"] >= 1
    assert backend.put([broken], [memoryview(b"whole")], timeout_seconds=10) == [None]
    assert backend.exists([broken], timeout_seconds=5) == [True]
    assert get(backend, [broken]) == [b"whole"]


def test_an_object_whose_put_was_cut_off_by_a_deadline_does_not_exist(
    server: RealServer, backend: Backend
):
    """The server may have a part of it, and says that it exists."""
    target, data = name(), memoryview(os.urandom(64 << 20))
    with server.stalled():
        (result,) = backend.put([target], [data], timeout_seconds=0.3)
    assert isinstance(result, BackendTimeout)
    assert backend.exists([target], timeout_seconds=10) == [False]
    assert backend.put([target], [memoryview(b"whole")], timeout_seconds=10) == [None]
    assert backend.exists([target], timeout_seconds=10) == [True]


def test_a_delete_is_counted_as_refused(backend: Backend):
    target = name()
    backend.put([target], [memoryview(b"data")], timeout_seconds=10)
    assert backend.delete([target, name()], timeout_seconds=10) == [False, False]
    assert backend.counters()["refused_deletes"] == 2


def test_the_message_about_listing_names_the_way_out(backend: Backend):
    with pytest.raises(BackendError, match="lmcache:// can"):
        list(backend.list())


def test_an_object_longer_than_the_wire_can_say_is_refused(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lm, "MAX_OBJECT_BYTES", 10)
    small, large = name(), name()
    views = [memoryview(b"a"), memoryview(b"x" * 11), memoryview(b"b")]
    results = backend.put([small, large, small], views, timeout_seconds=10)
    assert isinstance(results[1], BackendFull)
    assert [results[0], results[2]] == [None, None]
    assert get(backend, [small, large]) == [b"b", None]


def test_it_recovers_from_a_restart_that_emptied_the_server(server: RealServer, backend: Backend):
    target = name()
    assert backend.put([target], [memoryview(b"data")], timeout_seconds=10) == [None]
    server.kill()
    (away,) = backend.put([target], [memoryview(b"data")], timeout_seconds=2)
    assert isinstance(away, BackendError)
    assert isinstance(get(backend, [target])[0], BackendError)
    server.start()
    assert get(backend, [target]) == [None]
    assert backend.put([target], [memoryview(b"again")], timeout_seconds=10) == [None]
    assert get(backend, [target]) == [b"again"]
