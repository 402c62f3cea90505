"""Pages in memory: blocks that are used again, and who may put something under a name."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcodec_backends._tier_policy import S3Fifo

__all__ = ["ENTRY_BYTES", "Entry", "Flights", "Memory", "capacity_of", "copy_bytes"]

#: What a page takes beside its block: its name, the entry, and its places in tables (measured).
ENTRY_BYTES = 1024
#: Below this a copy keeps the GIL: it takes less than a thread that computes takes to hand it back.
_RELEASING_BYTES = 256 << 10

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Entry:
    """One page. It is pinned while somebody reads or writes its block."""

    block: Bytes
    size: int
    pins: int = 0
    is_dropped: bool = False
    seconds: float = field(default_factory=time.time)
    #: Only of pages that are not in the store yet.
    attempts: int = 0
    first_attempt: int = 0

    @property
    def cost(self) -> int:
        """Bytes of memory."""
        return len(self.block) + ENTRY_BYTES

    @property
    def view(self) -> memoryview:
        """The page."""
        return self.block[: self.size].data


def capacity_of(size: int) -> int:
    """The length of the block for a page: one of eight steps per power of two, at least 512.

    Pages of one codec and layout have one size, so blocks are used again at once; steps let pages
    that differ a little share them.
    """
    step = max(1 << max(size.bit_length() - 4, 0), 512)
    return -(-size // step) * step


def copy_bytes(target: Bytes, source: Bytes) -> None:
    """Copy `source` over the start of `target`; large ones without the GIL."""
    if len(source) >= _RELEASING_BYTES:
        np.copyto(target[: len(source)], source)
    else:
        target.data[: len(source)] = source.data


class Memory:
    """Pages by name within a number of bytes. The caller holds the lock for every call.

    What a page takes is counted from `take` to the moment its block is given to the system again;
    blocks that wait to be used again count too.
    """

    def __init__(self, limit_bytes: int, counts: Counter[str]) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.entries: dict[str, Entry] = {}
        self._policy = S3Fifo(limit_bytes)
        self._free: dict[int, list[Bytes]] = {}
        self._counts = counts

    def can_hold(self, size: int) -> bool:
        """Whether a page of this size fits at all."""
        return capacity_of(size) + ENTRY_BYTES <= self.limit_bytes

    def take(self, size: int) -> Entry | None:
        """A pinned entry for a page, with others evicted to make room; None if there is none."""
        capacity = capacity_of(size)
        while not (blocks := self._free.get(capacity)):
            if self.used_bytes + capacity + ENTRY_BYTES <= self.limit_bytes:
                self.used_bytes += capacity + ENTRY_BYTES
                return Entry(np.empty(capacity, np.uint8), size, pins=1)
            if self._free:
                _, others = self._free.popitem()
                self.used_bytes -= sum(len(block) + ENTRY_BYTES for block in others)
            elif not self._evict():
                return None
        block = blocks.pop()
        if not blocks:
            del self._free[capacity]
        return Entry(block, size, pins=1)

    def install(self, name: str, entry: Entry) -> None:
        """Put an entry under a name, in place of what was there."""
        self.remove(name)
        self.entries[name] = entry
        self._policy.insert(name, entry.cost)

    def remove(self, name: str) -> bool:
        """Whether there was such a page; it is gone now."""
        entry = self.entries.pop(name, None)
        if entry is None:
            return False
        self._policy.remove(name)
        self.drop(entry)
        return True

    def pinned(self, name: str) -> Entry | None:
        """The page of a name, to be read and then unpinned."""
        entry = self.entries.get(name)
        if entry is not None:
            self._policy.touch(name)
            entry.pins += 1
        return entry

    def unpin(self, entry: Entry) -> None:
        """Its reader or writer is done."""
        entry.pins -= 1
        self._release(entry)

    def drop(self, entry: Entry) -> None:
        """It is under no name any more; its block is free once nobody reads it."""
        entry.is_dropped = True
        self._release(entry)

    def clear(self) -> None:
        """Give everything to the system again."""
        for name in list(self.entries):
            self.remove(name)
        self.used_bytes -= sum(
            len(block) + ENTRY_BYTES for blocks in self._free.values() for block in blocks
        )
        self._free.clear()

    def _release(self, entry: Entry) -> None:
        if entry.is_dropped and not entry.pins:
            self._free.setdefault(len(entry.block), []).append(entry.block)

    def _evict(self) -> bool:
        name = self._policy.evict()
        if name is None:
            return False
        entry = self.entries.pop(name)
        self._counts["evicted_objects"] += 1
        self._counts["evicted_bytes"] += entry.size
        self.drop(entry)
        return True


class Flights:
    """Calls to the store that are under way, by name. The caller holds the lock for every call.

    What a call read or wrote may be kept in memory only if nobody else wrote that name meanwhile:
    the store alone knows who came last.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Flight] = {}

    def begin_read(self, name: str) -> int:
        """A read begins; its stamp."""
        flight = self._begin(name)
        return -1 if flight.writers else flight.stamp

    def end_read(self, name: str, stamp: int) -> bool:
        """A read has ended; whether nobody wrote meanwhile."""
        flight = self._end(name)
        return flight.stamp == stamp

    def begin_write(self, name: str) -> int:
        """A put or a delete begins; its stamp."""
        flight = self._begin(name)
        flight.writers += 1
        flight.stamp += 1
        return flight.stamp

    def end_write(self, name: str, stamp: int) -> bool:
        """A put or a delete has ended; whether nobody else wrote meanwhile."""
        flight = self._end(name)
        is_alone = flight.writers == 1 and flight.stamp == stamp
        flight.writers -= 1
        flight.stamp += 1
        return is_alone

    def is_written(self, name: str) -> bool:
        """Whether a put or a delete is under way."""
        return name in self._open and self._open[name].writers > 0

    def note_write(self, name: str) -> None:
        """A name was written in memory: what is being read from the store is old."""
        if name in self._open:
            self._open[name].stamp += 1

    def _begin(self, name: str) -> _Flight:
        flight = self._open.setdefault(name, _Flight())
        flight.calls += 1
        return flight

    def _end(self, name: str) -> _Flight:
        flight = self._open[name]
        flight.calls -= 1
        if not flight.calls:
            del self._open[name]
        return flight


@dataclass(slots=True)
class _Flight:
    calls: int = 0
    writers: int = 0
    stamp: int = 0
