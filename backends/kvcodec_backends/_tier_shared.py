"""What all backends of one tier in a process share: the memory, the store, and the way between."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvcodec.backend import (
    Backend,
    Deadline,
    GetResult,
    ObjectInfo,
    PutResult,
    display_url,
    parse_byte_count,
)
from kvcodec.errors import BackendError, ConfigError
from kvcodec_backends._tier_memory import Entry, Flights, Memory, copy_bytes
from kvcodec_backends._tier_store import StoreBehind
from kvcodec_backends._tier_writer import Writer

__all__ = ["DEFAULT_FLUSH_TIMEOUT_SECONDS", "Lent", "Tier", "TierOptions"]

DEFAULT_FLUSH_TIMEOUT_SECONDS = 10.0
#: How much of the memory may hold pages that are not in the store yet, unless told.
_DIRTY_SHARE = 4
_MODES = ("write_through", "write_back")
_COUNTERS = (
    "hits",
    "hit_bytes",
    "misses",
    "inserted_objects",
    "evicted_objects",
    "evicted_bytes",
    "buffered_objects",
    "buffered_bytes",
    "flushed_objects",
    "flushed_bytes",
    "flush_failed",
    "lost_objects",
    "lost_bytes",
    "store_raised",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOptions:
    """How much memory a tier has, and when it writes."""

    limit_bytes: int
    write_back: bool = False
    dirty_bytes: int = 0
    flush_timeout_seconds: float = DEFAULT_FLUSH_TIMEOUT_SECONDS

    @classmethod
    def parsed(cls, url: str, options: Mapping[str, str]) -> TierOptions:
        """The options of a URL. Raises `ConfigError`."""
        if "bytes" not in options:
            raise ConfigError(f"{display_url(url)}: bytes is missing, as in bytes=4GiB")
        limit = parse_byte_count("bytes", options["bytes"])
        if limit < 1:
            raise ConfigError(f"bytes is {options['bytes']}, must be at least 1")
        mode = options.get("mode", _MODES[0])
        if mode not in _MODES:
            raise ConfigError(f"mode is {mode!r}, must be one of: {', '.join(_MODES)}")
        if mode == _MODES[0]:
            for name in ("dirty_bytes", "flush_timeout_seconds"):
                if name in options:
                    raise ConfigError(f"{name} is for mode=write_back, and mode is {mode}")
            return cls(limit_bytes=limit)
        dirty = limit // _DIRTY_SHARE
        if "dirty_bytes" in options:
            dirty = parse_byte_count("dirty_bytes", options["dirty_bytes"])
        if not 1 <= dirty <= limit:
            raise ConfigError(f"dirty_bytes is {dirty}, must be from 1 to bytes={limit}")
        text = options.get("flush_timeout_seconds", str(DEFAULT_FLUSH_TIMEOUT_SECONDS))
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= 3600:
            raise ConfigError(f"flush_timeout_seconds is {text!r}, must be a number from 0 to 3600")
        return cls(
            limit_bytes=limit, write_back=True, dirty_bytes=dirty, flush_timeout_seconds=seconds
        )


class Lent:
    """A page that is pinned until the end of the context."""

    def __init__(self, tier: Tier, entry: Entry) -> None:
        self._tier = tier
        self._entry = entry

    def __enter__(self) -> memoryview:
        return self._entry.view.toreadonly()

    def __exit__(self, *_: object) -> None:
        self._tier.unpin(self._entry)


class Tier:
    """What the backends of one URL share."""

    def __init__(self, backend: Backend, options: TierOptions, url: str) -> None:
        self.url = url
        self.users = 0
        self.options = options
        self.counts: Counter[str] = Counter(dict.fromkeys(_COUNTERS, 0))
        self.store = StoreBehind(backend, self.counts)
        self.reset()

    def reset(self) -> None:
        """Begin with empty memory; a child of a fork leaves its parent's pages to the parent."""
        self.lock = threading.Condition()
        self.memory = Memory(self.options.limit_bytes, self.counts)
        self.flights = Flights()
        self.writer = Writer(
            self.store,
            self.memory,
            self.flights,
            self.lock,
            self.counts,
            dirty_limit_bytes=self.options.dirty_bytes,
        )

    def close(self) -> None:
        """Store what is left, and let go of everything."""
        self.writer.close(self.options.flush_timeout_seconds)
        self.store.backend.close()
        with self.lock:
            self.memory.clear()

    def read(self, name: str, buffer: memoryview) -> int | None:
        """Copy a page out of memory; its length, or None if it is not there."""
        with self.lock:
            entry = self.writer.pinned(name) or self.memory.pinned(name)
            self.counts["misses" if entry is None else "hits"] += 1
            if entry is None:
                return None
            self.counts["hit_bytes"] += entry.size
        try:
            if entry.size <= len(buffer):
                copy_bytes(np.frombuffer(buffer, np.uint8), entry.block[: entry.size])
        finally:
            self.unpin(entry)
        return entry.size

    def unpin(self, entry: Entry) -> None:
        """The reader of a page is done."""
        with self.lock:
            self.memory.unpin(entry)

    def lend(self, name: str) -> Lent | None:
        """A page where it lies in memory; None if it is not there."""
        with self.lock:
            entry = self.writer.pinned(name) or self.memory.pinned(name)
            if entry is None:
                return None  # whoever asks for it then is a miss
            self.counts["hits"] += 1
            self.counts["hit_bytes"] += entry.size
        return Lent(self, entry)

    def fill(
        self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline
    ) -> Sequence[GetResult]:
        """Read pages from the store, and keep them."""
        names = [name for name, _ in pairs]
        with self.lock:
            stamps = [self.flights.begin_read(name) for name in names]
        buffers = [buffer for _, buffer in pairs]
        answers = self.store.get_into(names, buffers, deadline.remaining_seconds())
        for (name, buffer), stamp, answer in zip(pairs, stamps, answers, strict=True):
            entry = None
            if isinstance(answer, int) and 0 < answer <= len(buffer):
                entry = self._copied(buffer[:answer])
            with self.lock:
                is_newest = self.flights.end_read(name, stamp)
                self._keep(name, entry, if_newest=is_newest)
        return answers

    def put_through(
        self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline
    ) -> list[PutResult]:
        """Put pages into the store, and keep those it took."""
        names = [name for name, _ in pairs]
        last = {name: index for index, name in enumerate(names)}
        stamps = self._begin_writes(list(last), deadline)
        if stamps is None:
            return [deadline.error("put", name) for name in names]
        views = [view for _, view in pairs]
        results = self.store.put(names, views, deadline.remaining_seconds())
        for name, index in last.items():
            entry = self._copied(views[index]) if results[index] is None else None
            with self.lock:
                is_alone = self.flights.end_write(name, stamps[name])
                self._keep(name, entry, if_newest=is_alone)
                self.lock.notify_all()
        return list(results)

    def delete(self, names: Sequence[str], deadline: Deadline) -> list[bool]:
        """Remove pages everywhere. The second of two equal names finds nothing."""
        distinct = list(dict.fromkeys(names))
        held: dict[str, bool] = {}
        stamps = self._begin_writes(distinct, deadline, held)
        if stamps is None:
            return [False] * len(names)
        answers = self.store.delete(distinct, deadline.remaining_seconds())
        gone = dict(zip(distinct, answers, strict=True))
        for name in distinct:
            if held[name] and not gone[name]:
                gone[name] = self._is_absent(name, deadline)
            with self.lock:
                self.flights.end_write(name, stamps[name])
                self.lock.notify_all()
        return [gone.pop(name, False) for name in names]

    def holds(self, names: Sequence[str]) -> list[bool]:
        """Whether each page is in memory."""
        with self.lock:
            pending, entries = self.writer.pending, self.memory.entries
            return [name in entries or name in pending for name in names]

    def pending_info(self, name: str) -> ObjectInfo | None:
        """A page that the store has not been given yet."""
        with self.lock:
            entry = self.writer.pending.get(name)
            return None if entry is None else ObjectInfo(name, entry.size, entry.seconds)

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """The union of the store and of what it has not been given yet."""
        with self.lock:
            pending = {
                name: ObjectInfo(name, entry.size, entry.seconds)
                for name, entry in self.writer.pending.items()
                if name.startswith(prefix)
            }
        for info in self.store.objects(prefix):
            yield pending.pop(info.name, info)
        yield from pending.values()

    def _begin_writes(
        self, names: Sequence[str], deadline: Deadline, held: dict[str, bool] | None = None
    ) -> dict[str, int] | None:
        """Take pages out of memory, and keep others from putting them there.

        `held` is told which of them the store had not been given yet. None if that took too long.
        """
        with self.lock:
            withdrawn = self.writer.withdraw(names, deadline)
            if withdrawn is None:
                return None
            for name, was_pending in zip(names, withdrawn, strict=True):
                self.memory.remove(name)
                if held is not None:
                    held[name] = was_pending
            return {name: self.flights.begin_write(name) for name in names}

    def _copied(self, view: memoryview) -> Entry | None:
        """A pinned copy of a page, None if there is no room."""
        with self.lock:
            if not self.memory.can_hold(len(view)):
                return None
            entry = self.memory.take(len(view))
        if entry is not None:
            copy_bytes(entry.block, np.frombuffer(view, np.uint8))
        return entry

    def _keep(self, name: str, entry: Entry | None, *, if_newest: bool) -> None:
        """Put a copy under its name, or give it up; the caller holds the lock."""
        if entry is None:
            return
        self.memory.unpin(entry)
        if if_newest:
            self.counts["inserted_objects"] += 1
            self.memory.install(name, entry)
        else:
            self.memory.drop(entry)

    def _is_absent(self, name: str, deadline: Deadline) -> bool:
        """Whether the store is sure not to have a page that it did not delete."""
        try:
            return self.store.stat(name, deadline.remaining_seconds()) is None
        except BackendError:
            return False
