"""The client's connection to the sidecar of its node: made, watched and made again by a thread."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import grpc

from kvcodec.backend import Deadline
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec_proto.v1 import service_pb2_grpc
from kvcodec_server import _region_wire as wire
from kvcodec_server._client_region import ClientRegion

__all__ = ["CHANNEL_OPTIONS", "Link", "LiveSession"]

#: Of a channel that has its own connections, and tries again soon.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one attempt may take: a server that stands still is one that does not answer.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.enable_http_proxy", 0),
)

_GREETING_SECONDS = 2.0
_FIRST_BACKOFF_SECONDS = 0.1
_LAST_BACKOFF_SECONDS = 1.0
_RESEND_SECONDS = 0.1


class LiveSession:
    """One session with one server process, until that process or this client ends it."""

    def __init__(
        self, connection: socket.socket, token: str, channel: grpc.Channel, region: ClientRegion
    ) -> None:
        self.stub = service_pb2_grpc.PageServiceStub(channel)
        self.metadata = ((wire.TOKEN_METADATA, token),)
        self._connection = connection
        self._channel = channel
        self._region = region
        self._lock = threading.Lock()
        self._in_doubt: set[int] = set()
        self._unsent: list[int] = []
        self._ended = False

    def doubt(self, call_id: int, parts: list[tuple[int, int]], keep: list[object]) -> None:
        """A call may still be under way: ask the server to tell when it is over."""
        with self._lock:
            if self._ended:
                return
            self._region.doubt(call_id, parts, keep)
            self._in_doubt.add(call_id)
            self._unsent.append(call_id)
            self._send()

    def watch(self, wake: int) -> bool:
        """Until the server ends the session: hear what is over. False when woken to end it here."""
        while True:
            timeout = _RESEND_SECONDS if self._unsent else None
            ready = _readable([self._connection.fileno(), wake], timeout)
            if wake in ready:
                return False
            with self._lock:
                self._send()
            if ready and self._hear():
                return True

    def _hear(self) -> bool:
        """Read what the server says; true where it has closed its end.

        Nothing else proves that it is done with every call: other errors, and packets that nobody
        knows, do not.
        """
        try:
            packet = self._connection.recv(wire.MAX_PACKET_BYTES)
        except ConnectionResetError:  # it was closed with something unread
            return True
        except OSError:
            time.sleep(_RESEND_SECONDS)
            return False
        call_id = wire.unpack_call(packet, wire.RELEASED)
        if call_id is not None:
            self._in_doubt.discard(call_id)
            self._region.settle(call_id)
        return not packet

    def end(self, *, is_over: bool) -> None:
        """Close the connection. With `is_over` the server has said that it touches nothing more."""
        with self._lock:
            self._ended = True
            self._connection.close()
        self._channel.close()
        if is_over:
            for call_id in self._in_doubt:
                self._region.settle(call_id)

    def _send(self) -> None:
        """The caller holds the lock."""
        while self._unsent:
            try:
                self._connection.send(wire.pack_call(wire.FENCE, self._unsent[0]))
            except BlockingIOError:
                return
            except OSError:  # the watcher sees the end of the connection next
                return
            self._unsent.pop(0)


class Link:
    """Keeps a session with whatever server listens on a path. Thread-safe.

    Its thread starts with the first call. While there is no server, a call asks for one attempt and
    gets its error at once; the thread tries again by itself, too.
    """

    def __init__(self, path: str, region: ClientRegion, count: Callable[[str], None]) -> None:
        self._path = path
        self._region = region
        self._count = count
        self._changed = threading.Condition()
        self._session: LiveSession | None = None
        self._attempts = 0
        self._error = BackendError(f"{path}: no connection yet")
        self._failed_at = -1.0
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def session(self, deadline: Deadline) -> LiveSession:
        """The session, or a new one, before the deadline. Raises `BackendError`."""
        session = self._session
        if session is not None:
            return session
        with self._changed:
            if self._closing:
                raise BackendError("the backend is closed")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="kvcodec-sidecar", daemon=True
                )
                self._thread.start()
            elif time.monotonic() - self._failed_at < _FIRST_BACKOFF_SECONDS:
                raise self._error
            asked = self._attempts
            self._wanted.set()
            self._changed.wait_for(
                lambda: self._session is not None or self._attempts > asked or self._closing,
                deadline.remaining_seconds(),
            )
            if self._session is not None:
                return self._session
            if self._attempts > asked or self._closing:
                raise self._error
        raise BackendTimeout(f"{self._path}: no session with the sidecar in time")

    def close(self) -> None:
        """End the session and the thread."""
        with self._changed:
            self._closing = True
            self._error = BackendError("the backend is closed")
            self._changed.notify_all()
            thread = self._thread
        self._wanted.set()
        os.write(self._wake_writer, b"x")
        if thread is not None:
            thread.join(1.0)
        if thread is None or not thread.is_alive():
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _run(self) -> None:
        backoff = _FIRST_BACKOFF_SECONDS
        while not self._closing:
            self._wanted.clear()
            try:
                session = self._connect()
            except (BackendError, OSError) as error:
                with self._changed:
                    self._error = BackendError(f"{self._path}: {error}")
                    self._failed_at = time.monotonic()
                    self._attempts += 1
                    self._changed.notify_all()
                self._wanted.wait(backoff)
                backoff = min(2 * backoff, _LAST_BACKOFF_SECONDS)
                continue
            backoff = _FIRST_BACKOFF_SECONDS
            with self._changed:
                self._session = session
                self._changed.notify_all()
            self._count("sessions")
            is_over = session.watch(self._wake_reader)
            with self._changed:
                self._session = None
                self._error = BackendError(f"{self._path}: the sidecar has ended the session")
            session.end(is_over=is_over)

    def _connect(self) -> LiveSession:
        deadline = time.monotonic() + _GREETING_SECONDS
        connection = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            while True:
                try:
                    connection.connect(wire.region_path(self._path))
                    break
                except BlockingIOError:  # many others want to come in, or nobody takes them
                    self._wait([], min(deadline, time.monotonic() + 0.05))
                    if time.monotonic() >= deadline:
                        raise BackendError("the sidecar takes no connection") from None
            hello = wire.pack_hello(self._region.size)
            # A client that is refused unheard finds the reason behind the error of the connection.
            with suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(connection, [hello], [self._region.descriptor])
            self._wait([connection], deadline)
            try:
                answer = connection.recv(wire.MAX_PACKET_BYTES)
            except ConnectionResetError:
                answer = connection.recv(wire.MAX_PACKET_BYTES)
            if answer[:1] != bytes([wire.WELCOME]):
                reason = answer[1:].decode(errors="replace") or "it closed the connection"
                raise BackendError(f"the sidecar refuses this client: {reason}")
            channel = grpc.insecure_channel(f"unix:{self._path}", options=CHANNEL_OPTIONS)
            return LiveSession(connection, answer[1:].decode("ascii"), channel, self._region)
        except BlockingIOError:
            connection.close()
            raise BackendError("the sidecar does not answer") from None
        except BaseException:
            connection.close()
            raise

    def _wait(self, sockets: list[socket.socket], deadline: float) -> None:
        """Until one of them can be read, the deadline, or the end of the backend."""
        descriptors = [item.fileno() for item in sockets]
        seconds = max(0.0, deadline - time.monotonic())
        ready = _readable([*descriptors, self._wake_reader], seconds)
        if self._wake_reader in ready:
            with suppress(BlockingIOError):
                os.read(self._wake_reader, 1)
            raise BackendError("the backend is closed")


def _readable(descriptors: list[int], timeout_seconds: float | None) -> list[int]:
    """Those with something to read, or at their end. An engine has more than select can name."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    wait = None if timeout_seconds is None else 1000 * timeout_seconds
    return [descriptor for descriptor, _ in poll.poll(wait)]
