"""How streams use the store and the staging memory: what a client sees of them is elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from waiting import wait_until

from kvcodec.errors import ConfigError
from kvcodec_backends.memory import MemoryBackend
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server._frames import chunks
from kvcodec_server.options import CHUNK_BYTES, ServerOptions
from kvcodec_server.store_calls import StoreCalls
from kvcodec_server.streams import GetStream, PutStream

MIB = 1 << 20


class Store(MemoryBackend):
    """Notes the number of objects of each call; takes its time for each, or waits for `gate`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[int] = []

    def put(self, names, objects, *, timeout_seconds):
        self._begin(names)
        return super().put(names, objects, timeout_seconds=timeout_seconds)

    def get_into(self, names, buffers, *, timeout_seconds):
        self._begin(names)
        return super().get_into(names, buffers, timeout_seconds=timeout_seconds)

    def lend(self, name):
        return None

    def _begin(self, names: Sequence[str]) -> None:
        self.calls.append(len(names))
        time.sleep(self.seconds)
        assert self.gate.wait(10)


class Lending(Store):
    """Lends the objects of these numbers; `lent` are those that somebody has."""

    def __init__(self, numbers: set[int]) -> None:
        super().__init__()
        self.numbers = {name(number): number for number in numbers}
        self.lent: list[int] = []

    def lend(self, name):
        return self._lent(name) if name in self.numbers else None

    @contextmanager
    def _lent(self, name):
        self.lent.append(self.numbers[name])
        with MemoryBackend.lend(self, name) as data:
            try:
                yield data
            finally:
                self.lent.remove(self.numbers[name])


@pytest.fixture
def make():
    """Makes the store calls of a sidecar over a store."""
    made: list[StoreCalls] = []

    def of(store: Store, **options: int) -> tuple[StoreCalls, ServerOptions]:
        known = ServerOptions(**options)
        made.append(StoreCalls(store, known))
        return made[-1], known

    yield of
    for calls in made:
        calls.close()


def name(number: int) -> str:
    return f"{0:032x}/{number:064x}"


def sent(
    count: int, size: int, pulled: list[int] | None = None
) -> Iterator[tuple[pb.PutStreamRequest | None, memoryview]]:
    """The messages of a put of so many objects, one each; `pulled` gets the numbers of those that
    were asked for.
    """
    yield pb.PutStreamRequest(header=pb.PutStreamHeader()), memoryview(b"")
    for number in range(count):
        if pulled is not None:
            pulled.append(number)
        start = pb.ObjectStart(name=name(number), length=size)
        yield pb.PutStreamRequest(start=start), memoryview(bytes([number]) * size)


def stored(store: Store, count: int, size: int) -> None:
    with store._store.lock:
        for number in range(count):
            assert store._store.get(name(number)) == bytes([number]) * size


def reader(calls: StoreCalls, options: ServerOptions, count: int, capacity: int):
    rooms = [pb.ObjectRoom(name=name(number), capacity=capacity) for number in range(count)]
    stream = GetStream(calls, pb.GetStreamRequest(objects=rooms), options, time.monotonic() + 20)
    return stream.parts()


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, 3 * MIB - 1, 3 * MIB, 5 * MIB, 13 * MIB])
def test_messages_are_few_equal_and_fit_what_grpc_takes_anywhere(size):
    parts = [len(part) for part in chunks(memoryview(bytes(size)))]
    assert sum(parts) == size
    assert max(parts) <= 3 * MIB and max(parts) - min(parts) < len(parts)
    assert (len(parts) == 1) == (size < 3 * MIB)


def test_small_objects_go_to_the_store_and_come_from_it_together(make):
    store = Store()
    calls, options = make(store)
    outcomes = PutStream(calls, options, time.monotonic() + 20).receive(sent(40, 1000))
    assert [(outcome.status, outcome.length) for outcome in outcomes] == [(pb.STATUS_OK, 1000)] * 40
    stored(store, 40, 1000)
    assert len(store.calls) == 3
    store.calls.clear()
    assert len(list(reader(calls, options, 40, 1000))) == 40
    assert len(store.calls) == 3


