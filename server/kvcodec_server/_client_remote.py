"""Objects to and from a sidecar anywhere, in chunks."""

from __future__ import annotations

import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from kvcodec.backend import Deadline, GetResult, PutResult
from kvcodec.connection import Connection, TLSConnection
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec_proto.v1.service_pb2_grpc import PageServiceStub
from kvcodec_server import _client_streams as streams
from kvcodec_server._http2 import Http2Connection, NotServed
from kvcodec_server.options import CLIENT_METADATA, Metadata

__all__ = ["Address", "RemoteDoor"]

T = TypeVar("T")

_OBJECTS_PER_CALL = 500
# A connection that was left is closed after this time: calls on it that do hear something go on.
_LEFT_SECONDS = 60.0
_MAX_LEFT = 8
# One for streams that has waited for so long is not used again: whatever is between may have
# forgotten it, and the server asks whether we are there after twice the time. It is closed with the
# next call, or by the server.
_IDLE_SECONDS = 5.0
_MAX_IDLE = 16
# How long one attempt to connect may take: a server that stands still is one that does not answer.
_CONNECT_SECONDS = 5.0
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


@dataclass(frozen=True, slots=True)
class Address:
    """Where a sidecar is, and with `tls` how to be sure: its certificate has `server_name`."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    server_name: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connect(self, deadline: Deadline) -> Http2Connection:
        """A connection for streams. Raises `OSError`."""
        soon = Deadline(min(_CONNECT_SECONDS, deadline.remaining_seconds()))
        transport: Connection
        if self.tls is None:
            transport = Connection(self.host, self.port, soon)
        else:
            transport = TLSConnection(self.host, self.port, soon, self.tls, self.server_name)
        try:
            if isinstance(transport, TLSConnection) and transport.protocol() != "h2":
                raise ConnectionError("the server does not speak HTTP/2")
            scheme, authority = "https" if self.tls else "http", self.server_name or str(self)
            return Http2Connection(transport, scheme, authority, soon)
        except BaseException:
            transport.close()
            raise


class _Line:
    """One connection for calls that move no objects."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.stub = PageServiceStub(channel)
        self.left_at = 0.0


