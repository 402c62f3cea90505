"""TierBackend with mode=write_back: pages in memory only, and how they get to the store."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import pytest
from fake_backend import FakeBackend
from tier_store import data, fake_stores, get, name, put
from waiting import wait_until

from kvcodec.errors import BackendError, BackendFull, BackendTimeout
from kvcodec_backends import _tier_writer
from kvcodec_backends.file import FileBackend


@pytest.fixture
def fake_store(monkeypatch):
    yield from fake_stores(monkeypatch)


BACK = {"mode": "write_back"}


class Gate:
    """Puts of a store wait until it is open; afterwards they go through, or fail."""

    def __init__(self, store: FakeBackend) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.error: BackendError | None = None
        self.timeouts: list[float] = []
        self.batches: list[list[str]] = []
        self._put = store.put
        store.put = self.put  # type: ignore[method-assign]

    def put(self, names, objects, *, timeout_seconds):
        self.timeouts.append(timeout_seconds)
        self.batches.append(list(names))
        self.reached.set()
        if not self.opened.wait(timeout_seconds):
            return [BackendTimeout("no answer")] * len(names)
        if self.error is not None:
            return [self.error] * len(names)
        return self._put(names, objects, timeout_seconds=timeout_seconds)


def names_of(*numbers: int) -> list[str]:
    return [name(number) for number in numbers]


def test_a_put_answers_before_the_store_has_the_page(fake_store):
    backend, store = fake_store(**BACK)
    gate = Gate(store)
    started = time.monotonic()
    assert put(backend, 1, 2, 3) == [None] * 3
    assert time.monotonic() - started < 5
    assert store.objects == {}
    assert backend.dirty_bytes > 3000
    assert get(backend, 1, 2, 3) == [data(1), data(2), data(3)]
    gate.opened.set()
    wait_until(lambda: not backend.dirty_bytes)
    assert store.objects == {name(number): data(number) for number in (1, 2, 3)}
    assert get(backend, 1, 2, 3) == [data(1), data(2), data(3)]
    counters = backend.counters()
    assert (counters["buffered_objects"], counters["flushed_objects"]) == (3, 3)
    assert (counters["buffered_bytes"], counters["flushed_bytes"]) == (3000, 3000)
    assert counters["misses"] == 0


def test_pages_are_stored_in_order_and_in_batches(fake_store):
    backend, store = fake_store(**BACK)
    gate = Gate(store)
    put(backend, 0)
    assert gate.reached.wait(20)
    put(backend, *range(1, 6))
    gate.opened.set()
    wait_until(lambda: not backend.dirty_bytes)
    assert list(chain.from_iterable(gate.batches)) == names_of(*range(6))
    assert max(map(len, gate.batches)) == store.batch_size == 2


def test_what_is_not_stored_yet_is_there_for_every_call(fake_store):
    backend, store = fake_store(**BACK)
    store.objects = {name(0): data(0), name(1): b"old"}
    gate = Gate(store)
    put(backend, 1, 2)
    assert backend.exists(names_of(0, 1, 2, 3), timeout_seconds=5) == [True, True, True, False]
    assert backend.exists_prefix(names_of(0, 1, 2, 3), timeout_seconds=5) == 3
    listed = [(info.name, info.stored_bytes) for info in backend.list()]
    assert sorted(listed) == [(name(number), 1000) for number in range(3)]
    assert [info.name for info in backend.list("f" * 32)] == []
    info = backend.stat(name(1), timeout_seconds=5)
    assert info is not None
    assert (info.stored_bytes, abs(info.modified_seconds - time.time()) < 60) == (1000, True)
    assert backend.stat(name(3), timeout_seconds=5) is None
    gate.opened.set()


def test_a_page_replaced_before_it_was_stored_is_stored_once_more(fake_store):
    backend, store = fake_store(**BACK)
    gate = Gate(store)
    put(backend, 1)
    assert gate.reached.wait(20)
    assert backend.put([name(1)], [memoryview(b"newer")], timeout_seconds=5) == [None]
    gate.opened.set()
    wait_until(lambda: not backend.dirty_bytes)
    assert store.objects == {name(1): b"newer"}
    assert get(backend, 1) == [b"newer"]


def test_a_page_deleted_before_it_was_stored_is_never_stored(fake_store):
    backend, store = fake_store(**BACK)
    gate = Gate(store)
    put(backend, 0)
    assert gate.reached.wait(20)
    put(backend, 1)
    assert backend.delete(names_of(1, 1, 9), timeout_seconds=5) == [True, False, False]
    gate.opened.set()
    wait_until(lambda: not backend.dirty_bytes)
    assert set(store.objects) == {name(0)}


def test_a_delete_waits_for_the_put_that_is_under_way(fake_store):
    """Else that put would bring the page back."""
    backend, store = fake_store(**BACK)
    gate = Gate(store)
    put(backend, 1)
    assert gate.reached.wait(20)
    started = time.monotonic()
    assert backend.delete([name(1)], timeout_seconds=0.3) == [False]
    assert 0.25 < time.monotonic() - started < 5
    threading.Timer(0.2, gate.opened.set).start()
    assert backend.delete([name(1)], timeout_seconds=20) == [True]
    assert store.objects == {}
    assert get(backend, 1) == [None]


def test_a_put_after_a_delete_waits_for_its_end(fake_store, monkeypatch):
    """Else the delete would take the new page out of the store, and memory would still have it."""
    backend, store = fake_store(**BACK)
    store.objects[name(1)] = b"old"
    original = store.delete

    def slow(names, *, timeout_seconds):
        assert put(backend, 1) == [None]
        time.sleep(0.3)
        return original(names, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(store, "delete", slow)
    assert backend.delete([name(1)], timeout_seconds=5) == [True]
    wait_until(lambda: not backend.dirty_bytes)
    assert store.objects == {name(1): data(1)}
    assert get(backend, 1) == [data(1)]


def test_a_delete_that_the_store_cannot_confirm_is_none(fake_store, monkeypatch):
    """The page in memory is gone, an older one may still be in the store."""
    backend, store = fake_store(**BACK)
    gate = Gate(store)
    put(backend, 0)
    assert gate.reached.wait(20)
    put(backend, 1)

    def away(name, *, timeout_seconds):
        raise BackendError("away")

    monkeypatch.setattr(store, "delete", lambda names, **_: [False] * len(names))
    monkeypatch.setattr(store, "stat", away)
    assert backend.delete([name(1)], timeout_seconds=5) == [False]
    gate.opened.set()


# --- bounds


def test_a_put_waits_for_room_and_no_longer_than_its_deadline(fake_store):
    backend, store = fake_store(**BACK, dirty_bytes=3000)
    gate = Gate(store)
    assert put(backend, 1, 2) == [None, None]
    started = time.monotonic()
    (answer,) = put(backend, 3, seconds=0.3)
    assert 0.25 < time.monotonic() - started < 5
    assert isinstance(answer, BackendFull)
    assert "dirty_bytes=3000" in str(answer)
    assert backend.dirty_bytes <= 3000
    threading.Timer(0.2, gate.opened.set).start()
    assert put(backend, 3, seconds=20) == [None]
    wait_until(lambda: len(store.objects) == 3)


def test_while_the_store_fails_a_full_buffer_answers_at_once(fake_store):
    backend, store = fake_store(**BACK, dirty_bytes=3000)
    gate = Gate(store)
    gate.error = BackendError("away")
    gate.opened.set()
    put(backend, 1, 2)
    wait_until(lambda: backend.counters()["flush_failed"] >= 2)
    started = time.monotonic()
    (answer,) = put(backend, 3, seconds=20)
    assert isinstance(answer, BackendFull)
    assert time.monotonic() - started < 5
    # Nothing is lost meanwhile, and all is well once the store is back.
    assert get(backend, 1, 2) == [data(1), data(2)]
    gate.error = None
    wait_until(lambda: not backend.dirty_bytes)
    assert put(backend, 3) == [None]
    assert backend.counters()["lost_objects"] == 0


def test_dirty_pages_are_never_evicted(fake_store):
    backend, store = fake_store(**BACK, bytes=20_000, dirty_bytes=10_000)
    gate = Gate(store)
    put(backend, 1, 2, 3)
    for number in range(100, 200):
        store.objects[name(number)] = data(number)
        assert get(backend, number) == [data(number)]
    assert backend.counters()["evicted_objects"] > 80
    assert get(backend, 1, 2, 3) == [data(1), data(2), data(3)]
    assert not set(names_of(1, 2, 3)) & set(store.objects)
    assert backend.used_bytes <= 20_000
    gate.opened.set()


def test_a_page_beyond_the_dirty_bytes_goes_to_the_store_at_once(fake_store):
    backend, store = fake_store(**BACK, dirty_bytes=3000)
    gate = Gate(store)
    gate.opened.set()
    assert put(backend, 1, size=5000) == [None]
    assert store.objects == {name(1): data(1, 5000)}
    assert backend.counters()["buffered_objects"] == 0
    assert get(backend, 1, size=5000) == [data(1, 5000)]
    assert backend.counters()["hits"] == 1


def test_a_large_page_does_not_pass_the_small_one_before_it(fake_store):
    """The small one of the same name is under way, and would arrive later."""
    backend, store = fake_store(**BACK, dirty_bytes=3000)
    gate = Gate(store)
    put(backend, 1)
    assert gate.reached.wait(20)
    large = [memoryview(data(1, 5000))]
    (answer,) = backend.put([name(1)], large, timeout_seconds=0.2)
    assert isinstance(answer, BackendTimeout)
    threading.Timer(0.2, gate.opened.set).start()
    assert backend.put([name(1)], large, timeout_seconds=20) == [None]
    assert store.objects == {name(1): data(1, 5000)}


# --- stores that fail


def test_a_page_that_the_store_alone_refuses_is_given_up(fake_store, monkeypatch):
    """Kept for ever, it would take room from others, and tries from the store."""
    monkeypatch.setattr(_tier_writer, "_FIRST_PAUSE_SECONDS", 0.001)
    backend, store = fake_store(**BACK)
    original = store.put

    def refusing(names, objects, *, timeout_seconds):
        answers = original(names, objects, timeout_seconds=timeout_seconds)
        refused = [name(1)] if name(1) in names else []
        for each in refused:
            del store.objects[each]
        return [
            BackendError("too large for me") if each in refused else answer
            for each, answer in zip(names, answers, strict=True)
        ]

    store.put = refusing
    put(backend, 1)
    wait_until(lambda: backend.counters()["flush_failed"] > 6)
    assert backend.counters()["lost_objects"] == 0
    put(backend, 2, 3)
    wait_until(lambda: not backend.dirty_bytes)
    counters = backend.counters()
    assert (counters["lost_objects"], counters["lost_bytes"]) == (1, 1000)
    assert set(store.objects) == set(names_of(2, 3))
    assert get(backend, 1) == [None]


def test_pages_that_the_store_refuses_hold_no_others_up(fake_store):
    """As many as one batch takes."""
    backend, store = fake_store(**BACK)
    original = store.put

    def refusing(names, objects, *, timeout_seconds):
        if set(names) & {name(1), name(2)}:
            return [BackendError("no")] * len(names)
        return original(names, objects, timeout_seconds=timeout_seconds)

    store.put = refusing
    put(backend, 1, 2, 3, 4)
    wait_until(lambda: set(store.objects) == {name(3), name(4)})
    store.put = original


def test_a_store_that_raises_ends_nothing(fake_store, monkeypatch):
    monkeypatch.setattr(_tier_writer, "_FIRST_PAUSE_SECONDS", 0.001)
    backend, store = fake_store(**BACK)

    def hook(operation, names):
        if operation == "put":
            raise RuntimeError("a bug")

    store.hook = hook
    assert put(backend, 1) == [None]
    wait_until(lambda: backend.counters()["store_raised"] >= 3)
    store.hook = lambda operation, names: None
    wait_until(lambda: not backend.dirty_bytes)
    assert store.objects == {name(1): data(1)}


def test_a_store_that_fails_is_not_asked_all_the_time(fake_store):
    backend, store = fake_store(**BACK)
    gate = Gate(store)
    gate.error = BackendError("away")
    gate.opened.set()
    put(backend, 1)
    time.sleep(0.8)
    wait_until(lambda: len(gate.batches) >= 2)
    # After 0.05, 0.1, 0.2, 0.4 s ...
    assert len(gate.batches) <= 6
    gate.error = None


# --- closing


def test_closing_stores_what_is_left(fake_store):
    backend, store = fake_store(**BACK)
    gate = Gate(store)
    put(backend, *range(5))
    threading.Timer(0.2, gate.opened.set).start()
    backend.close()
    assert set(store.objects) == set(names_of(*range(5)))
    assert store.closed
    assert backend.counters()["lost_objects"] == 0
    assert (backend.dirty_bytes, backend.used_bytes) == (0, 0)


@pytest.mark.parametrize("hangs", [True, False])
def test_closing_takes_no_longer_than_it_may(fake_store, hangs):
    backend, store = fake_store(**BACK, flush_timeout_seconds=0.5)
    gate = Gate(store)
    gate.error = BackendError("away")
    if not hangs:
        gate.opened.set()
    put(backend, *range(5))
    assert gate.reached.wait(20)
    if hangs:
        # The call that is under way was given ten seconds.
        threading.Timer(0.55, gate.opened.set).start()
    started = time.monotonic()
    backend.close()
    assert 0.4 < time.monotonic() - started < 3
    counters = backend.counters()
    assert (counters["lost_objects"], counters["lost_bytes"]) == (5, 5000)
    assert max(gate.timeouts[1:], default=0) <= 0.5
    assert isinstance(put(backend, 9)[0], BackendError)


def test_a_put_that_waits_for_room_ends_with_the_tier(fake_store):
    backend, store = fake_store(**BACK, dirty_bytes=2000, flush_timeout_seconds=0)
    Gate(store)
    put(backend, 1)
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(put(backend, 2, 3, seconds=20)))
    thread.start()
    time.sleep(0.1)
    backend.close()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(answers[-1], BackendError) and "closed" in str(answers[-1])


@pytest.mark.parametrize("tiers", [1, 2])
def test_a_process_that_forgets_to_close_stores_what_it_has(tmp_path, tiers):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tier_store import *
from kvcodec.backend import open_backend
url = "file://{tmp_path}/store"
for _ in range({tiers}):
    url = tier_url(url, mode="write_back")
backend = open_backend(url)
assert put(backend, *range(20)) == [None] * 20
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    store = FileBackend.from_url(f"file://{tmp_path}/store")
    assert get(store, *range(20)) == [data(number) for number in range(20)]
    store.close()


def test_no_thread_is_started_before_there_is_something_to_do(fake_store):
    before = threading.active_count()
    backend, _ = fake_store(**BACK)
    get(backend, 1)
    assert threading.active_count() == before
    put(backend, 1)
    assert threading.active_count() == before + 1
    backend.close()
    assert threading.active_count() == before
