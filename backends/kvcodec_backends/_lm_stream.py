"""A backend whose server speaks requests and answers over one TCP stream, in order.

What `lm://` and `lmcache://` have in common: connections made when they are needed, kept between
calls, and never shared with a forked child; answers per object, in time; a lost connection that
costs what was under way and nothing else.
"""

from __future__ import annotations

import abc
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar
from urllib.parse import SplitResult

from kvcodec.backend import (
    Backend,
    Deadline,
    GetResult,
    ObjectInfo,
    PutResult,
    check_name,
    checked_buffers,
    checked_names,
    checked_objects,
    closed_error,
    display_url,
)
from kvcodec.connection import Connection
from kvcodec.errors import BackendError, ConfigError

__all__ = ["Item", "LMConnection", "StreamBackend", "host_and_port"]

T = TypeVar("T")

#: An object's name and its memory; empty where only the name matters.
Item = tuple[str, memoryview]

_WINDOW = 64
_MAX_IDLE = 16
_SCRATCH_BYTES = 1 << 18
_NOTHING = memoryview(b"")


class LMConnection(Connection):
    """One connection, with what a protocol of requests and answers needs besides."""

    def __init__(self, host: str, port: int, deadline: Deadline) -> None:
        super().__init__(host, port, deadline)
        #: Whether it waited for this call since an earlier one: the server may have gone since.
        self.was_idle = False

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        """Fill the view."""
        # A server that sends header and body apart waits for the first one's acknowledgement, which
        # Linux holds back for 40 ms unless told, again before each wait, not to.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        super().receive_into(view, deadline)

    def receive(self, size: int, deadline: Deadline) -> bytes:
        """The next `size` bytes; they should be few."""
        data = bytearray(size)
        self.receive_into(memoryview(data), deadline)
        return bytes(data)

    def drop(self, size: int, deadline: Deadline) -> None:
        """Read over the next `size` bytes."""
        scratch = memoryview(bytearray(min(size, _SCRATCH_BYTES)))
        while size:
            part = scratch[: min(size, len(scratch))]
            self.receive_into(part, deadline)
            size -= len(part)


def host_and_port(url: str, parts: SplitResult, example: str) -> tuple[str, int]:
    """The two things such a URL names; `ConfigError` for anything else in it."""
    try:
        port = parts.port
    except ValueError:
        port = None
    extra = parts.username or parts.password or parts.path.strip("/") or parts.fragment
    if not parts.hostname or not port or extra:
        raise ConfigError(f"{display_url(url)!r}: wanted is a host and a port, as in {example}")
    return parts.hostname, port


class StreamBackend(Backend):
    """The common half; a subclass speaks the protocol in its `_put`, `_get`, `_exists`, `_stat`.

    These are generators: they send a request for all items and yield the answers in order. Whatever
    they raise from the connection ends that connection.
    """

    batch_size = 8
    #: The most objects that one request asks about; only their answers are ever waited for.
    question_window = 512

    def __init__(self, url: str, host: str, port: int) -> None:
        self._url = url
        self._address = (host, port)
        self._lock = threading.Lock()
        self._idle: list[LMConnection] = []
        self._owner = os.getpid()
        self._closed = False
        self._counts: Counter[str] = Counter(connections=0, lost_connections=0)

    @abc.abstractmethod
    def _put(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[PutResult]:
        """Store objects."""

    @abc.abstractmethod
    def _get(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[GetResult]:
        """Read objects into their memory."""

    @abc.abstractmethod
    def _exists(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[bool]:
        """Whether objects are there."""

    @abc.abstractmethod
    def _stat(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[ObjectInfo | None]:
        """Describe objects."""

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Store objects; each is visible once all of it has arrived."""
        items = checked_objects(names, objects)
        return self._answers("put", items, timeout_seconds, self._put)

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Receive objects into the starts of the buffers."""
        items = checked_buffers(names, buffers)
        return self._answers("get", items, timeout_seconds, self._get)

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is there."""
        answers = self._questions("exists", names, timeout_seconds, self._exists)
        return [answer is True for answer in answers]

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description."""
        (answer,) = self._questions("stat", [check_name(name)], timeout_seconds, self._stat)
        if isinstance(answer, BackendError):
            raise answer
        return answer

    def close(self) -> None:
        """Close the connections that wait; one in use closes when its call ends."""
        self._closed = True
        self._notice_fork()
        self._close_idle()

    def counters(self) -> Mapping[str, int]:
        """Connections made, and lost in use."""
        return dict(self._counts)

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    def _questions(
        self,
        verb: str,
        names: Sequence[str],
        timeout_seconds: float,
        exchange: Callable[[LMConnection, Sequence[Item], Deadline], Iterator[T]],
    ) -> list[T | BackendError]:
        items = [(name, _NOTHING) for name in checked_names(names)]
        return self._answers(verb, items, timeout_seconds, exchange, self.question_window)

    def _answers(
        self,
        verb: str,
        items: Sequence[Item],
        timeout_seconds: float,
        exchange: Callable[[LMConnection, Sequence[Item], Deadline], Iterator[T]],
        window: int = _WINDOW,
    ) -> list[T | BackendError]:
        """One answer per item.

        Answers come in order, so when a connection is lost the rest goes over a new one: at once
        if it brought something or had waited idle (its server may have been started again since),
        and one by one if many were under way. A new connection that brings nothing is the end.
        """
        answers: list[T | BackendError] = []
        if self._closed:
            return [closed_error(self._url) for _ in items]
        self._notice_fork()
        deadline = Deadline(timeout_seconds)
        while len(answers) < len(items):
            had = len(answers)
            connection: LMConnection | None = None
            try:
                connection = self._take(deadline)
                while len(answers) < len(items):
                    part = items[len(answers) : len(answers) + window]
                    for answer in exchange(connection, part, deadline):
                        answers.append(answer)
            except TimeoutError:
                self._lose(connection)
                # Whatever ails the server, those that wait idle have it too.
                self._close_idle()
                answers += [deadline.error(verb, name) for name, _ in items[len(answers) :]]
            except OSError as error:
                self._lose(connection)
                has_hope = connection is not None and (connection.was_idle or window > 1)
                if not has_hope and len(answers) == had:
                    answers += [
                        BackendError(f"{verb} {name}: {self._url}: {error}")
                        for name, _ in items[len(answers) :]
                    ]
                elif connection is not None and not connection.was_idle:
                    window = 1
            except BaseException:
                self._lose(connection)
                raise
            else:
                self._give(connection)
        return answers

    def _notice_fork(self) -> None:
        """In a child: the lock may be held by a thread that is not there, and the connections
        carry the parent's conversations.
        """
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._lock = threading.Lock()
            self._close_idle()

    def _take(self, deadline: Deadline) -> LMConnection:
        if deadline.passed():
            raise TimeoutError
        with self._lock:
            if self._idle:
                return self._idle.pop()
        connection = LMConnection(*self._address, deadline)
        self._count("connections")
        return connection

    def _give(self, connection: LMConnection) -> None:
        connection.was_idle = True
        with self._lock:
            if not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _lose(self, connection: LMConnection | None) -> None:
        if connection is not None:
            connection.close()
            self._count("lost_connections")
