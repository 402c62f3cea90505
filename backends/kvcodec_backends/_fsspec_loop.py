"""One thread with an event loop, where all requests of one store are made."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from kvcodec.errors import BackendTimeout

__all__ = ["RequestLoop"]

T = TypeVar("T")

#: How much later than asked a call may return when the loop itself is held up.
_GRACE_SECONDS = 0.05


class RequestLoop:
    """Runs coroutines for callers in other threads, so many at a time.

    The thread starts with the first call, and in a child process after a fork with the first call
    there.
    """

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: asyncio.Semaphore | None = None
        self._pid = 0

    def gather(
        self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]], timeout_seconds: float
    ) -> list[T | BaseException]:
        """The result or the exception of each call; `BackendTimeout` for those not done in time,
        which are cancelled.
        """
        late = BackendTimeout(f"no answer within {timeout_seconds:g} s")
        future = asyncio.run_coroutine_threadsafe(
            self._gathered(calls, timeout_seconds, late), self.start()
        )
        try:
            return future.result(timeout_seconds + _GRACE_SECONDS)
        except concurrent.futures.TimeoutError:
            future.cancel()
            return [late] * len(calls)

    def iterate(self, items: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        """What an asynchronous iterator yields, one item for each step."""
        loop = self.start()
        iterator = items()
        try:
            while True:
                try:
                    yield asyncio.run_coroutine_threadsafe(_next(iterator), loop).result()
                except StopAsyncIteration:
                    return
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None and not loop.is_closed():
                asyncio.run_coroutine_threadsafe(close(), loop)

    def start(self) -> asyncio.AbstractEventLoop:
        """The running loop of this process."""
        if self._loop is not None and self._pid == os.getpid():
            return self._loop
        if self._pid not in (0, os.getpid()):
            # The parent's lock may be held by a thread that does not exist here.
            self._lock = threading.Lock()
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                loop = asyncio.new_event_loop()
                self._running = asyncio.Semaphore(self._concurrency)
                threading.Thread(
                    target=loop.run_forever, name="kvcodec-fsspec", daemon=True
                ).start()
                self._loop, self._pid = loop, os.getpid()
            return self._loop

    def close(self) -> None:
        """End the thread; calls under way are cancelled."""
        loop, self._loop = self._loop, None
        if loop is not None and self._pid == os.getpid():
            asyncio.run_coroutine_threadsafe(_stop(), loop)

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
                if not task.done():
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


async def _stop() -> None:
    loop = asyncio.get_running_loop()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0))])
    loop.call_soon(loop.stop)
