"""The addresses a sidecar listens on: taken once, with the right permissions."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from kvcodec.errors import ConfigError
from kvcodec_server.config import Address

__all__ = ["MAX_PATH_BYTES", "UnixSocket", "add_port"]

#: The kernel takes 107 bytes; the socket beside it, for memory, has a longer name.
MAX_PATH_BYTES = 107 - len(".region")


class UnixSocket:
    """The place of a Unix socket, held against other sidecars until it is closed.

    gRPC takes a path over even from a server that lives; the lock beside it prevents that, and goes
    with the process, whatever ends it.
    """

    def __init__(self, path: str, mode: int) -> None:
        """Raises `ConfigError` if the place cannot be had."""
        self.path = Path(path).absolute()
        self.mode = mode
        if len(os.fsencode(self.path)) > MAX_PATH_BYTES:
            raise ConfigError(
                f"listen.unix {str(self.path)!r} is longer than {MAX_PATH_BYTES} bytes, which is "
                "as long as a socket's path may be"
            )
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"listen.unix {str(self.path)!r}: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"listen.unix {str(self.path)!r}: another sidecar listens there"
            ) from error

    def add_to(self, server: grpc.Server) -> None:
        """Listen. Raises `ConfigError` if that fails."""
        with _permissions(self.mode):
            add_port(server, f"unix:{self.path}", None, "listen.unix")
        self.path.chmod(self.mode)

    def close(self) -> None:
        """Leave the place to others."""
        self.path.unlink(missing_ok=True)
        os.close(self._lock)


@contextmanager
def _permissions(mode: int) -> Iterator[None]:
    """Nobody who may not come in gets a moment in which he could."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


def add_port(
    server: grpc.Server,
    address: Address | str,
    credentials: grpc.ServerCredentials | None,
    setting: str,
) -> int:
    """Listen on a port, in the clear without `credentials`; the port that was taken.

    Raises `ConfigError` if that fails.
    """
    try:
        if credentials is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), credentials)
    except RuntimeError as error:
        raise ConfigError(f"{setting} {address}: {error}") from error
    if not port:
        raise ConfigError(f"{setting} {address}: nobody can listen there")
    return port
