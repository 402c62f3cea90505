"""Objects in chunks: read ahead of a reader, and stored behind a writer, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from kvcodec.backend import GetResult, PutResult, check_name
from kvcodec.errors import BackendTimeout, ConfigError, KVCodecError
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
    """Some objects on their way from the store."""

    rows: list[memoryview]
    pending: Pending[GetResult] | None
    outcomes: list[pb.Outcome]
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
                rows = [memoryview(b"")] * len(rooms) if group is None else group.rows
                for outcome, row in zip(outcomes, rows, strict=True):
                    yield from self._object(outcome, row)
            except BaseException:
                if ahead is not None:
                    ahead.release()
                raise
            finally:
                if group is not None:
                    group.release()

    def _object(
        self, outcome: pb.Outcome, row: memoryview
    ) -> Iterator[pb.GetStreamResponse | bytes]:
        self.outcomes.append(outcome)
        message = pb.GetStreamResponse(outcome=outcome)
        if outcome.status != pb.STATUS_OK:
            yield message
            return
        for index, chunk in enumerate(chunks(row[: outcome.length])):
            yield get_part(None if index else message, chunk)

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
            return _Group(rows, None, outcomes, Countdown(1, free))
        release = Countdown(2, free)
        return _Group(rows, self._calls.get(names, rows, self._left(), release), [], release)

    def _settle(self, group: _Group | None, rooms: Sequence[pb.ObjectRoom]) -> list[pb.Outcome]:
        if group is None:
            return [outcome_of(_no_memory()) for _ in rooms]
        if group.pending is None:
            return group.outcomes
        results, _ = group.pending.wait()
        outcomes = [
            get_outcome(result, room.capacity) for result, room in zip(results, rooms, strict=True)
        ]
        if self._with_metadata:
            for outcome, row in zip(outcomes, group.rows, strict=True):
                if outcome.status == pb.STATUS_OK:
                    with_metadata(outcome, row[: outcome.length])
        return outcomes

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


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


def _no_memory() -> BackendTimeout:
    return BackendTimeout("no staging memory came free in time (staging_bytes)")


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
            _fill(None, start, received)
            self._answers.append(outcome_of(_no_memory()))
            return
        release = partial(buffers.release, buffer)
        target = buffer.data[: start.length]
        try:
            _fill(target, start, received)
        except BaseException:
            release()
            raise
        if self.raw is not None:
            self._answers += self.raw.put([start.name], [target], self._left(), release)
        else:
            pending = self._calls.put([start.name], [target], self._left(), release)
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


def _fill(target: memoryview | None, start: pb.ObjectStart, received: Iterator[memoryview]) -> None:
    """Put an object together; without a target its bytes are passed over."""
    at = 0
    for chunk in received:
        if not chunk or at + len(chunk) > start.length:
            raise ConfigError(
                f"object {start.name} of {start.length} bytes: after {at} came {len(chunk)}"
            )
        if target is not None:
            target[at : at + len(chunk)] = chunk
        at += len(chunk)
        if at == start.length:
            return
    raise ConfigError(f"object {start.name} of {start.length} bytes was cut off after {at}")
