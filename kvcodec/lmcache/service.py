"""The socket behind ``lmcache://``: kvcodec_proto.lmcache spoken over objects in LMCache's memory.

One thread per connection, and no copy of an object in between: it is received into LMCache's memory
and sent from it.
"""

from __future__ import annotations

import logging
import socket
import threading
import time

from kvcodec.lmcache.objects import Objects
from kvcodec_proto.lmcache import (
    ANSWER,
    ANSWERS,
    ENTRY,
    LISTED,
    MAGIC,
    MAX_ENTRIES,
    MAX_OBJECT_BYTES,
    REQUEST,
    Status,
    Verb,
)

__all__ = ["Service"]

logger = logging.getLogger(__name__)

#: No request may take longer: LMCache takes read locks away after 300 s.
_MAX_REQUEST_SECONDS = 120.0
_SCRATCH_BYTES = 1 << 18
_LIST_PART = 4096


class _Refused(Exception):
    """The peer does not speak this protocol, or stopped in the middle."""


class _Conversation:
    """One connection, one request after the other."""

    def __init__(self, connection: socket.socket, objects: Objects) -> None:
        self._socket = connection
        self._objects = objects
        self._deadline = 0.0

    def run(self) -> None:
        """Until the peer goes."""
        while True:
            self._socket.settimeout(None)
            header = bytearray(REQUEST.size)
            if not self._receive(memoryview(header), may_end=True):
                return
            magic, verb, count, milliseconds = REQUEST.unpack(header)
            if magic != MAGIC or count > MAX_ENTRIES or verb not in set(Verb):
                raise _Refused(f"a request that begins with {bytes(header[:8])!r}")
            seconds = min(milliseconds / 1000, _MAX_REQUEST_SECONDS)
            self._deadline = time.monotonic() + seconds
            if verb == Verb.PUT:
                self._send(ANSWERS.pack(MAGIC, count))
                for _ in range(count):
                    self._put()
                continue
            entries = [ENTRY.unpack(self._bytes(ENTRY.size)) for _ in range(count)]
            if verb == Verb.GET:
                self._get(entries)
            elif verb == Verb.LIST:
                self._list(entries)
            else:
                self._send(ANSWERS.pack(MAGIC, count))
                answer = self._stat if verb == Verb.STAT else self._delete
                self._send(b"".join(answer(name) for name, _ in entries))

    def _put(self) -> None:
        name, length = ENTRY.unpack(self._bytes(ENTRY.size))
        if not 0 < length <= MAX_OBJECT_BYTES:
            raise _Refused(f"an object of {length} bytes")
        draft = self._objects.reserve(name, length, self._deadline)
        if draft is None:
            scratch = memoryview(bytearray(min(length, _SCRATCH_BYTES)))
            while length:
                part = scratch[: min(length, len(scratch))]
                self._receive(part)
                length -= len(part)
            status = Status.LATE if time.monotonic() > self._deadline else Status.FULL
            self._send(ANSWER.pack(status, 0, 0.0))
            return
        try:
            self._receive(draft.view)
        except BaseException:
            draft.discard()
            raise
        draft.commit()
        self._send(ANSWER.pack(Status.FOUND, length, 0.0))

    def _get(self, entries: list[tuple[bytes, int]]) -> None:
        self._send(ANSWERS.pack(MAGIC, len(entries)), more=True)
        with self._objects.reading([name for name, _ in entries], self._deadline) as views:
            for (_, room), view in zip(entries, views, strict=True):
                if view is None:
                    is_late = time.monotonic() > self._deadline
                    self._send(ANSWER.pack(Status.LATE if is_late else Status.MISSING, 0, 0.0))
                elif len(view) > room:
                    self._send(ANSWER.pack(Status.FOUND, len(view), 0.0))
                else:
                    self._send(ANSWER.pack(Status.FOUND, len(view), 0.0), more=True)
                    self._send(view)

    def _stat(self, name: bytes) -> bytes:
        stored = self._objects.stat(name)
        if stored is None:
            return ANSWER.pack(Status.MISSING, 0, 0.0)
        return ANSWER.pack(Status.FOUND, stored.length, stored.written_seconds)

    def _delete(self, name: bytes) -> bytes:
        status = Status.FOUND if self._objects.delete(name) else Status.MISSING
        return ANSWER.pack(status, 0, 0.0)

    def _list(self, entries: list[tuple[bytes, int]]) -> None:
        if len(entries) != 1:
            raise _Refused(f"a list of {len(entries)} namespaces")
        ((name, is_one),) = entries
        listed = self._objects.list(name[:16] if is_one else None)
        self._send(ANSWERS.pack(MAGIC, len(listed)))
        for start in range(0, len(listed), _LIST_PART):
            self._send(
                b"".join(
                    LISTED.pack(name, stored.length, stored.written_seconds)
                    for name, stored in listed[start : start + _LIST_PART]
                )
            )

    def _bytes(self, size: int) -> bytes:
        data = bytearray(size)
        self._receive(memoryview(data))
        return bytes(data)

    def _receive(self, view: memoryview, *, may_end: bool = False) -> bool:
        """Fill the view. False if the peer went before the first byte, where it may."""
        while len(view):
            if not may_end:
                self._limit()
            received = self._socket.recv_into(view)
            if not received:
                if may_end:
                    return False
                raise _Refused("the peer went in the middle of a request")
            view = view[received:]
            may_end = False
        return True

    def _send(self, data: bytes | memoryview, *, more: bool = False) -> None:
        self._limit()
        self._socket.sendall(data, socket.MSG_MORE if more else 0)

    def _limit(self) -> None:
        # Who asked has stopped waiting at the deadline; a little later it is the peer that hangs.
        self._socket.settimeout(max(1.0, self._deadline + 1.0 - time.monotonic()))


class Service:
    """Listens on a port until it is closed."""

    def __init__(self, objects: Objects, host: str, port: int) -> None:
        """Raises `OSError` if the port is taken."""
        self._objects = objects
        self._listener = socket.create_server((host, port), backlog=128)
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="kvcodec-accept", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._listener.getsockname()[1])

    def connection_count(self) -> int:
        """Connections open now."""
        return len(self._connections)

    def close(self) -> None:
        """Take no more requests."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        for connection in [self._listener, *connections]:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the peer was faster
        self._listener.close()
        self._thread.join(timeout=5.0)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # out of file descriptors: others will be closed
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="kvcodec-client", daemon=True
            )
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closed:
                connection.close()
                return
            self._connections.add(connection)
        try:
            _Conversation(connection, self._objects).run()
        except (_Refused, OSError) as error:
            logger.info("kvcodec: a connection ends: %s", error)
        except Exception:
            logger.warning("kvcodec: a connection ends for an error in LMCache", exc_info=True)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
