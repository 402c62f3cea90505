"""Calls of the store on threads of their own, so that one that hangs holds nothing else up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from kvcodec.backend import Backend, GetResult, ObjectInfo, PutResult
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec.guard import Attempt, Breaker
from kvcodec.pipeline import Pipeline, StoreOptions
from kvcodec_server.options import ServerOptions

__all__ = ["Countdown", "Pending", "StoreCalls"]

# A store is called silent only after it was given so much time: a client in a hurry must not close
# it to the others.
_FAIR_SECONDS = 0.25
# The part of the time that is kept for the way back, and its most.
_MARGIN, _MARGIN_SECONDS = 0.1, 0.05

T = TypeVar("T")


def _less_a_margin(seconds: float) -> float:
    return seconds - min(_MARGIN * seconds, _MARGIN_SECONDS)


class Countdown:
    """Calls `then` when it was called itself by so many: memory is free when all are done with
    it.
    """

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._count = count
        self._then = then
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """One is done."""
        with self._lock:
            self._count -= 1
            over = self._count == 0
        if over:
            self._then()


class Pending(Generic[T]):
    """A store call under way."""

    def __init__(
        self, breaker: Breaker, count: int, failed: Callable[[BackendError], T], seconds: float
    ) -> None:
        self.answers: queue.SimpleQueue[Sequence[T] | None] = queue.SimpleQueue()
        self._breaker = breaker
        self._count = count
        self._failed = failed
        self._started = time.monotonic()
        self._seconds = seconds

    def refuse(self, error: BackendError) -> None:
        """The store is not asked."""
        self.answers.put([self._failed(error)] * self._count)

    def wait(self) -> tuple[list[T], bool]:
        """The answers, and whether the store is done with the memory it was given."""
        attempt = Attempt()
        left = self._started + self._seconds - time.monotonic()
        try:
            answers = self.answers.get(timeout=max(0.0, left))
        except queue.Empty:
            if self._seconds >= _FAIR_SECONDS:
                attempt.silent = 1
                self._breaker.settle(attempt)
            error = BackendTimeout(f"the store did not answer within {self._seconds:.3g} s")
            return [self._failed(error)] * self._count, False
        if answers is None or len(answers) != self._count:
            attempt.failed = 1
            answers = [self._failed(BackendError("the store failed in an unknown way"))]
            answers = answers * self._count
        else:
            attempt.note(answers)
            if self._seconds < _FAIR_SECONDS:
                attempt.silent = 0
        self._breaker.settle(attempt)
        return list(answers), True


class StoreCalls:
    """A store behind threads, breakers and a bounded amount of staging memory."""

    def __init__(self, store: Backend, options: ServerOptions) -> None:
        patience = min(10.0, options.max_call_seconds)
        self.pipeline = Pipeline(
            store,
            StoreOptions(
                codec_threads=options.codec_threads,
                io_threads=options.io_threads,
                buffer_bytes=options.staging_bytes,
                exists_timeout_seconds=patience,
                prefetch_timeout_seconds=patience,
                backup_timeout_seconds=patience,
                breaker_failures=options.breaker_failures,
                breaker_cooldown_seconds=options.breaker_cooldown_seconds,
            ),
        )
        self._store = store

    def get(
        self,
        names: Sequence[str],
        targets: Sequence[memoryview],
        seconds: float,
        done: Callable[[], None],
        then: Callable[[Sequence[GetResult]], None] = lambda _: None,
    ) -> Pending[GetResult]:
        """Read objects. `done` is called once, when the store touches the targets no more: that may
        be long after the call was given up. What was read can be worked on by `then`, before that
        and on the same thread.
        """

        def call(left: float) -> Sequence[GetResult]:
            results = self._store.get_into(names, targets, timeout_seconds=left)
            then(results)
            return results

        return self._start("get", self.pipeline.reads, len(names), call, _same, seconds, done)

    def put(
        self,
        names: Sequence[str],
        sources: Sequence[memoryview],
        seconds: float,
        done: Callable[[], None],
        first: Callable[[], None] = lambda: None,
    ) -> Pending[PutResult]:
        """Store objects; `done` as for `get`. They can be put together by `first`, on the thread
        that then stores them.
        """

        def call(left: float) -> Sequence[PutResult]:
            first()
            return self._store.put(names, sources, timeout_seconds=left)

        return self._start("put", self.pipeline.writes, len(names), call, _same, seconds, done)

    def exists(self, names: Sequence[str], seconds: float) -> list[bool]:
        """Whether objects are there; no answer is a no."""

        def call(left: float) -> Sequence[bool]:
            return self._store.exists(names, timeout_seconds=left)

        return self._ask("exists", self.pipeline.reads, len(names), call, _no, seconds)

    def exists_prefix(self, names: Sequence[str], seconds: float) -> int:
        """The length of the leading run; no answer is a gap."""

        def call(left: float) -> Sequence[int]:
            return [self._store.exists_prefix(names, timeout_seconds=left)]

        return self._ask("exists", self.pipeline.reads, 1, call, lambda _: 0, seconds)[0]

    def delete(self, names: Sequence[str], seconds: float) -> list[bool]:
        """Remove objects; no answer is a no."""

        def call(left: float) -> Sequence[bool]:
            return self._store.delete(names, timeout_seconds=left)

        return self._ask("delete", self.pipeline.writes, len(names), call, _no, seconds)

    def stat(self, name: str, seconds: float) -> ObjectInfo | BackendError | None:
        """One object's description, or why there is none."""

        def call(left: float) -> Sequence[ObjectInfo | BackendError | None]:
            try:
                return [self._store.stat(name, timeout_seconds=left)]
            except BackendError as error:
                return [error]

        return self._ask("stat", self.pipeline.reads, 1, call, _same, seconds)[0]

    def close(self) -> None:
        """End the threads; the store stays open."""
        self.pipeline.stop()

    def _ask(
        self,
        operation: str,
        breaker: Breaker,
        count: int,
        call: Callable[[float], Sequence[T]],
        failed: Callable[[BackendError], T],
        seconds: float,
    ) -> list[T]:
        return self._start(operation, breaker, count, call, failed, seconds, lambda: None).wait()[0]

    def _start(
        self,
        operation: str,
        breaker: Breaker,
        count: int,
        call: Callable[[float], Sequence[T]],
        failed: Callable[[BackendError], T],
        seconds: float,
        done: Callable[[], None],
    ) -> Pending[T]:
        # The store answers a little before the caller gives up, and the caller before its client.
        seconds = _less_a_margin(seconds)
        pending = Pending(breaker, count, failed, seconds)
        deadline = time.monotonic() + _less_a_margin(seconds)

        def work() -> None:
            left = deadline - time.monotonic()
            answers: Sequence[T] | None = [failed(_too_late())] * count
            try:
                if left > 0:
                    answers = self.pipeline.guarded(operation, lambda: call(left))
            finally:
                done()
                pending.answers.put(answers)

        if not breaker.admits:
            done()
            pending.refuse(BackendError("the store is not asked now: it did not answer lately"))
        elif not self.pipeline.io.submit(work):
            done()
            pending.refuse(BackendError("too many calls wait for the store (io_threads)"))
        return pending


def _same(error: BackendError) -> BackendError:
    return error


def _no(_: BackendError) -> bool:
    return False


def _too_late() -> BackendTimeout:
    return BackendTimeout("no thread was free in time to ask the store (io_threads)")