class RemoteDoor:
    """A sidecar at ``host:port``. Thread-safe; not for both sides of a fork.

    Objects move over connections of our own, of one call at a time; everything else over gRPC's.

    A call that hears nothing leaves gRPC's connection to those that hear something, and the next
    call makes another: what is between may have forgotten it without a word. Nor is gRPC quick to
    connect again by itself: a channel that is asked all the time while its server is away says for
    2 to 40 seconds after its return that it cannot connect, whatever the backoff is set to.
    """

    def __init__(
        self, address: Address, open_channel: Callable[[], grpc.Channel], metadata: Metadata
    ) -> None:
        self._address = address
        self._open_channel = open_channel
        self._metadata = (*metadata, (CLIENT_METADATA, secrets.token_hex(8)))
        self._lock = threading.Lock()
        self._line = _Line(open_channel())
        self._left: list[_Line] = []
        self._idle: list[tuple[float, Http2Connection]] = []
        self._used: set[Http2Connection] = set()
        self._closed = False

    def stub(self, deadline: Deadline) -> tuple[PageServiceStub, Metadata]:
        """For calls that move no objects."""
        del deadline
        return self._line.stub, self._metadata

    def suspect(self, stub: PageServiceStub, error: grpc.RpcError) -> None:
        """A call on this connection has failed, as after hearing nothing."""
        if not (isinstance(error, grpc.Call) and error.code() in _HEARD):
            self._leave(stub)

    def get(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[GetResult]:
        """Read objects into memory. What was not reached has the error of the call."""
        return self._answers(pairs, deadline, streams.get)

    def put(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[PutResult]:
        """Store objects from memory, which is not read after the return."""
        return self._answers(pairs, deadline, streams.put)

    def close(self) -> None:
        """Close the connections; calls under way end."""
        with self._lock:
            self._closed = True
            for connection in self._used:
                connection.transport.abort()
            lines = [*self._left, self._line]
        self._close_idle()
        for line in lines:
            line.channel.close()

    def _answers(
        self,
        pairs: Sequence[tuple[str, memoryview]],
        deadline: Deadline,
        exchange: Callable[
            [Http2Connection, Sequence[tuple[str, memoryview]], Metadata, Deadline], Iterable[T]
        ],
    ) -> list[T | BackendError]:
        """An answer per object, in calls of some objects each.

        A call that cannot have reached the server goes on over a new connection, once: its own had
        waited since another call, or the server says so.
        """
        answers: list[T | BackendError] = []
        is_new = False
        while len(answers) < len(pairs):
            line, connection, was_idle = self._line, None, False
            end = min(len(answers) + _OBJECTS_PER_CALL, len(pairs))
            error: BackendError | None = None
            try:
                connection, was_idle = self._take(deadline, is_new=is_new)
                for answer in exchange(
                    connection, pairs[len(answers) : end], self._metadata, deadline
                ):
                    answers.append(answer)  # those before an error count, too
            except BackendError as found:
                error = found
            except TimeoutError:
                if connection is None or not connection.heard:
                    self._leave(line.stub)
                what = "connection" if connection is None else "answer"
                error = BackendTimeout(f"{self._address}: no {what} in time")
                end = len(pairs)
            except OSError as lost:
                is_stale = was_idle and connection and not (connection.ended or connection.heard)
                if is_new or not (is_stale or isinstance(lost, NotServed)):
                    error = BackendError(f"{self._address}: {lost}")
                is_new = True
            else:
                is_new = False
            finally:
                if connection is not None:
                    self._give(connection)
            if error is not None:
                answers += [error] * (end - len(answers))
                is_new = False
        return answers

    def _take(self, deadline: Deadline, *, is_new: bool) -> tuple[Http2Connection, bool]:
        """A connection, and whether it was used before."""
        connection: Http2Connection | None = None
        while not is_new and connection is None:
            with self._lock:
                if not self._idle:
                    break
                since, connection = self._idle.pop()
            if time.monotonic() - since > _IDLE_SECONDS or not connection.is_usable(deadline):
                connection.transport.close()
                connection = None
        was_idle = connection is not None
        connection = connection or self._address.connect(deadline)
        with self._lock:
            self._used.add(connection)
            if self._closed:
                connection.transport.abort()
        return connection, was_idle

    def _give(self, connection: Http2Connection) -> None:
        """Keep a connection whose call is over, and close those that nobody wants any more."""
        now = time.monotonic()
        with self._lock:
            self._used.discard(connection)
            fresh = [(since, idle) for since, idle in self._idle if now - since <= _IDLE_SECONDS]
            if connection.ended and not self._closed:
                fresh.append((now, connection))
            kept = fresh[-_MAX_IDLE:]
            old = {idle for _, idle in self._idle} | {connection}
            old -= {idle for _, idle in kept}
            self._idle = kept
        for idle in old:
            if not idle.ended:
                # A child that was forked meanwhile would keep the call open at the server.
                idle.transport.abort()
            idle.transport.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.transport.close()

    def _leave(self, stub: PageServiceStub) -> None:
        """Let later calls make other connections, unless they do already."""
        # Whatever ails one, those that wait idle have it too.
        self._close_idle()
        now = time.monotonic()
        with self._lock:
            if self._closed or self._line.stub is not stub:
                return
            self._line.left_at = now
            self._left.append(self._line)
            self._line = _Line(self._open_channel())
            silent = [line for line in self._left if now - line.left_at > _LEFT_SECONDS]
            silent += [line for line in self._left[:-_MAX_LEFT] if line not in silent]
            self._left = [line for line in self._left if line not in silent]
        for line in silent:
            line.channel.close()
