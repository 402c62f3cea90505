"""A store that shows some of its namespaces only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from kvcodec.backend import Backend, GetResult, ObjectInfo, PutResult
from kvcodec.errors import BackendReadOnly, ConfigError

__all__ = ["ServedNamespaces"]

R = TypeVar("R")


class ServedNamespaces(Backend):
    """Another backend, of which the objects of other namespaces are not there and cannot be made.

    A refused object answers as a store that can only be read does, which no breaker takes for a
    failing one. Closing it closes the other.
    """

    def __init__(self, backend: Backend, digests: Collection[str]) -> None:
        self._backend = backend
        self._digests = frozenset(digests)
        self.batch_size = backend.batch_size

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> Backend:
        """Has no URL: it is made from a backend."""
        del create
        raise ConfigError(f"{url!r}: set store.namespaces of the sidecar instead")

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """As `Backend.put`."""

        def put(served: Sequence[int]) -> list[PutResult]:
            wanted = [names[index] for index in served], [objects[index] for index in served]
            return self._backend.put(*wanted, timeout_seconds=timeout_seconds)

        refused: PutResult = BackendReadOnly(
            "this sidecar does not serve the namespace; it is not in store.namespaces"
        )
        return _each(self._served(names), len(names), refused, put)

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """As `Backend.get_into`."""

        def get(served: Sequence[int]) -> list[GetResult]:
            wanted = [names[index] for index in served], [buffers[index] for index in served]
            return self._backend.get_into(*wanted, timeout_seconds=timeout_seconds)

        missing: GetResult = None
        return _each(self._served(names), len(names), missing, get)

    def lend(self, name: str) -> AbstractContextManager[memoryview] | None:
        """As `Backend.lend`."""
        return self._backend.lend(name) if self._serves(name) else None

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """As `Backend.exists`."""

        def ask(served: Sequence[int]) -> list[bool]:
            wanted = [names[index] for index in served]
            return self._backend.exists(wanted, timeout_seconds=timeout_seconds)

        return _each(self._served(names), len(names), False, ask)

    def exists_prefix(self, names: Sequence[str], *, timeout_seconds: float) -> int:
        """As `Backend.exists_prefix`."""
        end = next((at for at, name in enumerate(names) if not self._serves(name)), len(names))
        return self._backend.exists_prefix(names[:end], timeout_seconds=timeout_seconds)

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """As `Backend.delete`."""

        def delete(served: Sequence[int]) -> list[bool]:
            wanted = [names[index] for index in served]
            return self._backend.delete(wanted, timeout_seconds=timeout_seconds)

        return _each(self._served(names), len(names), False, delete)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As `Backend.list`."""
        return (info for info in self._backend.list(prefix) if self._serves(info.name))

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """As `Backend.stat`."""
        if not self._serves(name):
            return None
        return self._backend.stat(name, timeout_seconds=timeout_seconds)

    def staging_memory(self, size: int) -> memoryview | None:
        """As `Backend.staging_memory`."""
        return self._backend.staging_memory(size)

    def is_idle(self, memory: memoryview) -> bool:
        """As `Backend.is_idle`."""
        return self._backend.is_idle(memory)

    def close(self) -> None:
        """Close the other backend."""
        self._backend.close()

    def counters(self) -> Mapping[str, int]:
        """Those of the other backend."""
        return self._backend.counters()

    def gauges(self) -> Mapping[str, int]:
        """Those of the other backend."""
        return self._backend.gauges()

    def _serves(self, name: str) -> bool:
        return name.partition("/")[0] in self._digests

    def _served(self, names: Sequence[str]) -> Sequence[int]:
        return [index for index, name in enumerate(names) if self._serves(name)]


def _each(
    served: Sequence[int], count: int, refused: R, call: Callable[[Sequence[int]], list[R]]
) -> list[R]:
    """The answers of `call` in the places that are served, `refused` in the others of `count`."""
    answers = [refused] * count
    if served:
        for index, answer in zip(served, call(served), strict=True):
            answers[index] = answer
    return answers
