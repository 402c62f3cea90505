"""Objects to and from a sidecar anywhere, in chunks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grpc
import numpy as np

from kvcodec.backend import Deadline, GetResult, PutResult
from kvcodec.errors import BackendError
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1.service_pb2_grpc import PageServiceStub
from kvcodec_server._client_local import as_backend_error
from kvcodec_server._frames import chunks, parse_get, put_part, serialized
from kvcodec_server.status import get_result, put_result

__all__ = ["RemoteDoor"]

_OBJECTS_PER_CALL = 500
# A connection that was left is closed after this time: calls on it that do hear something go on.
_LEFT_SECONDS = 60.0
_MAX_LEFT = 8
# What only a sidecar says, of a connection that is well: who is refused for the crowd does not make
# it larger.
_HEARD = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)

Metadata = tuple[tuple[str, str], ...]


class _Line:
    """One connection."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.stub = PageServiceStub(channel)
        self.get = channel.unary_stream(
            "/kvcodec.v1.PageService/GetStream",
            request_serializer=pb.GetStreamRequest.SerializeToString,
            response_deserializer=parse_get,
        )
        self.put = channel.stream_unary(
            "/kvcodec.v1.PageService/PutStream",
            request_serializer=serialized,
            response_deserializer=pb.PutStreamResponse.FromString,
        )
        self.left_at = 0.0


class RemoteDoor:
    """A sidecar at ``host:port``. Thread-safe; not for both sides of a fork.

    A call that hears nothing leaves its connection to those that hear something, and the next call
    makes another: what is between may have forgotten it without a word. Nor is gRPC quick to
    connect again by itself: a channel that is asked all the time while its server is away says for
    2 to 40 seconds after its return that it cannot connect, whatever the backoff is set to.
    """

    def __init__(self, open_channel: Callable[[], grpc.Channel], metadata: Metadata) -> None:
        self._open_channel = open_channel
        self._metadata = metadata
        self._lock = threading.Lock()
        self._line = _Line(open_channel())
        self._left: list[_Line] = []

    def stub(self, deadline: Deadline) -> tuple[PageServiceStub, Metadata]:
        """For calls that move no objects."""
        del deadline
        return self._line.stub, self._metadata

    def suspect(self, stub: PageServiceStub, error: grpc.RpcError) -> None:
        """A call on this connection has failed, as after hearing nothing."""
        if isinstance(error, grpc.Call) and error.code() in _HEARD:
            return
        now = time.monotonic()
        with self._lock:
            if self._line.stub is not stub:
                return
            self._line.left_at = now
            self._left.append(self._line)
            self._line = _Line(self._open_channel())
            silent = [line for line in self._left if now - line.left_at > _LEFT_SECONDS]
            silent += [line for line in self._left[:-_MAX_LEFT] if line not in silent]
            self._left = [line for line in self._left if line not in silent]
        for line in silent:
            line.channel.close()

    def get(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[GetResult]:
        """Read objects into memory. What was not reached has the error of the call."""
        results: list[GetResult] = []
        for at in range(0, len(pairs), _OBJECTS_PER_CALL):
            results += self._get(pairs[at : at + _OBJECTS_PER_CALL], deadline)
        return results

    def put(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[PutResult]:
        """Store objects from memory, which is not read after the return."""
        results: list[PutResult] = []
        for at in range(0, len(pairs), _OBJECTS_PER_CALL):
            results += self._put(pairs[at : at + _OBJECTS_PER_CALL], deadline)
        return results

    def close(self) -> None:
        """Close the connections; calls under way end."""
        for line in [*self._left, self._line]:
            line.channel.close()

    def _get(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[GetResult]:
        results: list[GetResult] = []
        line = self._line
        rooms = [pb.ObjectRoom(name=name, capacity=len(view)) for name, view in pairs]
        try:
            parts = line.get(
                pb.GetStreamRequest(objects=rooms),
                timeout=deadline.remaining_seconds(),
                metadata=self._metadata,
            )
            try:
                for _, view in pairs:
                    results.append(_read(parts, view))
            finally:
                parts.cancel()
        except grpc.RpcError as error:
            found = as_backend_error(error)
            if not results:
                self.suspect(line.stub, error)
            results += [found] * (len(pairs) - len(results))
        except (BackendError, ValueError) as error:
            results += [BackendError(str(error))] * (len(pairs) - len(results))
        return results

    def _put(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[PutResult]:
        parts, line = _Parts(pairs), self._line
        try:
            response = line.put(
                parts, timeout=deadline.remaining_seconds(), metadata=self._metadata
            )
            if len(response.outcomes) == len(pairs):
                return [put_result(outcome) for outcome in response.outcomes]
            error = BackendError(f"{len(response.outcomes)} answers for {len(pairs)} objects")
        except grpc.RpcError as call:
            error = as_backend_error(call)
            self.suspect(line.stub, call)
        except ValueError as closed:
            error = BackendError(str(closed))
        finally:
            parts.stop()
        return [error] * len(pairs)


def _read(
    parts: Iterator[tuple[pb.GetStreamResponse | None, memoryview]], view: memoryview
) -> GetResult:
    """The next object of a stream, checked against the room for it before anything is written."""
    message, chunk = next(parts, (None, memoryview(b"")))
    if message is None or not message.HasField("outcome"):
        raise BackendError("the sidecar broke the form of a stream: no outcome")
    result = get_result(message.outcome, len(view))
    if not isinstance(result, int) or message.outcome.status != pb.STATUS_OK:
        return result
    at = 0
    while chunk and at + len(chunk) <= result:
        target = np.frombuffer(view, np.uint8)  # an assignment to the view would hold the GIL
        target[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
        if at == result:
            return result
        _, chunk = next(parts, (None, memoryview(b"")))
    raise BackendError(f"the sidecar broke off an object of {result} bytes after {at}")


class _Parts:
    """The messages of a put, made when they are sent: by gRPC's thread, until the call is over."""

    def __init__(self, pairs: Sequence[tuple[str, memoryview]]) -> None:
        self._parts = self._all(pairs)
        self._lock = threading.Lock()
        self._stopped = False

    def __iter__(self) -> Iterator[pb.PutStreamRequest | bytes]:
        return self

    def __next__(self) -> pb.PutStreamRequest | bytes:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._parts)

    def stop(self) -> None:
        """The memory of the objects is read no more."""
        with self._lock:
            self._stopped = True

    def _all(
        self, pairs: Sequence[tuple[str, memoryview]]
    ) -> Iterator[pb.PutStreamRequest | bytes]:
        yield pb.PutStreamRequest(header=pb.PutStreamHeader())
        for name, view in pairs:
            start = pb.ObjectStart(name=name, length=len(view))
            message = pb.PutStreamRequest(start=start)
            for index, chunk in enumerate(chunks(view)):
                yield put_part(None if index else message, chunk)
