"""The socket beside a sidecar's, on which clients of the same node hand over their memory."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import selectors
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvcodec.errors import BackendError, ConfigError
from kvcodec.log import RateLimitedLog
from kvcodec_server import _region_wire as wire
from kvcodec_server.options import ServerOptions
from kvcodec_server.session import Session, Sessions

__all__ = ["RegionServer"]

logger = logging.getLogger(__name__)

# Who has connected has so long to say what it wants, and so many may be about to.
_GREETING_SECONDS = 2.0
_MAX_STRANGERS = 64
_CREDENTIALS = struct.Struct("3i")
_MAX_DESCRIPTORS = 4


class RegionServer:
    """Listens on `path`, checks who comes and what memory it brings, and watches its sessions.

    One thread serves all sockets and never waits for any of them. Allowed are the server's own uid,
    root and `allowed_uids`. `options` is asked anew for every client: limits may change.
    """

    def __init__(
        self,
        path: str | Path,
        sessions: Sessions,
        options: Callable[[], ServerOptions],
        *,
        mode: int = 0o660,
    ) -> None:
        self.path = Path(path)
        self._sessions = sessions
        self._options = options
        self._log = RateLimitedLog(logger)
        self._listener = _listen(self.path, mode)
        self._inode = self.path.stat().st_ino
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._strangers: dict[socket.socket, float] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvcodec-region", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more clients and end the sessions; one with a call under way ends after it."""
        if self._closing:
            return
        self._closing = True
        os.write(self._wake_writer, b"x")
        self._thread.join()
        os.close(self._wake_writer)
        os.close(self._wake_reader)
        with suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(0.5 if self._strangers else None):
                if key.data is not None:
                    key.data()
            now = time.monotonic()
            for connection, deadline in list(self._strangers.items()):
                if deadline < now:
                    self._refuse(connection, "no greeting in time")
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Watched):
                key.data.session.end()
            elif isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # out of descriptors, or the client is gone again
            self._log.report("accept", "a client could not be taken: %s", error)
            time.sleep(0.01)
            return
        connection.setblocking(False)
        self._strangers[connection] = time.monotonic() + _GREETING_SECONDS
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._greet(connection))
        uid = _uid_of(connection)
        if uid not in {os.getuid(), 0} | self._options().allowed_uids:
            self._refuse(connection, f"uid {uid} may not use this sidecar")
        elif len(self._strangers) > _MAX_STRANGERS:
            self._refuse(connection, "too many clients at once")

    def _greet(self, connection: socket.socket) -> None:
        """Read a stranger's greeting: it becomes a session, or goes."""
        descriptors: list[int] = []
        try:
            packet, descriptors, _, _ = socket.recv_fds(
                connection, wire.MAX_PACKET_BYTES, _MAX_DESCRIPTORS
            )
            region = self._checked_region(wire.unpack_hello(packet), descriptors)
        except (BackendError, OSError, ValueError) as error:
            self._refuse(connection, str(error))
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        session = self._sessions.open(connection, region, _uid_of(connection))
        del self._strangers[connection]
        self._selector.modify(connection, selectors.EVENT_READ, _Watched(session, self._selector))
        with suppress(OSError):  # then it is gone already, which the selector tells next
            connection.send(bytes([wire.WELCOME]) + session.token.encode())

    def _checked_region(self, size: int, descriptors: list[int]) -> mmap.mmap:
        options = self._options()
        if len(descriptors) != 1:
            raise BackendError(f"{len(descriptors)} descriptors came with the greeting, wanted one")
        if not mmap.PAGESIZE <= size <= options.max_region_bytes:
            raise BackendError(
                f"a region of {size} bytes; allowed are {mmap.PAGESIZE} to "
                f"{options.max_region_bytes} (max_region_bytes): ask for less with region_bytes"
            )
        if self._sessions.mapped_regions >= options.max_sessions:
            raise BackendError(f"all {options.max_sessions} sessions are taken (max_sessions)")
        (descriptor,) = descriptors
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            raise BackendError("the region is no memfd") from error
        if seals & wire.SEALS != wire.SEALS:
            raise BackendError("the region is not sealed: it could shrink under the sidecar")
        found = os.fstat(descriptor).st_size
        if found != size:
            raise BackendError(f"the region has {found} bytes, not the {size} of the greeting")
        return mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def _refuse(self, connection: socket.socket, reason: str) -> None:
        self._log.report("refused", "a client of the region socket was refused: %s", reason)
        self._selector.unregister(connection)
        del self._strangers[connection]
        with suppress(OSError):
            connection.send(bytes([wire.REFUSED]) + reason.encode()[:300])
            # Closed with something unread, the socket would tell of a reset and of no reason.
            connection.shutdown(socket.SHUT_RDWR)
            while connection.recv(wire.MAX_PACKET_BYTES):
                pass
        connection.close()


class _Watched:
    """What to do when a session's socket has something to read."""

    def __init__(self, session: Session, selector: selectors.BaseSelector) -> None:
        self.session = session
        self._selector = selector

    def __call__(self) -> None:
        try:
            packet = self.session.connection.recv(wire.MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        call_id = wire.unpack_call(packet, wire.FENCE)
        if call_id is not None:
            self.session.fence(call_id)
            return
        # The end of the socket, or something that no client of ours says.
        self._selector.unregister(self.session.connection)
        self.session.end()


def _listen(path: Path, mode: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _remove_stale(path)
        # What bind makes gets the permissions of the socket: at no moment may others connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(_MAX_STRANGERS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error}") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that is gone; one that answers stays, and is an error."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise FileExistsError(f"{path} is there and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise FileExistsError("another sidecar listens there")


def _uid_of(connection: socket.socket) -> int:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])
