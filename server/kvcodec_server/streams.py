"""Objects in chunks: read ahead of a reader, and stored behind a writer, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
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

# Staging memory comes in few sizes, so that it is used again.
_LEAST_STAGING_BYTES = 1 << 20
# Up to this size what a thread does for an object leaves the caller's free to talk to the network;
# larger ones would take memory twice.
_SMALL_BYTES = 8 << 20
# Objects that are read together, while as many are sent: more of them leave the processor's cache.
_GROUP_OBJECTS = 2


def with_metadata(outcome: pb.Outcome, page: memoryview) -> None:
    """Add what the page says about itself. One that is no page has no metadata."""
    try:
        outcome.metadata.CopyFrom(metadata_of(EncodedPage.parse(page).header))
    except KVCodecError:
        outcome.ClearField("metadata")


def _staging_bytes(size: int) -> int:
    return max(_LEAST_STAGING_BYTES, 1 << (size - 1).bit_length())


@dataclass(slots=True)
class _Group:
    """Some objects on their way from the store, and what is ready to be sent of them."""

    rows: list[memoryview]
    pending: Pending[GetResult] | None
    outcomes: list[pb.Outcome]
    parts: dict[int, list[bytes]]
    release: Countdown


class GetStream:
    """What one reader asked for. While a group of objects is sent, the next is read."""

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
        self._groups = _grouped(
            request.objects,
            objects=min(_GROUP_OBJECTS, max(1, calls.pipeline.backend.batch_size)),
            staging_bytes=options.staging_bytes // (2 * options.max_streams),
        )
        self.outcomes: list[pb.Outcome] = []

    def parts(self) -> Iterator[pb.GetStreamResponse | bytes]:
        """The messages of the answer, or what is on the wire already."""
        ahead: _Group | None = None
        for index, rooms in enumerate(self._groups):
            group = ahead or self._start(rooms, self._left())
            ahead = None
            try:
                outcomes = self._settle(group, rooms)
                if group is not None and index + 1 < len(self._groups):
                    # Who has memory does not wait for more: others might wait for his.
                    ahead = self._start(self._groups[index + 1], 0.0)
                for place, outcome in enumerate(outcomes):
                    self.outcomes.append(outcome)
                    if group is None or outcome.status != pb.STATUS_OK:
                        yield pb.GetStreamResponse(outcome=outcome)
                    else:
                        row = group.rows[place][: outcome.length]
                        yield from group.parts.get(place) or _parts(outcome, row)
            except BaseException:
                if ahead is not None:
                    ahead.release()
                raise
            finally:
                if group is not None:
                    group.release()

    def _start(self, rooms: Sequence[pb.ObjectRoom], seconds: float) -> _Group | None:
        """Begin to read a group; None if there is no memory for it in that time."""
        row_bytes = _staging_bytes(max(1, *(room.capacity for room in rooms)))
        buffers = self._calls.pipeline.buffers
        buffer = buffers.acquire(row_bytes * len(rooms), seconds)
        if buffer is None:
            return None
        rows = [
            row.data[: room.capacity]
            for row, room in zip(buffer.reshape(-1, row_bytes), rooms, strict=True)
        ]
        names = [room.name for room in rooms]
        free = partial(buffers.release, buffer)
        if self.raw is not None:
            outcomes = self.raw.get(names, rows, self._left())
            return _Group(rows, None, outcomes, {}, Countdown(1, free))
        outcomes = [pb.Outcome() for _ in rooms]
        parts: dict[int, list[bytes]] = {}
        release = Countdown(2, free)

        def prepare(results: Sequence[GetResult]) -> None:
            for place, (result, row) in enumerate(zip(results, rows, strict=True)):
                outcome = outcomes[place] = get_outcome(result, len(row))
                if outcome.status == pb.STATUS_OK:
                    page = row[: outcome.length]
                    if self._with_metadata:
                        with_metadata(outcome, page)
                    if outcome.length <= _SMALL_BYTES:
                        parts[place] = list(_parts(outcome, page))

        pending = self._calls.get(names, rows, self._left(), release, prepare)
        return _Group(rows, pending, outcomes, parts, release)

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


def _parts(outcome: pb.Outcome, data: memoryview) -> Iterator[bytes]:
    """An object as it is sent."""
    message = pb.GetStreamResponse(outcome=outcome)
    for index, chunk in enumerate(chunks(data)):
        yield get_part(None if index else message, chunk)


def _grouped(
    rooms: Sequence[pb.ObjectRoom], *, objects: int, staging_bytes: int
) -> list[list[pb.ObjectRoom]]:
    """Cut a request into groups that fit the share that one reader has of the staging memory."""
    groups: list[list[pb.ObjectRoom]] = []
    largest = 0
    for room in rooms:
        size = _staging_bytes(max(1, room.capacity))
        largest = max(largest, size)
        if (
            not groups
            or len(groups[-1]) == objects
            or largest * (len(groups[-1]) + 1) > staging_bytes
        ):
            groups.append([])
            largest = size
        groups[-1].append(room)
    return groups


class PutStream:
    """What one writer sends. While an object is received, those before it are stored."""

    def __init__(self, calls: StoreCalls, options: ServerOptions, deadline: float) -> None:
        self._calls = calls
        self._options = options
        self._deadline = deadline
        self.raw: RawPages | None = None
        self._answers: list[tuple[int, Pending[PutResult]] | pb.Outcome] = []

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
        for message, chunk in requests:
            if message is None or not message.HasField("start"):
                raise ConfigError("an object begins with its name and length")
            self._object(message.start, chain([chunk], _continued(requests)))
        return [
            answer
            if isinstance(answer, pb.Outcome)
            else put_outcome(answer[1].wait()[0][0], answer[0])
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
        buffer = buffers.acquire(_staging_bytes(start.length), self._left())
        if buffer is None:
            for _ in _whole(start, received):
                pass
            self._answers.append(outcome_of(self._calls.no_memory("put")))
            return
        release = partial(buffers.release, buffer)
        target = buffer.data[: start.length]
        late: list[memoryview] = []
        try:
            if self.raw is None and start.length <= _SMALL_BYTES:
                late = list(_whole(start, received))
            else:
                _fill(target, _whole(start, received))
        except BaseException:
            release()
            raise
        if self.raw is not None:
            self._answers += self.raw.put([start.name], [target], self._left(), release)
            return
        if len(late) == 1:
            # It lies in one piece already; the buffer only counts it among the staging memory.
            pending = self._calls.put([start.name], late, self._left(), release)
        else:
            first = partial(_fill, target, late)
            pending = self._calls.put([start.name], [target], self._left(), release, first)
        self._answers.append((start.length, pending))

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


def _fill(target: memoryview, parts: Iterable[memoryview]) -> None:
    """Put an object together; not under the GIL."""
    array, at = np.frombuffer(target, np.uint8), 0
    for part in parts:
        array[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
