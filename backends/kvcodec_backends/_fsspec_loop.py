"""One thread with an event loop, where all requests of one store are made."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from kvcodec.errors import BackendError, BackendTimeout

__all__ = ["STEP_SECONDS", "RequestLoop"]

T = TypeVar("T")
R = TypeVar("R")

#: How much later than asked a call may return when the loop itself is held up.
_GRACE_SECONDS = 0.05
#: How long an iterator, which has no deadline, may take for one step.
STEP_SECONDS = 60.0
#: How long what was cancelled may take to be over.
_SETTLE_SECONDS = 0.2


class RequestLoop:
    """Runs coroutines for callers in other threads, so many at a time.

    The thread starts with the first call, in a forked child with the first call there.
    """

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: asyncio.Semaphore | None = None
        self._closed = False

    def gather(
        self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]], timeout_seconds: float
    ) -> list[T | BaseException]:
        """The result or the exception of each call; `BackendTimeout` for those not done in time,
        which are cancelled.
        """
        late = BackendTimeout(f"no answer within {timeout_seconds:g} s")
        try:
            future = self._submit(self._gathered(calls, timeout_seconds, late))
        except BackendError as closed:
            return [closed] * len(calls)
        try:
            return future.result(timeout_seconds + _GRACE_SECONDS)
        except concurrent.futures.TimeoutError:
            future.cancel()
            return [late] * len(calls)
        except concurrent.futures.CancelledError:
            return [BackendError("closed meanwhile")] * len(calls)

    def iterate(self, items: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        """What an asynchronous iterator yields, one item for each step. Raises `BackendError` once
        the loop is closed.
        """
        iterator = items()
        try:
            while True:
                try:
                    yield self._submit(_next(iterator)).result(STEP_SECONDS)
                except StopAsyncIteration:
                    return
                except concurrent.futures.TimeoutError:
                    raise BackendTimeout(f"no answer within {STEP_SECONDS:g} s") from None
                except concurrent.futures.CancelledError:
                    raise BackendError("closed meanwhile") from None
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                try:
                    self._submit(close())
                except BackendError:
                    pass

    def _submit(self, work: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._start())
        # It would warn that nobody awaited it.
        work.close()
        raise BackendError("closed meanwhile")

    def _start(self) -> asyncio.AbstractEventLoop:
        """The running loop of this process; the lock is held."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._running = asyncio.Semaphore(self._concurrency)
            threading.Thread(
                target=_run, args=(self._loop,), name="kvcodec-fsspec", daemon=True
            ).start()
        return self._loop

    def after_fork(self) -> None:
        """In the child: the thread is the parent's, and its lock may be held for ever."""
        self._lock = threading.Lock()
        self._loop = None

    def close(self, *, at_exit: bool = False) -> None:
        """Cancel calls under way, and end the thread soon: not before the interpreter where that is
        about to end, because others may have something to tell the loop until then.
        """
        with self._lock:
            self._closed = True
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_cancel(stop=not at_exit), loop)

    async def _gathered(
        self,
        calls: Sequence[Callable[[], Coroutine[Any, Any, T]]],
        timeout_seconds: float,
        late: BackendTimeout,
    ) -> list[T | BaseException]:
        tasks = [asyncio.create_task(self._limited(call)) for call in calls]
        try:
            await asyncio.wait(tasks, timeout=timeout_seconds)
        finally:
            for task in tasks:
                task.add_done_callback(_forget)
                task.cancel()
        outcomes: list[T | BaseException] = []
        for task in tasks:
            outcomes.append(_outcome(task) if task.done() else late)
        return outcomes

    async def _limited(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        assert self._running is not None
        async with self._running:
            return await call()


async def _next(iterator: AsyncIterator[T]) -> T:
    return await iterator.__anext__()


def _outcome(task: asyncio.Task[T]) -> T | BaseException:
    if task.cancelled():
        return asyncio.CancelledError()
    return task.exception() or task.result()


def _forget(task: asyncio.Future[Any]) -> None:
    # Somebody has to look at the exception, or the loop logs that nobody did.
    if not task.cancelled():
        task.exception()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


async def _cancel(*, stop: bool) -> None:
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            task.cancel()
    if stop:
        await asyncio.sleep(_SETTLE_SECONDS)
        asyncio.get_running_loop().stop()
