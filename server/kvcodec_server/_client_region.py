"""The client's side of a region: whose its parts are, and which of them are in doubt."""

from __future__ import annotations

import mmap
import os
import threading
import weakref

import numpy as np

from kvcodec_server import _region_wire as wire
from kvcodec_server.ranges import Ranges

__all__ = ["ClientRegion", "Slot"]


class Slot:
    """A part of the region for one object of one call. Freed when the last reference is gone."""

    def __init__(self, region: ClientRegion, offset: int, size: int) -> None:
        self.offset = offset
        self.bytes = region.bytes_at(offset, size)
        weakref.finalize(self, region.ranges.free, offset, size).atexit = False


class ClientRegion:
    """Memory that a sidecar may read and write. Thread-safe.

    A part is *in doubt* while a call that was given up may still be under way at the sidecar: then
    it is lent to nobody else, and `is_idle` says no.
    """

    def __init__(self, size: int) -> None:
        self.descriptor = wire.new_region(size)
        self._map = mmap.mmap(self.descriptor, size)
        self._array = np.frombuffer(self._map, np.uint8)
        self._address = self._array.__array_interface__["data"][0]
        self._lock = threading.Lock()
        self._in_doubt: dict[int, list[tuple[int, int]]] = {}
        self._kept: dict[int, list[object]] = {}
        self.ranges = Ranges(size)
        self.size = size

    def bytes_at(self, offset: int, size: int) -> memoryview:
        """A part of the region."""
        return self._array[offset : offset + size].data

    def lend(self, size: int) -> memoryview | None:
        """A part for staging, freed when the last view of it is gone; None if there is no room.

        A quarter is never lent: objects that lie elsewhere need slots.
        """
        offset = self.ranges.take(size, leave=self.size // 4)
        if offset is None:
            return None
        # The array is what every view of the part keeps alive.
        part = np.frombuffer(self._map, np.uint8, size, offset)
        weakref.finalize(part, self.ranges.free, offset, size).atexit = False
        return part.data

    def slot(self, size: int, timeout_seconds: float) -> Slot | None:
        """A part for one object that lies elsewhere; None if no room comes free in time."""
        offset = self.ranges.take(size, timeout_seconds)
        return None if offset is None else Slot(self, offset, size)

    def offset_of(self, view: memoryview) -> int | None:
        """Where in the region a view lies, None if it is of other memory."""
        if not len(view):
            return None
        address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        offset = int(address - self._address)
        return offset if 0 <= offset <= self.size - len(view) else None

    def doubt(self, call_id: int, parts: list[tuple[int, int]], keep: list[object]) -> None:
        """Nobody may use these (offset, size), and `keep` is held, until the call is over."""
        with self._lock:
            self._in_doubt[call_id] = parts
            self._kept[call_id] = keep

    def settle(self, call_id: int) -> None:
        """The call is over."""
        with self._lock:
            self._in_doubt.pop(call_id, None)
            kept = self._kept.pop(call_id, None)
        del kept  # outside the lock: what it frees may want it

    def is_idle(self, view: memoryview) -> bool:
        """Whether no part of this memory is in doubt."""
        if not self._in_doubt:
            return True
        offset = self.offset_of(view)
        return offset is None or not self._doubtful(offset, len(view))

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last view of it."""
        os.close(self.descriptor)

    def _doubtful(self, offset: int, size: int) -> bool:
        with self._lock:
            return any(
                start < offset + size and offset < start + length
                for parts in self._in_doubt.values()
                for start, length in parts
            )
