"""Pools of native threads, batches under way, and how long what they borrow has to live."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcodec.errors import NativeError
from kvcodec.native import _library
from kvcodec.native._library import address_of, isa, library
from kvcodec.native._plan import Plan

__all__ = ["Batch", "Pool"]

_MAX_STREAM_COUNT = 4
_MAX_THREADS = 64

#: A wait comes back this often, so that Python sees a signal such as Ctrl-C.
_WAIT_SLICE_SECONDS = 0.2

_Addresses = npt.NDArray[np.uint64]


class _Lifetimes:
    """Which batches run, and whether new ones may start.

    Native threads work on memory that Python objects own. So at interpreter exit no batch may start
    any more, and those that run are waited for before that memory goes. A fork is kept out of the
    start of a batch.
    """

    def __init__(self) -> None:
        # Re-entrant: a signal handler or a finalizer may come here while this thread is inside.
        self.gate = threading.RLock()
        self.exiting = False
        self.running: weakref.WeakSet[Batch] = weakref.WeakSet()
        atexit.register(self._drain)
        os.register_at_fork(
            before=self.gate.acquire,
            after_in_parent=self.gate.release,
            after_in_child=self._begin_again,
        )

    def _drain(self) -> None:
        with self.gate:
            self.exiting = True
        for batch in list(self.running):
            batch.wait()

    def _begin_again(self) -> None:
        # Nobody works on the parent's batches here; no native thread touches this copy of memory.
        self.running = weakref.WeakSet()
        self.gate.release()


class Batch:
    """Pages under way, made by `Pool.submit`.

    A batch that is dropped while it runs is waited for, so that nothing it borrows is freed early.
    """

    def __init__(self, pages: npt.NDArray[np.void], borrowed: Sequence[object]) -> None:
        # Filled by the native call itself: no interrupt can come between a batch and its owner.
        self.pointer = ctypes.c_void_p()
        self._pages = pages
        self._borrowed: list[object] = list(borrowed)
        self._done = False
        # The finalizer keeps what the native threads may use until it has waited for them.
        finalizer = weakref.finalize(self, _free_batch, self.pointer, pages, self._borrowed)
        finalizer.atexit = False

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Whether every page is done, after at most `timeout_seconds` (None: without limit)."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        if not self._done:
            self._note(library().batch_look(self.pointer, 0))
        while not self._done:
            seconds = _WAIT_SLICE_SECONDS
            if deadline is not None:
                seconds = min(seconds, deadline - time.monotonic())
                if seconds <= 0:
                    return False
            self._note(library().batch_wait(self.pointer, max(1, int(seconds * 1e6))))
        return True

    def cancel(self) -> None:
        """Pages that no thread has begun end as CANCELLED. Wait afterwards as usual."""
        library().batch_cancel(self.pointer)

    @property
    def status(self) -> npt.NDArray[np.int32]:
        """What became of each page: OK, HEADER_DIFFERS ..."""
        return self._results()["status"].astype(np.int32)

    @property
    def section(self) -> npt.NDArray[np.uint32]:
        """Index of the first section that failed, per page."""
        return self._results()["section"].astype(np.uint32)

    @property
    def encoded_bytes(self) -> npt.NDArray[np.uint64]:
        """Length of each encoded page."""
        return self._results()["encoded_bytes"].astype(np.uint64)

    @property
    def nonfinite_groups(self) -> npt.NDArray[np.uint64]:
        """Groups outside the codec's domain, per encoded page; they decode to NaN."""
        return self._results()["nonfinite_groups"].astype(np.uint64)

    def _results(self) -> npt.NDArray[np.void]:
        if not self.wait(0):
            raise NativeError("the batch is still running; wait for it first")
        return self._pages

    def _note(self, result: int) -> None:
        if result == _library.DONE:
            self._done = True
            self._borrowed.clear()
            _lifetimes.running.discard(self)
        elif result != _library.PENDING:
            raise NativeError("a batch of the parent process, whose threads do not exist here")


def _free_batch(
    pointer: ctypes.c_void_p, _pages: npt.NDArray[np.void], borrowed: list[object]
) -> None:
    library().batch_free(pointer)
    borrowed.clear()


_lifetimes = _Lifetimes()


class Pool:
    """At most `threads` native threads, started by the first batch, again by one after a fork.

    Thread-safe. Batches are begun in the order in which they were submitted.
    """

    def __init__(self, threads: int) -> None:
        isa()
        if not 1 <= threads <= _MAX_THREADS:
            raise NativeError(f"a pool of {threads} threads; allowed is 1 to {_MAX_THREADS}")
        pointer = library().pool_create(threads)
        if not pointer:
            raise NativeError("no memory for a pool")
        self._pointer: int | None = pointer
        self._finalizer = weakref.finalize(self, library().pool_destroy, pointer)
        # At exit the threads sleep; a daemon thread that comes too late must still find its pool.
        self._finalizer.atexit = False

    def submit(
        self,
        operation: int,
        plan: Plan,
        addresses: _Addresses,
        lengths: _Addresses,
        keys: Sequence[bytes],
        bases: _Addresses | None,
        owner: object = None,
    ) -> Batch:
        """Start ENCODE, DECODE or VERIFY on pages and return at once.

        `addresses` and `lengths` describe the encoded pages: capacities to encode into, exact
        lengths to read. `bases` holds the address of row (layer 0, head 0, token 0) in host memory,
        of shape (pages, streams); VERIFY needs none. The caller keeps all that memory alive until
        the batch is done; what `owner` refers to is kept alive for him.
        """
        count = len(keys)
        if {*map(len, keys)} - {plan.key_bytes}:
            raise NativeError(f"a key is not of the plan's {plan.key_bytes} bytes")
        joined = b"".join(keys)
        pages = np.zeros(count, _library.PAGE)
        if addresses.shape != (count,) or lengths.shape != (count,):
            raise NativeError(
                f"{count} keys, addresses {addresses.shape} and lengths {lengths.shape}"
            )
        pages["encoded"] = addresses
        pages["encoded_bytes"] = lengths
        if count:
            first = address_of(np.frombuffer(joined, np.uint8))
            pages["key"] = first + np.arange(count, dtype=np.uint64) * np.uint64(plan.key_bytes)
        if bases is not None:
            if bases.shape != (count, plan.stream_count) or plan.stream_count > _MAX_STREAM_COUNT:
                raise NativeError(f"bases {bases.shape}, wanted {(count, plan.stream_count)}")
            pages["base"][:, : plan.stream_count] = bases
        return self._start(operation, plan, pages, (plan, joined, owner))

    def _start(
        self, operation: int, plan: Plan, pages: npt.NDArray[np.void], borrowed: Sequence[object]
    ) -> Batch:
        batch = Batch(pages, borrowed)
        with _lifetimes.gate:
            if self._pointer is None or _lifetimes.exiting:
                raise NativeError("the pool is closed")
            _lifetimes.running.add(batch)
            result = library().submit(
                self._pointer,
                operation,
                ctypes.byref(plan.structure),
                address_of(pages),
                len(pages),
                ctypes.byref(batch.pointer),
            )
        if result == _library.DONE:
            return batch
        _lifetimes.running.discard(batch)
        if result == _library.NO_MEMORY:
            raise NativeError("no memory, or no thread, for a batch")
        isa()
        raise NativeError("the plan contradicts itself, or an address is zero")

    def close(self) -> None:
        """Wait for running batches and end the threads; `submit` raises afterwards."""
        with _lifetimes.gate:
            self._pointer = None
        self._finalizer()
