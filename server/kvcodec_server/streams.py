"""Objects in chunks: read ahead of a reader, and stored behind a writer, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from kvcodec.backend import GetResult, PutResult, check_name
from kvcodec.errors import BackendTimeout, ConfigError, KVCodecError
from kvcodec.format import EncodedPage
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server.metadata import metadata_of
from kvcodec_server.options import CHUNK_BYTES, ServerOptions
from kvcodec_server.raw import RawPages
from kvcodec_server.status import get_outcome, outcome_of, put_outcome
from kvcodec_server.store_calls import Countdown, Pending, StoreCalls

__all__ = ["GetStream", "PutStream", "with_metadata"]

# Staging memory comes in few sizes, so that it is used again.
_LEAST_STAGING_BYTES = 1 << 20

Bytes = npt.NDArray[np.uint8]


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
        self._raw: RawPages | None = None
        if request.HasField("raw"):
            self._raw = RawPages(calls, request.raw, options.max_object_bytes)
        else:
            for room in request.objects:
                check_name(room.name)
        for room in request.objects:
            room.capacity = min(room.capacity, options.max_object_bytes)
        self._groups = _grouped(
            request.objects,
            objects=max(1, calls.pipeline.backend.batch_size),
            staging_bytes=options.staging_bytes // (2 * options.max_streams),
        )
        self.outcomes: list[pb.Outcome] = []
        self.sent_bytes = 0

    def parts(self) -> Iterator[pb.GetStreamResponse]:
        """The messages of the answer."""
        ahead: _Group | None = None
        for index, rooms in enumerate(self._groups):
            group = ahead or self._start(rooms, max(0.0, self._deadline - time.monotonic()))
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

    def _object(self, outcome: pb.Outcome, row: memoryview) -> Iterator[pb.GetStreamResponse]:
        self.outcomes.append(outcome)
        yield pb.GetStreamResponse(outcome=outcome)
        if outcome.status == pb.STATUS_OK:
            for start in range(0, outcome.length, CHUNK_BYTES):
                chunk = row[start : min(start + CHUNK_BYTES, outcome.length)]
                self.sent_bytes += len(chunk)
                yield pb.GetStreamResponse(chunk=bytes(chunk))

    def _start(self, rooms: Sequence[pb.ObjectRoom], seconds: float) -> _Group | None:
        """Begin to read a group; None if there is no memory for it in that time."""
        row_bytes = _staging_bytes(max(room.capacity for room in rooms))
        buffers = self._calls.pipeline.buffers
        buffer = buffers.acquire(row_bytes * len(rooms), seconds)
        if buffer is None:
            return None
        rows = [
            row.data[: room.capacity]
            for row, room in zip(buffer.reshape(-1, row_bytes), rooms, strict=True)
        ]
        names = [room.name for room in rooms]
        left = max(0.0, self._deadline - time.monotonic())
        free = partial(buffers.release, buffer)
        if self._raw is not None:
            return _Group(rows, None, self._raw.get(names, rows, left), Countdown(1, free))
        release = Countdown(2, free)
        return _Group(rows, self._calls.get(names, rows, left, release), [], release)

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


def _grouped(
    rooms: Sequence[pb.ObjectRoom], *, objects: int, staging_bytes: int
) -> list[list[pb.ObjectRoom]]:
    """Cut a request into groups that fit the share that one reader has of the staging memory."""
    groups: list[list[pb.ObjectRoom]] = []
    largest = 0
    for room in rooms:
        largest = max(largest, _staging_bytes(room.capacity))
        full = groups and (
            len(groups[-1]) == objects or largest * (len(groups[-1]) + 1) > staging_bytes
        )
        if not groups or full:
            groups.append([])
            largest = _staging_bytes(room.capacity)
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
        self._raw: RawPages | None = None
        self._answers: list[tuple[int, Pending[PutResult]] | pb.Outcome] = []
        self.received_bytes = 0

    @property
    def is_raw(self) -> bool:
        """Whether pages came raw."""
        return self._raw is not None

    def receive(self, requests: Iterator[pb.PutStreamRequest]) -> list[pb.Outcome]:
        """Store what comes. Raises `ConfigError` for a stream that breaks its form: objects before
        that are stored, the one that was cut is not.
        """
        first = next(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise ConfigError("a stream of objects begins with its header")
        if first.header.HasField("raw"):
            self._raw = RawPages(self._calls, first.header.raw, self._options.max_object_bytes)
        for request in requests:
            if request.WhichOneof("part") != "start":
                raise ConfigError("an object begins with its name and length")
            self._object(request.start, requests)
        return [
            answer
            if isinstance(answer, pb.Outcome)
            else put_outcome(answer[1].wait()[0][0], answer[0])
            for answer in self._answers
        ]

    def _object(self, start: pb.ObjectStart, requests: Iterator[pb.PutStreamRequest]) -> None:
        options, buffers = self._options, self._calls.pipeline.buffers
        if self._raw is None:
            check_name(start.name)
        if not 1 <= start.length <= options.max_object_bytes:
            raise ConfigError(
                f"object {start.name} of {start.length} bytes; allowed are 1 to "
                f"{options.max_object_bytes} (max_object_bytes)"
            )
        if len(self._answers) >= options.max_objects:
            raise ConfigError(f"more than {options.max_objects} objects in a call (max_objects)")
        left = max(0.0, self._deadline - time.monotonic())
        buffer = buffers.acquire(_staging_bytes(start.length), left)
        if buffer is None:
            self._fill(None, start, requests)
            self._answers.append(outcome_of(_no_memory()))
            return
        release = partial(buffers.release, buffer)
        target = buffer.data[: start.length]
        try:
            self._fill(target, start, requests)
        except BaseException:
            release()
            raise
        left = max(0.0, self._deadline - time.monotonic())
        if self._raw is not None:
            self._answers += self._raw.put([start.name], [target], left, release)
        else:
            pending = self._calls.put([start.name], [target], left, release)
            self._answers.append((start.length, pending))

    def _fill(
        self,
        target: memoryview | None,
        start: pb.ObjectStart,
        requests: Iterator[pb.PutStreamRequest],
    ) -> None:
        at = 0
        while at < start.length:
            request = next(requests, None)
            chunk = request.chunk if request is not None else b""
            if not chunk or at + len(chunk) > start.length:
                raise ConfigError(
                    f"object {start.name} was to have {start.length} bytes; after {at} of them "
                    f"came {len(chunk)}"
                )
            if target is not None:
                target[at : at + len(chunk)] = chunk
            at += len(chunk)
            self.received_bytes += len(chunk)
