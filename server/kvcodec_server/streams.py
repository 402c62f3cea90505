"""Objects in chunks: read ahead of a reader, and stored behind a writer, in bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from kvcodec.backend import GetResult, PutResult, check_name
from kvcodec.errors import BackendError, ConfigError, KVCodecError
from kvcodec.format import EncodedPage
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server._frames import chunks, get_part
from kvcodec_server.metadata import metadata_of
from kvcodec_server.options import ServerOptions
from kvcodec_server.raw import RawPages
from kvcodec_server.status import get_outcome, outcome_of, put_outcome
from kvcodec_server.store_calls import Countdown, Pending, StoreCalls

__all__ = ["GetStream", "PutStream", "with_metadata"]

# Staging memory comes in few sizes, so that it is used again: so many from one power of two to the
# next, and none below that many bytes.
_SIZES_PER_OCTAVE = 8
_LEAST_STAGING_BYTES = 64 << 10
# Objects that the store is asked for, or given, in one call: each call wakes a thread, but what lay
# around for long has left the processor's cache.
_GROUP_OBJECTS = 16
_GROUP_BYTES = 8 << 20
# A store that takes less than this part of the time that sending takes is not read ahead: two
# threads at work at once cost more than the wait that they save.
_QUICK = 0.25
# Calls of the store that may be under way behind one writer.
_PUTS_UNDER_WAY = 2

_NOTHING = memoryview(b"")


def with_metadata(outcome: pb.Outcome, page: memoryview) -> None:
    """Add what the page says about itself. One that is no page has no metadata."""
    try:
        outcome.metadata.CopyFrom(metadata_of(EncodedPage.parse(page).header))
    except KVCodecError:
        outcome.ClearField("metadata")


def _staging_bytes(size: int) -> int:
    step = max(_LEAST_STAGING_BYTES, (1 << (size - 1).bit_length()) // 2 // _SIZES_PER_OCTAVE)
    return -(-size // step) * step


@dataclass(slots=True)
class _Group:
    """Some objects on their way from the store, and how long that has taken."""

    rows: list[memoryview]
    pending: Pending[GetResult] | None
    outcomes: list[pb.Outcome]
    release: Countdown
    seconds: float = 0.0


class GetStream:
    """What one reader asked for. What lies in the store's memory goes into messages from there; the
    rest is read in groups, and while one is sent, a store that is not quick reads the next.
    """

    def __init__(
        self,
        calls: StoreCalls,
        request: pb.GetStreamRequest,
        options: ServerOptions,
        deadline: float,
    ) -> None:
        """Raises `ConfigError` for a broken request."""
        self._calls = calls
        self._deadline = deadline
        self._with_metadata = request.with_metadata
        self.raw: RawPages | None = None
        if request.HasField("raw"):
            self.raw = RawPages(calls, request.raw, options.max_object_bytes)
        else:
            for room in request.objects:
                check_name(room.name)
        for room in request.objects:
            room.capacity = min(room.capacity, options.max_object_bytes)
        self._rooms = request.objects
        self._share_bytes = min(_GROUP_BYTES, options.staging_bytes // (2 * options.max_streams))
        self.outcomes: list[pb.Outcome] = []

    def parts(self) -> Iterator[pb.GetStreamResponse | bytes]:
        """The messages of the answer, or what is on the wire already."""
        at, quick = 0, True
        ahead: _Group | None = None
        while at < len(self._rooms):
            lent = None if ahead is not None or self.raw is not None else self._lent(at)
            if lent is not None:
                with lent as data:
                    yield from self._sent(self._outcome(len(data), self._rooms[at], data), data)
                at += 1
                continue
            rooms = self._group(at)
            at += len(rooms)
            group, ahead = ahead or self._start(rooms, self._left()), None
            try:
                outcomes = self._settle(group, rooms)
                if group is not None and not quick and at < len(self._rooms):
                    # Who has memory does not wait for more: others might wait for his.
                    ahead = self._start(self._group(at), 0.0)
                started = time.monotonic()
                for place, outcome in enumerate(outcomes):
                    yield from self._sent(outcome, group.rows[place] if group else _NOTHING)
                if group is not None:
                    quick = group.seconds < _QUICK * (time.monotonic() - started)
            except BaseException:
                if ahead is not None:
                    ahead.release()
                raise
            finally:
                if group is not None:
                    group.release()

    def _lent(self, at: int) -> AbstractContextManager[memoryview] | None:
        """An object that need not be asked for: it goes from the store's memory into a message."""
        return self._calls.lend(self._rooms[at].name)

    def _sent(self, outcome: pb.Outcome, row: memoryview) -> Iterator[pb.GetStreamResponse | bytes]:
        """What is said of an object, and the object."""
        self.outcomes.append(outcome)
        if outcome.status != pb.STATUS_OK:
            yield pb.GetStreamResponse(outcome=outcome)
            return
        message = pb.GetStreamResponse(outcome=outcome)
        for index, chunk in enumerate(chunks(row[: outcome.length])):
            yield get_part(None if index else message, chunk)

    def _outcome(self, result: GetResult, room: pb.ObjectRoom, row: memoryview) -> pb.Outcome:
        outcome = get_outcome(result, room.capacity)
        if outcome.status == pb.STATUS_OK and self._with_metadata:
            with_metadata(outcome, row[: outcome.length])
        return outcome

    def _group(self, at: int) -> list[pb.ObjectRoom]:
        """The objects from there on that fit the share that one reader has of the staging memory;
        one at least.
        """
        rooms: list[pb.ObjectRoom] = []
        largest = 0
        for room in self._rooms[at : at + _GROUP_OBJECTS]:
            largest = max(largest, _staging_bytes(max(1, room.capacity)))
            if rooms and largest * (len(rooms) + 1) > self._share_bytes:
                break
            rooms.append(room)
        return rooms

    def _start(self, wanted: Sequence[pb.ObjectRoom], seconds: float) -> _Group | None:
        """Begin to read a group; None if there is no memory for it in that time."""
        row_bytes = _staging_bytes(max(1, *(room.capacity for room in wanted)))
        buffers = self._calls.pipeline.buffers
        buffer = buffers.acquire(row_bytes * len(wanted), seconds)
        if buffer is None:
            return None
        rows = [
            row.data[: room.capacity]
            for row, room in zip(buffer.reshape(-1, row_bytes), wanted, strict=True)
        ]
        names = [room.name for room in wanted]
        free = partial(buffers.release, buffer)
        if self.raw is not None:
            outcomes = self.raw.get(names, rows, self._left())
            return _Group(rows, None, outcomes, Countdown(1, free))
        group = _Group(rows, None, [pb.Outcome() for _ in wanted], Countdown(2, free))
        started = time.monotonic()

        def prepare(results: Sequence[GetResult]) -> None:
            for place, (result, row) in enumerate(zip(results, rows, strict=True)):
                group.outcomes[place] = self._outcome(result, wanted[place], row)
            group.seconds = time.monotonic() - started

        group.pending = self._calls.get(names, rows, self._left(), group.release, prepare)
        return group

    def _settle(self, group: _Group | None, rooms: Sequence[pb.ObjectRoom]) -> list[pb.Outcome]:
        if group is None:
            error = self._calls.no_memory("get", len(rooms))
            return [outcome_of(error) for _ in rooms]
        if group.pending is None:
            return group.outcomes
        results, _ = group.pending.wait()
        return [
            outcome_of(result) if isinstance(result, BackendError) else outcome
            for result, outcome in zip(results, group.outcomes, strict=True)
        ]

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


