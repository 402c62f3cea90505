"""Objects in the memory of this process: for tests, and the smallest backend to learn from."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from kvcodec.backend import (
    Backend,
    Deadline,
    GetResult,
    ObjectInfo,
    PutResult,
    check_name,
    checked_buffers,
    checked_names,
    checked_objects,
    closed_error,
    parse_byte_count,
    parse_options,
)
from kvcodec.errors import BackendFull, BackendTimeout, ConfigError

__all__ = ["DEFAULT_MAX_BYTES", "MemoryBackend"]

DEFAULT_MAX_BYTES = 1 << 30

_STORE_NAME = re.compile(r"[A-Za-z0-9._-]{0,64}")


class _MemoryStore:
    """The objects behind one name, least recently used first. The caller holds `lock`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.lock = threading.Lock()
        self.objects: OrderedDict[str, tuple[memoryview, float]] = OrderedDict()
        self.used_bytes = 0
        self.counts: Counter[str] = Counter(evicted_objects=0, evicted_bytes=0)

    def put(self, name: str, data: memoryview) -> PutResult:
        if len(data) > self.max_bytes:
            return BackendFull(f"put {name}: {len(data)} bytes, the store holds {self.max_bytes}")
        self.remove(name)
        while self.used_bytes + len(data) > self.max_bytes:
            _, (evicted, _) = self.objects.popitem(last=False)
            self.used_bytes -= len(evicted)
            self.counts["evicted_objects"] += 1
            self.counts["evicted_bytes"] += len(evicted)
        self.objects[name] = (data, time.time())
        self.used_bytes += len(data)
        return None

    def get(self, name: str) -> memoryview | None:
        entry = self.objects.get(name)
        if entry is None:
            return None
        self.objects.move_to_end(name)
        return entry[0]

    def remove(self, name: str) -> bool:
        entry = self.objects.pop(name, None)
        if entry is None:
            return False
        self.used_bytes -= len(entry[0])
        return True


def _is_for_ever(view: memoryview) -> bool:
    """Whether this is nearly all of a `bytes`, such as a message that brought the object: keeping
    it costs little more than a copy would.
    """
    return type(view.obj) is bytes and len(view.obj) <= len(view) + len(view) // 16


_stores: dict[str, _MemoryStore] = {}
_stores_lock = threading.Lock()


class MemoryBackend(Backend):
    """``memory://name?max_bytes=64MiB``: a bounded dict of bytes, least recently used out first.

    Backends of one name share their objects for the life of the process; ``memory://`` without a
    name is nobody else's and ends with the backend. `max_bytes` is 1 GiB unless given.
    """

    def __init__(
        self, name: str = "", *, max_bytes: int | None = None, create: bool = True
    ) -> None:
        if not _STORE_NAME.fullmatch(name):
            raise ConfigError(
                f"memory store name {name!r}; allowed are up to 64 of A-Z a-z 0-9 . _ -"
            )
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"max_bytes is {max_bytes}, must be at least 1")
        self._url = f"memory://{name}"
        self._closed = False
        with _stores_lock:
            store = _stores.get(name) if name else None
            if store is None:
                if not create:
                    raise ConfigError(f"{self._url}: this process has no such memory store")
                store = _MemoryStore(DEFAULT_MAX_BYTES if max_bytes is None else max_bytes)
                if name:
                    _stores[name] = store
            elif max_bytes not in (None, store.max_bytes):
                raise ConfigError(
                    f"{self._url} is open with max_bytes={store.max_bytes}, not {max_bytes}"
                )
        self._store = store

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> MemoryBackend:
        """Open the store of that name, creating it if need be."""
        parts, options = parse_options(url, ["max_bytes"])
        if parts.path or parts.fragment:
            raise ConfigError(
                f"{url!r}: a memory store has a name and no path, as in memory://name"
            )
        limit = options.get("max_bytes")
        return cls(
            parts.netloc,
            max_bytes=None if limit is None else parse_byte_count("max_bytes", limit),
            create=create,
        )

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Store copies of the objects, or those themselves that nobody can change."""
        pairs = checked_objects(names, objects)
        deadline = Deadline(timeout_seconds)
        results: list[PutResult] = []
        for name, view in pairs:
            if self._closed:
                results.append(closed_error(self._url))
            elif deadline.passed():
                results.append(deadline.error("put", name))
            else:
                # Copied outside the lock: whole objects change hands, never bytes.
                data = view[:] if _is_for_ever(view) else memoryview(bytes(view))
                with self._store.lock:
                    results.append(self._store.put(name, data))
        return results

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Copy objects into the starts of the buffers."""
        pairs = checked_buffers(names, buffers)
        deadline = Deadline(timeout_seconds)
        results: list[GetResult] = []
        for name, buffer in pairs:
            if self._closed:
                results.append(closed_error(self._url))
            elif deadline.passed():
                results.append(deadline.error("get", name))
            else:
                with self._store.lock:
                    data = self._store.get(name)
                if data is not None and len(data) <= len(buffer):
                    buffer[: len(data)] = data
                results.append(None if data is None else len(data))
        return results

    def lend(self, name: str) -> AbstractContextManager[memoryview] | None:
        """The object itself."""
        if self._closed:
            return None
        with self._store.lock:
            data = self._store.get(name)
        return None if data is None else nullcontext(data)

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is there."""
        checked = checked_names(names)
        if self._closed or Deadline(timeout_seconds).passed():
            return [False] * len(checked)
        with self._store.lock:
            return [name in self._store.objects for name in checked]

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Remove objects."""
        checked = checked_names(names)
        if self._closed or Deadline(timeout_seconds).passed():
            return [False] * len(checked)
        with self._store.lock:
            return [self._store.remove(name) for name in checked]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects there were when it was called, least recently used first."""
        if self._closed:
            raise closed_error(self._url)
        with self._store.lock:
            entries = tuple(self._store.objects.items())
        return (
            ObjectInfo(name, len(data), modified_seconds)
            for name, (data, modified_seconds) in entries
            if name.startswith(prefix)
        )

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description."""
        check_name(name)
        if self._closed:
            raise closed_error(self._url)
        if Deadline(timeout_seconds).passed():
            raise BackendTimeout(f"stat {name}: not reached within {timeout_seconds:g} s")
        with self._store.lock:
            entry = self._store.objects.get(name)
        return None if entry is None else ObjectInfo(name, len(entry[0]), entry[1])

    def close(self) -> None:
        """Stop answering. The objects of a named store stay for those who open it later."""
        self._closed = True

    def counters(self) -> Mapping[str, int]:
        """Evictions since the store was made, by whomever of its users."""
        return dict(self._store.counts)

    def gauges(self) -> Mapping[str, int]:
        """Bytes of the objects, and how many there may be."""
        return {"stored_bytes": self._store.used_bytes, "limit_bytes": self._store.max_bytes}
