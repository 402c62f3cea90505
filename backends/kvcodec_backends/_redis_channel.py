"""One connection to a Redis server: redis-py opens it, and bytes pass between it and memory.

redis-py knows how to connect, to log in and to set up TLS. Its parsers return every value as new
`bytes`, which costs an allocation and two copies, and take a timeout per system call; here a
value goes from the socket into the caller's buffer, and one deadline bounds all of a call.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from redis.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kvcodec.backend import Deadline
from kvcodec.errors import BackendError, BackendFull, BackendReadOnly, BackendTimeout

__all__ = ["Channel", "Channels", "Connect", "ServerError", "as_backend_error"]

# Lines are short: this much of a value may take the way through a second buffer.
_READ_AHEAD_BYTES = 16 << 10
_MAX_LINE_BYTES = 64 << 10
# Small parts of a request are joined up to this size; larger ones are sent from where they lie.
_JOINED_BYTES = 16 << 10

_READ_ONLY_CODES = frozenset({"READONLY", "MISCONF", "NOREPLICAS"})
_CLUSTER_CODES = frozenset({"MOVED", "ASK", "CROSSSLOT"})


class ServerError(ResponseError):
    """The server refused one command: ``"OOM command not allowed ..."``."""

    @property
    def code(self) -> str:
        """The first word, by which errors are told apart."""
        return str(self).partition(" ")[0]


def as_backend_error(error: Exception, verb: str, name: str) -> BackendError:
    """What a refusal, a lost connection or a passed deadline means for one object."""
    text = f"{verb} {name}: {error}"
    if isinstance(error, BackendError):
        return type(error)(text)
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return BackendTimeout(text)
    code = error.code if isinstance(error, ServerError) else ""
    if code == "OOM":
        return BackendFull(text)
    if code in _CLUSTER_CODES:
        return BackendError(f"{text}; redis:// serves one server, this one is part of a cluster")
    return BackendReadOnly(text) if code in _READ_ONLY_CODES else BackendError(text)


class _Parser:
    """Reads replies of protocol 2 from one socket; to redis-py it is one more parser.

    `deadline` is that of the call under way.
    """

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self._socket: socket.socket | None = None
        self._ahead = bytearray(_READ_AHEAD_BYTES)
        self._start = 0
        self._end = 0

    # What redis-py asks of a parser

    def on_connect(self, connection: AbstractConnection) -> None:
        self._socket = connection._sock
        self._start = self._end = 0

    def on_disconnect(self) -> None:
        self._socket = None

    def read_response(self, **_: object) -> object:
        """One reply of the log-in; an error comes back as a value."""
        return self.read_reply()

    def can_read(self, timeout: float = 0) -> bool:
        return self._start < self._end or bool(select.select([self.socket], [], [], timeout)[0])

    # What a channel asks

    @property
    def socket(self) -> socket.socket:
        if self._socket is None:
            raise ConnectionError("the connection is closed")
        return self._socket

    def read_reply(self) -> object:
        """The next reply: int, bytes, None, a list of replies, or a `ServerError`, not raised."""
        kind, text = self._read_line()
        if kind == b"$":
            size = int(text)
            if size < 0:
                return None
            data = bytearray(size)
            self._read_exactly(memoryview(data))
            self._end_value()
            return bytes(data)
        return self._simple(kind, text)

    def read_value_into(self, buffer: memoryview, trailer_bytes: int) -> int | ServerError:
        """The next reply, a value: all but its trailer goes into the buffer. The value's length.

        What the buffer does not hold is read and thrown away.
        """
        kind, text = self._read_line()
        if kind == b"-":
            return ServerError(text)
        size = int(text) if kind == b"$" else -1
        if size < 0:
            raise ConnectionError(f"the server answered {kind + text.encode()!r}, not a value")
        wanted = max(0, min(size - trailer_bytes, len(buffer)))
        self._read_exactly(buffer[:wanted])
        left = size - wanted
        while left:
            rest = memoryview(bytearray(min(left, _READ_AHEAD_BYTES)))
            self._read_exactly(rest)
            left -= len(rest)
        self._end_value()
        return size

    def _simple(self, kind: bytes, text: str) -> object:
        if kind == b"-":
            return ServerError(text)
        if kind == b":":
            return int(text)
        if kind == b"+":
            return text.encode()
        if kind == b"*":
            return None if int(text) < 0 else [self.read_reply() for _ in range(int(text))]
        raise ConnectionError(f"the server answered {kind!r}, which is not Redis's protocol")

    def _read_line(self) -> tuple[bytes, str]:
        line = bytearray()
        while not line.endswith(b"\r\n"):
            if self._start == self._end:
                self._start, self._end = 0, self._receive(memoryview(self._ahead))
            stop = self._ahead.find(b"\n", self._start, self._end) + 1 or self._end
            line += self._ahead[self._start : stop]
            self._start = stop
            if len(line) > _MAX_LINE_BYTES:
                raise ConnectionError("the server sends no line ends; is it a Redis server?")
        return bytes(line[:1]), line[1:-2].decode(errors="replace")

    def _read_exactly(self, target: memoryview) -> None:
        ready = min(len(target), self._end - self._start)
        target[:ready] = memoryview(self._ahead)[self._start : self._start + ready]
        self._start += ready
        while ready < len(target):
            ready += self._receive(target[ready:])

    def _end_value(self) -> None:
        end = bytearray(2)
        self._read_exactly(memoryview(end))
        if end != b"\r\n":
            raise ConnectionError("a value of the server does not end where it should")

    def _receive(self, target: memoryview) -> int:
        self.socket.settimeout(_time_left(self.deadline))
        count = self.socket.recv_into(target)
        if not count:
            raise ConnectionError("the server closed the connection")
        return count


class Connect(Protocol):
    """Makes a connection of redis-py that is not connected yet."""

    def __call__(
        self,
        *,
        parser_class: Callable[..., object],
        socket_timeout: float,
        socket_connect_timeout: float,
    ) -> AbstractConnection:
        """With this parser, and these timeouts in seconds."""


class Channel:
    """One open connection. Not for two threads at once.

    Whatever raises here leaves replies on the way that belong to nobody: a channel that raised
    must be closed.
    """

    def __init__(self, connect: Connect, deadline: Deadline) -> None:
        self._parser = _Parser(deadline)
        self._connection = connect(
            # redis-py tells its parsers how much to read at once.
            parser_class=lambda socket_read_size: self._parser,  # noqa: ARG005
            socket_timeout=_time_left(deadline),
            socket_connect_timeout=_time_left(deadline),
        )
        try:
            self._connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            self.close()
            raise

    def send(self, commands: Sequence[Sequence[bytes | Sequence[memoryview]]]) -> None:
        """Send commands; an argument may lie in memory in several parts, which are not copied."""
        joined = bytearray()
        for command in commands:
            joined += b"*%d\r\n" % len(command)
            for argument in command:
                if isinstance(argument, bytes):
                    joined += b"$%d\r\n%b\r\n" % (len(argument), argument)
                    continue
                joined += b"$%d\r\n" % sum(map(len, argument))
                for part in argument:
                    if len(joined) + len(part) > _JOINED_BYTES:
                        self._send_all(joined)
                        self._send_all(part)
                        joined = bytearray()
                    else:
                        joined += part
                joined += b"\r\n"
        self._send_all(joined)

    def read_reply(self) -> object:
        """The next reply: int, bytes, None, a list, or a `ServerError`, not raised."""
        return self._parser.read_reply()

    def read_value_into(self, buffer: memoryview, trailer_bytes: int) -> int | ServerError:
        """The next reply, a value: all but its trailer goes into the buffer. The value's length,
        which may be larger than both.
        """
        return self._parser.read_value_into(buffer, trailer_bytes)

    def is_quiet(self) -> bool:
        """Whether nothing has arrived that nobody asked for, such as the end of the connection."""
        try:
            return not self._parser.can_read()
        except (OSError, ValueError):
            return False

    def use_deadline(self, deadline: Deadline) -> None:
        """Bound what follows by this call's deadline."""
        self._parser.deadline = deadline

    def close(self) -> None:
        """Close the connection; its replies on the way are lost, which is what is wanted."""
        self._connection.disconnect()  # type: ignore[no-untyped-call]

    def _send_all(self, data: bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            # sendall has one timeout for all on a plain socket, but one for each part with TLS.
            self._parser.socket.settimeout(_time_left(self._parser.deadline))
            view = view[self._parser.socket.send(view) :]


class Channels:
    """Up to `limit` connections of one process, made when they are needed and kept open."""

    def __init__(self, connect: Connect, limit: int) -> None:
        self._connect = connect
        self._limit = limit
        self._closed = False
        self.opened = 0
        self.dropped = 0
        self._start()

    @contextmanager
    def channel(self, deadline: Deadline) -> Iterator[Channel]:
        """A connection for one call; one that raises is closed.

        Raises `BackendError` and its kin, never an error of redis-py or the socket.
        """
        if self._pid != os.getpid():
            self._start()
        if self._closed:
            raise BackendError("the backend is closed")
        slots = self._slots
        if deadline.passed():
            raise BackendTimeout("no time was left to ask the server")
        if not slots.acquire(timeout=deadline.remaining_seconds()):
            raise BackendTimeout(f"all {self._limit} connections are busy (max_connections)")
        channel = None
        try:
            channel = self._idle_channel() or self._new_channel(deadline)
            channel.use_deadline(deadline)
            yield channel
            with self._lock:
                if not self._closed:
                    self._idle.append(channel)
                    channel = None
        except (RedisError, OSError, ValueError) as error:
            self.dropped += 1
            raise as_backend_error(error, "asking", "the server") from error
        finally:
            if channel is not None:
                channel.close()
            slots.release()

    def close(self) -> None:
        """Close what is idle; what is in use is closed after its call."""
        self._closed = True
        if self._pid == os.getpid():
            while (channel := self._take_idle()) is not None:
                channel.close()

    def _start(self) -> None:
        """Begin with no connection, as a child after a fork has to."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self._limit)
        self._idle: list[Channel] = []

    def _idle_channel(self) -> Channel | None:
        while (channel := self._take_idle()) is not None:
            # A server that was restarted has closed it, which shows as something to read.
            if channel.is_quiet():
                return channel
            self.dropped += 1
            channel.close()
        return None

    def _take_idle(self) -> Channel | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _new_channel(self, deadline: Deadline) -> Channel:
        channel = Channel(self._connect, deadline)
        self.opened += 1
        return channel


def _time_left(deadline: Deadline) -> float:
    seconds = deadline.remaining_seconds()
    if not seconds:
        raise TimeoutError("the deadline passed")
    return seconds