class _PutGroup:
    """Some objects that are given to the store together, and its answers."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.data: list[memoryview] = []
        self._releases: list[Callable[[], None]] = []
        self._pending: Pending[PutResult] | None = None
        self._results: list[PutResult] = []

    def add(self, name: str, data: memoryview, release: Callable[[], None]) -> int:
        """One more object; its place."""
        self.names.append(name)
        self.data.append(data)
        self._releases.append(release)
        return len(self.names) - 1

    def is_full(self) -> bool:
        """Whether it is worth a call of the store."""
        return len(self.names) >= _GROUP_OBJECTS or sum(map(len, self.data)) >= _GROUP_BYTES // 2

    def start(self, calls: StoreCalls, seconds: float) -> None:
        """Give them to the store."""
        self._pending = calls.put(self.names, self.data, seconds, self._release)

    def settle(self) -> None:
        """Wait for the store."""
        if self._pending is not None:
            self._results, _ = self._pending.wait()
            self._pending = None

    def outcome(self, place: int) -> pb.Outcome:
        """What became of the object there, once it is settled."""
        return put_outcome(self._results[place], len(self.data[place]))

    def _release(self) -> None:
        for release in self._releases:
            release()
        self._releases.clear()


class PutStream:
    """What one writer sends. While objects are received, those before them are stored."""

    def __init__(self, calls: StoreCalls, options: ServerOptions, deadline: float) -> None:
        self._calls = calls
        self._options = options
        self._deadline = deadline
        self.raw: RawPages | None = None
        self._answers: list[tuple[_PutGroup, int] | pb.Outcome] = []
        self._group = _PutGroup()
        self._under_way: deque[_PutGroup] = deque()

    def receive(
        self, requests: Iterator[tuple[pb.PutStreamRequest | None, memoryview]]
    ) -> list[pb.Outcome]:
        """Store what comes: messages, None for one without, each with its chunk.

        Raises `ConfigError` for a stream that breaks its form: objects before that are stored, the
        one that was cut is not.
        """
        message, _ = next(requests, (None, None))
        if message is None or not message.HasField("header"):
            raise ConfigError("a stream of objects begins with its header")
        if message.header.HasField("raw"):
            self.raw = RawPages(self._calls, message.header.raw, self._options.max_object_bytes)
        try:
            for message, chunk in requests:
                if message is None or not message.HasField("start"):
                    raise ConfigError("an object begins with its name and length")
                self._object(message.start, chain([chunk], _continued(requests)))
        finally:
            self._store()
        for group in self._under_way:
            group.settle()
        return [
            answer if isinstance(answer, pb.Outcome) else answer[0].outcome(answer[1])
            for answer in self._answers
        ]

    def _object(self, start: pb.ObjectStart, received: Iterator[memoryview]) -> None:
        options, buffers = self._options, self._calls.pipeline.buffers
        if self.raw is None:
            check_name(start.name)
        if not 1 <= start.length <= options.max_object_bytes:
            raise ConfigError(
                f"object {start.name} of {start.length} bytes; allowed are 1 to "
                f"{options.max_object_bytes} (max_object_bytes)"
            )
        if len(self._answers) >= options.max_objects:
            raise ConfigError(f"more than {options.max_objects} objects in a call (max_objects)")
        size = _staging_bytes(start.length)
        buffer = buffers.acquire(size, 0.0)
        if buffer is None:
            self._store()  # what waits for company has memory that comes free by that
            buffer = buffers.acquire(size, self._left())
        if buffer is None:
            for _ in _whole(start, received):
                pass
            self._answers.append(outcome_of(self._calls.no_memory("put")))
            return
        release = partial(buffers.release, buffer)
        try:
            data = _assembled(buffer.data[: start.length], _whole(start, received))
        except BaseException:
            release()
            raise
        if self.raw is not None:
            self._answers += self.raw.put([start.name], [data], self._left(), release)
            return
        self._answers.append((self._group, self._group.add(start.name, data, release)))
        if self._group.is_full():
            self._store()

    def _store(self) -> None:
        """Give the store what was received, after it has answered to most of what it has."""
        if not self._group.names:
            return
        if len(self._under_way) == _PUTS_UNDER_WAY:
            self._under_way.popleft().settle()
        self._group.start(self._calls, self._left())
        self._under_way.append(self._group)
        self._group = _PutGroup()

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


def _continued(
    requests: Iterator[tuple[pb.PutStreamRequest | None, memoryview]],
) -> Iterator[memoryview]:
    for message, chunk in requests:
        if message is not None and (message.HasField("start") or message.HasField("header")):
            raise ConfigError("an object begins before all of the one before it has come")
        yield chunk


def _whole(start: pb.ObjectStart, received: Iterator[memoryview]) -> Iterator[memoryview]:
    """The chunks of one object. Raises `ConfigError` if they are not all of it, and no more."""
    at = 0
    for chunk in received:
        at += len(chunk)
        if not chunk or at > start.length:
            raise ConfigError(f"object {start.name} of {start.length} bytes: {at} came")
        yield chunk
        if at == start.length:
            return
    raise ConfigError(f"object {start.name} of {start.length} bytes was cut off after {at}")


def _assembled(target: memoryview, parts: Iterator[memoryview]) -> memoryview:
    """An object in one piece. One that comes in one stays where it is: the target then only counts
    it among the staging memory.
    """
    array, at = np.frombuffer(target, np.uint8), 0
    for part in parts:
        if len(part) == len(target):
            return part
        array[at : at + len(part)] = np.frombuffer(part, np.uint8)  # not under the GIL
        at += len(part)
    return target
