"""Write-back: pages that are in memory only, and the thread that brings them to the store."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import islice

import numpy as np

from kvcodec.backend import Deadline
from kvcodec.errors import BackendError, BackendFull
from kvcodec_backends._tier_memory import Entry, Flights, Memory, capacity_of, copy_bytes
from kvcodec_backends._tier_store import StoreBehind

__all__ = ["Writer"]

_PUT_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 5.0
#: A page that the store refused so often, while it took others, is given up.
_MOST_ATTEMPTS = 5
#: What a close waits for a put of the store that does not end by its deadline.
_GRACE_SECONDS = 0.25


class Writer:
    """The pages that are newer than the store, oldest first, bounded in bytes.

    `lock` guards everything here and in `memory`; it is notified when there is more room, or more
    to do. A dirty page is never evicted, since it is not among the pages of `memory` before it is
    in the store.
    """

    def __init__(
        self,
        store: StoreBehind,
        memory: Memory,
        flights: Flights,
        lock: threading.Condition,
        counts: Counter[str],
        *,
        dirty_limit_bytes: int,
    ) -> None:
        self.pending: OrderedDict[str, Entry] = OrderedDict()
        self.dirty_limit_bytes = dirty_limit_bytes
        self.dirty_bytes = 0
        self._store = store
        self._memory = memory
        self._flights = flights
        self._lock = lock
        self._counts = counts
        self._flushing: frozenset[str] = frozenset()
        self._thread: threading.Thread | None = None
        self._stop_at: float | None = None
        self._is_failing = False

    def takes(self, size: int) -> bool:
        """Whether a page of this size can be held back at all."""
        return capacity_of(size) <= self.dirty_limit_bytes and self._memory.can_hold(size)

    def put(self, name: str, view: memoryview, deadline: Deadline) -> BackendError | None:
        """Take a copy of a page, to be stored later.

        While the store works off what is there, this waits for room until the deadline; while it
        fails, `BackendFull` is answered at once.
        """
        with self._lock:
            entry = self._room(len(view), deadline)
            if entry is None:
                return self._refusal(name)
            self.dirty_bytes += len(entry.block)
        copy_bytes(entry.block, np.frombuffer(view, np.uint8))
        with self._lock:
            self._memory.unpin(entry)
            if self._stop_at is not None:
                self._clean(entry)
                self._memory.drop(entry)
                return self._refusal(name)
            self._withdraw(name)
            self._memory.remove(name)
            self._flights.note_write(name)
            self.pending[name] = entry
            self._counts["buffered_objects"] += 1
            self._counts["buffered_bytes"] += entry.size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tier-writer", daemon=True)
                self._thread.start()
            self._lock.notify_all()
        return None

    def pinned(self, name: str) -> Entry | None:
        """A page that is not in the store yet. The caller holds the lock."""
        entry = self.pending.get(name)
        if entry is not None:
            entry.pins += 1
        return entry

    def withdraw(self, names: Sequence[str], deadline: Deadline) -> list[bool] | None:
        """Take pages back before they are stored: for each, whether it was there.

        A put that is under way is waited for, as it could bring back what the caller is about to
        delete; None if that took too long. The caller holds the lock.
        """
        while not self._flushing.isdisjoint(names):
            if not self._lock.wait(deadline.remaining_seconds()):
                return None
        return [self._withdraw(name) for name in names]

    def close(self, timeout_seconds: float) -> None:
        """Store what is left, as far as the time allows; the rest is lost, and counted."""
        with self._lock:
            if self._stop_at is None:
                self._stop_at = time.monotonic() + timeout_seconds
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_seconds + _GRACE_SECONDS)
        with self._lock:
            for name in list(self.pending):
                self._lose(name)

    def _room(self, size: int, deadline: Deadline) -> Entry | None:
        """A pinned entry, as soon as there is room for it; the caller holds the lock."""
        while self._stop_at is None:
            if self.dirty_bytes + capacity_of(size) <= self.dirty_limit_bytes:
                entry = self._memory.take(size)
                if entry is not None:
                    return entry
            if self._is_failing or not self._lock.wait(deadline.remaining_seconds()):
                break
        return None

    def _refusal(self, name: str) -> BackendError:
        if self._stop_at is not None:
            return BackendError(f"put {name}: the tier is closed")
        return BackendFull(
            f"put {name}: {self.dirty_bytes} bytes wait for the store, "
            f"dirty_bytes={self.dirty_limit_bytes}"
        )

    def _withdraw(self, name: str) -> bool:
        entry = self.pending.pop(name, None)
        if entry is None:
            return False
        self._clean(entry)
        self._memory.drop(entry)
        return True

    def _lose(self, name: str) -> None:
        self._counts["lost_objects"] += 1
        self._counts["lost_bytes"] += self.pending[name].size
        self._withdraw(name)

    def _clean(self, entry: Entry) -> None:
        self.dirty_bytes -= len(entry.block)
        self._lock.notify_all()

    def _run(self) -> None:
        pause = 0.0
        while (batch := self._next_batch(pause)) is not None:
            names = [name for name, _ in batch]
            views = [entry.view for _, entry in batch]
            results = self._store.put(names, views, self._put_seconds())
            with self._lock:
                self._flushing = frozenset()
                for (name, entry), result in zip(batch, results, strict=True):
                    self._memory.unpin(entry)
                    self._note(name, entry, result)
                self._is_failing = all(result is not None for result in results)
                self._lock.notify_all()
            if self._is_failing:
                pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            else:
                pause = 0.0

    def _next_batch(self, pause: float) -> list[tuple[str, Entry]] | None:
        """The oldest pages, pinned; None when it is time to end."""
        resume_at = time.monotonic() + pause
        with self._lock:
            while True:
                now = time.monotonic()
                if self._stop_at is not None:
                    if not self.pending or now >= self._stop_at:
                        return None
                    # Before the end every moment counts.
                    resume_at = min(resume_at, now + _FIRST_PAUSE_SECONDS)
                batch = self._ready() if now >= resume_at else []
                if batch:
                    break
                wait_seconds = max(resume_at - now, _FIRST_PAUSE_SECONDS)
                self._lock.wait(wait_seconds if self.pending else None)
            for _, entry in batch:
                entry.pins += 1
                if not entry.attempts:
                    entry.first_attempt = self._counts["flushed_objects"]
            self._flushing = frozenset(name for name, _ in batch)
        return batch

    def _ready(self) -> list[tuple[str, Entry]]:
        """The oldest pages that nobody writes in the store at the moment: a delete that began
        before the put has to end before the page is stored.
        """
        ready = (item for item in self.pending.items() if not self._flights.is_written(item[0]))
        return list(islice(ready, self._store.backend.batch_size))

    def _put_seconds(self) -> float:
        stop_at = self._stop_at
        if stop_at is None:
            return _PUT_SECONDS
        return max(0.0, min(_PUT_SECONDS, stop_at - time.monotonic()))

    def _note(self, name: str, entry: Entry, result: BackendError | None) -> None:
        """What became of one page; the caller holds the lock."""
        is_current = self.pending.get(name) is entry
        if result is None:
            self._counts["flushed_objects"] += 1
            self._counts["flushed_bytes"] += entry.size
            if is_current:
                del self.pending[name]
                self._clean(entry)
                self._memory.install(name, entry)
            return
        self._counts["flush_failed"] += 1
        if not is_current:
            return
        entry.attempts += 1
        self.pending.move_to_end(name)
        store_works = self._counts["flushed_objects"] > entry.first_attempt
        if entry.attempts >= _MOST_ATTEMPTS and store_works:
            self._lose(name)
