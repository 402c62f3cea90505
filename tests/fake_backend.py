"""A backend in a dict whose every call can be made to fail, hang or lie."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvcodec.backend import Backend, GetResult, ObjectInfo, PutResult


class FakeBackend(Backend):
    """`hook(operation, names)` runs before every call: it may sleep, raise, or wait for ever."""

    def __init__(self, batch_size: int = 2) -> None:
        self.batch_size = batch_size
        self.objects: dict[str, bytes] = {}
        self.hook: Callable[[str, Sequence[str]], None] = lambda operation, names: None
        self.calls: list[tuple[str, int]] = []
        self.lock = threading.Lock()
        self.closed = False

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> FakeBackend:
        return cls()

    def _begin(self, operation: str, names: Sequence[str]) -> None:
        with self.lock:
            self.calls.append((operation, len(names)))
        self.hook(operation, names)

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        self._begin("put", names)
        for name, data in zip(names, objects, strict=True):
            self.objects[name] = bytes(data)
        return [None] * len(names)

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        self._begin("get", names)
        results: list[GetResult] = []
        for name, buffer in zip(names, buffers, strict=True):
            data = self.objects.get(name)
            if data is not None and len(data) <= len(buffer):
                buffer[: len(data)] = data
            results.append(None if data is None else len(data))
        return results

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        self._begin("exists", names)
        return [name in self.objects for name in names]

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        self._begin("delete", names)
        return [self.objects.pop(name, None) is not None for name in names]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._begin("list", [prefix])
        for name, data in sorted(self.objects.items()):
            if name.startswith(prefix):
                yield ObjectInfo(name, len(data), time.time())

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        self._begin("stat", [name])
        data = self.objects.get(name)
        return None if data is None else ObjectInfo(name, len(data), time.time())

    def close(self) -> None:
        self.closed = True

    def counters(self) -> Mapping[str, int]:
        return {"objects": len(self.objects)}
