"""TCP for backends: every step ends by the deadline of the call that it is part of."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kvcodec.backend import Deadline

__all__ = ["Connection", "ConnectionEnded", "TLSConnection"]

# Of one system call; Linux takes four times as many.
_MAX_PARTS = 256
# What a socket is told to wait at most; more than some time it calls an overflow.
_LONGEST_SECONDS = 1e6
# Received and sent at a time below TLS, whose records have 16 KiB.
_TLS_BYTES = 256 << 10

_Addresses = Sequence[tuple[Any, ...]]


class ConnectionEnded(ConnectionError):
    """The other side closed the connection in the middle of something."""


class Connection:
    """One connection, of one thread at a time but for `abort`.

    Every step raises `TimeoutError` at its deadline, and another `OSError` when the connection is
    lost. After either it can only be closed.
    """

    def __init__(self, host: str, port: int, deadline: Deadline) -> None:
        """Connect to the first address of the host that answers."""
        self._socket = _connected(host, port, deadline)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, parts: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        """Send all of them, one after the other."""
        left = [memoryview(part) for part in parts if len(part)]
        while left:
            self._socket.settimeout(_seconds(deadline))
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
        except BlockingIOError:
            return 0
        if not received:
            raise ConnectionEnded("the server closed the connection")
        return received

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        """Fill the view."""
        while len(view):
            view = view[self.receive_some(view, deadline) :]

    def abort(self) -> None:
        """End whatever another thread, or a process forked from this one, does with it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of it. A parent's connection stays open for the parent."""
        self._socket.close()


class TLSConnection(Connection):
    """The same, encrypted.

    Between memory and the socket are buffers of ours instead of those of `ssl.SSLSocket`, which
    asks the kernel twice for each record of 16 KiB, and waits for one where it should look.
    """

    def __init__(
        self,
        host: str,
        port: int,
        deadline: Deadline,
        context: ssl.SSLContext,
        server_name: str = "",
    ) -> None:
        """Connect to a server whose certificate has `server_name`, or the host's."""
        _check_name(server_name)
        super().__init__(host, port, deadline)
        self._received, self._unsent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._buffer = memoryview(bytearray(_TLS_BYTES))
        try:
            self._tls = context.wrap_bio(
                self._received, self._unsent, server_hostname=server_name or host
            )
            self._greet(deadline)
        except BaseException:
            self.close()
            raise

    def protocol(self) -> str | None:
        """What both sides agreed to speak (ALPN), if anything."""
        return self._tls.selected_alpn_protocol()

    def send(self, parts: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        """Send all of them, one after the other."""
        for part in parts:
            view = memoryview(part)
            while len(view):
                view = view[self._tls.write(view) :]
                if self._unsent.pending >= _TLS_BYTES:
                    self._flush(deadline)
        self._flush(deadline)

    def receive_some(self, view: memoryview, deadline: Deadline, *, wait: bool = True) -> int:
        """As without TLS; what is no data, such as a ticket for another session, is not waited for
        either.
        """
        while True:
            try:
                # A buffer is asked for, and how much of it is filled is answered.
                received = int(self._tls.read(len(view), view))
            except ssl.SSLWantReadError:
                if not self._fill(deadline, wait=wait):
                    return 0
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError) as error:
                raise ConnectionEnded("the server closed the connection") from error
            else:
                return received
            finally:
                self._flush(deadline)  # the answer to a change of keys

    def _greet(self, deadline: Deadline) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush(deadline)
                self._fill(deadline, wait=True)
            except ssl.SSLError:
                with suppress(OSError):
                    self._flush(deadline)  # what is wrong with the server's certificate
                raise
            else:
                self._flush(deadline)
                return

    def _fill(self, deadline: Deadline, *, wait: bool) -> bool:
        received = super().receive_some(self._buffer, deadline, wait=wait)
        self._received.write(self._buffer[:received])
        return received > 0

    def _flush(self, deadline: Deadline) -> None:
        if self._unsent.pending:
            super().send([self._unsent.read()], deadline)


def _connected(host: str, port: int, deadline: Deadline) -> socket.socket:
    """To the first address that answers, each of them in its share of the time."""
    addresses = _addresses(host, port, deadline)
    lost: OSError = ConnectionError(f"{host} has no address")
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        try:
            found = socket.socket(family, kind, protocol)
        except OSError as error:  # an address of a family that this machine has not
            lost = error
            continue
        try:
            found.settimeout(_seconds(deadline) / (len(addresses) - index))
            found.connect(address)
        except OSError as error:
            found.close()
            lost = error
        else:
            return found
    raise lost


def _addresses(host: str, port: int, deadline: Deadline) -> _Addresses:
    """Of a host, whose name is asked for on a thread: that question has no time-out."""
    _check_name(host)
    answers: queue.SimpleQueue[_Addresses | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.put(error)

    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        threading.Thread(target=ask, name="kvcodec-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=_seconds(deadline))
    except queue.Empty:
        raise TimeoutError(f"no address of {host} in time") from None
    if isinstance(answer, OSError):
        raise answer
    return answer


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
    return min(seconds, _LONGEST_SECONDS)
