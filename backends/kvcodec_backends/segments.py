"""Many objects in few large files: a local disk at its own speed, past the page cache.

``file:///path?engine=segments`` keeps objects in preallocated segments. A segment is filled from
its start to its end with records (`_segment_records` has the format) and goes as a whole, the one
written to least recently first, when the quota is reached. Reads and writes use O_DIRECT; objects
that a batch puts side by side are written, and later read, with one system call.

*What is whole.* Every record carries its place, its name and a checksum of the object, which each
read verifies: what a crash tore, what was evicted or overwritten during the read, or what rotted,
is a miss. Nothing is synced unless `fsync=1`.

*What is found again.* Memory knows where each object lies. An index file beside each segment
repeats the headers of its records, so that opening a store reads 128 bytes per object. It is a
convenience and no more: the parts of a segment that it does not cover are searched for records.

*What is gone.* Deleting, or replacing, marks the record itself as dead. So no segment depends on
another, and in whatever order they go, nothing deleted comes back.

*Several processes* may open a root, each for reading and writing. Each appends to a segment of its
own, under flock; a kernel drops that lock with the process, and the next one to start goes on with
what a dead one left. Every call first looks for what others appended to their indexes: a few
system calls. Segments are made and dropped under one lock of the root, by whomever needs room, so
the quota is one for all. It must have room for at least one segment per process and one more.
Of two versions of a name the later sequence counts. Within one process all backends of a root
share one state, and have to agree on its options.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import unquote, urlsplit

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
    parse_byte_count,
    parse_options,
)
from kvcodec.errors import ConfigError
from kvcodec_backends._file_io import as_backend_error, checked_root, make_private_root
from kvcodec_backends._file_publish import file_system_type, is_on_shared_mount
from kvcodec_backends._segment_reader import read_objects
from kvcodec_backends._segment_records import BLOCK_BYTES, raw_name, text_name
from kvcodec_backends._segment_space import SegmentSpace
from kvcodec_backends._segment_store import SegmentOptions, SegmentStore
from kvcodec_backends._segment_writer import SegmentWriter

__all__ = [
    "DEFAULT_SEGMENT_BYTES",
    "ENGINES",
    "MIN_SEGMENT_BYTES",
    "SegmentBackend",
    "engine_of",
]

#: The engines of ``file://``, the first one is for new stores.
ENGINES = ("files", "segments")

#: Unless given: so large, but at most an eighth of the quota.
DEFAULT_SEGMENT_BYTES = 256 << 20
MIN_SEGMENT_BYTES = 64 << 10
_QUOTA_SHARE = 8
_DELETE_BATCH = 256
_FOLDERS = {"files": "/objects", "segments": "/segments"}


def engine_of(url: str) -> str:
    """The engine that a ``file://`` URL names; else that of the store which is there already."""
    parts = urlsplit(url)
    named = dict(option.partition("=")[::2] for option in parts.query.split("&")).get("engine")
    root = unquote(parts.path).rstrip("/")
    found = [engine for engine in ENGINES if os.path.isdir(root + _FOLDERS[engine])]
    if named is None:
        return found[0] if found else ENGINES[0]
    if named not in ENGINES:
        raise ConfigError(f"{url!r}: engine is {named!r}, must be one of {', '.join(ENGINES)}")
    if found and named not in found:
        raise ConfigError(
            f"{url!r}: the store in this directory is of engine={found[0]}; "
            f"leave the engine out, or name another directory"
        )
    return named


class _Shared:
    """What all backends of one root share in one process."""

    def __init__(self, root: str, options: SegmentOptions) -> None:
        self.store = SegmentStore(root, options)
        self.space = SegmentSpace(self.store)
        self.writer = SegmentWriter(self.store, self.space)
        self.user_count = 0


_shared: dict[str, _Shared] = {}
_shared_lock = threading.Lock()


def _join(root: str, options: SegmentOptions) -> _Shared:
    """The state of a root in this process, which begins with its first user."""
    key = os.path.realpath(root)
    with _shared_lock:
        shared = _shared.get(key)
        if shared is None:
            shared = _shared[key] = _Shared(root, options)
        elif shared.store.options != options:
            raise ConfigError(
                f"file://{root} is open in this process with {shared.store.options}, "
                f"not {options}: give both the same options"
            )
        shared.user_count += 1
    return shared