def test_what_lies_in_memory_is_not_read_into_any(make):
    store = Lending({0, 1, 4})
    calls, options = make(store, max_object_bytes=9000)
    outcomes = PutStream(calls, options, time.monotonic() + 20).receive(sent(6, 9000))
    assert [outcome.status for outcome in outcomes] == [pb.STATUS_OK] * 6
    store.calls.clear()
    staged = calls.pipeline.buffers.allocated_bytes
    parts = reader(calls, options, 7, 9000)
    for number in range(2):
        outcome = pb.Outcome(status=pb.STATUS_OK, length=9000)
        message = pb.GetStreamResponse(outcome=outcome, chunk=bytes([number]) * 9000)
        assert pb.GetStreamResponse.FromString(next(parts)) == message
    assert not store.calls
    assert calls.pipeline.buffers.allocated_bytes == staged
    for number in range(2, 6):
        assert pb.GetStreamResponse.FromString(next(parts)).chunk == bytes([number]) * 9000
    (last,) = parts
    assert last.outcome.status == pb.STATUS_NOT_FOUND
    assert store.calls == [5], "what is read at all is read together"


def test_an_object_in_memory_that_has_no_room_is_told_of(make):
    store = Lending({0, 1})
    calls, options = make(store)
    PutStream(calls, options, time.monotonic() + 20).receive(sent(2, 9000))
    too_long, also = reader(calls, options, 2, 8999)
    assert [part.outcome.status for part in (too_long, also)] == [pb.STATUS_TOO_LONG] * 2
    assert too_long.outcome.length == 9000


def test_an_object_in_memory_is_held_until_its_last_part_is_sent(make):
    size = 4 * MIB
    store = Lending({0, 1})
    calls, options = make(store, max_object_bytes=size)
    PutStream(calls, options, time.monotonic() + 20).receive(sent(2, size))
    parts = reader(calls, options, 2, size)
    next(parts)
    assert store.lent == [0]
    next(parts)
    assert store.lent == [0]
    next(parts)
    assert store.lent == [1]
    parts.close()
    assert store.lent == []


@pytest.mark.parametrize(("seconds", "pause", "ahead"), [(0.2, 0.0, 1), (0.0, 0.8, 0)])
def test_a_slow_store_is_read_ahead_and_a_quick_one_is_not(make, seconds, pause, ahead):
    size = 4 * MIB
    store = Store(seconds)
    calls, options = make(store, max_object_bytes=size)
    outcomes = PutStream(calls, options, time.monotonic() + 20).receive(sent(5, size))
    assert [outcome.status for outcome in outcomes] == [pb.STATUS_OK] * 5
    store.calls.clear()
    parts = reader(calls, options, 5, size)
    for _ in range(3):  # both parts of the first object, and half of the second
        next(parts)
        time.sleep(pause)
    wait_until(lambda: len(store.calls) >= 2 + ahead)
    time.sleep(0.05)
    assert len(store.calls) == 2 + ahead
    assert len(list(parts)) == 7


def test_a_writer_waits_for_a_store_that_does_not_keep_up(make):
    store = Store()
    calls, options = make(store)
    store.gate.clear()
    pulled: list[int] = []
    put = PutStream(calls, options, time.monotonic() + 20)
    thread = threading.Thread(target=put.receive, args=(sent(100, 1000, pulled),))
    thread.start()
    wait_until(lambda: len(store.calls) == 2)
    time.sleep(0.1)
    assert len(pulled) <= 3 * 16
    store.gate.set()
    thread.join(10)
    assert len(pulled) == 100
    stored(store, 100, 1000)


def test_objects_in_wait_make_room_for_the_next(make):
    """Two of them do not fit the staging memory at once, and none fills a call."""
    store = Store()
    calls, options = make(store, staging_bytes=MIB, max_object_bytes=MIB)
    started = time.monotonic()
    outcomes = PutStream(calls, options, started + 20).receive(sent(4, 600_000))
    assert [outcome.status for outcome in outcomes] == [pb.STATUS_OK] * 4
    assert time.monotonic() - started < 10
    stored(store, 4, 600_000)
    assert calls.pipeline.buffers.acquire(MIB, 1.0) is not None, "something was not given back"


def test_what_came_before_a_broken_message_is_stored(make):
    store = Store()
    calls, options = make(store)

    def broken():
        yield from sent(3, 1000)
        start = pb.ObjectStart(name=name(3), length=1000)
        yield pb.PutStreamRequest(start=start), memoryview(b"x")
        yield pb.PutStreamRequest(header=pb.PutStreamHeader()), memoryview(b"")

    with pytest.raises(ConfigError, match="an object begins before"):
        PutStream(calls, options, time.monotonic() + 20).receive(broken())
    wait_until(lambda: len(store._store.objects) == 3)
    stored(store, 3, 1000)
    limit = calls.pipeline.buffers.limit_bytes
    wait_until(lambda: calls.pipeline.buffers.acquire(limit, 0.0) is not None)
