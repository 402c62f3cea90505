"""A store's list on a thread of its own, as fast as it is read."""

from __future__ import annotations

import queue
import threading

from kvcodec.backend import Backend, ObjectInfo
from kvcodec.errors import BackendError, BackendTimeout

__all__ = ["Listing"]

_LISTED_AT_ONCE = 500
_LOOK_SECONDS = 0.5


class Listing:
    """Objects of a store, some at a time. One thread runs it, another reads it."""

    def __init__(self, store: Backend, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._batches: queue.Queue[list[ObjectInfo] | BackendError] = queue.Queue(2)
        self._left = threading.Event()

    def run(self) -> None:
        """List until the end, or until the reader has left."""
        # Whatever ends this early, a store that raises something strange too, is an error.
        end: list[ObjectInfo] | BackendError = BackendError("the store failed in an unknown way")
        try:
            batch: list[ObjectInfo] = []
            for info in self._store.list(self._prefix):
                batch.append(info)
                if len(batch) == _LISTED_AT_ONCE:
                    if not self._give(batch):
                        return
                    batch = []
            if not batch or self._give(batch):
                end = []
        except BackendError as error:
            end = error
        finally:
            self._give(end)

    def next(self, timeout_seconds: float) -> list[ObjectInfo]:
        """The next objects, none at the end. Raises `BackendError`."""
        try:
            batch = self._batches.get(timeout=max(0.0, timeout_seconds))
        except queue.Empty:
            raise BackendTimeout("the store did not list its objects in time") from None
        if isinstance(batch, BackendError):
            raise batch
        return batch

    def leave(self) -> None:
        """Nobody reads any more."""
        self._left.set()

    def _give(self, batch: list[ObjectInfo] | BackendError) -> bool:
        while not self._left.is_set():
            try:
                self._batches.put(batch, timeout=_LOOK_SECONDS)
            except queue.Full:
                continue
            return True
        return False
