"""TierBackend: what memory holds when calls on one name overlap."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest
from tier_store import data, fake_stores, get, name, put
from waiting import wait_until

from kvcodec.errors import BackendFull


@pytest.fixture
def fake_store(monkeypatch):
    yield from fake_stores(monkeypatch)


def test_a_put_during_a_read_is_not_undone(fake_store):
    """What the read brings is old, and must not get into memory after the new."""
    backend, store = fake_store()
    store.objects[name(1)] = data(1)
    reading, written = threading.Event(), threading.Event()

    def get_into(names, buffers, *, timeout_seconds):
        buffers[0][:1000] = data(1)
        reading.set()
        assert written.wait(20)
        return [1000]

    store.get_into = get_into
    thread = threading.Thread(target=get, args=(backend, 1))
    thread.start()
    assert reading.wait(20)
    views = [memoryview(data(2))]
    assert backend.put([name(1)], views, timeout_seconds=5) == [None]
    written.set()
    thread.join()
    assert get(backend, 1) == [data(2)]


@pytest.mark.parametrize("mode", ["write_through", "write_back"])
def test_a_delete_during_a_read_is_not_undone(fake_store, mode):
    backend, store = fake_store(mode=mode)
    store.objects[name(1)] = data(1)
    original = store.get_into

    def get_into(names, buffers, *, timeout_seconds):
        answers = original(names, buffers, timeout_seconds=timeout_seconds)
        assert backend.delete([name(1)], timeout_seconds=5) == [True]
        return answers

    store.get_into = get_into
    assert get(backend, 1) == [data(1)]
    store.get_into = original
    assert get(backend, 1) == [None]


def test_a_put_in_memory_during_a_read_is_not_undone(fake_store):
    backend, store = fake_store(mode="write_back")
    store.objects[name(1)] = data(1)
    original = store.get_into

    def get_into(names, buffers, *, timeout_seconds):
        answers = original(names, buffers, timeout_seconds=timeout_seconds)
        views = [memoryview(data(2))]
        assert backend.put([name(1)], views, timeout_seconds=5) == [None]
        wait_until(lambda: store.objects[name(1)] == data(2))
        wait_until(lambda: not backend.dirty_bytes)
        return answers

    store.get_into = get_into
    assert get(backend, 1) == [data(1)]
    assert get(backend, 1) == [data(2)]


def test_of_two_writers_at_once_the_store_decides(fake_store):
    """Which put the store took last is not known here, so memory keeps neither."""
    backend, store = fake_store()
    original = store.put

    def nested(names, objects, *, timeout_seconds):
        store.put = original
        original(names, objects, timeout_seconds=timeout_seconds)
        views = [memoryview(data(2))]
        assert backend.put([name(1)], views, timeout_seconds=5) == [None]
        return [None]

    store.put = nested
    put(backend, 1)
    assert not backend._tier.holds([name(1)])[0]
    assert get(backend, 1) == [data(2)]
    assert backend._tier.holds([name(1)])[0]


def test_a_put_that_the_store_refused_leaves_nothing_in_memory(fake_store, monkeypatch):
    backend, store = fake_store()
    put(backend, 1)
    monkeypatch.setattr(store, "put", lambda names, *a, **k: [BackendFull("no")] * len(names))
    answer = backend.put([name(1)], [memoryview(data(2))], timeout_seconds=5)
    assert isinstance(answer[0], BackendFull)
    assert get(backend, 1) == [data(1)]


def test_a_page_is_read_whole_while_it_is_evicted(fake_store):
    """Blocks are used again only when nobody reads them any more."""
    backend, _ = fake_store(bytes="2MiB")
    size, stop_at, failures = 300_000, time.monotonic() + 1.0, []

    def work(seed: int) -> None:
        number = seed
        while time.monotonic() < stop_at:
            number += 4
            put(backend, number % 24, size=size)
            for wanted, found in zip(
                (number % 24, (number + 7) % 24),
                get(backend, number % 24, (number + 7) % 24, size=size),
                strict=True,
            ):
                if found not in (None, data(wanted, size)):
                    failures.append(wanted)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert backend.used_bytes <= 2 << 20


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "write_back"}, {"bytes": "12kB"}, {"bytes": "12kB", "mode": "write_back"}],
    ids=["through", "back", "through, small", "back, small"],
)
def test_memory_and_store_agree_after_any_traffic(fake_store, options):
    """Threads put, read and delete the same names while the store takes its time."""
    backend, store = fake_store(**options)
    store.hook = lambda operation, names: time.sleep(random.random() * 0.002)
    stop_at = time.monotonic() + 1.0

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < stop_at:
            numbers = [rng.randrange(6) for _ in range(rng.randrange(1, 4))]
            kind = rng.random()
            if kind < 0.4:
                views = [memoryview(os.urandom(rng.choice([500, 2000]))) for _ in numbers]
                backend.put(list(map(name, numbers)), views, timeout_seconds=5)
            elif kind < 0.8:
                get(backend, *numbers, size=2000)
            else:
                backend.delete(list(map(name, numbers)), timeout_seconds=5)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: not backend.dirty_bytes)
    assert get(backend, *range(6), size=2000) == get(store, *range(6), size=2000)
    assert backend._tier.flights._open == {}
    assert backend.used_bytes <= backend._tier.options.limit_bytes
    assert all(not entry.pins for entry in backend._tier.memory.entries.values())
    assert backend.counters()["lost_objects"] == 0
