"""How a process makes, adopts, reuses and drops segments."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from kvcodec.backend import Deadline
from kvcodec.errors import BackendFull
from kvcodec_backends._file_io import FULL_ERRNOS, remove_file, sync_directory
from kvcodec_backends._segment_directory import (
    append_to,
    lock_segment,
    open_index,
    try_lock,
    unlock,
)
from kvcodec_backends._segment_index import Segment
from kvcodec_backends._segment_records import BLOCK_BYTES, SEALED, Record
from kvcodec_backends._segment_store import SegmentStore

__all__ = ["OpenSegment", "SegmentSpace"]

# The index of a segment full of the smallest objects, as a part of the segment.
_INDEX_SHARE = 32


@dataclass(slots=True, eq=False)
class OpenSegment:
    """The segment that this process appends to. `fd` holds the lock that tells the others."""

    segment: Segment
    fd: int
    end: int
    file_bytes: int
    #: Writes under way.
    pending_count: int = 0
    #: No more writes: the last one under way closes it.
    is_retired: bool = False


class SegmentSpace:
    """The space below one root. Thread-safe; methods raise OSError unless they say otherwise."""

    def __init__(self, store: SegmentStore) -> None:
        self._store = store

    def drop_empty(self) -> None:
        """Give the space of sealed segments back in which nothing lives any more."""
        oldest = self._store.index.oldest_sequence()
        with self._store.lock:
            for segment in list(self._store.segments.values()):
                is_empty = segment.live_count == 0 and segment.is_sealed
                if is_empty or segment.last_sequence < oldest:
                    self._drop(segment, "expired")

    def open_segment(self, wanted_bytes: int, deadline: Deadline, *, adopt: bool) -> OpenSegment:
        """A segment with room for so many bytes, which nobody else appends to.

        With `adopt`, one that its last writer left unfinished is preferred. Raises `BackendFull`
        and `BackendTimeout` too.
        """
        self._store.directory.make()
        with self._store.directory.locked(deadline):
            self._store.refresh()
            self._store.directory.remove_strays()
            self.drop_empty()
            adopted = self._adopt(wanted_bytes) if adopt else None
            if adopted is not None:
                return adopted
            return self._create(self._store.options.segment_bytes)

    def close_segment(self, opened: OpenSegment, *, seal: bool) -> None:
        """Let go of a segment; unless it is sealed, the next process goes on with it."""
        if seal:
            segment = opened.segment
            record = Record(
                SEALED, bytes(48), 0, segment.last_sequence, segment.number, opened.end, 0
            )
            append_to(segment.index_path, record.pack(), self._store.count)
            self._store.index.learn(segment, [record])
        unlock(opened.fd)

    # Making and dropping; the directory is locked

    def _adopt(self, wanted_bytes: int) -> OpenSegment | None:
        with self._store.lock:
            for segment in reversed(self._by_age()):
                if segment.is_sealed:
                    continue
                try:
                    opened = self._take_over(segment, wanted_bytes)
                except OSError:
                    continue
                if opened is not None:
                    self._store.count("adopted_segments", 1)
                    return opened
        return None

    def _take_over(self, segment: Segment, wanted_bytes: int) -> OpenSegment | None:
        fd = self._store.io.open_fd(segment.path, os.O_RDWR)
        try:
            if lock_segment(fd):
                found = self._store.load(segment, is_ours=True)
                file_bytes = os.fstat(fd).st_size // BLOCK_BYTES * BLOCK_BYTES
                if found is not None and file_bytes - segment.end >= wanted_bytes:
                    lines = b"".join(record.pack() for record in found)
                    append_to(segment.index_path, lines, self._store.count)
                    opened = OpenSegment(segment, fd, segment.end, file_bytes)
                    fd = -1
                    return opened
        finally:
            if fd >= 0:
                unlock(fd)
        return None

    def _create(self, size: int) -> OpenSegment:
        with self._store.lock:
            number = max([time.time_ns(), *(number + 1 for number in self._store.segments)])
            segment = Segment(number, self._store.directory.path)
            fd = self._keep_quota(segment, size)
            while fd is None:
                try:
                    fd = self._allocate(segment, size)
                except OSError as error:
                    _remove_files(segment)
                    # Others have filled the disk: as long as there is a quota, the oldest goes.
                    if error.errno not in FULL_ERRNOS or self._store.options.max_bytes is None:
                        raise
                    if not any(self._drop(other, "displaced") for other in self._by_age()):
                        raise
            try:
                append_to(segment.index_path, b"", self._store.count)
                if self._store.options.fsync:
                    os.fsync(fd)
                    sync_directory(self._store.directory.path)
                    sync_directory(os.path.dirname(self._store.directory.path))
            except OSError:
                _remove_files(segment)
                unlock(fd)
                raise
            self._store.segments[number] = segment
        self._store.directory.change_stamp()
        return OpenSegment(segment, fd, 0, size)

    def _allocate(self, segment: Segment, size: int) -> int:
        """A new file; the descriptor holds its lock, as it does whenever others see the segment."""
        path = f"{segment.path.removesuffix('.segment')}.new"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            plain_fd = os.open(path, flags, 0o600)
            try:
                os.posix_fallocate(plain_fd, 0, size)
            finally:
                os.close(plain_fd)
            fd = self._store.io.open_fd(path, os.O_RDWR)
        except OSError:
            remove_file(path)
            raise
        try:
            lock_segment(fd)
            os.rename(path, segment.path)
        except OSError:
            unlock(fd)
            remove_file(path)
            raise
        return fd

    def _keep_quota(self, heir: Segment, size: int) -> int | None:
        """Make room for a segment. The last one that goes becomes `heir` if it fits, which saves
        the file system freeing and finding the space: then its descriptor is returned.
        """
        max_bytes = self._store.options.max_bytes
        wanted_bytes = size + size // _INDEX_SHARE
        while max_bytes is not None:
            excess = self._store.directory.used_bytes() + wanted_bytes - max_bytes
            if excess <= 0:
                break
            for victim in self._by_age():
                fd = self._lock(victim)
                if fd is not None:
                    break
            else:
                raise BackendFull(
                    f"no room for a segment in max_bytes={max_bytes}, and every other one is being "
                    "written to: raise max_bytes, or lower segment_bytes="
                    f"{self._store.options.segment_bytes}"
                )
            try:
                status = os.fstat(fd)
                fits = status.st_size == size <= status.st_blocks * 512 and excess <= size
                if fits and _rename(victim, heir):
                    self._forget(victim, "evicted")
                    return fd
                self._remove(victim, fd, "evicted")
            except OSError:
                unlock(fd)
                raise
            unlock(fd)
        return None

    def _by_age(self) -> list[Segment]:
        return sorted(self._store.segments.values(), key=lambda segment: segment.last_sequence)

    def _lock(self, segment: Segment) -> int | None:
        """A descriptor with the lock of a segment, None while somebody appends to it."""
        try:
            fd = self._store.io.open_fd(segment.path, os.O_RDWR)
        except FileNotFoundError:
            return None
        if lock_segment(fd):
            return fd
        unlock(fd)
        return None

    def _drop(self, segment: Segment, counter: str) -> bool:
        """Remove a segment unless somebody appends to it; whether it is gone. `counter` is the
        first word of who counts the objects in it.
        """
        fd = self._lock(segment)
        if fd is None:
            return False
        try:
            self._remove(segment, fd, counter)
        finally:
            unlock(fd)
        return True

    def _remove(self, segment: Segment, fd: int, counter: str) -> None:
        # Whoever has it open would keep its space: so it is cut first.
        os.ftruncate(fd, 0)
        _remove_files(segment)
        self._forget(segment, counter)

    def _forget(self, segment: Segment, counter: str) -> None:
        objects, stored_bytes = self._store.index.drop_segment(segment)
        self._store.segments.pop(segment.number, None)
        self._store.count("dropped_segments", 1)
        self._store.count(f"{counter}_objects", objects)
        self._store.count(f"{counter}_bytes", stored_bytes)
        self._store.directory.change_stamp()


def _rename(victim: Segment, heir: Segment) -> bool:
    """Make one segment another; False while somebody marks records in it as dead.

    What is in it belongs to the old number, and so to nobody.
    """
    fd = open_index(victim.index_path)
    try:
        if not try_lock(fd):
            return False
        os.rename(victim.path, heir.path)
        remove_file(victim.index_path)
    finally:
        unlock(fd)
    return True


def _remove_files(segment: Segment) -> None:
    remove_file(segment.path)
    remove_file(segment.index_path)
