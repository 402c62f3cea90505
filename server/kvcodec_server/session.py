"""Sessions: a client's region of shared memory, and which calls may touch it."""

from __future__ import annotations

import mmap
import secrets
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

from kvcodec.errors import BackendError, ConfigError
from kvcodec_server import _region_wire as wire
from kvcodec_server._steps import begin_step

__all__ = ["Lease", "Session", "Sessions"]

# Calls that were given up are remembered, so that none of them begins later. A session that has
# given up so many is ended instead; its client opens another.
_MAX_GIVEN_UP = 65536


class Session:
    """One client's region. Thread-safe.

    Somebody has to watch the client's socket, call `fence` for what it asks, and `end` when it is
    closed. From then on no call begins; this side of the socket is closed, and `ended` called, when
    the last call is over: to the client that is the proof that nobody writes to its memory.
    """

    def __init__(
        self, connection: socket.socket, region: mmap.mmap, uid: int, ended: Callable[[], None]
    ) -> None:
        self.token = secrets.token_hex(16)
        self.uid = uid
        self.region_bytes = len(region)
        self.connection = connection
        self._memory = memoryview(region)
        self._ended = ended
        self._lock = threading.Lock()
        self._active: set[int] = set()
        self._awaited: set[int] = set()
        self._given_up: set[int] = set()
        self._ending = False
        self._watched = True

    def begin(self, call_id: int) -> Lease:
        """Let a call touch the region until its lease is released.

        Raises `BackendError` if the client has given the call up already, or the session is ending.
        """
        with self._lock:
            if self._ending or call_id in self._given_up:
                raise BackendError("the client has given up this call before it began")
            if call_id in self._active:
                raise ConfigError(f"call_id {call_id} is that of a call under way")
            self._active.add(call_id)
        return Lease(self, call_id)

    def view(self, offset: int, length: int) -> memoryview:
        """Bytes of the region. Raises `ConfigError` beyond its end."""
        if not length or offset + length > self.region_bytes:
            raise ConfigError(
                f"a range of {length} bytes at {offset}; the region has {self.region_bytes}"
            )
        return self._memory[offset : offset + length]

    def fence(self, call_id: int) -> None:
        """Tell the client when this call is over; it will not begin any more."""
        with self._lock:
            self._given_up.add(call_id)
            if call_id in self._active:
                self._awaited.add(call_id)
            else:
                self._tell(call_id)
            if len(self._given_up) > _MAX_GIVEN_UP:
                self._want_end()

    def release(self, call_id: int) -> None:
        """The call does not touch the region any more."""
        with self._lock:
            self._active.remove(call_id)
            if call_id in self._awaited:
                self._awaited.remove(call_id)
                self._tell(call_id)
            over = not self._watched and not self._active
        if over:
            self._finish()

    def end(self) -> None:
        """Nobody watches the socket any more: the session is over when its calls are."""
        with self._lock:
            self._ending = True
            over = self._watched and not self._active
            self._watched = False
        if over:
            self._finish()

    def _tell(self, call_id: int) -> None:
        """The caller holds the lock."""
        try:
            self.connection.send(wire.pack_call(wire.RELEASED, call_id))
        except OSError:  # it is gone, or does not read what it asked for
            self._want_end()

    def _want_end(self) -> None:
        """Let the watcher see the end of the socket; the client does not see it yet. The caller
        holds the lock.
        """
        self._ending = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def _finish(self) -> None:
        self._memory = memoryview(b"")
        self.connection.close()
        self._ended()


class Lease:
    """One call's permission to touch the region; released once, by whoever is done with it."""

    __slots__ = ("_call_id", "_session", "_step")

    def __init__(self, session: Session, call_id: int) -> None:
        self._session = session
        self._call_id = call_id
        self._step = begin_step("region")

    def release(self) -> None:
        """Touch the region no more."""
        self._session.release(self._call_id)
        if self._step is not None:
            self._step.end()


class Sessions:
    """All sessions of a server, by token. Thread-safe.

    A region counts as long as it is mapped, which a call that hangs may prolong beyond the end of
    its session.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_token: dict[str, Session] = {}
        self._mapped: list[int] = []

    def open(self, connection: socket.socket, region: mmap.mmap, uid: int) -> Session:
        """A new session; `find` knows it until it ends."""
        size = len(region)
        with self._lock:
            self._mapped.append(size)
        # Not of the session: a view that a hanging store call has keeps the mapping alive.
        weakref.finalize(region, self._mapped.remove, size).atexit = False
        session = Session(connection, region, uid, lambda: self._forget(session.token))
        with self._lock:
            self._by_token[session.token] = session
        return session

    def find(self, token: str) -> Session | None:
        """The session with this token."""
        with self._lock:
            return self._by_token.get(token)

    @property
    def count(self) -> int:
        """Sessions that have not ended."""
        return len(self._by_token)

    @property
    def mapped_regions(self) -> int:
        """Regions that are mapped."""
        return len(self._mapped)

    @property
    def mapped_bytes(self) -> int:
        """Their size, of which only what was touched takes memory."""
        return sum(list(self._mapped))

    def _forget(self, token: str) -> None:
        with self._lock:
            self._by_token.pop(token, None)
