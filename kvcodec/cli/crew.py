"""A few threads that work through one sequence of tasks, at a rate if need be."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from kvcodec.backend import ObjectInfo, parse_byte_count
from kvcodec.errors import BackendError, ConfigError, KVCodecError

__all__ = ["Crew", "Pace", "parse_rate"]

T = TypeVar("T")

#: How long an interrupted command waits for calls that are under way: a put that is cut off with
#: its process leaves no torn object, but it may leave a temporary file.
_FAREWELL_SECONDS = 3.0
#: How far a rate may be exceeded for a moment.
_BURST_SECONDS = 0.25


def parse_rate(text: str) -> int | None:
    """``"100MB/s"`` in bytes per second, None for no limit. Raises `ConfigError`."""
    if not text:
        return None
    rate = parse_byte_count("--rate", text.removesuffix("/s"))
    if rate < 1:
        raise ConfigError(f"--rate is {text!r}, must be at least 1 byte per second")
    return rate


class Pace:
    """Bytes per second that are not exceeded over any time much longer than a moment.

    A token bucket that may be in debt: a page larger than the bucket passes, and the next one waits
    until it is paid for.
    """

    def __init__(
        self,
        bytes_per_second: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._sleep = sleep
        self._paid_at = clock()

    def paced(self, objects: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
        """These objects, each when its bytes may be moved."""
        for info in objects:
            self.wait(info.stored_bytes)
            yield info

    def wait(self, byte_count: int, at_most_seconds: float = float("inf")) -> None:
        """Return when these bytes may be moved."""
        if self._rate is None:
            return
        delay = min(self._paid_at - self._clock(), at_most_seconds)
        if delay > 0:
            self._sleep(delay)
        earliest = self._clock() - _BURST_SECONDS
        self._paid_at = max(self._paid_at, earliest) + byte_count / self._rate


class Crew(Generic[T]):
    """Runs tasks on threads. A `KVCodecError` of one ends the run; anything else is a bug."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Begin no further task."""
        self._stopped.set()

    def run(self, tasks: Iterable[T], worker: Callable[[], Callable[[T], None]]) -> None:
        """Do all tasks. `worker` makes what one thread calls, so that it may keep a buffer."""
        waiting: queue.Queue[T | None] = queue.Queue(4 * self._threads)
        endings: list[KVCodecError | None] = []
        threads = [
            threading.Thread(target=self._work, args=(waiting, worker, endings), daemon=True)
            for _ in range(self._threads)
        ]
        for thread in threads:
            thread.start()
        try:
            for task in tasks:
                if self._stopped.is_set() or not self._handed_over(waiting, task, threads):
                    break
            for _ in threads:
                self._handed_over(waiting, None, threads)
            for thread in threads:
                thread.join()
        except BaseException:
            self._leave(waiting, threads)
            raise
        for error in endings:
            if error is not None:
                raise error
        if len(endings) != len(threads):
            raise BackendError("the backend raised what it should have answered; see above")

    def _work(
        self,
        waiting: queue.Queue[T | None],
        worker: Callable[[], Callable[[T], None]],
        endings: list[KVCodecError | None],
    ) -> None:
        do = worker()
        ending: KVCodecError | None = None
        while (task := waiting.get()) is not None:
            if self._stopped.is_set():
                continue
            try:
                do(task)
            except KVCodecError as error:
                ending = error
                self._stopped.set()
        endings.append(ending)

    def _handed_over(
        self, waiting: queue.Queue[T | None], task: T | None, threads: list[threading.Thread]
    ) -> bool:
        """Whether some thread lives to take the task."""
        while any(thread.is_alive() for thread in threads):
            try:
                waiting.put(task, timeout=0.5)
            except queue.Full:
                continue
            return True
        return False

    def _leave(self, waiting: queue.Queue[T | None], threads: list[threading.Thread]) -> None:
        """Let calls that are under way end, for a short time."""
        self._stopped.set()
        stop_at = time.monotonic() + _FAREWELL_SECONDS
        while any(thread.is_alive() for thread in threads) and time.monotonic() < stop_at:
            try:
                waiting.put(None, timeout=0.05)
            except queue.Full:
                continue
