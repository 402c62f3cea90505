"""gRPC's streams of objects, between a connection to the sidecar and the caller's memory.

Of a message all but its chunk is read and written by protobuf. A chunk goes from the socket to
where its object is wanted, and from there to the socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from urllib.parse import unquote

import grpc
import hpack
from google.protobuf.message import DecodeError

from kvcodec.backend import Deadline, GetResult, PutResult
from kvcodec.errors import BackendError
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server._frames import GET_TAG, chunks, put_head
from kvcodec_server._http2 import Http2Connection
from kvcodec_server.options import Metadata
from kvcodec_server.status import (
    STATUS_TRAILER,
    as_backend_error,
    error_of_status,
    get_result,
    put_result,
)

__all__ = ["get", "put"]

_SERVICE = "/kvcodec.v1.PageService/"
# Of the answer to a put, and of what a message of a get has beside its chunk.
_MAX_ANSWER_BYTES = 4 << 20
_MAX_FIELD_BYTES = 64 << 10
_LONGEST_TIMEOUT = 99_999_999
# How long they are waited for when every object is there, so that the connection can be kept.
_TRAILERS_SECONDS = 1.0

_CODES = {str(code.value[0]): code for code in grpc.StatusCode}
# Of an answer that is not gRPC's own, such as a proxy's: gRPC's "HTTP to gRPC status code mapping".
_CODES_OF_HTTP = {
    "400": grpc.StatusCode.INTERNAL,
    "401": grpc.StatusCode.UNAUTHENTICATED,
    "403": grpc.StatusCode.PERMISSION_DENIED,
    "404": grpc.StatusCode.UNIMPLEMENTED,
    "429": grpc.StatusCode.UNAVAILABLE,
    "502": grpc.StatusCode.UNAVAILABLE,
    "503": grpc.StatusCode.UNAVAILABLE,
    "504": grpc.StatusCode.UNAVAILABLE,
}


def get(
    connection: Http2Connection,
    pairs: Sequence[tuple[str, memoryview]],
    metadata: Metadata,
    deadline: Deadline,
) -> Iterator[GetResult]:
    """Read objects into memory, an answer each.

    Raises `BackendError` if the sidecar refuses the call or breaks its form, and what an
    `Http2Connection` raises.
    """
    _begin(connection, "GetStream", metadata, deadline)
    rooms = [pb.ObjectRoom(name=name, capacity=len(view)) for name, view in pairs]
    connection.send([_message(pb.GetStreamRequest(objects=rooms).SerializeToString())], last=True)
    parts = _Parts(connection)
    for _, view in pairs:
        yield _read(parts, view)
    with suppress(TimeoutError):
        connection.finish(_TRAILERS_SECONDS)


def put(
    connection: Http2Connection,
    pairs: Sequence[tuple[str, memoryview]],
    metadata: Metadata,
    deadline: Deadline,
) -> list[PutResult]:
    """Store objects from memory, which is not read after the return. Raises as `get` does."""
    _begin(connection, "PutStream", metadata, deadline)
    header = pb.PutStreamRequest(header=pb.PutStreamHeader()).SerializeToString()
    is_wanted = connection.send([_message(header)])
    for name, view in pairs:
        start = pb.PutStreamRequest(start=pb.ObjectStart(name=name, length=len(view)))
        for index, chunk in enumerate(chunks(view)):
            head = put_head(None if index else start, len(chunk))
            is_wanted = is_wanted and connection.send([_message(head, len(chunk)), chunk])
        if not is_wanted:
            break
    if is_wanted:
        connection.send([], last=True)
    parts = _Parts(connection)
    size = parts.begin()
    if size > _MAX_ANSWER_BYTES:
        raise BackendError(f"the sidecar answered with {size} bytes")
    answer = parts.read(size)
    connection.finish()
    error = _error_of(connection)
    if error is not None:
        raise error
    try:
        outcomes = pb.PutStreamResponse.FromString(answer).outcomes
    except DecodeError as broken:
        raise BackendError(f"the sidecar's answer cannot be read: {broken}") from broken
    if len(outcomes) != len(pairs):
        raise BackendError(f"{len(outcomes)} answers for {len(pairs)} objects")
    return [put_result(outcome) for outcome in outcomes]


def _begin(
    connection: Http2Connection, method: str, metadata: Metadata, deadline: Deadline
) -> None:
    left = min(deadline.remaining_seconds() * 1000, _LONGEST_TIMEOUT)
    connection.begin(
        _SERVICE + method,
        [
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "kvcodec"),
            ("grpc-timeout", f"{max(1, round(left))}m"),
            *(hpack.NeverIndexedHeaderTuple(name, value) for name, value in metadata),
        ],
        deadline,
    )


def _message(head: bytes, chunk_bytes: int = 0) -> bytes:
    """A message as gRPC sends it, up to its chunk."""
    return b"\0" + (len(head) + chunk_bytes).to_bytes(4, "big") + head


def _error_of(connection: Http2Connection) -> BackendError | None:
    """Why a call failed that is over; None if it did not."""
    status, http = (
        connection.fields.get("grpc-status", ""),
        connection.fields.get(":status", "none"),
    )
    if status == "0":
        return None
    if status.isdecimal():
        code = _CODES.get(status, grpc.StatusCode.UNKNOWN)
        detail = unquote(connection.fields.get("grpc-message", ""))
    else:
        code = _CODES_OF_HTTP.get(http, grpc.StatusCode.UNKNOWN)
        detail = f"an answer without a status of gRPC, its HTTP status {http}"
    return as_backend_error(
        error_of_status(code, detail, connection.fields.get(STATUS_TRAILER, ""))
    )


class _Parts:
    """The messages of an answer."""

    def __init__(self, connection: Http2Connection) -> None:
        self._connection = connection
        self._left = 0

    def begin(self) -> int:
        """The length of the next message. Raises the error of the call if there is none."""
        if self._left > _MAX_FIELD_BYTES:
            raise BackendError(f"the sidecar answered with {self._left} bytes after an object")
        if self._left:
            self.read(self._left)
        prefix = self.read(5)
        if self._connection.fields.get(":status") != "200":
            raise self._failure()
        if prefix[0]:
            raise BackendError("the sidecar answered with a compressed message")
        self._left = int.from_bytes(prefix[1:], "big")
        return self._left

    def next(self) -> tuple[pb.GetStreamResponse, int]:
        """What the next message of a get says, and how long its chunk is, which is to be read."""
        self.begin()
        head = bytearray()
        size = self._fields(head)
        try:
            return pb.GetStreamResponse.FromString(bytes(head)), size
        except DecodeError as broken:
            raise BackendError(f"the sidecar's answer cannot be read: {broken}") from broken

    def read(self, size: int) -> bytes:
        """So many bytes of an answer that is not long."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, view: memoryview) -> None:
        """The next bytes of a chunk."""
        if not self._connection.receive_into(view):
            raise self._failure()
        self._left -= min(self._left, len(view))

    def _failure(self) -> BackendError:
        """Why there is no message where one should be."""
        return _error_of(self._connection) or BackendError("the sidecar broke off its answer")

    def _fields(self, head: bytearray) -> int:
        """Collect the fields before a chunk, whatever they are; the length of the chunk."""
        while self._left:
            at = len(head)
            tag = self._varint(head)
            size = {0: 0, 1: 8, 2: -1, 5: 4}.get(tag & 7)
            if size is None:
                raise BackendError(f"the sidecar sent a field of wire type {tag & 7}")
            if tag & 7 == 0:
                self._varint(head)
            if size < 0:
                size = self._varint(head)
            if size > self._left:
                raise BackendError(f"the sidecar sent a field of {size} bytes in {self._left}")
            if tag == GET_TAG:
                del head[at:]
                return size
            if len(head) + size > _MAX_FIELD_BYTES:
                raise BackendError(f"the sidecar answered with {size} bytes before an object")
            head += self.read(size)
        return 0

    def _varint(self, head: bytearray) -> int:
        value = 0
        for shift in range(0, 70, 7):
            if not self._left:
                break
            head += self.read(1)
            value |= (head[-1] & 0x7F) << shift
            if head[-1] < 0x80:
                return value
        raise BackendError("the sidecar sent a number that does not end")


def _read(parts: _Parts, view: memoryview) -> GetResult:
    """The next object of a stream, checked against the room for it before anything is written."""
    message, size = parts.next()
    if not message.HasField("outcome"):
        raise BackendError("the sidecar broke the form of a stream: no outcome")
    result = get_result(message.outcome, len(view))
    if not isinstance(result, int) or message.outcome.status != pb.STATUS_OK:
        return result
    at = 0
    while size and at + size <= result:
        parts.read_into(view[at : at + size])
        at += size
        if at == result:
            return result
        _, size = parts.next()
    raise BackendError(f"the sidecar broke off an object of {result} bytes after {at}")
