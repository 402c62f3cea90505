"""MemoryBackend: the conformance suite, and what is its own."""

from __future__ import annotations

import os

import pytest

from kvcodec.backend import Backend
from kvcodec.errors import BackendFull, ConfigError
from kvcodec.testing import BackendTests
from kvcodec_backends.memory import MemoryBackend


def name(number: int) -> str:
    return f"{0:032x}/{number:064x}"


class TestConformance(BackendTests):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.store_name = os.urandom(8).hex()

    def open_backend(self) -> Backend:
        return MemoryBackend.from_url(f"memory://{self.store_name}?max_bytes=64MiB")

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return MemoryBackend, "memory://name?size=10"

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return MemoryBackend, f"memory://{os.urandom(8).hex()}"


class TestConformanceOfAPrivateStore(BackendTests):
    keeps_objects = False

    def open_backend(self) -> Backend:
        return MemoryBackend.from_url("memory://")


def put(backend: MemoryBackend, number: int, size: int) -> object:
    return backend.put([name(number)], [memoryview(bytes(size))], timeout_seconds=1)[0]


def present(backend: MemoryBackend, numbers: range) -> list[int]:
    found = backend.exists([name(number) for number in numbers], timeout_seconds=1)
    return [number for number, there in zip(numbers, found, strict=True) if there]


def test_the_least_recently_used_goes_first():
    backend = MemoryBackend(max_bytes=100)
    for number in range(4):
        assert put(backend, number, 25) is None
    backend.get_into([name(0)], [memoryview(bytearray(25))], timeout_seconds=1)
    assert put(backend, 4, 25) is None
    assert present(backend, range(5)) == [0, 2, 3, 4]
    assert put(backend, 5, 60) is None
    assert present(backend, range(6)) == [4, 5]
    assert backend.counters() == {"evicted_objects": 4, "evicted_bytes": 100}
    assert backend.gauges() == {"stored_bytes": 85, "limit_bytes": 100}


def test_an_object_above_the_limit_is_full_and_evicts_nothing():
    backend = MemoryBackend(max_bytes=100)
    put(backend, 0, 50)
    assert isinstance(put(backend, 1, 101), BackendFull)
    assert present(backend, range(2)) == [0]
    assert put(backend, 1, 100) is None


def test_a_name_is_shared_and_no_name_is_private():
    shared = os.urandom(8).hex()
    put(MemoryBackend(shared), 0, 10)
    assert present(MemoryBackend(shared), range(1)) == [0]
    assert present(MemoryBackend(os.urandom(8).hex()), range(1)) == []
    put(MemoryBackend(), 0, 10)
    assert present(MemoryBackend(), range(1)) == []


def test_a_store_has_one_limit():
    shared = os.urandom(8).hex()
    first = MemoryBackend(shared, max_bytes=100)
    MemoryBackend(shared, max_bytes=100)
    MemoryBackend(shared)
    with pytest.raises(ConfigError, match="max_bytes=100, not 200"):
        MemoryBackend(shared, max_bytes=200)
    first.close()


@pytest.mark.parametrize(
    "url",
    [
        "memory://a/b",
        "memory:///a",
        "memory://a b",
        "memory://a?max_bytes=0",
        "memory://a?max_bytes=much",
        "memory://a?max_bytes=1&max_bytes=1",
        "memory://a#b",
        "memory://" + "a" * 65,
    ],
)
def test_a_url_that_cannot_be_honoured_is_a_config_error(url: str):
    with pytest.raises(ConfigError):
        MemoryBackend.from_url(url)


def test_an_object_that_nobody_can_change_is_kept_and_not_copied():
    backend, message = MemoryBackend(), b"head" + os.urandom(10_000)
    view = memoryview(message)[4:]
    assert backend.put([name(0)], [view], timeout_seconds=1) == [None]
    view.release()
    with backend.lend(name(0)) as lent:
        assert lent.obj is message
        assert lent == message[4:]
    assert backend.gauges()["stored_bytes"] == 10_000


@pytest.mark.parametrize("kind", ["can be changed", "a small part"])
def test_an_object_is_copied_that(kind):
    """A page in memory that goes on changing, or that would keep far more than itself."""
    whole = bytearray(10_000) if kind == "can be changed" else bytes(100_000)
    backend = MemoryBackend()
    view = memoryview(whole)[:10_000]
    assert backend.put([name(0)], [view], timeout_seconds=1) == [None]
    with backend.lend(name(0)) as lent:
        assert lent.obj is not whole
        if kind == "can be changed":
            whole[:] = b"x" * len(whole)
        assert lent == bytes(10_000)


def test_who_borrows_uses_an_object():
    backend = MemoryBackend(max_bytes=100)
    for number in range(4):
        put(backend, number, 25)
    with backend.lend(name(0)):
        put(backend, 4, 25)
    assert present(backend, range(5)) == [0, 2, 3, 4]
