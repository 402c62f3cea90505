"""Calls of the store on threads of their own, so that one that hangs holds nothing else up."""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, TypeVar

from kvcodec.backend import Backend, GetResult, ObjectInfo, PutResult
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec.format import FIXED, MAGIC
from kvcodec.guard import Attempt, Breaker
from kvcodec.pipeline import Pipeline, StoreOptions
from kvcodec_server._steps import Step, begin_step, steps_go_to, steps_of_call
from kvcodec_server.options import ServerOptions

__all__ = ["Countdown", "Pending", "StoreCalls"]

# A store is called silent only after it was given so much time: a client in a hurry must not close
# it to the others.
_FAIR_SECONDS = 0.25
# The part of the time that is kept for the way back, and its most.
_MARGIN, _MARGIN_SECONDS = 0.1, 0.05
# Where a page says how long its header is.
_HEADER_BYTES = struct.Struct("<12xI")

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
    """A store behind threads, breakers and a bounded amount of staging memory.

    Beside the counts of its pipeline it counts pages the store was never asked about
    (``dropped.<operation>.<reason>``), bytes of headers (``header_bytes.<operation>``) and pages
    it removed (``removed.<reason>``).
    """

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
        self._pages = Counter(waiting=0, asked=0)
        self._pages_lock = threading.Lock()

    @property
    def waiting_pages(self) -> int:
        """Pages of calls for which no thread was free yet."""
        return self._pages["waiting"]

    @property
    def asked_pages(self) -> int:
        """Pages of calls that the store has not answered yet."""
        return self._pages["asked"]

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
            self._count_headers("get", targets, [type(result) is int for result in results])
            then(results)
            return results

        return self._start("get", self.pipeline.reads, names, call, _same, seconds, done)

    def lend(self, name: str) -> AbstractContextManager[memoryview] | None:
        """An object where it lies in memory, as `Backend.lend`: nobody has to be waited for."""
        lent = self.pipeline.guarded("get", lambda: self._store.lend(name))
        return None if lent is None else self._counted(lent)

    def put(
        self,
        names: Sequence[str],
        sources: Sequence[memoryview],
        seconds: float,
        done: Callable[[], None],
    ) -> Pending[PutResult]:
        """Store objects; `done` as for `get`."""

        def call(left: float) -> Sequence[PutResult]:
            results = self._store.put(names, sources, timeout_seconds=left)
            self._count_headers("put", sources, [result is None for result in results])
            return results

        return self._start("put", self.pipeline.writes, names, call, _same, seconds, done)

    def exists(self, names: Sequence[str], seconds: float) -> list[bool]:
        """Whether objects are there; no answer is a no."""

        def call(left: float) -> Sequence[bool]:
            return self._store.exists(names, timeout_seconds=left)

        return self._ask("exists", self.pipeline.reads, names, call, _no, seconds)

    def exists_prefix(self, names: Sequence[str], seconds: float) -> int:
        """The length of the leading run; no answer is a gap."""

        def call(left: float) -> Sequence[int]:
            return [self._store.exists_prefix(names, timeout_seconds=left)]

        (count,) = self._ask(
            "exists", self.pipeline.reads, names, call, lambda _: 0, seconds, answer_count=1
        )
        return count

    def delete(self, names: Sequence[str], seconds: float) -> list[bool]:
        """Remove objects; no answer is a no."""

        def call(left: float) -> Sequence[bool]:
            return self._store.delete(names, timeout_seconds=left)

        return self._ask("delete", self.pipeline.writes, names, call, _no, seconds)

    def remove_damaged(self, name: str) -> None:
        """Remove a page that is not what it says, soon: nobody waits for it."""
        seconds = self.pipeline.options.backup_timeout_seconds

        def call(left: float) -> Sequence[bool]:
            gone = self._store.delete([name], timeout_seconds=left)
            self.pipeline.counts.add("removed.corrupt_page", gone.count(True))
            return gone

        with steps_go_to(None):  # it may outlast the call that found the page
            self._start("delete", self.pipeline.writes, [name], call, _no, seconds, lambda: None)

    def no_memory(self, operation: str, pages: int = 1) -> BackendTimeout:
        """The answer for pages for which no staging memory came free in time."""
        self._drop(operation, "memory", pages)
        return BackendTimeout("no staging memory came free in time (staging_bytes)")

    def stat(self, name: str, seconds: float) -> ObjectInfo | BackendError | None:
        """One object's description, or why there is none."""

        def call(left: float) -> Sequence[ObjectInfo | BackendError | None]:
            try:
                return [self._store.stat(name, timeout_seconds=left)]
            except BackendError as error:
                return [error]

        return self._ask("stat", self.pipeline.reads, [name], call, _same, seconds)[0]

    def close(self) -> None:
        """End the threads; the store stays open."""
        self.pipeline.stop()

    def _ask(
        self,
        operation: str,
        breaker: Breaker,
        names: Sequence[str],
        call: Callable[[float], Sequence[T]],
        failed: Callable[[BackendError], T],
        seconds: float,
        answer_count: int | None = None,
    ) -> list[T]:
        return self._start(
            operation, breaker, names, call, failed, seconds, lambda: None, answer_count
        ).wait()[0]

    def _start(
        self,
        operation: str,
        breaker: Breaker,
        names: Sequence[str],
        call: Callable[[float], Sequence[T]],
        failed: Callable[[BackendError], T],
        seconds: float,
        done: Callable[[], None],
        answer_count: int | None = None,
    ) -> Pending[T]:
        pages = len(names)
        count = pages if answer_count is None else answer_count
        # The store answers a little before the caller gives up, and the caller before its client.
        seconds = _less_a_margin(seconds)
        pending = Pending(breaker, count, failed, seconds)
        deadline = time.monotonic() + _less_a_margin(seconds)
        # Of the call that this thread serves; what follows is done on another.
        steps = steps_of_call()
        waiting = begin_step("wait", steps)

        def work() -> None:
            left = deadline - time.monotonic()
            self._move(pages, "waiting", "asked")
            asked = None
            if waiting is not None:
                waiting.end(pages=pages)
                asked = begin_step(f"store.{operation}", steps)
            answers: Sequence[T] | None = [failed(_too_late())] * count
            try:
                if left > 0:
                    answers = self.pipeline.guarded(operation, lambda: call(left))
                else:
                    self._drop(operation, "thread", pages)
            finally:
                self._move(pages, "asked")
                if asked is not None:
                    _end(asked, operation, pages, answers)
                done()
                pending.answers.put(answers)

        if not breaker.admits:
            done()
            self._drop(operation, "circuit", pages, waiting)
            pending.refuse(BackendError("the store is not asked now: it did not answer lately"))
            return pending
        self._move(pages, None, "waiting")
        if not self.pipeline.io.submit(work):
            self._move(pages, "waiting")
            done()
            self._drop(operation, "queue", pages, waiting)
            pending.refuse(BackendError("too many calls wait for the store (io_threads)"))
        return pending

    def _drop(self, operation: str, reason: str, pages: int, step: Step | None = None) -> None:
        self.pipeline.counts.add(f"dropped.{operation}.{reason}", pages)
        if step is not None:
            step.end(pages=pages, error=reason)

    def _move(self, pages: int, source: str | None, target: str | None = None) -> None:
        with self._pages_lock:
            if source is not None:
                self._pages[source] -= pages
            if target is not None:
                self._pages[target] += pages

    @contextmanager
    def _counted(self, lent: AbstractContextManager[memoryview]) -> Iterator[memoryview]:
        step = begin_step("store.get")
        with lent as data:
            self._count_headers("get", [data], [True])
            if step is not None:
                step.end(pages=1, byte_count=len(data))
            yield data

    def _count_headers(
        self, operation: str, pages: Sequence[memoryview], moved: Sequence[bool]
    ) -> None:
        """Pages of one call have headers of one length, but for some bytes of their keys."""
        if True in moved:
            header_bytes = _header_bytes(pages[moved.index(True)])
            self.pipeline.counts.add(f"header_bytes.{operation}", moved.count(True) * header_bytes)


def _end(step: Step, operation: str, pages: int, answers: Sequence[object] | None) -> None:
    lengths = [answer for answer in answers or () if type(answer) is int and operation == "get"]
    errors = [answer.label for answer in answers or () if isinstance(answer, BackendError)]
    error = "raised" if answers is None else errors[0] if errors else ""
    step.end(pages=pages, byte_count=sum(lengths), error=error)


def _header_bytes(page: memoryview) -> int:
    """The length of a page's header, 0 of what is no page."""
    if len(page) < FIXED.size or page[: len(MAGIC)] != MAGIC:
        return 0
    (size,) = _HEADER_BYTES.unpack_from(page)
    return min(int(size), len(page))


def _same(error: BackendError) -> BackendError:
    return error


def _no(_: BackendError) -> bool:
    return False


def _too_late() -> BackendTimeout:
    return BackendTimeout("no thread was free in time to ask the store (io_threads)")
