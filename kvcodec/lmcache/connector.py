"""Connector: an L2 adapter of LMCache (``native_plugin``) over kvcodec's page stores.

LMCache hands over batches of keys and of memory, and is told of their end through an event file
descriptor. Whatever goes wrong with an object is a miss there and a counter here.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvcodec.backend import open_backend
from kvcodec.identity import Namespace
from kvcodec.lmcache.chunks import ChunkKey, ChunkShape
from kvcodec.lmcache.options import ConnectorOptions
from kvcodec.lmcache.statistics import register_connector
from kvcodec.log import RateLimitedLog
from kvcodec.store import PageStore, Pipeline

__all__ = ["Connector"]

logger = logging.getLogger(__name__)

#: Number of the batch, whether all of it succeeded, what went wrong, and per object whether it did.
Completion = tuple[int, bool, str, list[bool]]

#: Page stores, one per model, rank, object group and salt; the least recently used go first.
_MAX_STORES = 1024
#: A backup of more than this is made in several, so that a long batch is not cut off by a deadline
#: meant for one.
_PART_BYTES = 256 << 20


class Connector:
    """What ``"class_name": "Connector"`` makes; its options are ``adapter_params``.

    Raises `ConfigError` for an option that cannot be honoured, which ends LMCache's start.
    """

    def __init__(self, **params: object) -> None:
        self._options = ConnectorOptions.parse(params)
        self._stores: OrderedDict[tuple[object, ...], PageStore] = OrderedDict()
        self._stores_lock = threading.Lock()
        self._log = RateLimitedLog(logger)
        self._pipeline = Pipeline(open_backend(self._options.url), self._options.store)
        try:
            for group in self._options.shapes:
                self._store(ChunkKey("", "0", group, ""))  # raises what an object would, at start
        except BaseException:
            self._pipeline.close()
            raise
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._workers = ThreadPoolExecutor(self._options.workers, "kvcodec-lmcache")
        self._lock = threading.Lock()
        self._last_number = 0
        self._closed = False
        register_connector(self)

    def event_fd(self) -> int:
        """Readable while there are completions."""
        return self._event_fd

    def submit_batch_set(self, keys: Sequence[str], memory: Sequence[memoryview]) -> int:
        """Encode objects and store them; nothing is read from the memory after the completion."""
        return self._submit("set", keys, memory, self._backup)

    def submit_batch_get(self, keys: Sequence[str], memory: Sequence[memoryview]) -> int:
        """Read objects, verify and decode them into the memory."""
        return self._submit("get", keys, memory, self._prefetch)

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Ask which objects are stored."""
        return self._submit("exists", keys, None, self._exists)

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Remove objects."""
        return self._submit("delete", keys, None, self._delete)

    def drain_completions(self) -> list[Completion]:
        """The batches that ended since the last call."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            pass  # called without need
        found: list[Completion] = []
        while True:
            try:
                found.append(self._done.get_nowait())
            except queue.Empty:
                return found

    def counters(self) -> dict[str, int]:
        """Every count so far: those of the pipeline, what was refused, and the raw and encoded
        bytes of what was stored.
        """
        return self._pipeline.counters()

    def close(self) -> None:
        """Finish what is under way, forget what waits, let go of the store. Twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._workers.shutdown(cancel_futures=True)
        self._pipeline.close()
        os.close(self._event_fd)

    def _submit(
        self,
        verb: str,
        keys: Sequence[str],
        memory: Sequence[memoryview] | None,
        work: Callable[[PageStore, ChunkShape, list[str], list[memoryview]], list[bool]],
    ) -> int:
        with self._lock:
            self._last_number += 1
            number = self._last_number
            if not self._closed:
                self._workers.submit(self._run, number, verb, list(keys), memory, work)
            return number

    def _run(
        self,
        number: int,
        verb: str,
        keys: list[str],
        memory: Sequence[memoryview] | None,
        work: Callable[[PageStore, ChunkShape, list[str], list[memoryview]], list[bool]],
    ) -> None:
        results = [False] * len(keys)
        try:
            for indices, store, shape, hashes in self._grouped(keys, memory):
                part = [memory[index] for index in indices] if memory is not None else []
                for index, is_done in zip(indices, work(store, shape, hashes, part), strict=True):
                    results[index] = is_done
        # The border to LMCache: a batch without a completion would hold its memory for ever.
        except Exception as error:  # noqa: BLE001
            self._refuse(f"{verb}.raised", 1, repr(error))
        failed = results.count(False)
        # For questions a no is an answer.
        is_answer = verb in ("exists", "delete")
        text = "" if is_answer or not failed else f"{failed} of {len(keys)} objects"
        self._done.put((number, not text, text, results))
        os.eventfd_write(self._event_fd, 1)

    def _grouped(
        self, keys: Sequence[str], memory: Sequence[memoryview] | None
    ) -> list[tuple[list[int], PageStore, ChunkShape, list[str]]]:
        """The objects of each page store; those of none are counted and left out."""
        groups: dict[tuple[object, ...], list[tuple[int, ChunkKey]]] = {}
        for index, text in enumerate(keys):
            try:
                key = ChunkKey.parse(text)
            except ValueError as error:
                self._refuse("key", 1, str(error))
                continue
            shape = self._options.shapes.get(key.group)
            if shape is None:
                self._refuse("object_group", 1, f"no layout for object group {key.group}")
            elif memory is not None and memory[index].nbytes != shape.layout.raw_bytes:
                self._refuse(
                    "object_bytes",
                    1,
                    f"an object of {memory[index].nbytes} bytes, by its layout it has "
                    f"{shape.layout.raw_bytes}",
                )
            else:
                name = (key.model, key.rank, key.group, key.salt)
                groups.setdefault(name, []).append((index, key))
        return [
            (
                [index for index, _ in members],
                self._store(members[0][1]),
                self._options.shapes[members[0][1].group],
                [key.chunk_hash for _, key in members],
            )
            for members in groups.values()
        ]

    def _store(self, key: ChunkKey) -> PageStore:
        name = (key.model, key.rank, key.group, key.salt)
        with self._stores_lock:
            store = self._stores.get(name)
            if store is None:
                shape, options = self._options.shapes[key.group], self._options
                identity = key.identity(
                    shape, namespace=options.namespace, revision=options.revision
                )
                namespace = Namespace(identity, shape.layout)
                store = self._stores[name] = PageStore(self._pipeline, namespace, options.spec)
                if len(self._stores) > _MAX_STORES:
                    self._stores.popitem(last=False)
            self._stores.move_to_end(name)
            return store

    def _backup(
        self, store: PageStore, shape: ChunkShape, hashes: list[str], memory: list[memoryview]
    ) -> list[bool]:
        step = max(1, _PART_BYTES // shape.layout.raw_bytes)
        results: list[bool] = []
        for start in range(0, len(hashes), step):
            part = slice(start, start + step)
            results += store.backup(hashes[part], shape.views(memory[part]))
        return results

    def _prefetch(
        self, store: PageStore, shape: ChunkShape, hashes: list[str], memory: list[memoryview]
    ) -> list[bool]:
        return store.prefetch(hashes, shape.views(memory))

    def _exists(
        self, store: PageStore, _: ChunkShape, hashes: list[str], __: list[memoryview]
    ) -> list[bool]:
        return store.exists(hashes)

    def _delete(
        self, store: PageStore, _: ChunkShape, hashes: list[str], __: list[memoryview]
    ) -> list[bool]:
        names = [store.namespace.object_name(key) for key in hashes]
        timeout = self._options.store.backup_timeout_seconds
        answer = self._pipeline.guarded(
            "delete", lambda: self._pipeline.backend.delete(names, timeout_seconds=timeout)
        )
        return answer or [False] * len(hashes)

    def _refuse(self, what: str, amount: int, message: str) -> None:
        self._pipeline.counts.add(f"lmcache.refused:{what}", amount)
        self._log.report(what, "kvcodec stores and reads none of these: %s", message)
