"""Whole objects in LMCache's storage manager: its memory (L1), its eviction, quotas and L2 stores.

LMCache neither replaces an object nor lists them nor tells an object's length beforehand. So each
version of an object has a key of its own, and an index here says which is the current one. The
index follows what LMCache does on its own: eviction from memory, copies to and evictions from L2.
It lives as long as the server; what an L2 store keeps longer is not found again.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.mp_observability.event import EventType
from lmcache.v1.mp_observability.event_bus import get_event_bus

if TYPE_CHECKING:
    from lmcache.v1.distributed.storage_manager import StorageManager
    from lmcache.v1.mp_observability.event import Event

__all__ = ["Draft", "Objects", "Stored"]

logger = logging.getLogger(__name__)

#: The model name of our keys in LMCache.
_MODEL = "kvcodec"
_NAME_BYTES = 48
_VERSION_BYTES = 8
# LMCache evicts once a second, when its memory is filled beyond a watermark; until then it refuses.
_ROOM_PATIENCE_SECONDS = 1.5
_ROOM_PAUSE_SECONDS = 0.02
_REAP_PAUSE_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Stored:
    """The current version of one object, and how many of LMCache's L2 stores have it."""

    key: ObjectKey
    length: int
    written_seconds: float
    l2_copies: int = 0


class Draft:
    """Memory of LMCache's for an object that is still arriving. Commit or discard it."""

    def __init__(
        self, objects: Objects, key: ObjectKey, length: int, reserved: Mapping[ObjectKey, object]
    ) -> None:
        self._objects = objects
        self._key = key
        self._length = length
        self._reserved = reserved
        self.view = _view(reserved[key])[:length]

    def commit(self) -> None:
        """Make it the object of its name."""
        self._objects.admit(self._key, self._length, self._reserved)

    def discard(self) -> None:
        """Give the memory back."""
        self._objects.manager.delete_l1_keys([self._key], force=True)


