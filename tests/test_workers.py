"""Staging memory: bounded, reused, and never while somebody else may still write to it."""

from __future__ import annotations

import threading
import time
import weakref

import numpy as np
import pytest

from kvcodec.workers import Buffers, IOThreads


def test_a_buffer_is_reused_and_memory_is_bounded() -> None:
    buffers = Buffers(100_000)
    first = buffers.acquire(60_000, 0)
    assert first is not None
    assert buffers.acquire(60_000, 0.01) is None
    buffers.release(first)
    assert buffers.acquire(60_000, 0) is first
    buffers.release(first)
    other = buffers.acquire(80_000, 0)
    assert other is not None and len(other) == 80_000
    assert buffers.allocated_bytes == 80_000


def test_a_backend_may_know_better_memory() -> None:
    own = bytearray(4096)
    buffers = Buffers(8192, lambda size: memoryview(own)[:size] if size <= 4096 else None)
    shared = buffers.acquire(4096, 0)
    assert shared is not None
    shared[7] = 42
    assert own[7] == 42
    # Where the backend has none left, this process's own memory does.
    buffers.release(shared)
    assert buffers.acquire(5000, 0) is not None


def test_a_buffer_in_doubt_is_not_used_again_until_it_is_idle() -> None:
    """A server that is late must not write into a page that is being decoded."""
    busy: set[int] = set()

    def is_idle(memory: memoryview) -> bool:
        return np.frombuffer(memory, np.uint8).ctypes.data not in busy

    buffers = Buffers(2 * 4096, is_idle=is_idle)
    first = buffers.acquire(4096, 0)
    assert first is not None
    busy.add(first.ctypes.data)
    buffers.release(first)
    second = buffers.acquire(4096, 0)
    assert second is not None and second is not first
    assert buffers.acquire(4096, 0.01) is None
    busy.clear()
    assert buffers.acquire(4096, 0) is first


def test_closed_buffers_hold_no_memory() -> None:
    buffers = Buffers(2 * 4096)
    first, second = buffers.acquire(4096, 0), buffers.acquire(4096, 0)
    assert first is not None and second is not None
    freed = [weakref.ref(first), weakref.ref(second)]
    buffers.release(first)
    buffers.close()
    buffers.release(second)
    del first, second
    assert [reference() for reference in freed] == [None, None]
    assert buffers.acquire(4096, 0) is None


def test_who_waits_gets_the_buffer_that_comes_free() -> None:
    buffers = Buffers(4096)
    held = buffers.acquire(4096, 0)
    assert held is not None
    threading.Timer(0.1, buffers.release, [held]).start()
    start = time.monotonic()
    assert buffers.acquire(4096, 10) is held
    assert time.monotonic() - start < 5


def test_an_allocation_that_fails_costs_no_memory() -> None:
    def fail(size: int) -> memoryview:
        raise MemoryError(size)

    buffers = Buffers(4096, fail)
    for _ in range(3):
        with pytest.raises(MemoryError):
            buffers.acquire(4096, 0)
    assert buffers.allocated_bytes == 0


def test_a_task_may_begin_while_hanging_ones_are_counted() -> None:
    io, begun = IOThreads(1), threading.Event()
    assert io.call(lambda: True, False, 20)  # its thread is there, and waits

    class Since(float):
        """When another thread began its task; who subtracts it gives that thread time for more."""

        def __rsub__(self, now: float) -> float:
            io._tasks.put(begun.set)
            begun.wait(0.3)
            return 0.0

    io._busy_since[threading.Thread()] = Since()
    assert io.replace_stuck(60) == 0
    assert begun.wait(20)
    io.close(5)
