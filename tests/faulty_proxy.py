"""A TCP proxy that can be told to fail: what networks and servers do when they are not well.

with FaultyProxy("127.0.0.1", server_port) as proxy:
    ...                                    # proxy.port passes everything on
    proxy.rate = 10_000                    # bytes per second and direction; 0: a black hole
    proxy.rate = None                      # as fast as it goes
    proxy.cut()                            # resets all connections that are open
    proxy.forget()                         # passes nothing on for those, and new ones well
"""

from __future__ import annotations

import socket
import struct
import threading
import time

_STEP_SECONDS = 0.02
_BLOCK_BYTES = 1 << 16
_RESET = struct.pack("ii", 1, 0)


class FaultyProxy:
    """Passes bytes between its own port and a server, at `rate` bytes per second."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.rate: int | None = None
        self._closed = False
        self._forgotten: set[socket.socket] = set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection, as a server that is killed or a firewall that restarts does."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                try:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()

    def forget(self) -> None:
        """Drop what comes on the open connections, as a firewall does that lost its table."""
        self._forgotten.update(end for pair in self._pairs for end in pair)
        self.rate = None

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, timeout=5.0)
            except OSError:
                continue
            far.settimeout(None)
            self._pairs.append((near, far))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while not self._closed:
                rate = self.rate
                if rate == 0 or source in self._forgotten:
                    time.sleep(_STEP_SECONDS)
                    continue
                size = _BLOCK_BYTES if rate is None else max(1, int(rate * _STEP_SECONDS))
                data = source.recv(size)
                # It may have become a black hole while this waited for the data.
                while not self._closed and (self.rate == 0 or source in self._forgotten):
                    time.sleep(_STEP_SECONDS)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
        except OSError:
            for end in (source, target):
                end.close()
