"""What a traced call spends its time on, gathered where it is spent and told when the call is over.

Without tracing this costs a look at the thread's own variables per step, and no library is needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Step", "Steps", "Total", "begin_step", "step_of", "steps_go_to", "steps_of_call"]

#: More names than the code has are not taken: the spans of a call stay few.
_MAX_NAMES = 16


@dataclass(slots=True)
class Total:
    """All steps of one name in one call, on the clock of `time.time_ns`."""

    started_ns: int
    ended_ns: int = 0
    busy_ns: int = 0
    count: int = 0
    pages: int = 0
    byte_count: int = 0
    error: str = ""
    #: Steps that have not ended.
    open: int = 0


@dataclass(slots=True)
class Steps:
    """The steps of one call. Thread-safe; what ends after `close` is not counted any more."""

    totals: dict[str, Total] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, name: str) -> Step | None:
        """A step begins now."""
        now = time.time_ns()
        with self._lock:
            if name not in self.totals and len(self.totals) >= _MAX_NAMES:
                return None
            self.totals.setdefault(name, Total(now)).open += 1
        return Step(self, name, now)

    def add(self, name: str, started_ns: int, busy_ns: int, count: int) -> None:
        """So many steps of one name, from then to now."""
        total = Total(started_ns, time.time_ns(), busy_ns, count)
        with self._lock:
            self.totals[name] = total

    def close(self) -> dict[str, Total]:
        """All of them, by name. What is still under way has taken until now, and failed."""
        now = time.time_ns()
        with self._lock:
            totals, self.totals = self.totals, {}
        for total in totals.values():
            if total.open:
                total.ended_ns, total.error = now, "unfinished"
        return totals


class Step:
    """Something under way."""

    __slots__ = ("_name", "_started_ns", "_steps")

    def __init__(self, steps: Steps, name: str, started_ns: int) -> None:
        self._steps = steps
        self._name = name
        self._started_ns = started_ns

    def end(self, *, pages: int = 0, byte_count: int = 0, error: str = "") -> None:
        """It is over, with so many pages and bytes, and what was wrong if anything was."""
        now = time.time_ns()
        with self._steps._lock:
            total = self._steps.totals.get(self._name)
            if total is None:
                return
            total.open -= 1
            total.count += 1
            total.ended_ns = max(total.ended_ns, now)
            total.busy_ns += now - self._started_ns
            total.pages += pages
            total.byte_count += byte_count
            total.error = error or total.error


_thread = threading.local()


def steps_of_call() -> Steps | None:
    """Those of the call that this thread serves; None unless it is traced."""
    return getattr(_thread, "steps", None)


def begin_step(name: str, steps: Steps | None = None) -> Step | None:
    """A step of a call, of that which this thread serves unless told; None unless it is traced."""
    steps = steps or steps_of_call()
    return None if steps is None else steps.begin(name)


@contextmanager
def step_of(name: str, pages: int, byte_count: int) -> Iterator[None]:
    """A step of the call that this thread serves, as long as the body."""
    step, error = begin_step(name), "raised"
    try:
        yield
        error = ""
    finally:
        if step is not None:
            step.end(pages=pages, byte_count=byte_count, error=error)


@contextmanager
def steps_go_to(steps: Steps | None) -> Iterator[None]:
    """What this thread does meanwhile is part of that call, or of none."""
    before = steps_of_call()
    _thread.steps = steps
    try:
        yield
    finally:
        _thread.steps = before
