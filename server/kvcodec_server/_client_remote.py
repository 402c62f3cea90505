"""Objects to and from a sidecar anywhere, in chunks."""

from __future__ import annotations

import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from kvcodec.backend import Deadline, GetResult, PutResult
from kvcodec.connection import Connection
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec_proto.v1.service_pb2_grpc import PageServiceStub
from kvcodec_server import _client_streams as streams
from kvcodec_server._client_streams import Metadata
from kvcodec_server._http2 import Http2Call
from kvcodec_server.options import CLIENT_METADATA

__all__ = ["Address", "RemoteDoor"]

_OBJECTS_PER_CALL = 500
# A connection that was left is closed after this time: calls on it that do hear something go on.
_LEFT_SECONDS = 60.0
_MAX_LEFT = 8
# One for streams that has said nothing for this time is closed instead of used: whatever is between
# may have forgotten it, and the server asks whether we are there after twice the time.
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

    def connect(self, deadline: Deadline) -> Http2Call:
        """A connection for streams. Raises `OSError`."""
        soon = Deadline(min(_CONNECT_SECONDS, deadline.remaining_seconds()))
        connection = Connection(
            self.host, self.port, soon, tls=self.tls, server_name=self.server_name
        )
        try:
            if self.tls is not None and connection.protocol() != "h2":
                raise ConnectionError("the server does not speak HTTP/2")
            host = f"[{self.host}]" if ":" in self.host else self.host
            authority = self.server_name or f"{host}:{self.port}"
            return Http2Call(connection, "https" if self.tls else "http", authority, deadline)
        except BaseException:
            connection.close()
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
        self._idle: list[tuple[float, Http2Call]] = []
        self._used: set[Http2Call] = set()
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
        results: list[GetResult] = []
        for at in range(0, len(pairs), _OBJECTS_PER_CALL):
            part = pairs[at : at + _OBJECTS_PER_CALL]
            try:
                with self._call(deadline) as call:
                    for result in streams.get(call, part, self._metadata, deadline):
                        results.append(result)  # those before an error count, too
            except BackendError as error:
                results += [error] * (at + len(part) - len(results))
        return results

    def put(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[PutResult]:
        """Store objects from memory, which is not read after the return."""
        results: list[PutResult] = []
        for at in range(0, len(pairs), _OBJECTS_PER_CALL):
            part = pairs[at : at + _OBJECTS_PER_CALL]
            try:
                with self._call(deadline) as call:
                    results += streams.put(call, part, self._metadata, deadline)
            except BackendError as error:
                results += [error] * len(part)
        return results

    def close(self) -> None:
        """Close the connections; calls under way end."""
        with self._lock:
            self._closed = True
            for call in self._used:
                call.connection.abort()
            lines = [*self._left, self._line]
        self._close_idle()
        for line in lines:
            line.channel.close()

    @contextmanager
    def _call(self, deadline: Deadline) -> Iterator[Http2Call]:
        """A connection for one call, kept for the next if that ended well. What it raises is a
        `BackendError` afterwards.
        """
        line, call = self._line, None
        try:
            call = self._take(deadline)
            yield call
        except TimeoutError as error:
            self._leave(line.stub)
            raise BackendTimeout("the sidecar was not heard in time") from error
        except OSError as error:
            raise BackendError(f"{self._address.host}:{self._address.port}: {error}") from error
        finally:
            if call is not None:
                self._give(call)

    def _take(self, deadline: Deadline) -> Http2Call:
        call: Http2Call | None = None
        while call is None:
            with self._lock:
                since, call = self._idle.pop() if self._idle else (0.0, None)
            if call is None:
                call = self._address.connect(deadline)
            elif time.monotonic() - since > _IDLE_SECONDS or not call.is_usable(deadline):
                call.connection.close()
                call = None
        with self._lock:
            self._used.add(call)
            if self._closed:
                call.connection.abort()
        return call

    def _give(self, call: Http2Call) -> None:
        old: list[Http2Call] = []
        now = time.monotonic()
        with self._lock:
            self._used.discard(call)
            if call.ended and not self._closed:
                self._idle.append((now, call))
                old = [call for since, call in self._idle if now - since > _IDLE_SECONDS]
                old += [call for _, call in self._idle[:-_MAX_IDLE] if call not in old]
                self._idle = [(since, call) for since, call in self._idle if call not in old]
            else:
                old.append(call)
        for each in old:
            each.connection.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, call in idle:
            call.connection.close()

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
