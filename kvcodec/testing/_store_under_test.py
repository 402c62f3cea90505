"""What the conformance suite has to be told about a store, and its short forms of the calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from kvcodec.backend import Backend, GetResult
from kvcodec.testing._backend_samples import skip

__all__ = ["StoreUnderTest"]


class StoreUnderTest:
    """The hooks of `BackendTests`."""

    #: The largest object the suite stores; a store with a lower limit says so.
    max_object_bytes: int = 8 << 20
    #: Whether objects outlive `close`.
    keeps_objects: bool = True
    #: Whether a name that is replaced always leads to one of the two objects. A store without this
    #: may answer "missing" in between; it still never shows a mixture.
    replaces_atomically: bool = True
    #: Whether objects can be removed. Where not, `delete` answers False for each.
    can_delete: bool = True
    #: Whether objects can be listed. Where not, `list` raises `BackendError`.
    can_list: bool = True
    #: Whether a put replaces what is there. Where not, it answers `BackendError` for other bytes
    #: under a name that is there, and None for the same bytes.
    can_replace: bool = True
    #: Long enough for any one call of the suite on a slow machine.
    timeout_seconds: float = 60.0
    #: How many sequences of calls the comparison with a dict tries.
    model_examples: int = 25

    def open_backend(self) -> Backend:
        """A backend that is connected to this test's store."""
        raise NotImplementedError(f"{type(self).__name__} has no open_backend()")

    def plant_foreign_objects(self, namespace: str) -> bool:  # noqa: ARG002 - for subclasses
        """Put things into the store that are no objects, some of them inside `namespace`.

        False where nobody else can write to the store.
        """
        return False

    def url_with_unknown_option(self) -> tuple[type[Backend], str] | None:
        """The class and a URL of it that would work, were it not for one unknown option."""
        return None

    def url_of_missing_store(self) -> tuple[type[Backend], str] | None:
        """The class and the URL of a store that nobody has made yet, but that could be made."""
        return None

    def stalled(self) -> AbstractContextManager[None] | None:
        """While it is entered the store hangs: it takes connections and requests, and answers none.

        Stopping the server's process (SIGSTOP) does it. None where a store cannot be made to hang,
        or where a call that hangs cannot be given up, as in a file system of the kernel.
        """
        return None

    @contextmanager
    def connection(self) -> Iterator[Backend]:
        """A backend that is closed in the end."""
        backend = self.open_backend()
        try:
            yield backend
        finally:
            backend.close()

    def put(
        self,
        backend: Backend,
        objects: Mapping[str, bytes | bytearray | memoryview],
    ) -> None:
        """Store objects; each of them has to succeed."""
        views = [memoryview(data) for data in objects.values()]
        results = backend.put(list(objects), views, timeout_seconds=self.timeout_seconds)
        assert results == [None] * len(objects)

    def get_into(
        self,
        backend: Backend,
        names: Sequence[str],
        buffers: Sequence[memoryview],
        timeout_seconds: float | None = None,
    ) -> list[GetResult]:
        """`Backend.get_into` with the suite's deadline."""
        seconds = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        return backend.get_into(names, buffers, timeout_seconds=seconds)

    def get(self, backend: Backend, names: Sequence[str], buffer_bytes: int) -> list[bytes | None]:
        """The objects, None for each that is missing; a failing store fails the test."""
        buffers = [memoryview(bytearray(buffer_bytes)) for _ in names]
        results = self.get_into(backend, names, buffers)
        assert len(results) == len(names)
        found: list[bytes | None] = []
        for result, buffer in zip(results, buffers, strict=True):
            assert result is None or isinstance(result, int), result
            assert result is None or 0 < result <= buffer_bytes
            found.append(None if result is None else bytes(buffer[:result]))
        return found

    def needs(self, *, delete: bool = False, list_: bool = False, replace: bool = False) -> None:
        """Skip the running test if the store cannot do what it is about."""
        if delete and not self.can_delete:
            skip("objects of this store cannot be removed")
        if list_ and not self.can_list:
            skip("objects of this store cannot be listed")
        if replace and not self.can_replace:
            skip("objects of this store cannot be replaced")

    def exists(self, backend: Backend, names: Sequence[str]) -> list[bool]:
        """`Backend.exists` with the suite's deadline."""
        return backend.exists(names, timeout_seconds=self.timeout_seconds)
