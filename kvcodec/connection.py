"""TCP for backends: every step ends by the deadline of the call that it is part of."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress

from kvcodec.backend import Deadline

__all__ = ["Connection", "ConnectionEnded"]

# Of one system call; Linux takes four times as many.
_MAX_PARTS = 256


class ConnectionEnded(ConnectionError):
    """The other side closed the connection in the middle of something."""


class Connection:
    """One connection, of one thread at a time but for `abort`.

    Every step raises `TimeoutError` at its deadline, and another `OSError` when the connection is
    lost. After either it can only be closed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        deadline: Deadline,
        *,
        tls: ssl.SSLContext | None = None,
        server_name: str = "",
    ) -> None:
        """Connect; with `tls` to a server whose certificate has `server_name`, or the host's."""
        for name in (host, server_name):
            _check_name(name)
        plain = _connected(host, port, deadline)
        self._socket = plain
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                plain.settimeout(_seconds(deadline))
                self._socket = tls.wrap_socket(plain, server_hostname=server_name or host)
        except BaseException:
            plain.close()
            raise

    def protocol(self) -> str | None:
        """What TLS agreed to speak (ALPN); None without TLS, or if it was not agreed."""
        if isinstance(self._socket, ssl.SSLSocket):
            return self._socket.selected_alpn_protocol()
        return None

    def send(self, parts: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        """Send all of them, one after the other."""
        left = [memoryview(part) for part in parts if len(part)]
        while left:
            self._socket.settimeout(_seconds(deadline))
            if isinstance(self._socket, ssl.SSLSocket):
                sent = self._socket.send(left[0])
            else:
                sent = self._socket.sendmsg(left[:_MAX_PARTS])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def receive_some(self, view: memoryview, deadline: Deadline, *, wait: bool = True) -> int:
        """Receive into the start of the view what is there, at least a byte of it; how many bytes.
        Without `wait` that is 0 where nothing is there yet.
        """
        try:
            self._socket.settimeout(_seconds(deadline) if wait else 0.0)
            received = self._socket.recv_into(view)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        if not received:
            raise ConnectionEnded("the server closed the connection")
        return received

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        """Fill the view."""
        while len(view):
            view = view[self.receive_some(view, deadline) :]

    def abort(self) -> None:
        """End whatever another thread does with it."""
        with suppress(OSError):
            # TLS has a `shutdown` of its own, which is not for other threads.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of it. A parent's connection stays open for the parent."""
        self._socket.close()


def _connected(host: str, port: int, deadline: Deadline) -> socket.socket:
    """To the first address of the host that answers, all of them within the deadline."""
    refused: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        try:
            found = socket.socket(family, kind, protocol)
        except OSError as error:  # an address of a family that this machine has not
            refused = error
            continue
        try:
            found.settimeout(_seconds(deadline))
            found.connect(address)
        except TimeoutError:
            found.close()
            raise
        except OSError as error:
            found.close()
            refused = error
        else:
            return found
    raise refused or ConnectionError(f"{host} has no address")


def _check_name(name: str) -> None:
    """What is no name of a host is not found; Python has errors of other kinds for it."""
    try:
        name.encode("idna")
    except UnicodeError as error:
        raise ConnectionError(f"{name!r} is not the name of a host: {error}") from error
    if "\0" in name:
        raise ConnectionError(f"{name!r} is not the name of a host")


def _seconds(deadline: Deadline) -> float:
    """What a socket takes as a time-out: 0 would mean not to wait, and not to raise."""
    seconds = deadline.remaining_seconds()
    if seconds <= 0:
        raise TimeoutError
    return seconds
