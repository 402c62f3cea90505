"""TierBackend: the conformance suite over several stores and in both modes, and what is its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
from tier_store import data, fake_stores, get, name, put, tier_url
from waiting import wait_until

from kvcodec.backend import Backend, ObjectInfo, display_url, open_backend
from kvcodec.errors import BackendError, BackendFull, BackendTimeout, ConfigError
from kvcodec.testing import BackendTests
from kvcodec_backends import tier as tier_module
from kvcodec_backends._tier_memory import ENTRY_BYTES, Memory, capacity_of
from kvcodec_backends.file import FileBackend
from kvcodec_backends.memory import MemoryBackend
from kvcodec_backends.tier import TierBackend


@pytest.fixture
def fake_store(monkeypatch):
    yield from fake_stores(monkeypatch)


# --- conformance


class OverMemory(BackendTests):
    options: ClassVar[dict[str, object]] = {}
    model_examples = 6

    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.store_url = f"memory://{os.urandom(8).hex()}?max_bytes=64MiB"

    def open_backend(self) -> Backend:
        return open_backend(tier_url(self.store_url, **self.options))

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return TierBackend, tier_url(self.store_url, size=10, **self.options)

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return TierBackend, tier_url(f"memory://{os.urandom(8).hex()}", **self.options)


class TestThroughToMemory(OverMemory):
    options: ClassVar = {}


class TestBackToMemory(OverMemory):
    options: ClassVar = {"mode": "write_back"}


class TestWithHardlyAnyMemory(OverMemory):
    """Pages come and go all the time; large ones never fit."""

    options: ClassVar = {"bytes": "40kB"}


class TestBackWithHardlyAnyMemory(OverMemory):
    options: ClassVar = {"bytes": "40kB", "mode": "write_back", "dirty_bytes": "10kB"}


class OverFiles(OverMemory):
    model_examples = 8

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.root = tmp_path
        self.store_url = f"file://{tmp_path}/store?max_bytes=64MiB"

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return TierBackend, tier_url(f"file://{self.root}/missing", **self.options)

    def plant_foreign_objects(self, namespace: str) -> bool:
        folder = self.root / "store" / "objects" / namespace / "00"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "foreign").write_bytes(b"not ours")
        return True


class TestThroughToFiles(OverFiles):
    options: ClassVar = {}


class TestBackToFiles(OverFiles):
    options: ClassVar = {"mode": "write_back"}


class Hanging(MemoryBackend):
    """As a server that takes requests and answers none, behind a client that keeps deadlines."""

    stalled = threading.Event()

    def _hang(self, timeout_seconds: float) -> BackendTimeout | None:
        if not self.stalled.is_set():
            return None
        time.sleep(timeout_seconds)
        return BackendTimeout("no answer")

    def put(self, names, objects, *, timeout_seconds):
        error = self._hang(timeout_seconds)
        if error:
            return [error] * len(names)
        return super().put(names, objects, timeout_seconds=timeout_seconds)

    def get_into(self, names, buffers, *, timeout_seconds):
        error = self._hang(timeout_seconds)
        if error:
            return [error] * len(names)
        return super().get_into(names, buffers, timeout_seconds=timeout_seconds)

    def exists(self, names, *, timeout_seconds):
        if self._hang(timeout_seconds):
            return [False] * len(names)
        return super().exists(names, timeout_seconds=timeout_seconds)

    def delete(self, names, *, timeout_seconds):
        if self._hang(timeout_seconds):
            return [False] * len(names)
        return super().delete(names, timeout_seconds=timeout_seconds)

    def stat(self, name, *, timeout_seconds):
        error = self._hang(timeout_seconds)
        if error:
            raise error
        return super().stat(name, timeout_seconds=timeout_seconds)


class TestOverAStoreThatHangs(BackendTests):
    """With memory for nothing, so that every call needs the store."""

    model_examples = 4

    @pytest.fixture(autouse=True)
    def _store(self, monkeypatch) -> None:
        self.name = os.urandom(8).hex()
        monkeypatch.setattr(tier_module, "open_backend", lambda url, **_: Hanging(self.name))

    def open_backend(self) -> Backend:
        return TierBackend.from_url(tier_url("fake://", bytes=1))

    @contextmanager
    def stalled(self) -> Iterator[None]:
        Hanging.stalled.set()
        try:
            yield
        finally:
            Hanging.stalled.clear()


# --- options


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("tier+ram://?store=memory://", "bytes is missing"),
        ("tier+ram://?bytes=0&store=memory://", "bytes is 0"),
        ("tier+ram://?bytes=much&store=memory://", "bytes is 'much'"),
        ("tier+ram://?bytes=1MiB", "store has to be the URL"),
        ("tier+ram://?bytes=1MiB&store=/a/path", "store has to be the URL"),
        ("tier+ram://?bytes=1MiB&store=nosuch://", "no backend for the URL"),
        ("tier+ram://?bytes=1MiB&store=memory://a%3Fsize=1", "unknown option 'size'"),
        ("tier+ram://?bytes=1MiB&mode=fast&store=memory://", "mode is 'fast'"),
        ("tier+ram://?bytes=1MiB&dirty_bytes=1&store=memory://", "is for mode=write_back"),
        ("tier+ram://?bytes=1MiB&flush_timeout_seconds=1&store=memory://", "for mode=write_back"),
        ("tier+ram://?bytes=1MiB&mode=write_back&dirty_bytes=0&store=memory://", "from 1 to"),
        ("tier+ram://?bytes=1MiB&mode=write_back&dirty_bytes=2MiB&store=memory://", "from 1 to"),
        (
            "tier+ram://?bytes=1MiB&mode=write_back&flush_timeout_seconds=x&store=memory://",
            "must be a number",
        ),
        (
            "tier+ram://?bytes=1MiB&mode=write_back&flush_timeout_seconds=nan&store=memory://",
            "must be a number",
        ),
        ("tier+ram://host?bytes=1MiB&store=memory://", "wanted is tier"),
        ("tier+ram:///path?bytes=1MiB&store=memory://", "wanted is tier"),
        ("tier+ram://?bytes=1MiB&store=memory://#a", "wanted is tier"),
        ("tier://?bytes=1MiB&store=memory://", "wanted is tier"),
        ("tier+disk://?bytes=1MiB&store=memory://", "wanted is tier"),
    ],
)
def test_a_url_that_cannot_be_honoured_is_a_config_error(url, message):
    with pytest.raises(ConfigError, match=message):
        open_backend(url)
    assert tier_module._tiers == {}


def test_the_store_has_options_of_its_own(tmp_path):
    inner = f"file://{tmp_path}/store%20a?max_bytes=3kB&fsync=1"
    backend = open_backend(tier_url(inner))
    assert put(backend, 1, size=2000) == [None]
    assert isinstance(put(backend, 2, size=4000)[0], BackendFull)
    backend.close()
    assert (tmp_path / "store a" / "objects").is_dir()


def test_secrets_of_the_store_are_not_shown():
    url = tier_url("redis://:geheim@host?password=geheim")
    assert "geheim" not in display_url(url)
    backend = TierBackend.from_url(tier_url("memory://", note="x").replace("&note=x", ""))
    backend.close()
    (answer,) = put(backend, 1)
    assert isinstance(answer, BackendError) and "is closed" in str(answer)
    with pytest.raises(ConfigError) as caught:
        TierBackend.from_url("tier+ram:///?bytes=1&store=redis://:geheim@host")
    assert "geheim" not in str(caught.value)


# --- sharing


def test_backends_of_one_url_share_their_memory():
    url = tier_url("memory://")
    first, second = open_backend(url), open_backend(url)
    assert put(first, 1) == [None]
    assert get(second, 1) == [data(1)]
    assert second.counters()["hits"] == 1
    first.close()
    assert get(second, 1) == [data(1)]
    assert isinstance(get(first, 1)[0], BackendError)
    second.close()
    third = open_backend(url)
    assert get(third, 1) == [None]
    third.close()


def test_another_url_is_another_tier():
    store = f"memory://{os.urandom(8).hex()}"
    first, second = open_backend(tier_url(store)), open_backend(tier_url(store, bytes="1MiB"))
    put(first, 1)
    assert get(second, 1) == [data(1)]
    assert (first.counters()["hits"], second.counters()["misses"]) == (0, 1)
    first.close()
    second.close()


def test_a_tier_may_stand_before_a_tier():
    inner = tier_url("memory://", bytes="32MiB", mode="write_back")
    backend = open_backend(tier_url(inner))
    assert put(backend, 1) == [None]
    assert get(backend, 1) == [data(1)]
    assert backend.counters()["store.buffered_objects"] == 1
    backend.close()
    assert tier_module._tiers == {}


def test_closing_frees_the_memory_and_closes_the_store(fake_store):
    backend, store = fake_store()
    put(backend, 1, 2, 3)
    backend.delete([name(2)], timeout_seconds=5)
    assert backend.used_bytes > 0
    backend.close()
    backend.close()
    assert backend.used_bytes == 0
    assert store.closed


# --- reading


def test_what_is_in_memory_does_not_reach_the_store(fake_store):
    backend, store = fake_store()
    put(backend, 1, 2)
    store.calls.clear()
    assert get(backend, 1, 2, 1) == [data(1), data(2), data(1)]
    assert backend.exists([name(1), name(2)], timeout_seconds=5) == [True, True]
    assert backend.exists_prefix([name(1), name(2)], timeout_seconds=5) == 2
    assert store.calls == []
    counters = backend.counters()
    assert (counters["hits"], counters["hit_bytes"], counters["misses"]) == (3, 3000, 0)


def test_a_page_that_is_lent_is_pinned_and_a_hit(fake_store):
    backend, _ = fake_store(bytes=64 << 10)
    put(backend, 1, size=20_000)
    assert backend.lend(name(2)) is None
    with backend.lend(name(1)) as lent:
        assert backend.delete([name(1)], timeout_seconds=5) == [True]
        put(backend, *range(3, 13), size=20_000)  # more than there is memory for
        assert lent == data(1, 20_000)
    counts = backend.counters()
    assert (counts["hits"], counts["hit_bytes"], counts["misses"]) == (1, 20_000, 0)


def test_misses_are_read_in_one_batch_and_kept(fake_store):
    backend, store = fake_store()
    for number in range(4):
        store.objects[name(number)] = data(number)
    put(backend, 1)
    store.calls.clear()
    assert get(backend, 0, 1, 2, 9) == [data(0), data(1), data(2), None]
    assert store.calls == [("get", 3)]
    assert get(backend, 0, 2) == [data(0), data(2)]
    assert store.calls == [("get", 3)]
    assert backend.counters()["misses"] == 3


def test_an_object_larger_than_its_buffer_is_not_kept(fake_store):
    backend, store = fake_store()
    store.objects[name(1)] = data(1)
    assert backend.get_into([name(1)], [memoryview(bytearray(10))], timeout_seconds=5) == [1000]
    assert backend.exists([name(1)], timeout_seconds=5) == [True]
    assert backend.counters()["inserted_objects"] == 0
    put(backend, 2)
    buffer = bytearray(10)
    assert backend.get_into([name(2)], [memoryview(buffer)], timeout_seconds=5) == [1000]
    assert buffer == bytes(10)


def test_the_store_is_asked_for_the_rest_of_a_prefix(fake_store):
    backend, store = fake_store()
    put(backend, 0, 1, 3)
    del store.objects[name(1)]
    store.objects[name(2)] = data(2)
    names = [name(number) for number in range(6)]
    store.calls.clear()
    assert backend.exists(names, timeout_seconds=5) == [True] * 4 + [False] * 2
    assert backend.exists_prefix(names, timeout_seconds=5) == 4
    assert store.calls == [("exists", 3), ("exists", 3)]


def test_pages_in_memory_are_there_while_the_store_is_away(fake_store):
    backend, store = fake_store()
    put(backend, 1)

    def away(operation, names):
        raise ConnectionError("no route")

    store.hook = away
    assert get(backend, 1) == [data(1)]
    (missing,) = get(backend, 2)
    assert isinstance(missing, BackendError) and "no route" in str(missing)
    assert isinstance(put(backend, 3)[0], BackendError)
    assert backend.exists([name(1), name(2)], timeout_seconds=5) == [True, False]
    assert backend.exists_prefix([name(1), name(2)], timeout_seconds=5) == 1
    assert backend.delete([name(2)], timeout_seconds=5) == [False]
    with pytest.raises(BackendError):
        list(backend.list())
    assert backend.counters()["store_raised"] == 6


def test_a_store_that_answers_too_little_is_a_failure(fake_store, monkeypatch):
    backend, store = fake_store()
    monkeypatch.setattr(store, "get_into", lambda *a, **k: [])
    assert isinstance(get(backend, 1, 2)[1], BackendError)


def test_deadlines_are_passed_down(fake_store, monkeypatch):
    backend, store = fake_store()
    found = {}
    for verb in ("put", "get_into", "exists", "delete", "stat"):

        def call(*arguments, verb=verb, timeout_seconds):
            found[verb] = timeout_seconds
            return None if verb == "stat" else [None] * len(arguments[0])

        monkeypatch.setattr(store, verb, call)
    put(backend, 1, seconds=30)
    get(backend, 2, seconds=30)
    backend.exists([name(2)], timeout_seconds=30)
    backend.delete([name(1)], timeout_seconds=30)
    backend.stat(name(1), timeout_seconds=30)
    assert set(found) == {"put", "get_into", "exists", "delete", "stat"}
    assert all(20 < seconds <= 30 for seconds in found.values())


def test_the_store_counts_for_itself(fake_store):
    backend, store = fake_store()
    put(backend, 1)
    assert backend.counters()["store.objects"] == 1
    assert backend.batch_size == store.batch_size


# --- bounds


@pytest.mark.parametrize("mode", ["write_through", "write_back"])
def test_memory_stays_within_its_bytes(fake_store, mode):
    backend, store = fake_store(bytes="200kB", mode=mode)
    for number in range(300):
        size = 500 + 37 * (number % 90)
        stop_at = time.monotonic() + 20
        while put(backend, number, size=size) != [None]:
            assert time.monotonic() < stop_at
        assert get(backend, number, size=size) == [data(number, size)]
        assert backend.used_bytes <= 200_000
    wait_until(lambda: len(store.objects) == 300)
    counters = backend.counters()
    assert counters["evicted_objects"] > 100
    assert counters["evicted_bytes"] > 500 * counters["evicted_objects"]
    assert get(backend, *range(300), size=5000) == [
        data(number, 500 + 37 * (number % 90)) for number in range(300)
    ]


def test_what_is_counted_is_what_it_takes():
    """ENTRY_BYTES covers what Python keeps about a page."""
    memory = Memory(1 << 30, Counter())
    tracemalloc.start()
    blocks = 0
    for number in range(2000):
        entry = memory.take(600)
        blocks += capacity_of(600)
        memory.unpin(entry)
        memory.install(f"{number:032x}/{number:064x}", entry)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert blocks < used <= memory.used_bytes


def test_a_page_that_is_read_survives_many_that_are_not(fake_store):
    backend, store = fake_store(bytes="50kB")
    put(backend, 1)
    get(backend, 1)
    for number in range(100, 200):
        put(backend, number)
    store.calls.clear()
    assert get(backend, 1) == [data(1)]
    assert store.calls == []


def test_an_object_beyond_the_memory_goes_to_the_store(fake_store):
    for mode in ("write_through", "write_back"):
        backend, store = fake_store(bytes="4kB", mode=mode)
        assert put(backend, 1, size=5000) == [None]
        assert name(1) in store.objects
        assert get(backend, 1, size=5000) == [data(1, 5000)]
        assert backend.counters()["inserted_objects"] == 0
        backend.close()


def test_blocks_are_used_again(fake_store):
    backend, _ = fake_store(bytes="100kB")
    for number in range(50):
        put(backend, number, size=10_000)
    assert backend.used_bytes <= 100_000
    cost = capacity_of(10_000) + ENTRY_BYTES
    assert backend.counters()["evicted_objects"] == 50 - 100_000 // cost


@pytest.mark.parametrize("size", [1, 100, 511, 512, 513, 4096, 5000, 65536, 65537, 1_000_000])
def test_a_block_is_little_larger_than_its_page(size):
    assert size <= capacity_of(size) <= max(size * 9 / 8, size + 511)


# --- fork


def test_a_child_begins_with_empty_memory(tmp_path):
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_backend_tier import *  # noqa
backend = open_backend(tier_url("file://{tmp_path}/store", mode="write_back"))
put(backend, 1)
# Held by nobody in the child, were it not made anew.
backend._tier.lock.acquire(); tier_module._tiers_lock.acquire()
pid = os.fork()
if pid == 0:
    wait_until(lambda: get(backend, 1) == [data(1)])
    assert backend.counters()["misses"] >= 1
    assert put(backend, 2) == [None]
    backend.close()
    os._exit(0)
backend._tier.lock.release(); tier_module._tiers_lock.release()
assert os.waitpid(pid, 0)[1] == 0
wait_until(lambda: get(backend, 2) == [data(2)])
assert get(backend, 1) == [data(1)]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    # The parent did not close it; what it was given is stored all the same.
    store = FileBackend.from_url(f"file://{tmp_path}/store")
    assert get(store, 1, 2) == [data(1), data(2)]
    store.close()


def test_an_object_info_of_the_store_is_passed_on(fake_store):
    backend, store = fake_store()
    store.objects[name(1)] = data(1)
    info = backend.stat(name(1), timeout_seconds=5)
    assert isinstance(info, ObjectInfo) and info.stored_bytes == 1000


# --- what a sidecar asks


def test_bytes_of_memory_and_of_the_store_are_told_apart():
    store_url = "memory://gauged?max_bytes=50kB"
    with closing(open_backend(tier_url(store_url, bytes="200kB"))) as backend:
        put(backend, 0, size=1000)
        assert 1000 < backend.used_bytes < 3000
        assert backend.gauges() == {
            "stored_bytes": backend.used_bytes,
            "limit_bytes": 200_000,
            "store.stored_bytes": 1000,
            "store.limit_bytes": 50_000,
        }


def test_its_origin_is_the_last_store_of_a_chain():
    with closing(open_backend(tier_url(tier_url("memory://")))) as backend:
        assert isinstance(backend.origin, MemoryBackend)
        assert backend.origin.origin is backend.origin
        put(backend, 0)
        assert backend.origin.exists([name(0)], timeout_seconds=1) == [True]
