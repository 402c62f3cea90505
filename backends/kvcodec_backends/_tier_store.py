"""The store behind a tier, which may be anybody's code: whatever it raises becomes an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from kvcodec.backend import Backend, GetResult, ObjectInfo, PutResult
from kvcodec.errors import BackendError

__all__ = ["StoreBehind"]

T = TypeVar("T")


class StoreBehind:
    """The calls of a backend that a tier makes. None of them raises but `list` and `stat`, and
    those `BackendError` only; each answer has one result for each name.
    """

    def __init__(self, backend: Backend, counts: Counter[str]) -> None:
        self.backend = backend
        self._counts = counts

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], timeout_seconds: float
    ) -> list[PutResult]:
        """`Backend.put`."""
        call = partial(self.backend.put, names, objects, timeout_seconds=timeout_seconds)
        return self._each(names, call, lambda error: error)

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], timeout_seconds: float
    ) -> list[GetResult]:
        """`Backend.get_into`."""
        call = partial(self.backend.get_into, names, buffers, timeout_seconds=timeout_seconds)
        return self._each(names, call, lambda error: error)

    def exists(self, names: Sequence[str], timeout_seconds: float) -> list[bool]:
        """`Backend.exists`."""
        call = partial(self.backend.exists, names, timeout_seconds=timeout_seconds)
        return self._each(names, call, lambda _: False)

    def delete(self, names: Sequence[str], timeout_seconds: float) -> list[bool]:
        """`Backend.delete`."""
        call = partial(self.backend.delete, names, timeout_seconds=timeout_seconds)
        return self._each(names, call, lambda _: False)

    def exists_prefix(self, names: Sequence[str], timeout_seconds: float) -> int:
        """`Backend.exists_prefix`."""
        if not names:
            return 0
        try:
            return self._called(
                partial(self.backend.exists_prefix, names, timeout_seconds=timeout_seconds)
            )
        except BackendError:
            return 0

    def stat(self, name: str, timeout_seconds: float) -> ObjectInfo | None:
        """`Backend.stat`."""
        return self._called(partial(self.backend.stat, name, timeout_seconds=timeout_seconds))

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """`Backend.list`."""
        found = self._called(lambda: iter(self.backend.list(prefix)))
        while (info := self._called(lambda: next(found, None))) is not None:
            yield info

    def _each(
        self,
        names: Sequence[str],
        call: Callable[[], list[T]],
        failed: Callable[[BackendError], T],
    ) -> list[T]:
        if not names:
            return []
        try:
            answers = self._called(call)
        except BackendError as error:
            return [failed(error)] * len(names)
        if len(answers) != len(names):
            wrong = BackendError(f"the store gave {len(answers)} answers for {len(names)} objects")
            return [failed(wrong)] * len(names)
        return answers

    def _called(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except BackendError:
            raise
        except Exception as error:
            # The border to code that is not ours.
            self._counts["store_raised"] += 1
            raise BackendError(f"the store behind the tier raised {error!r}") from error
