"""Calls that wait for who does not come: ended by one thread that looks at them all.

gRPC refuses a message that is too long when it has all of it. Until then it is in this process'
memory, however long it is, and nobody is told: so a call that waits long for one message, while the
process grows, is ended. And sending to a reader that does not read waits for it, whatever the time:
so a call whose time is up is ended, too.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Deadlines", "Receiving"]

_TICK_SECONDS = 0.2
# The longest message that is allowed is here in less, but on the slowest networks.
_PATIENCE_SECONDS = 1.0
# What a process may grow by meanwhile, for reasons of its own such as a memory tier that fills.
_GROWTH_BYTES = 256 << 20

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Receiving:
    """The calls of one server that wait for a message. Thread-safe."""

    def __init__(self) -> None:
        self.waiting: dict[object, tuple[float, int, Callable[[], object]]] = {}
        _watcher.watch(self)

    def each(self, requests: Iterator[Any], leave: Callable[[], object]) -> Iterator[Any]:
        """The messages of a call, which `leave` ends."""
        key = object()
        try:
            while True:
                self.waiting[key] = time.monotonic(), _watcher.own_bytes, leave
                try:
                    request = next(requests)
                except StopIteration:
                    return
                self.waiting.pop(key, None)
                yield request
        finally:
            self.waiting.pop(key, None)

    def end_those_that_swell(self, own_bytes: int) -> None:
        """End every call that has waited for one message while the process grew to this."""
        now = time.monotonic()
        for since, before, leave in list(self.waiting.values()):
            if now - since > _PATIENCE_SECONDS and own_bytes - before > _GROWTH_BYTES:
                leave()


class Deadlines:
    """The calls of one server that may not last for ever. Thread-safe."""

    def __init__(self) -> None:
        self._ends: dict[object, tuple[float, Callable[[], object]]] = {}
        _watcher.watch(self)

    @contextmanager
    def until(self, deadline: float, leave: Callable[[], object]) -> Iterator[None]:
        """The body is part of a call that `leave` ends soon after the deadline."""
        key = object()
        self._ends[key] = deadline, leave
        try:
            yield
        finally:
            del self._ends[key]

    def end_those_that_are_late(self) -> None:
        """End every call whose deadline has passed."""
        now = time.monotonic()
        for deadline, leave in list(self._ends.values()):
            if now > deadline:
                leave()


class _Watcher:
    """One thread for all servers of a process; it starts with the first."""

    def __init__(self) -> None:
        self.own_bytes = 0
        self._all: weakref.WeakSet[Receiving | Deadlines] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._pid = 0

    def watch(self, calls: Receiving | Deadlines) -> None:
        with self._lock:
            self._all.add(calls)
            if self._pid == os.getpid():
                return
            self._pid, self.own_bytes = os.getpid(), _own_bytes()
        threading.Thread(target=self._run, name="kvcodec-receiving", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            self.own_bytes = _own_bytes()
            with self._lock:
                watched = list(self._all)
            for calls in watched:
                if isinstance(calls, Deadlines):
                    calls.end_those_that_are_late()
                else:
                    calls.end_those_that_swell(self.own_bytes)


def _own_bytes() -> int:
    """Resident memory that is this process' alone, without what clients share with it."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE_BYTES


_watcher = _Watcher()
