"""The circuit breaker: a store that does not answer costs one deadline, once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from fake_backend import FakeBackend
from store_pages import NAMESPACE, empty_pages, keys_of, random_pages, timed
from waiting import wait_until

from kvcodec.errors import BackendError, BackendFull, BackendReadOnly, BackendTimeout
from kvcodec.guard import Attempt, Breaker
from kvcodec.log import RateLimitedLog
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline, StoreOptions
from kvcodec.workers import Counters, IOThreads

SILENT = [BackendTimeout("late")]
FAILED = [BackendError("broken")]


class Store:
    """What a probe finds."""

    def __init__(self) -> None:
        self.well = threading.Event()
        self.probed_at: list[float] = []

    @property
    def probes(self) -> int:
        return len(self.probed_at)

    def probe(self) -> None:
        self.probed_at.append(time.monotonic())
        if not self.well.is_set():
            raise BackendError("still broken")


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def counts() -> Counters:
    return Counters()


@pytest.fixture
def breaker(store: Store, counts: Counters) -> Iterator[Breaker]:
    log = RateLimitedLog(logging.getLogger("kvcodec.test"))
    breaker = Breaker("read", store.probe, counts, log, failures=3, cooldown_seconds=0.02)
    yield breaker
    breaker.close()


def settle(breaker: Breaker, answers: Sequence[object] | None) -> None:
    attempt = Attempt()
    attempt.note(answers)
    breaker.settle(attempt)


def test_a_store_that_was_away_for_long_is_noticed_soon(breaker: Breaker, store: Store) -> None:
    settle(breaker, SILENT)
    wait_until(lambda: store.probes >= 12)
    store.well.set()
    wait_until(lambda: breaker.admits)
    # An interval that doubled would be 1.28 s by now; a loaded machine lengthens some, not all.
    last = store.probed_at[7:12]
    assert min(later - earlier for earlier, later in pairwise(last)) < 0.5


def test_one_silent_call_opens_it(breaker: Breaker) -> None:
    settle(breaker, SILENT)
    assert not breaker.admits


def test_one_answer_among_silence_keeps_it_closed(breaker: Breaker) -> None:
    for _ in range(10):
        settle(breaker, [*SILENT, None, *SILENT])
        settle(breaker, [*SILENT, 17])
    assert breaker.admits


def test_errors_open_it_only_in_a_row(breaker: Breaker) -> None:
    for _ in range(5):
        settle(breaker, FAILED)
        settle(breaker, None)
        settle(breaker, [None])
    assert breaker.admits
    for _ in range(3):
        assert breaker.admits
        settle(breaker, FAILED)
    assert not breaker.admits


@pytest.mark.parametrize("answer", [BackendFull("full"), BackendReadOnly("locked"), None, 5])
def test_a_store_that_says_what_is_wrong_answers(breaker: Breaker, answer: object) -> None:
    for _ in range(10):
        settle(breaker, [answer])
    assert breaker.admits


def test_a_call_that_asked_nothing_says_nothing(breaker: Breaker) -> None:
    settle(breaker, FAILED)
    settle(breaker, FAILED)
    settle(breaker, [])
    assert breaker.admits
    settle(breaker, FAILED)
    assert not breaker.admits


def test_it_closes_when_a_probe_succeeds(breaker: Breaker, store: Store, counts: Counters) -> None:
    settle(breaker, SILENT)
    wait_until(lambda: store.probes >= 2)
    assert not breaker.admits
    store.well.set()
    wait_until(lambda: breaker.admits)
    found = counts.snapshot()
    assert found["read_breaker.opened"] == found["read_breaker.closed"] == 1
    assert found["read_breaker.probe_failed"] >= 2


def test_it_stays_open_longer_each_time_until_a_call_succeeds(
    breaker: Breaker, store: Store
) -> None:
    store.well.set()

    def seconds_open() -> float:
        started = time.monotonic()
        settle(breaker, SILENT)
        wait_until(lambda: breaker.admits)
        return time.monotonic() - started

    seconds_open()  # the first time it is asked again soon
    for doubled in range(5):
        assert seconds_open() >= 0.02 * 2**doubled
    # One more doubling would be 0.64 s; a loaded machine may add as much to 0.02 s, but not always.
    tries = []
    for _ in range(5):
        settle(breaker, [None])
        tries.append(seconds_open())
    assert min(tries) < 0.6


def test_a_probe_that_hangs_keeps_it_open_and_blocks_nobody(counts: Counters) -> None:
    release, probes = threading.Event(), []

    def hang() -> None:
        probes.append(1)
        release.wait(30)

    log = RateLimitedLog(logging.getLogger("kvcodec.test"))
    breaker = Breaker("read", hang, counts, log, failures=1, cooldown_seconds=0.01)
    settle(breaker, SILENT)
    wait_until(lambda: bool(probes))
    _, seconds = timed(settle, breaker, SILENT)
    assert seconds < 10  # the probe would take 30
    assert not breaker.admits
    breaker.close()
    release.set()


def test_no_failures_wanted_is_no_breaker(store: Store, counts: Counters) -> None:
    log = RateLimitedLog(logging.getLogger("kvcodec.test"))
    breaker = Breaker("read", store.probe, counts, log, failures=0, cooldown_seconds=0.01)
    for _ in range(10):
        settle(breaker, SILENT)
    assert breaker.admits


def test_the_log_has_a_line_and_not_more(
    breaker: Breaker, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.well.set()
    for _ in range(3):
        settle(breaker, SILENT)
        wait_until(lambda: breaker.admits)
    opened = [r for r in caplog.records if "does not answer" in r.getMessage()]
    closed = [r for r in caplog.records if "answers again" in r.getMessage()]
    assert (len(opened), len(closed)) == (1, 1)


# --- threads that hang


def test_stuck_threads_are_replaced_a_bounded_number_of_times() -> None:
    io, release, started = IOThreads(2), threading.Event(), []

    def hang() -> None:
        started.append(1)
        release.wait(30)

    for generation in range(1, 6):
        for _ in range(2):
            io.submit(hang)
        wait_until(lambda g=generation: len(started) == min(2 * g, 8))  # type: ignore[misc]
        time.sleep(0.02)
        assert io.replace_stuck(60) == 0
        assert io.replace_stuck(0.01) == (2 if generation <= 3 else 0)
    release.set()
    answers = [io.call(lambda: 1, 0, 5) for _ in range(20)]
    assert answers == [1] * 20
    io.close(5)


def test_a_thread_given_up_ends_with_its_call() -> None:
    io, release, started = IOThreads(1), threading.Event(), threading.Event()

    def hang() -> None:
        started.set()
        release.wait(30)

    io.submit(hang)
    assert started.wait(20)
    time.sleep(0.02)
    before = threading.active_count()
    assert io.replace_stuck(0.01) == 1
    assert threading.active_count() == before + 1
    release.set()
    wait_until(lambda: threading.active_count() == before)
    assert io.call(lambda: 1, 0, 5) == 1
    io.close(5)


# --- through a page store

SHORT = StoreOptions(
    buffer_bytes=8 << 20,
    exists_timeout_seconds=0.3,
    prefetch_timeout_seconds=0.5,
    backup_timeout_seconds=0.5,
    breaker_cooldown_seconds=0.05,
)


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    backend = FakeBackend()
    yield backend
    backend.hook = lambda operation, names: None


@pytest.fixture
def pages(backend: FakeBackend) -> Iterator[PageStore]:
    pipeline = Pipeline(backend, SHORT)
    yield PageStore(pipeline, NAMESPACE, CodecSpec())
    backend.hook = lambda operation, names: None
    pipeline.close()


@pytest.mark.parametrize("operation", ["exists", "get", "put"])
def test_a_store_that_hangs_for_ever_costs_one_deadline_once(
    pages: PageStore, backend: FakeBackend, operation: str
) -> None:
    """Then nothing; and when it is back, everything is as before."""
    _, views = random_pages(6)
    wait_until(lambda: pages.backup(keys_of(6), views) == [True] * 6)
    hanging = threading.Event()
    hanging.set()

    def hook(called: str, names: Sequence[str]) -> None:
        while hanging.is_set() and called in (operation, "stat"):
            time.sleep(0.01)

    backend.hook = hook

    def call() -> object:
        if operation == "get":
            return pages.prefetch(keys_of(6), empty_pages(6)[1])
        if operation == "put":
            return pages.backup(keys_of(6, start=100), views)
        return pages.exists(keys_of(6))

    result, seconds = timed(call)
    assert result == [False] * 6
    assert seconds < 3  # a deadline for each page would be that long
    started = time.monotonic()
    for _ in range(50):
        assert call() == [False] * 6
    assert time.monotonic() - started < 7  # a deadline for each call would be twice that
    hanging.clear()
    wait_until(lambda: call() == [True] * 6)


def test_a_store_that_answers_probes_and_nothing_else_costs_less_and_less(
    pages: PageStore, backend: FakeBackend
) -> None:
    _, views = random_pages(2)
    wait_until(lambda: pages.backup(keys_of(2), views) == [True] * 2)
    backend.hook = lambda called, names: time.sleep(1.0 if called == "get" else 0)
    stop_at = time.monotonic() + 6.0
    while time.monotonic() < stop_at:
        assert pages.prefetch(keys_of(2), empty_pages(2)[1]) == [False] * 2
        time.sleep(0.005)
    # Without doubling it would be asked every 0.55 s: eleven times.
    assert 2 <= len([call for call in backend.calls if call[0] == "get"]) <= 8


def test_a_choked_uplink_does_not_cost_the_hits(backend: FakeBackend) -> None:
    pipeline = Pipeline(backend, replace(SHORT, prefetch_timeout_seconds=30))
    pages, going_on = PageStore(pipeline, NAMESPACE, CodecSpec()), threading.Event()
    _, views = random_pages(4)
    wait_until(lambda: pages.backup(keys_of(4), views) == [True] * 4)
    backend.hook = lambda called, names: going_on.wait(60) if called == "put" else None
    assert pages.backup(keys_of(4, start=50), views) == [False] * 4
    assert pages.backup(keys_of(4, start=60), views) == [False] * 4
    assert pages.prefetch(keys_of(4), empty_pages(4)[1]) == [True] * 4
    going_on.set()
    pipeline.close()


def test_exists_that_answers_no_at_its_deadline_is_silence(
    pages: PageStore, backend: FakeBackend
) -> None:
    """As a client with a time-out of its own does when the server hangs."""

    def hook(called: str, names: Sequence[str]) -> None:
        if called != "exists":  # a probe, which would close the breaker again
            raise BackendError("away")
        time.sleep(0.27)

    backend.hook = hook
    assert pages.exists(keys_of(3)) == [False] * 3
    asked = [called for called, _ in backend.calls].count("exists")
    assert pages.exists(keys_of(3)) == [False] * 3
    assert [called for called, _ in backend.calls].count("exists") == asked