class Objects:
    """The objects, by the 48 bytes of their names. Thread-safe."""

    def __init__(self, manager: StorageManager, *, cache_salt: str = "") -> None:
        """`cache_salt` is the name under which LMCache's quotas count these objects."""
        self.manager = manager
        self.counts: Counter[str] = Counter()
        self._cache_salt = cache_salt
        self._index: dict[bytes, Stored] = {}
        #: Those in memory, the least recently used first.
        self._memory: OrderedDict[ObjectKey, Stored] = OrderedDict()
        self._arriving: dict[ObjectKey, Stored] = {}
        self._lock = threading.Lock()
        self._doomed: queue.SimpleQueue[ObjectKey | None] = queue.SimpleQueue()
        self._reaper = threading.Thread(target=self._reap, name="kvcodec-reaper", daemon=True)
        self._reaper.start()
        manager.register_l2_listener(_L2Listener(self))
        bus = get_event_bus()
        bus.subscribe(EventType.L1_KEYS_EVICTED, self._on_evicted)
        if not bus.enabled:
            logger.warning(
                "LMCache's event bus is off: an object that LMCache evicts is listed until "
                "somebody asks for it; start the server without --disable-observability"
            )

    def reserve(self, name: bytes, length: int, deadline: float) -> Draft | None:
        """Memory for an object, None if LMCache has none by `deadline` (monotonic seconds)."""
        key = ObjectKey(
            chunk_hash=name + os.urandom(_VERSION_BYTES),
            model_name=_MODEL,
            kv_rank=0,
            cache_salt=self._cache_salt,
        )
        end = min(deadline, time.monotonic() + _ROOM_PATIENCE_SECONDS)
        while True:
            reserved = self.manager.reserve_write([key], _layout(length))
            if key in reserved:
                return Draft(self, key, length, reserved)
            if length > self.manager.get_l1_usage()[1] or time.monotonic() > end:
                self._count("refused_full")
                return None
            if not self._make_room(length):
                time.sleep(_ROOM_PAUSE_SECONDS)

    def _make_room(self, length: int) -> bool:
        """Take our least recently used objects out of memory; False if there are none to take.

        LMCache evicts too, but once a second, and a share of its objects, however small these are.
        """
        with self._lock:
            oldest: list[Stored] = []
            for stored in self._memory.values():
                if length <= 0:
                    break
                oldest.append(stored)
                length -= stored.length
        taken = 0
        for stored in oldest:
            deleted, _ = self.manager.delete_l1_keys([stored.key])
            if deleted:
                self._leave_memory(stored)
                taken += 1
        return taken > 0

    def admit(self, key: ObjectKey, length: int, reserved: Mapping[ObjectKey, object]) -> None:
        """Make a reserved version the current one; the one before goes."""
        stored = Stored(key, length, time.time())
        with self._lock:
            # L2 may report its copy before the index has the object.
            self._arriving[key] = stored
        try:
            self.manager.finish_write_by_owner(
                self.manager.prepare_write_completion(dict(reserved))
            )
        finally:
            with self._lock:
                del self._arriving[key]
        with self._lock:
            before = self._index.get(_name(key))
            self._index[_name(key)] = stored
            self._memory[key] = stored
            self.counts["stored_objects"] += 1
            self.counts["stored_bytes"] += length
        if before is not None:
            self._dispose(before)

    @contextmanager
    def reading(self, names: Sequence[bytes], deadline: float) -> Iterator[list[memoryview | None]]:
        """The objects, None where there is none; their memory stays as it is until the exit."""
        locked: dict[ObjectKey, memoryview] = {}
        owners: dict[ObjectKey, int] = {}
        views: list[memoryview | None] = [None] * len(names)
        todo = set(range(len(names)))
        try:
            while todo:
                with self._lock:
                    found = {index: self._index.get(names[index]) for index in todo}
                wanted = {stored.key: stored for stored in found.values() if stored is not None}
                kept = self._load_all(list(wanted.values()), owners, locked, deadline)
                todo = set()
                for index, stored in found.items():
                    if stored is None:
                        continue
                    views[index] = locked.get(stored.key)
                    has_gone = views[index] is None and stored.key not in kept
                    if has_gone and time.monotonic() < deadline:
                        # Evicted, or replaced since: then the index has the new version.
                        self._forget(stored)
                        todo.add(index)
            yield views
        finally:
            if locked:
                self.manager.finish_read_prefetched(list(locked), 1, owners)

    def _load_all(
        self,
        wanted: Sequence[Stored],
        owners: dict[ObjectKey, int],
        locked: dict[ObjectKey, memoryview],
        deadline: float,
    ) -> set[ObjectKey]:
        """Lock objects; which of the others are in L2, but found no room in memory."""
        missing = [stored for stored in wanted if stored.key not in locked]
        self._load(missing, owners, locked, deadline, from_l2=False)
        by_length: dict[int, list[Stored]] = {}
        for stored in missing:
            if stored.key not in locked and stored.l2_copies > 0:
                by_length.setdefault(stored.length, []).append(stored)
        kept: set[ObjectKey] = set()
        for group in by_length.values():
            kept |= self._load(group, owners, locked, deadline, from_l2=True)
        return kept

    def _load(
        self,
        wanted: Sequence[Stored],
        owners: dict[ObjectKey, int],
        locked: dict[ObjectKey, memoryview],
        deadline: float,
        *,
        from_l2: bool,
    ) -> set[ObjectKey]:
        """Lock objects in memory, loading them first if they are in L2; all have one length then.

        A load that does not end in time leaves locks, which LMCache takes away after its
        ``read_ttl_seconds``.
        """
        if not wanted:
            return set()
        keys = [stored.key for stored in wanted]
        # In memory an object has the length it was written with, whatever is said here.
        layout = _layout(wanted[0].length)
        group = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=layout)
        spec = PrefetchTaskSpec(key_groups=[group], fetching_policy="full")
        handle = self.manager.submit_prefetch_task(spec, skip_l2=not from_l2)
        if from_l2:
            self.manager.wait_prefetch_status(handle, max(0.0, deadline - time.monotonic()))
        result = self.manager.query_prefetch_status(handle)
        if result is None:
            return set()
        held = [keys[index] for index in result.hit_cells[0].get_indices_list()]
        owners.update(result.l1_owners)
        good, memory = self.manager.unsafe_read(held, result.l1_owners)
        lengths = {stored.key: stored.length for stored in wanted}
        for key, obj in zip(good, memory, strict=True):
            locked[key] = _view(obj)[: lengths[key]]
        with self._lock:
            self.counts["loaded_from_l2"] += len(good) if from_l2 else 0
            for stored in wanted:
                if stored.key in locked and self._index.get(_name(stored.key)) is stored:
                    self._memory[stored.key] = stored
                    self._memory.move_to_end(stored.key)
        found = result.found_cells[0].get_indices_list() if result.found_cells else []
        return {keys[index] for index in found} - locked.keys()

    def stat(self, name: bytes) -> Stored | None:
        """The current version of an object."""
        with self._lock:
            return self._index.get(name)

    def delete(self, name: bytes) -> bool:
        """Remove an object; whether there was one. L2 stores follow within seconds."""
        with self._lock:
            stored = self._index.pop(name, None)
        if stored is not None:
            self._dispose(stored)
        return stored is not None

    def list(self, namespace: bytes | None) -> list[tuple[bytes, Stored]]:
        """All objects, or those whose names begin with `namespace`."""
        with self._lock:
            entries = list(self._index.items())
        if namespace is None:
            return entries
        return [entry for entry in entries if entry[0].startswith(namespace)]

    def status(self) -> dict[str, int]:
        """Counts so far, and how many objects and bytes there are."""
        with self._lock:
            entries = list(self._index.values())
            counts = dict(self.counts)
        used = sum(stored.length for stored in entries)
        return counts | {"objects": len(entries), "object_bytes": used}

    def close(self) -> None:
        """End the reaper."""
        self._doomed.put(None)
        self._reaper.join(timeout=5.0)

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[name] += amount

    def _dispose(self, stored: Stored) -> None:
        """Free an old version: memory at once unless somebody reads it, L2 by the reaper."""
        with self._lock:
            self._memory.pop(stored.key, None)
        _, locked = self.manager.delete_l1_keys([stored.key])
        if locked or self.manager.l2_adapters():
            self._doomed.put(stored.key)

    def _forget(self, stored: Stored) -> None:
        """LMCache has evicted it."""
        name = _name(stored.key)
        with self._lock:
            self._memory.pop(stored.key, None)
            if self._index.get(name) is stored:
                del self._index[name]
                self.counts["evicted_objects"] += 1
                self.counts["evicted_bytes"] += stored.length

    def note_l2_copies(self, keys: Sequence[ObjectKey], change: int) -> None:
        """L2 has one copy of each more, or less."""
        for stored in self._current(keys):
            with self._lock:
                stored.l2_copies += change
                is_nowhere = stored.l2_copies <= 0 and stored.key not in self._memory
                is_nowhere &= stored.key not in self._arriving
            if is_nowhere:
                self._forget(stored)

    def _on_evicted(self, event: Event) -> None:
        for stored in self._current(event.metadata["keys"]):
            self._leave_memory(stored)

    def _leave_memory(self, stored: Stored) -> None:
        with self._lock:
            self._memory.pop(stored.key, None)
            has_copy = stored.l2_copies > 0
        if not has_copy:
            self._forget(stored)

    def _current(self, keys: Sequence[ObjectKey]) -> Iterator[Stored]:
        """The entries of those keys that are ours and the current version of their object."""
        for key in keys:
            if key.model_name == _MODEL:
                with self._lock:
                    stored = self._arriving.get(key) or self._index.get(_name(key))
                if stored is not None and stored.key == key:
                    yield stored

    def _reap(self) -> None:
        """Delete old versions; those in use are tried again later.

        A thread of its own: an L2 store may take its time, and may call us back.
        """
        waiting: list[ObjectKey] = []
        while True:
            try:
                key = self._doomed.get(timeout=_REAP_PAUSE_SECONDS if waiting else None)
            except queue.Empty:
                waiting = [key for key in waiting if not self._delete(key)]
                continue
            if key is None:
                return
            if not self._delete(key):
                waiting.append(key)

    def _delete(self, key: ObjectKey) -> bool:
        try:
            # What is being copied to L2 is locked in memory: its copy is complete when it is not.
            _, locked = self.manager.delete_l1_keys([key])
            if locked:
                return False
            for _, adapter in self.manager.l2_adapters():
                adapter.delete([key])
        except Exception:  # the border to LMCache, which logs what went wrong
            self._count("failed_deletes")
            logger.warning("LMCache could not delete an old object", exc_info=True)
        return True


class _L2Listener:
    """What LMCache's L2 adapters report; an `L2AdapterListener` by its methods."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def on_l2_keys_stored(self, keys: Sequence[ObjectKey], sizes: Sequence[int]) -> None:
        """Another copy of each."""
        del sizes
        self._objects.note_l2_copies(keys, 1)

    def on_l2_keys_accessed(self, keys: Sequence[ObjectKey]) -> None:
        """Of no interest."""

    def on_l2_keys_deleted(self, keys: Sequence[ObjectKey]) -> None:
        """A copy less of each."""
        self._objects.note_l2_copies(keys, -1)


def _name(key: ObjectKey) -> bytes:
    name: bytes = key.chunk_hash[:_NAME_BYTES]
    return name


def _layout(length: int) -> MemoryLayoutDesc:
    return MemoryLayoutDesc(shapes=[torch.Size([length])], dtypes=[torch.uint8])


def _view(obj: object) -> memoryview:
    """The bytes of one of LMCache's memory objects, in place."""
    return memoryview(obj.tensor.numpy())  # type: ignore[attr-defined]
