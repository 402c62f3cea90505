"""One file per object in a directory: a local disk, a tmpfs, or a shared mount such as JuiceFS.

::

    <root>/                                     mode 0700
        objects/<namespace>/<2 hex digits>/<digest> the objects, mode 0600, never written in place
        tmp/                                        objects being written
        ledger                                      only with max_bytes: who keeps how many bytes

An object is written under `tmp` and published from there, so its name leads to a whole object or
to none, and the last complete writer wins. Nothing is synced to the disk unless `fsync=1`: this is
a cache, and what a loss of power damages, the page's own checksums turn into a miss.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import unquote

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
from kvcodec.errors import BackendError, BackendFull, ConfigError
from kvcodec_backends._file_io import (
    FULL_ERRNOS,
    as_backend_error,
    checked_root,
    file_bytes,
    holds_store,
    make_private_root,
    object_path,
    read_file,
    scan_objects,
)
from kvcodec_backends._file_orphans import sweep_orphans
from kvcodec_backends._file_publish import file_system_type
from kvcodec_backends._file_quota import Quota
from kvcodec_backends._file_writer import ObjectWriter
from kvcodec_backends.segments import SegmentBackend, engine_of

__all__ = ["FileBackend"]

# Within a quota objects are admitted together as long as they are at most this part of it, so
# that usage never goes far below the limit to make room for one batch.
_BATCH_QUOTA_SHARE = 16
# How long the ledger may stay locked: whoever opens a store alone counts its files under the lock.
_OPEN_LOCK_TIMEOUT_SECONDS = 60.0
_PUT_LOCK_TIMEOUT_SECONDS = 0.25


class FileBackend(Backend):
    """``file:///abs/path?max_bytes=10GB&fsync=1&publish=link``: one file per object.

    `max_bytes` bounds the lengths of all files under the root, whichever processes wrote them;
    the least recently used go first. Without it the store grows until the disk is full. `fsync`
    makes each object survive a loss of power before put answers. `publish` is ``rename``, ``link``
    for mounts that several hosts share (JuiceFS, NFS, CephFS ...), or ``auto``, which looks what
    the directory is on; on a shared one there is no `max_bytes`. ``engine=segments`` is another
    backend, `SegmentBackend`.
    """

    def __init__(
        self,
        root: str,
        *,
        max_bytes: int | None = None,
        fsync: bool = False,
        publish: str = "auto",
        create: bool = True,
    ) -> None:
        self._root = checked_root(root)
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"max_bytes is {max_bytes}, must be at least 1")
        self._writer = ObjectWriter(self._root, fsync=fsync, publish=publish)
        self._max_bytes = max_bytes
        self._url = f"file://{self._root}"
        self._closed = False
        self._counts: Counter[str] = Counter(
            swept_orphans=0,
            evicted_objects=0,
            evicted_bytes=0,
            displaced_objects=0,
            displaced_bytes=0,
            scans=0,
        )
        self._reset_process_state()
        if create:
            make_private_root(self._root)
        elif not holds_store(self._root):
            raise ConfigError(f"{self._url}: there is no store in this directory")
        self._start()

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> Backend:
        """Open the directory of a ``file:///`` URL with the engine that it names, or that the store
        there was made with.
        """
        if engine_of(url) == "segments":
            return SegmentBackend.from_url(url, create=create)
        parts, options = parse_options(url, ["engine", "max_bytes", "fsync", "publish"])
        if parts.netloc or parts.fragment:
            raise ConfigError(
                f"{url!r}: wanted is file:///absolute/path, three slashes, and # written as %23"
            )
        limit = options.get("max_bytes")
        fsync = options.get("fsync", "0")
        if fsync not in ("0", "1"):
            raise ConfigError(f"{url!r}: fsync is {fsync!r}, must be 0 or 1")
        return cls(
            unquote(parts.path),
            max_bytes=None if limit is None else parse_byte_count("max_bytes", limit),
            fsync=fsync == "1",
            publish=options.get("publish", "auto"),
            create=create,
        )

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Write objects, each under a temporary name first."""
        pairs = checked_objects(names, objects)
        deadline = Deadline(timeout_seconds)
        if self._closed:
            return [closed_error(self._url) for _ in pairs]
        self._writer.remove_leftovers()
        if self._max_bytes is None:
            return [self._put_by(deadline, name, view) for name, view in pairs]
        results: list[PutResult] = []
        for group in _grouped(pairs, self._max_bytes // _BATCH_QUOTA_SHARE):
            results += self._put_within_quota(deadline, group, self._max_bytes)
        return results

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Read objects whole."""
        pairs = checked_buffers(names, buffers)
        deadline = Deadline(timeout_seconds)
        results: list[GetResult] = []
        for name, buffer in pairs:
            if self._closed:
                results.append(closed_error(self._url))
            elif deadline.passed():
                results.append(deadline.error("get", name))
            else:
                try:
                    results.append(read_file(object_path(self._writer.objects, name), buffer))
                except OSError as error:
                    results.append(as_backend_error(error, "get", name, writing=False))
        quota = self._quota
        if quota is not None:
            quota.touch(
                name
                for (name, _), result in zip(pairs, results, strict=True)
                if isinstance(result, int)
            )
        return results

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is there; one lstat each."""
        checked = checked_names(names)
        deadline = Deadline(timeout_seconds)
        results = []
        for name in checked:
            found = None
            if not (self._closed or deadline.passed()):
                try:
                    found = file_bytes(object_path(self._writer.objects, name))
                except OSError:
                    # An unanswered question is a no.
                    pass
            results.append(found is not None)
        return results

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Remove objects. What is no regular file is not ours to remove."""
        checked = checked_names(names)
        deadline = Deadline(timeout_seconds)
        results = []
        for name in checked:
            removed = False
            if not (self._closed or deadline.passed()):
                try:
                    removed = self._delete_one(name)
                except OSError:
                    pass
            results.append(removed)
        return results

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects, found by reading directories; files of any other name are not looked at."""
        if self._closed:
            raise closed_error(self._url)
        return self._list(prefix)

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description."""
        check_name(name)
        if self._closed:
            raise closed_error(self._url)
        deadline = Deadline(timeout_seconds)
        if deadline.passed():
            raise deadline.error("stat", name)
        try:
            found = file_bytes(object_path(self._writer.objects, name))
        except OSError as error:
            raise as_backend_error(error, "stat", name, writing=False) from error
        return None if found is None else ObjectInfo(name, *found)

    def close(self) -> None:
        """Stop answering, and leave the byte account to others."""
        self._closed = True
        if self._pid != os.getpid():
            self._reset_process_state()
        with self._quota_lock:
            if self._quota is not None:
                self._quota.close()

    def counters(self) -> Mapping[str, int]:
        """Swept orphans, evictions to keep `max_bytes`, objects displaced by what else fills the
        disk, scans of the tree, and renames for want of links.
        """
        return dict(self._counts) | {"unlinkable_files": self._writer.publisher.unlinkable_count}

    def gauges(self) -> Mapping[str, int]:
        """With `max_bytes`: bytes of the files of all processes, and how many there may be."""
        if self._max_bytes is None or (quota := self._quota) is None:
            return {}
        return {"stored_bytes": quota.used_bytes, "limit_bytes": self._max_bytes}

    def _start(self) -> None:
        """Set up what a writer needs; a store that can only be read is fine too."""
        try:
            self._writer.make_directories()
            self._check_countable()
            self._count("swept_orphans", sweep_orphans(self._writer.temporaries))
            if self._max_bytes is not None:
                self._open_quota(_OPEN_LOCK_TIMEOUT_SECONDS)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self._url}: another process holds the ledger of this store for more than "
                f"{_OPEN_LOCK_TIMEOUT_SECONDS:g} s; see whether it is stopped"
            ) from error
        except OSError:
            # Every put tries again, and answers what is wrong.
            pass

    def _check_countable(self) -> None:
        if self._max_bytes is not None and self._writer.publisher.is_shared:
            raise ConfigError(
                f"{self._url}: max_bytes cannot be kept on a shared file system "
                f"({file_system_type(self._root)}), where a host does not see at once what others "
                "write; set a quota there instead, or publish=rename if it is a local one after all"
            )

    def _reset_process_state(self) -> None:
        """What a child cannot take over from its parent: locks that may be held, the account."""
        self._pid = os.getpid()
        self._counts_lock = threading.Lock()
        self._quota_lock = threading.Lock()
        self._quota: Quota | None = None

    def _count(self, counter: str, increment: int) -> None:
        with self._counts_lock:
            self._counts[counter] += increment

    def _open_quota(self, lock_timeout_seconds: float) -> Quota | None:
        """The account, opened again if the root was removed; None without `max_bytes`."""
        if self._max_bytes is None:
            return None
        if self._pid != os.getpid():
            self._reset_process_state()
        with self._quota_lock:
            if self._closed:
                raise closed_error(self._url)
            quota = self._quota
            if quota is None or quota.is_lost:
                if quota is not None:
                    quota.close()
                self._writer.make_directories()
                self._quota = quota = Quota(
                    ledger=f"{self._root}/ledger",
                    objects=self._writer.objects,
                    temporaries=self._writer.temporaries,
                    max_bytes=self._max_bytes,
                    count=self._count,
                    lock_timeout_seconds=lock_timeout_seconds,
                )
            return quota

    def _put_within_quota(
        self, deadline: Deadline, pairs: Sequence[tuple[str, memoryview]], max_bytes: int
    ) -> Sequence[PutResult]:
        """Store objects that are admitted together."""
        admitted_bytes = sum(len(view) for _, view in pairs)
        if admitted_bytes > max_bytes:
            (name, _) = pairs[0]
            return [BackendFull(f"put {name}: {admitted_bytes} bytes, above max_bytes={max_bytes}")]
        if deadline.passed():
            return [deadline.error("put", name) for name, _ in pairs]
        try:
            quota = self._admitted(admitted_bytes, deadline)
        except OSError as error:
            return [as_backend_error(error, "put", name, writing=True) for name, _ in pairs]
        except BackendError as error:
            return [type(error)(f"put {name}: {error}") for name, _ in pairs]
        results: list[PutResult] = []
        changed: list[tuple[str, int, int]] = []
        try:
            for name, view in pairs:
                result, bytes_now, bytes_before = self._replace(deadline, name, view, quota)
                results.append(result)
                changed.append((name, bytes_now, bytes_before))
        finally:
            quota.settle(admitted_bytes, changed)
        return results

    def _admitted(self, admitted_bytes: int, deadline: Deadline) -> Quota:
        """The account, with room made for so many bytes."""
        quota = self._open_quota(_PUT_LOCK_TIMEOUT_SECONDS)
        assert quota is not None
        quota.reserve(admitted_bytes, deadline)
        if quota.is_lost:
            # Found out just now; what was reserved there is seen by nobody.
            quota = self._open_quota(_PUT_LOCK_TIMEOUT_SECONDS)
            assert quota is not None
            quota.reserve(admitted_bytes, deadline)
        return quota

    def _replace(
        self, deadline: Deadline, name: str, view: memoryview, quota: Quota
    ) -> tuple[PutResult, int, int]:
        """Store one object; the answer, and the length of what is there now and was before."""
        path = object_path(self._writer.objects, name)
        quota.hold(name)
        try:
            before = file_bytes(path)
        except OSError as error:
            return as_backend_error(error, "put", name, writing=True), 0, 0
        bytes_before = before[0] if before else 0
        result = self._put_by(deadline, name, view, quota)
        if result is None:
            return None, len(view), bytes_before
        try:
            # A put that failed late may have changed what is there all the same.
            now = file_bytes(path)
        except OSError:
            return result, bytes_before, bytes_before
        return result, now[0] if now else 0, bytes_before

    def _put_by(
        self, deadline: Deadline, name: str, view: memoryview, quota: Quota | None = None
    ) -> PutResult:
        if deadline.passed():
            return deadline.error("put", name)
        try:
            try:
                self._writer.write(name, view)
            except OSError as error:
                if quota is None or error.errno not in FULL_ERRNOS:
                    raise
                if not quota.make_room(len(view)):
                    raise
                self._writer.write(name, view)
        except OSError as error:
            return as_backend_error(error, "put", name, writing=True)
        return None

    def _delete_one(self, name: str) -> bool:
        path = object_path(self._writer.objects, name)
        found = file_bytes(path)
        if found is None or not self._writer.publisher.withdraw(path):
            return False
        quota = self._quota
        if quota is not None and self._pid == os.getpid():
            quota.forget(name, found[0])
        return True

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        try:
            for info in scan_objects(self._writer.objects, prefix):
                if self._closed:
                    raise closed_error(self._url)
                yield info
        except OSError as error:
            raise as_backend_error(error, "list", prefix or "objects", writing=False) from error


def _grouped(
    pairs: Sequence[tuple[str, memoryview]], group_bytes: int
) -> Iterator[Sequence[tuple[str, memoryview]]]:
    """Cut a batch into groups of at most `group_bytes`, or of one object where that is more."""
    start = 0
    while start < len(pairs):
        end = start + 1
        total_bytes = len(pairs[start][1])
        while end < len(pairs) and total_bytes + len(pairs[end][1]) <= group_bytes:
            total_bytes += len(pairs[end][1])
            end += 1
        yield pairs[start:end]
        start = end
