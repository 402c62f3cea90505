"""``hicache+NAME://``: a storage backend that SGLang has, as the store of encoded pages.

SGLang's backends (file, mooncake, nixl, hf3fs, ...) move whole pages of its host pool under the
keys that it gives them. Here each object is such a page: SGLang's factory makes the backend, around
a host pool whose pages are slots of opaque bytes. What that interface lacks is missing here too:
nothing can be listed, a failing read cannot be told from a missing object, and most backends
neither remove nor replace; see docs/hicache.md.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from kvcodec.backend import (
    Backend,
    Deadline,
    GetResult,
    ObjectInfo,
    PutResult,
    check_name,
    checked_buffers,
    checked_names,
    checked_objects,
    closed_error,
)
from kvcodec.errors import BackendError, BackendFull, BackendTimeout, ConfigError
from kvcodec.sglang._hicache_lanes import Connection, Lane, Lanes
from kvcodec.sglang._hicache_url import HiCacheURL

if TYPE_CHECKING:
    from kvcodec.sglang._hicache_slots import FrameInfo
    from kvcodec.sglang._hicache_store import HiCacheStore

__all__ = ["HiCacheBackend"]

T = TypeVar("T")

_BATCH_SIZE = 4
# One more slot, to look at what is there already.
_SLOTS_PER_LANE = _BATCH_SIZE + 1
_OPEN_SECONDS = 5.0
_CLOSE_SECONDS = 5.0
_READ_ATTEMPTS = 3
# Raised while a backend is made, these are about its configuration; anything else may pass.
_CONFIG_ERRORS = (ImportError, ValueError, TypeError, LookupError, AttributeError)


class HiCacheBackend(Backend):
    """``hicache+mooncake://?master_server_address=host:50051&metadata_server=P2PHANDSHAKE``

    `json` holds SGLang's configuration of the backend, or ``@`` and the path of a file with it;
    some of its options may stand in the URL. `slot_bytes` is the largest object and its frame of 32
    bytes; with ``exact=0`` (all backends but mooncake) every object is stored in as many. Up to
    `threads` calls are under way at a time.
    """

    batch_size = _BATCH_SIZE

    def __init__(self, url: HiCacheURL) -> None:
        self._url = url
        self._closed = False
        self._counts: Counter[str] = Counter(damaged_objects=0)
        self._engine = _Engine(url)
        self._connect()

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> HiCacheBackend:  # noqa: ARG003
        """Make SGLang's backend; what it needs, it makes itself."""
        parsed = HiCacheURL.parse(url)
        try:
            from kvcodec.sglang._hicache_store import check_backend
        except ImportError as error:
            raise ConfigError(f"{parsed.shown!r} needs SGLang: {error}") from error
        check_backend(parsed.backend_name)
        return cls(parsed)

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Store objects. Where the backend can remove, what was there goes first; where not, other
        bytes under a name that is there are a `BackendError`.
        """
        pairs = checked_objects(names, objects)
        deadline = Deadline(timeout_seconds)
        results: dict[str, PutResult] = {}
        # Of two equal names the last one wins, on backends that do not replace too.
        for group in _groups(list(dict(pairs).items())):
            names_of_group = [name for name, _ in group]
            try:
                reasons = self._with_lane(deadline, partial(self._put_group, deadline, group))
            except BackendError as error:
                results.update((name, _named(error, "put", name)) for name in names_of_group)
                continue
            results.update(zip(names_of_group, reasons, strict=True))
        return [results[name] for name in names]

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Read objects into slots, check them against their frames, and copy them out."""
        pairs = checked_buffers(names, buffers)
        deadline = Deadline(timeout_seconds)
        results: list[GetResult] = []
        for group in _groups(pairs):
            try:
                results += self._with_lane(deadline, partial(self._get_group, deadline, group))
            except BackendError as error:
                results += [_named(error, "get", name) for name, _ in group]
        return results

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is there."""
        keys = [_key(name) for name in checked_names(names)]
        return self._answer_or(
            [False] * len(keys), Deadline(timeout_seconds), lambda store: store.exists(keys)
        )

    def exists_prefix(self, names: Sequence[str], *, timeout_seconds: float) -> int:
        """How many objects from the first on are there: the one question SGLang's backends know."""
        keys = [_key(name) for name in checked_names(names)]
        return self._answer_or(
            0, Deadline(timeout_seconds), lambda store: store.exists_prefix(keys)
        )

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Remove objects, where the backend can; False for each where it cannot."""
        keys = list(dict.fromkeys(_key(name) for name in checked_names(names)))

        def remove(store: HiCacheStore) -> dict[str, bool]:
            gone = store.remove(keys) if store.can_remove() else [False] * len(keys)
            return dict(zip(keys, gone, strict=True))

        nothing: dict[str, bool] = {}
        gone = self._answer_or(nothing, Deadline(timeout_seconds), remove)
        return [gone.pop(_key(name), False) for name in names]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:  # noqa: ARG002
        """Always raises: SGLang's storage interface has no way to list."""
        raise BackendError(f"{self._url.shown}: SGLang's storage backends cannot list their pages")

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description, from its frame: the object is read for it."""
        check_name(name)
        deadline = Deadline(timeout_seconds)

        def ask(store: HiCacheStore, lane: Lane) -> FrameInfo | None:
            slots = lane.slots[:1]
            (info,) = lane.run(lambda: self._read(store, [_key(name)], slots), deadline)
            return info

        try:
            info = self._with_lane(deadline, ask)
        except BackendError as error:
            raise _named(error, "stat", name) from error
        return None if info is None else ObjectInfo(name, info.object_bytes, info.modified_seconds)

    def close(self) -> None:
        """Close the backend, unless a call into it still hangs: then it ends with the process."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    def counters(self) -> Mapping[str, int]:
        """Objects that did not fit their frame, three times in a row."""
        return dict(self._counts)

    # One group of objects, on one lane

    def _put_group(
        self,
        deadline: Deadline,
        group: Sequence[tuple[str, memoryview]],
        store: HiCacheStore,
        lane: Lane,
    ) -> Sequence[PutResult]:
        limit = store.pool.max_object_bytes
        reasons: dict[str, PutResult] = {
            name: BackendFull(f"put {name}: {len(view)} bytes, above {limit} (slot_bytes)")
            for name, view in group
            if len(view) > limit
        }
        kept = [(name, view) for name, view in group if name not in reasons]
        slots = lane.slots[: len(kept)]
        for slot, (_, view) in zip(slots, kept, strict=True):
            store.pool.fill(slot, view)
        keys = [_key(name) for name, _ in kept]
        answers = lane.run(lambda: _replace(store, keys, slots, lane.slots[-1]), deadline)
        for (name, _), reason in zip(kept, answers, strict=True):
            reasons[name] = BackendError(f"put {name}: {reason}") if reason else None
        return [reasons[name] for name, _ in group]

    def _get_group(
        self,
        deadline: Deadline,
        group: Sequence[tuple[str, memoryview]],
        store: HiCacheStore,
        lane: Lane,
    ) -> Sequence[GetResult]:
        slots = lane.slots[: len(group)]
        keys = [_key(name) for name, _ in group]
        infos = lane.run(lambda: self._read(store, keys, slots), deadline)
        for slot, info, (_, buffer) in zip(slots, infos, group, strict=True):
            if info is not None and info.object_bytes <= len(buffer):
                store.pool.copy_object(slot, buffer[: info.object_bytes])
        return [None if info is None else info.object_bytes for info in infos]

    def _read(
        self, store: HiCacheStore, keys: Sequence[str], slots: Sequence[int]
    ) -> Sequence[FrameInfo | None]:
        """Read into slots; None for what is missing, or damaged each time it is read.

        What is being replaced at the moment may be one object's beginning and another's end.
        """
        infos: dict[int, FrameInfo | None] = dict.fromkeys(slots)
        left = list(zip(keys, slots, strict=True))
        for _ in range(_READ_ATTEMPTS):
            for _, slot in left:
                store.pool.empty(slot)
            found = store.get([key for key, _ in left], [slot for _, slot in left])
            left = [pair for pair, is_there in zip(left, found, strict=True) if is_there]
            infos.update((slot, store.pool.frame(slot)) for _, slot in left)
            left = [(key, slot) for key, slot in left if infos[slot] is None]
            if not left:
                break
        if left:
            self._counts["damaged_objects"] += len(left)
            if store.can_remove():
                store.remove([key for key, _ in left])
        return list(infos.values())

    # The backend behind them

    def _with_lane(self, deadline: Deadline, use: Callable[[HiCacheStore, Lane], T]) -> T:
        if self._closed:
            raise closed_error(self._url.shown)
        if self._engine.pid != os.getpid():
            # Neither threads nor connections came along: begin anew.
            self._engine = _Engine(self._url)
        engine = self._engine
        if deadline.passed():
            raise BackendTimeout("no time was left to ask the storage backend")
        store = engine.connection.get(deadline)
        with engine.lanes.borrow(deadline) as lane:
            return use(store, lane)

    def _answer_or(self, default: T, deadline: Deadline, ask: Callable[[HiCacheStore], T]) -> T:
        """The answer; an unanswered question is a no."""
        try:
            return self._with_lane(
                deadline, lambda store, lane: lane.run(lambda: ask(store), deadline)
            )
        except BackendError:
            return default

    def _connect(self) -> None:
        """Wait a while for a first connection; refuse a configuration that SGLang refuses."""
        try:
            self._engine.connection.get(Deadline(_OPEN_SECONDS))
        except BackendError as error:
            if isinstance(error.__cause__, _CONFIG_ERRORS):
                raise ConfigError(f"{self._url.shown}: {error}") from error


