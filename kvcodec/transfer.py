"""Moving one batch between an engine's thread and the I/O threads, in chunks, until a deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from kvcodec.workers import Buffers, IOThreads

__all__ = ["Chunk", "Transfer"]

Answer = TypeVar("Answer")


@dataclass(slots=True, eq=False)
class Chunk:
    """Some pages of a batch: their places in it, and a staging buffer with one row of bytes per
    page.
    """

    indices: list[int]
    buffer: npt.NDArray[np.uint8]
    rows: list[npt.NDArray[np.uint8]]
    pages: list[memoryview] = field(default_factory=list)

    def fill(self, pages: Sequence[memoryview | None]) -> None:
        """Take what is to be written; the chunk forgets pages that are None."""
        kept = [row for row, page in enumerate(pages) if page is not None]
        self.indices = [self.indices[row] for row in kept]
        self.rows = [self.rows[row] for row in kept]
        self.pages = [page for page in pages if page is not None]


class Transfer(Generic[Answer]):
    """The chunks of one call. At its deadline the call leaves; a buffer still in use follows when
    its thread is done.
    """

    def __init__(
        self, io: IOThreads, buffers: Buffers, *, row_bytes: int, chunk_pages: int, deadline: float
    ) -> None:
        self._io = io
        self._buffers = buffers
        self._row_bytes = row_bytes
        self._buffer_bytes = row_bytes * chunk_pages
        self._deadline = deadline
        self._answers: queue.SimpleQueue[tuple[Chunk, Answer | None]] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._left = False

    def run(
        self,
        runs: Iterable[list[int]],
        *,
        prepare: Callable[[Chunk], None],
        work: Callable[[Chunk, float], Answer | None],
        settle: Callable[[Chunk, Answer | None], None],
        drop: Callable[[list[int]], None],
    ) -> int:
        """For every run of page indices: `prepare` here, `work` on an I/O thread, `settle` here
        again. Returns how many chunks were started and not answered by the deadline.

        `work` gets the seconds left and must not raise. While one chunk is worked on, others are
        prepared and settled. `drop` is told of pages that found no buffer, no thread or no time.
        """
        try:
            for indices in runs:
                chunk = self._acquire(indices, settle)
                if chunk is None:
                    drop(indices)
                    continue
                if self._start(chunk, prepare, work):
                    self._waiting += 1
                else:
                    drop(indices)
            while self._waiting and self._settle_one(settle):
                pass
            return self._waiting
        finally:
            self._leave()

    def _start(
        self,
        chunk: Chunk,
        prepare: Callable[[Chunk], None],
        work: Callable[[Chunk, float], Answer | None],
    ) -> bool:
        started = False
        try:
            prepare(chunk)
            started = self._io.submit(lambda: self._work(chunk, work))
        finally:
            if not started:
                self._buffers.release(chunk.buffer)
        return started

    def _work(self, chunk: Chunk, work: Callable[[Chunk, float], Answer | None]) -> None:
        seconds = self._deadline - time.monotonic()
        answer = work(chunk, seconds) if seconds > 0 else None
        with self._lock:
            if not self._left:
                self._answers.put((chunk, answer))
                return
        self._buffers.release(chunk.buffer)

    def _acquire(
        self, indices: list[int], settle: Callable[[Chunk, Answer | None], None]
    ) -> Chunk | None:
        """A staging buffer; while there is none, answers are settled, which gives buffers back."""
        while True:
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                return None
            buffer = self._buffers.acquire(self._buffer_bytes, 0.0 if self._waiting else seconds)
            if buffer is not None:
                rows = buffer.reshape(-1, self._row_bytes)
                return Chunk(indices, buffer, [rows[row] for row in range(len(indices))])
            if not self._waiting or not self._settle_one(settle):
                return None

    def _settle_one(self, settle: Callable[[Chunk, Answer | None], None]) -> bool:
        try:
            chunk, answer = self._answers.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            return False
        self._waiting -= 1
        try:
            settle(chunk, answer)
        finally:
            self._buffers.release(chunk.buffer)
        return True

    def _leave(self) -> None:
        with self._lock:
            self._left = True
        while not self._answers.empty():
            self._buffers.release(self._answers.get()[0].buffer)
