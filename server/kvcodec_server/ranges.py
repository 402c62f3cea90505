"""Which parts of a region are taken: first fit, page-aligned."""

from __future__ import annotations

import mmap
import threading
import time
from bisect import insort
from collections import deque

__all__ = ["Ranges", "aligned"]


class Ranges:
    """Hands out parts of `size` bytes. Thread-safe.

    `free` may be called from a finalizer, on any thread and at any moment: it takes no lock.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]
        self._freed: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def take(self, size: int, timeout_seconds: float = 0.0, *, leave: int = 0) -> int | None:
        """The offset of a part of at least `size` bytes, None if none comes free in time. At least
        `leave` bytes stay free beside it.
        """
        wanted = aligned(size)
        deadline = time.monotonic() + timeout_seconds
        while True:
            with self._lock:
                self._settle()
                free = sum(length for _, length in self._free) - leave
                for index, (start, length) in enumerate(self._free):
                    if wanted <= min(length, free):
                        rest = (start + wanted, length - wanted)
                        self._free[index : index + 1] = [rest] if rest[1] else []
                        return start
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(0.001, left))

    def free(self, offset: int, size: int) -> None:
        """Give a part back."""
        self._freed.append((offset, aligned(size)))

    def free_bytes(self) -> int:
        """How much is not taken."""
        with self._lock:
            self._settle()
            return sum(length for _, length in self._free)

    def _settle(self) -> None:
        """Put what was given back among the free, joined with its neighbours. The caller holds the
        lock.
        """
        if not self._freed:
            return
        while self._freed:
            insort(self._free, self._freed.popleft())
        joined: list[tuple[int, int]] = []
        for start, length in self._free:
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        self._free = joined


def aligned(size: int) -> int:
    """`size` in whole pages of memory."""
    return -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