def _leave(shared: _Shared) -> None:
    """Give a share back; the last one closes."""
    with _shared_lock:
        shared.user_count -= 1
        if shared.user_count:
            return
        for key in [key for key, value in _shared.items() if value is shared]:
            del _shared[key]
    shared.writer.close()


def _forget_in_child() -> None:
    """Locks may be held by threads that a forked child does not have, and the open segments are
    the parent's: a child opens the store for itself.
    """
    global _shared_lock
    _shared_lock = threading.Lock()
    _shared.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class SegmentBackend(Backend):
    """``file:///abs/path?engine=segments&max_bytes=100GB``: objects in preallocated segments.

    `max_bytes` bounds what all files of the store take on the disk. `segment_bytes` is the unit of
    eviction and the limit of an object. Objects older than `ttl_seconds` are not there any more.
    With `fsync` they survive a loss of power before put answers.
    """

    def __init__(
        self,
        root: str,
        *,
        max_bytes: int | None = None,
        segment_bytes: int | None = None,
        ttl_seconds: float | None = None,
        fsync: bool = False,
        create: bool = True,
    ) -> None:
        self._root = checked_root(root)
        self._url = f"file://{self._root}"
        if segment_bytes is None:
            share = DEFAULT_SEGMENT_BYTES if max_bytes is None else max_bytes // _QUOTA_SHARE
            segment_bytes = min(DEFAULT_SEGMENT_BYTES, share)
        self._options = _checked(
            SegmentOptions(
                segment_bytes=segment_bytes // BLOCK_BYTES * BLOCK_BYTES,
                max_bytes=max_bytes,
                ttl_seconds=ttl_seconds,
                fsync=fsync,
            )
        )
        self._closed = False
        self._lock = threading.Lock()
        if create:
            make_private_root(self._root)
        elif not os.path.isdir(self._root + _FOLDERS["segments"]):
            raise ConfigError(f"{self._url}: there is no store of engine=segments here")
        if is_on_shared_mount(self._root):
            raise ConfigError(
                f"{self._url} is on a file system that hosts share "
                f"({file_system_type(self._root)}), and engine=segments needs a disk of this host: "
                "use engine=files there"
            )
        self._pid = os.getpid()
        self._shared = _join(self._root, self._options)
        if create:
            try:
                self._shared.store.directory.make()
            except OSError:
                # Every put tries again, and answers what is wrong.
                pass
        try:
            self._shared.store.refresh()
        except OSError:
            # So does every read.
            pass

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> SegmentBackend:
        """Open the directory of a ``file:///`` URL."""
        parts, options = parse_options(
            url, ["engine", "fsync", "max_bytes", "segment_bytes", "ttl_seconds"]
        )
        if parts.netloc or parts.fragment:
            raise ConfigError(
                f"{url!r}: wanted is file:///absolute/path, three slashes, and # written as %23"
            )
        fsync = options.get("fsync", "0")
        if fsync not in ("0", "1"):
            raise ConfigError(f"{url!r}: fsync is {fsync!r}, must be 0 or 1")
        counts = {
            name: parse_byte_count(name, options[name])
            for name in ("max_bytes", "segment_bytes")
            if name in options
        }
        ttl = options.get("ttl_seconds")
        return cls(
            unquote(parts.path),
            max_bytes=counts.get("max_bytes"),
            segment_bytes=counts.get("segment_bytes"),
            ttl_seconds=None if ttl is None else _parse_seconds(ttl),
            fsync=fsync == "1",
            create=create,
        )

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Append objects, neighbours of the batch together."""
        pairs = checked_objects(names, objects)
        deadline = Deadline(timeout_seconds)
        if self._closed:
            return [closed_error(self._url) for _ in pairs]
        shared = self._joined()
        try:
            shared.store.refresh()
        except OSError as error:
            return [as_backend_error(error, "put", name, writing=True) for name, _ in pairs]
        return shared.writer.put(pairs, deadline)

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Read objects, verified; neighbours together."""
        pairs = checked_buffers(names, buffers)
        deadline = Deadline(timeout_seconds)
        if self._closed:
            return [closed_error(self._url) for _ in pairs]
        return read_objects(self._joined().store, pairs, deadline)

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is there; no disk is asked."""
        checked = checked_names(names)
        if self._closed or Deadline(timeout_seconds).passed():
            return [False] * len(checked)
        store = self._joined().store
        try:
            store.refresh()
        except OSError:
            # An unanswered question is a no.
            return [False] * len(checked)
        return [found is not None for found in store.index.find(map(raw_name, checked))]

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Mark objects as dead. A segment in which nothing lives any more is given back."""
        checked = checked_names(names)
        deadline = Deadline(timeout_seconds)
        if self._closed or deadline.passed():
            return [False] * len(checked)
        shared = self._joined()
        store = shared.store
        results = [False] * len(checked)
        try:
            store.refresh()
            for start in range(0, len(checked), _DELETE_BATCH):
                if deadline.passed():
                    break
                part = checked[start : start + _DELETE_BATCH]
                results[start : start + len(part)] = _delete(store, part)
            shared.space.drop_empty()
        except OSError:
            # What is gone is gone, the rest is a no.
            pass
        return results

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects there are when it is called."""
        if self._closed:
            raise closed_error(self._url)
        store = self._joined().store
        try:
            store.refresh()
        except OSError as error:
            raise as_backend_error(error, "list", prefix or "objects", writing=False) from error
        return (
            ObjectInfo(name, location.stored_bytes, location.sequence / 1e9)
            for name, location in (
                (text_name(raw), location) for raw, location in store.index.snapshot()
            )
            if name.startswith(prefix)
        )

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description."""
        check_name(name)
        if self._closed:
            raise closed_error(self._url)
        deadline = Deadline(timeout_seconds)
        if deadline.passed():
            raise deadline.error("stat", name)
        store = self._joined().store
        try:
            store.refresh()
        except OSError as error:
            raise as_backend_error(error, "stat", name, writing=False) from error
        (found,) = store.index.find([raw_name(name)])
        return found and ObjectInfo(name, found.stored_bytes, found.sequence / 1e9)

    def close(self) -> None:
        """Stop answering; the last backend of a root leaves its segment to the next process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            shared = self._shared if self._pid == os.getpid() else None
        if shared is not None:
            _leave(shared)

    def counters(self) -> Mapping[str, int]:
        """Objects evicted to keep `max_bytes`, expired, or displaced by what else fills the disk;
        segments taken over, objects found without the index, damaged objects.
        """
        return self._shared.store.counters()

    def gauges(self) -> Mapping[str, int]:
        """Bytes of all segments, and how many there may be if `max_bytes` says so."""
        return self._shared.store.gauges()

    def _joined(self) -> _Shared:
        """The state of this process; a forked child begins anew."""
        if self._pid == os.getpid():
            return self._shared
        with self._lock:
            if self._pid != os.getpid():
                self._shared = _join(self._root, self._options)
                self._pid = os.getpid()
            return self._shared


def _checked(options: SegmentOptions) -> SegmentOptions:
    if options.segment_bytes < MIN_SEGMENT_BYTES:
        raise ConfigError(
            f"segment_bytes is {options.segment_bytes}, must be at least {MIN_SEGMENT_BYTES}; "
            f"unless given it is an eighth of max_bytes={options.max_bytes}"
        )
    if options.max_bytes is not None and options.max_bytes < 2 * options.segment_bytes:
        raise ConfigError(
            f"max_bytes={options.max_bytes} has no room for two segments of "
            f"segment_bytes={options.segment_bytes}"
        )
    if options.ttl_seconds is not None and not options.ttl_seconds > 0:
        raise ConfigError(f"ttl_seconds is {options.ttl_seconds:g}, must be above 0")
    return options


def _parse_seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"ttl_seconds is {text!r}, wanted a number such as 86400") from None


def _delete(store: SegmentStore, names: Sequence[str]) -> list[bool]:
    """Take objects out of memory, then mark them on disk; back in where that fails."""
    raw = [raw_name(name) for name in names]
    taken = [
        (place, name, location)
        for place, (name, location) in enumerate(zip(raw, store.index.find(raw), strict=True))
        if location is not None and store.index.remove(name, location)
    ]
    results = [False] * len(names)
    killed = store.kill([(name, location) for _, name, location in taken])
    for (place, name, location), done in zip(taken, killed, strict=True):
        results[place] = done
        if not done:
            store.index.put_back(name, location)
    return results
