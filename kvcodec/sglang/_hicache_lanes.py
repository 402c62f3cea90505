"""Calls that may block for ever, on threads of their own, each with slots of its own.

A lane is a daemon thread and some slots of staging memory. A call borrows a lane; if it has not
ended by the caller's deadline the caller goes on without it, and the lane comes back when the call
does. Until then neither its thread nor its slots are anybody else's, so nothing is written to
memory that is in use again, and a backend that hangs costs a bounded number of threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from kvcodec.backend import Deadline
from kvcodec.errors import BackendError, BackendTimeout

__all__ = ["Connection", "Lane", "Lanes"]

T = TypeVar("T")

# A connection that takes longer to come up is waited for no more; later calls find it, or not.
_PATIENCE_SECONDS = 5.0
_RETRY_SECONDS = 1.0


class _GivenUp(BackendTimeout):
    """The call is still under way, and its lane with it."""


class _Job(Generic[T]):
    """One call, which its caller may give up."""

    def __init__(self, task: Callable[[], T]) -> None:
        self._task = task
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._given_up = False
        self._error: Exception | None = None
        self._results: list[T] = []

    def run(self) -> bool:
        """Do it; whether somebody still waits for the answer."""
        try:
            self._results.append(self._task())
        except Exception as error:  # noqa: BLE001 - the engine's backends raise what they like
            self._error = error
        with self._lock:
            self._ended.set()
            return not self._given_up

    def result(self, deadline: Deadline) -> T:
        """The answer. `_GivenUp` if there is none by the deadline, `BackendError` for an error."""
        if not self._ended.wait(deadline.remaining_seconds()):
            with self._lock:
                self._given_up = not self._ended.is_set()
                if self._given_up:
                    raise _GivenUp("the storage backend did not answer in time")
        if self._error is not None:
            raise _as_backend_error(self._error)
        return self._results[0]


class Lane:
    """A thread, and the slots that only its calls use."""

    def __init__(self, slots: Sequence[int], give_back: Callable[[Lane], None]) -> None:
        self.slots = slots
        self._give_back = give_back
        self._jobs: queue.SimpleQueue[Callable[[], bool] | None] = queue.SimpleQueue()
        self._is_started = False

    def run(self, task: Callable[[], T], deadline: Deadline) -> T:
        """The task's answer. `BackendTimeout` at the deadline, `BackendError` for an error."""
        if not self._is_started:
            self._is_started = True
            threading.Thread(target=self._work, name="kvcodec-hicache", daemon=True).start()
        job = _Job(task)
        self._jobs.put(job.run)
        return job.result(deadline)

    def stop(self) -> None:
        """End the thread after what it does now."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (run := self._jobs.get()) is not None:
            if not run():
                self._give_back(self)


class Lanes:
    """A fixed number of lanes; the one used last is used next, so few threads start."""

    def __init__(self, count: int, slots_per_lane: int) -> None:
        self._count = count
        self._free: queue.LifoQueue[Lane] = queue.LifoQueue()
        for first in range(0, count * slots_per_lane, slots_per_lane):
            self._free.put(Lane(range(first, first + slots_per_lane), self._free.put))

    def __len__(self) -> int:
        """How many lanes are free."""
        return self._free.qsize()

    @contextmanager
    def borrow(self, deadline: Deadline) -> Iterator[Lane]:
        """A lane for one call; `BackendTimeout` when all are in use until the deadline."""
        if deadline.passed():
            raise BackendTimeout("no time was left to ask the storage backend")
        try:
            lane = self._free.get(timeout=deadline.remaining_seconds())
        except queue.Empty:
            raise BackendTimeout(
                f"all {self._count} threads wait for the storage backend (threads)"
            ) from None
        try:
            yield lane
        except _GivenUp:
            raise  # its thread gives it back
        except BaseException:
            self._free.put(lane)
            raise
        self._free.put(lane)

    def close(self, timeout_seconds: float) -> bool:
        """Stop the threads; whether all of them were done with their calls by then."""
        deadline = Deadline(timeout_seconds)
        for _ in range(self._count):
            try:
                self._free.get(timeout=deadline.remaining_seconds()).stop()
            except queue.Empty:
                return False
        return True


class _Attempt(Generic[T]):
    """One attempt to make something, on a thread of its own."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.patience = Deadline(_PATIENCE_SECONDS)
        self.ended = threading.Event()
        self.error: Exception | None = None
        self.retry = Deadline(0)
        self.made: T | None = None
        threading.Thread(target=self._run, name="kvcodec-hicache", daemon=True).start()

    def _run(self) -> None:
        try:
            self.made = self._make()
        except Exception as error:  # noqa: BLE001 - the engine's backends raise what they like
            self.error = error
            self.retry = Deadline(_RETRY_SECONDS)
        self.ended.set()


class Connection(Generic[T]):
    """Something that may take minutes to make, may fail, and is then tried again."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._attempt: _Attempt[T] | None = None

    def get(self, deadline: Deadline) -> T:
        """What was made; `BackendError` with the reason while there is none."""
        with self._lock:
            attempt = self._attempt
            if attempt is None or (attempt.error is not None and attempt.retry.passed()):
                attempt = self._attempt = _Attempt(self._make)
        seconds = min(deadline.remaining_seconds(), attempt.patience.remaining_seconds())
        if not attempt.ended.wait(seconds):
            if deadline.passed():
                raise BackendTimeout("still connecting to the storage backend")
            raise BackendError("still connecting to the storage backend")
        if attempt.error is not None:
            raise _as_backend_error(attempt.error)
        assert attempt.made is not None
        return attempt.made

    def made(self) -> T | None:
        """What was made, if it was; never blocks."""
        return None if self._attempt is None else self._attempt.made


def _as_backend_error(error: Exception) -> BackendError:
    """The same error for this caller: its cause is what was raised."""
    translated = BackendError(f"{type(error).__name__}: {error}")
    translated.__cause__ = error
    return translated
