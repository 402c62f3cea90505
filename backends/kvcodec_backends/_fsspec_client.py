"""What FsspecBackend asks of a client of one kind of store, and what clients have in common."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from kvcodec.errors import BackendError, ConfigError

__all__ = ["Address", "Client", "StoredObject", "flag"]


@dataclass(frozen=True, slots=True)
class Address:
    """A store URL taken apart. `shown` is the URL without its secrets."""

    protocol: str
    location: str
    path: str
    shown: str


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object as a listing or a question for it describes it."""

    key: str
    stored_bytes: int
    modified_seconds: float


class Client(abc.ABC):
    """Requests for single objects, to be awaited in the backend's event loop.

    Keys are paths below the root of the store. Methods raise whatever the library below them
    raises, for `as_backend_error` to translate; FileNotFoundError is the one that always means that
    there is no such object.
    """

    @abc.abstractmethod
    async def open(self, *, create: bool) -> None:
        """Raise `ConfigError` if it is certain that the store cannot be used: it does not exist and
        is not to be made or cannot be, or the credentials are wrong.
        """

    @abc.abstractmethod
    async def put(self, key: str, data: bytes) -> None:
        """Store an object whole, in place of what there is."""

    @abc.abstractmethod
    async def get(self, key: str, limit_bytes: int) -> memoryview | int:
        """An object, or its length where that is above the limit."""

    @abc.abstractmethod
    async def stat(self, key: str) -> StoredObject:
        """One object's description."""

    @abc.abstractmethod
    async def delete(self, key: str) -> None:
        """Remove an object that was there a moment ago."""

    @abc.abstractmethod
    def list(self, directory: str) -> AsyncIterator[list[StoredObject]]:
        """Everything in a directory of the store, page by page."""

    @abc.abstractmethod
    def as_backend_error(self, error: BaseException, verb: str, name: str) -> BackendError:
        """The one place where an exception of the library becomes a class of the error tree."""

    @abc.abstractmethod
    def after_fork(self) -> None:
        """In the child: connections, threads and locks are the parent's."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of connections."""


def flag(options: Mapping[str, str], name: str, shown: str) -> bool:
    """An option that is 0 or 1, and 0 where it is not given."""
    value = options.get(name, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{shown}: {name} is {value!r}, must be 0 or 1")
    return value == "1"