class _Engine:
    """What one process has of a backend: the connection, and the lanes to use it on."""

    def __init__(self, url: HiCacheURL) -> None:
        self.pid = os.getpid()
        self.lanes = Lanes(url.threads, _SLOTS_PER_LANE)
        self.connection = Connection(partial(self._open, url))
        self._is_closed = False

    def close(self) -> None:
        """Close what was opened, or will be. Waits a while, and no longer."""
        self._is_closed = True
        store = self.connection.made()
        if self.pid == os.getpid() and store is not None and self.lanes.close(_CLOSE_SECONDS):
            closing = threading.Thread(target=store.close, name="kvcodec-hicache", daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)

    def _open(self, url: HiCacheURL) -> HiCacheStore:
        from kvcodec.sglang._hicache_slots import SlotPool
        from kvcodec.sglang._hicache_store import open_store

        pool = SlotPool(url.threads * _SLOTS_PER_LANE, url.slot_bytes, exact=url.exact)
        store = open_store(url.backend_name, url.extra_config, pool)
        if self._is_closed:
            store.close()
            raise BackendError("closed while it was being opened")
        return store


def _replace(
    store: HiCacheStore, keys: Sequence[str], slots: Sequence[int], spare_slot: int
) -> Sequence[str | None]:
    """Store slots in place of what is there; None for each that is stored, else why not."""
    there = store.exists(keys)
    if any(there) and store.can_remove():
        store.remove([key for key, is_there in zip(keys, there, strict=True) if is_there])
        there = [False] * len(keys)
    new = [index for index, is_there in enumerate(there) if not is_there]
    stored = store.set([keys[index] for index in new], [slots[index] for index in new])
    reasons = dict(zip(new, stored, strict=True))
    return [
        _reason_not_same(store, key, slot, spare_slot)
        if is_there
        else (None if reasons[index] else "the storage backend refused it")
        for index, (key, slot, is_there) in enumerate(zip(keys, slots, there, strict=True))
    ]


def _reason_not_same(store: HiCacheStore, key: str, slot: int, spare_slot: int) -> str | None:
    """None if what is there under a key is the object in the slot, byte for byte."""
    store.pool.empty(spare_slot)
    (found,) = store.get([key], [spare_slot])
    there = store.pool.frame(spare_slot) if found else None
    wanted = store.pool.frame(slot)
    if (
        there
        and wanted
        and (there.object_bytes, there.checksum)
        == (
            wanted.object_bytes,
            wanted.checksum,
        )
    ):
        return None
    return "other bytes are there under this name, and this storage backend cannot replace them"


def _groups(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), _BATCH_SIZE):
        yield items[first : first + _BATCH_SIZE]


def _key(name: str) -> str:
    """The object's name for backends that make file names of keys."""
    return "kvcodec-" + name.replace("/", "-")


def _named(error: BackendError, verb: str, name: str) -> BackendError:
    text = f"{verb} {name}: {error}"
    return BackendTimeout(text) if isinstance(error, BackendTimeout) else BackendError(text)
