"""What the pipeline of a store is made of: daemon threads for I/O, and a bounded set of staging
buffers.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Buffers", "Counters", "IOThreads"]

T = TypeVar("T")

# Threads that hang for ever, in multiples of those that work: a bound, whatever a store does.
_MAX_GIVEN_UP_FACTOR = 3


class Counters:
    """Monotonic named counts. Reading never blocks: it copies a plain dict."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        """Add to one count."""
        with self._lock:
            self._counts[name] += amount

    def snapshot(self) -> dict[str, int]:
        """All counts so far."""
        return dict(self._counts)


class IOThreads:
    """A fixed number of daemon threads that run blocking store calls.

    Daemon, because a call into a dead mount cannot be interrupted: neither the engine nor the end
    of the process may wait for it. At most `limit` tasks wait; more are refused, so a hanging store
    costs no memory. Threads that hang in a call can be replaced, each number of them three times.
    """

    def __init__(self, count: int, limit: int = 256) -> None:
        self._count = count
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(limit)
        self._threads: list[threading.Thread] = []
        self._busy_since: dict[threading.Thread, float] = {}
        self._given_up: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, task: Callable[[], None]) -> bool:
        """Run `task` (which must not raise) on some thread, soon. False if the queue is full or
        closed.
        """
        with self._lock:
            if self._closed:
                return False
            if len(self._threads) < self._count:
                self._add_thread()
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            return False
        return True

    def call(self, function: Callable[[], T], default: T, timeout_seconds: float) -> T:
        """The result of `function` run on some thread, or `default` if it does not come in time."""
        answers: queue.SimpleQueue[T] = queue.SimpleQueue()
        if not self.submit(lambda: answers.put(function())):
            return default
        try:
            return answers.get(timeout=max(0.0, timeout_seconds))
        except queue.Empty:
            return default

    def replace_stuck(self, older_than_seconds: float) -> int:
        """Start a thread for each that has been in one task for so long; how many were started.

        A store that comes back on new connections or a new mount does not wake the calls that hang
        in the old one. A thread given up ends when its call does.
        """
        now = time.monotonic()
        with self._lock:
            room = _MAX_GIVEN_UP_FACTOR * self._count - len(self._given_up)
            stuck = [
                thread
                for thread, since in self._busy_since.items()
                if now - since > older_than_seconds and thread not in self._given_up
            ][: max(0, room)]
            if self._closed:
                return 0
            for thread in stuck:
                self._given_up.add(thread)
                self._threads.remove(thread)
                self._add_thread()
            return len(stuck)

    def close(self, timeout_seconds: float) -> None:
        """Take no more tasks and wait a while for those under way."""
        with self._lock:
            self._closed = True
        deadline = time.monotonic() + timeout_seconds
        for _ in self._threads:
            try:
                self._tasks.put(None, timeout=max(0.0, deadline - time.monotonic()))
            except queue.Full:
                return
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _add_thread(self) -> None:
        """The caller holds the lock."""
        thread = threading.Thread(target=self._run, name="kvcodec-io", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        thread = threading.current_thread()
        while (task := self._tasks.get()) is not None:
            with self._lock:
                self._busy_since[thread] = time.monotonic()
            task()
            del task  # a finished task must not keep its buffers alive while the thread waits
            with self._lock:
                del self._busy_since[thread]
                if thread in self._given_up:
                    self._given_up.remove(thread)
                    return


def _own_memory(size: int) -> memoryview:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class Buffers:
    """Staging memory of at most `limit_bytes`, page-aligned, reused.

    Memory never touched costs nothing, so a buffer may be as large as the worst case. A buffer held
    by a store call that hangs is missing until the call ends; others then get None instead of
    memory without bound.
    """

    def __init__(
        self,
        limit_bytes: int,
        allocate: Callable[[int], memoryview | None] = lambda _: None,
        is_idle: Callable[[memoryview], bool] = lambda _: True,
    ) -> None:
        """`allocate` may know better memory than this process's own; a buffer of it is used again
        once `is_idle` says that nobody else writes to it.
        """
        self.limit_bytes = limit_bytes
        self._allocate = allocate
        self._is_idle = is_idle
        self._free: list[npt.NDArray[np.uint8]] = []
        self._in_doubt: list[npt.NDArray[np.uint8]] = []
        self.allocated_bytes = 0
        self._changed = threading.Condition()

    def acquire(self, size: int, timeout_seconds: float) -> npt.NDArray[np.uint8] | None:
        """A buffer of exactly `size` bytes, or None if none comes free in time."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while True:
                self._settle_doubts()
                for index, buffer in enumerate(self._free):
                    if len(buffer) == size:
                        return self._free.pop(index)
                while self._free and self.allocated_bytes + size > self.limit_bytes:
                    self.allocated_bytes -= len(self._free.pop())
                if self.allocated_bytes + size <= self.limit_bytes:
                    self.allocated_bytes += size
                    break
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    return None
        try:
            memory = self._allocate(size)
            return np.frombuffer(_own_memory(size) if memory is None else memory, np.uint8)
        except BaseException:
            with self._changed:
                self.allocated_bytes -= size
            raise

    def release(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Give a buffer back; nobody may use it any more."""
        with self._changed:
            if self.limit_bytes:
                self._in_doubt.append(buffer)
                self._settle_doubts()
            self._changed.notify()

    def close(self) -> None:
        """Free what nobody uses, and lend no more. What is in use is freed when it is released."""
        with self._changed:
            self.limit_bytes = 0
            self._free.clear()
            self._in_doubt.clear()

    def _settle_doubts(self) -> None:
        """The caller holds the lock."""
        in_doubt, self._in_doubt = self._in_doubt, []
        for buffer in in_doubt:
            (self._free if self._is_idle(buffer.data) else self._in_doubt).append(buffer)
