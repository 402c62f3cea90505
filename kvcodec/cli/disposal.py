"""Where pages go that are damaged."""

from __future__ import annotations

import os
from collections.abc import Callable

from kvcodec.backend import Backend
from kvcodec.errors import BackendError

__all__ = ["deletion", "quarantine", "write_whole"]

#: Takes a bad page out of the store; whether it is gone.
Disposal = Callable[[str, memoryview], bool]


def deletion(backend: Backend, timeout_seconds: float) -> Disposal:
    """Deletes bad pages."""

    def dispose(name: str, data: memoryview) -> bool:  # noqa: ARG001 - what it looks like is lost
        return backend.delete([name], timeout_seconds=timeout_seconds)[0]

    return dispose


def quarantine(backend: Backend, directory: str, timeout_seconds: float) -> Disposal:
    """Moves bad pages into files of a directory, to be looked at with ``kvcodec inspect``."""

    def dispose(name: str, data: memoryview) -> bool:
        path = os.path.join(directory, name.replace("/", "-"))
        try:
            write_whole(path, data)
        except OSError as error:
            raise BackendError(
                f"{path} cannot be written: {error.strerror}; the page stays in the store"
            ) from error
        return backend.delete([name], timeout_seconds=timeout_seconds)[0]

    return dispose


def write_whole(path: str, data: bytes | memoryview) -> None:
    """Write a file so that there is the old one or the new one, whatever happens."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
