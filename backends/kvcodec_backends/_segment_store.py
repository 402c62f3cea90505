"""What one process knows of the segments below a root; how it makes, adopts and drops them."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcodec.errors import BackendFull
from kvcodec_backends._arguments import Deadline
from kvcodec_backends._file_io import FULL_ERRNOS, remove_file, sync_directory
from kvcodec_backends._segment_directory import SegmentDirectory, append_to, lock_segment, unlock
from kvcodec_backends._segment_index import Location, Segment, SegmentIndex
from kvcodec_backends._segment_io import SegmentIO
from kvcodec_backends._segment_records import (
    BLOCK_BYTES,
    DEAD,
    LIVE,
    SEALED,
    Record,
    iter_index,
)

__all__ = ["OpenSegment", "SegmentOptions", "SegmentStore"]

# The index of a segment full of the smallest objects, as a part of the segment.
_INDEX_SHARE = 32


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """What all users of a root in one process have to agree on."""

    segment_bytes: int
    max_bytes: int | None = None
    ttl_seconds: float | None = None
    fsync: bool = False


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


class SegmentStore:
    """The segments of one root. Thread-safe; methods raise OSError unless they say otherwise."""

    def __init__(self, root: str, options: SegmentOptions) -> None:
        self.options = options
        self._counts: Counter[str] = Counter(
            evicted_objects=0,
            evicted_bytes=0,
            dropped_segments=0,
            adopted_segments=0,
            recovered_objects=0,
            damaged_objects=0,
            index_failures=0,
            buffered=0,
        )
        self._counts_lock = threading.Lock()
        self.directory = SegmentDirectory(root)
        self.io = SegmentIO(self.count)
        self.index = SegmentIndex(options.ttl_seconds)
        self._refresh_lock = threading.Lock()
        self._segments: dict[int, Segment] = {}
        self._stamp: bytes | None = None

    def count(self, counter: str, increment: int) -> None:
        """Add to a counter."""
        with self._counts_lock:
            self._counts[counter] += increment

    def counters(self) -> dict[str, int]:
        """All counters; waits for nobody."""
        return dict(self._counts)

    def refresh(self) -> None:
        """Learn what other processes have done since the last call."""
        with self._refresh_lock:
            stamp = self.directory.stamp()
            if stamp is None or stamp != self._stamp:
                self._look_at_all()
                self._stamp = stamp
            for segment in self._segments.values():
                if not segment.is_sealed:
                    self._read_index(segment)

    def kill(self, entries: Sequence[tuple[bytes, Location]]) -> list[bool]:
        """Mark versions as dead on disk, so that no restart brings them back. False where it
        failed.
        """
        if not entries:
            return []
        # The index goes first: a crash in between leaves nothing that is told of but not there.
        for segment in {location.segment for _, location in entries}:
            lines = _packed(
                location.record(name)._replace(state=DEAD)
                for name, location in entries
                if location.segment is segment
            )
            append_to(segment.index_path, lines, self.count)
        results = [self._kill_record(*entry) for entry in entries]
        self.directory.change_stamp()
        return results

    def _kill_record(self, name: bytes, location: Location) -> bool:
        try:
            self.io.kill(location.segment.path, location.record(name))
        except FileNotFoundError:
            # Evicted meanwhile: gone is gone.
            return True
        except OSError:
            return False
        return True

    def drop_empty(self) -> None:
        """Give the space of sealed segments back in which nothing lives any more."""
        oldest = self.index.oldest_sequence()
        with self._refresh_lock:
            for segment in list(self._segments.values()):
                is_empty = segment.live_count == 0 and segment.is_sealed
                if is_empty or segment.last_sequence < oldest:
                    self._drop(segment)

    def open_segment(self, wanted_bytes: int, deadline: Deadline, *, adopt: bool) -> OpenSegment:
        """A segment with room for so many bytes, which nobody else appends to.

        With `adopt`, one that its last writer left unfinished is preferred. Raises `BackendFull`
        and `BackendTimeout` too.
        """
        self.directory.make()
        with self.directory.locked(deadline):
            self.refresh()
            self.directory.remove_stray_indexes()
            self.drop_empty()
            adopted = self._adopt(wanted_bytes) if adopt else None
            if adopted is not None:
                return adopted
            size = self.options.segment_bytes
            self._keep_quota(size + size // _INDEX_SHARE)
            return self._create(size)

    def close_segment(self, opened: OpenSegment, *, seal: bool) -> None:
        """Let go of a segment; unless it is sealed, the next process goes on with it."""
        if seal:
            segment = opened.segment
            record = Record(
                SEALED, bytes(48), 0, segment.last_sequence, segment.number, opened.end, 0
            )
            append_to(segment.index_path, record.pack(), self.count)
            self.index.learn(segment, [record])
        unlock(opened.fd)

    # Looking

    def _look_at_all(self) -> None:
        numbers = self.directory.numbers()
        for number in self._segments.keys() - numbers:
            self.index.drop_segment(self._segments.pop(number))
        for number in sorted(numbers):
            segment = self._segments.get(number)
            if segment is None:
                segment = Segment(number, self.directory.path)
                self._load(segment)
                self._segments[number] = segment
            elif segment.is_sealed:
                self._read_index(segment)

    def _read_index(self, segment: Segment) -> list[Record]:
        """Take up what was appended to an index; what that was."""
        records = []
        data = _read_from(segment.index_path, segment.index_bytes)
        start = segment.index_bytes
        for record, end in iter_index(data):
            segment.index_bytes = start + end
            if record.segment == segment.number:
                records.append(record)
        self.index.learn(segment, records)
        return records

    def _load(self, segment: Segment) -> list[Record] | None:
        """Take up a whole segment: its index, and the records where that has gaps. The latter are
        returned; None if not all of it could be searched.
        """
        segment.index_bytes = 0
        entries = list(_own_entries(segment))
        found: list[Record] = []
        is_searched = True
        try:
            with self.io.open(segment.path, os.O_RDONLY) as fd:
                file_bytes = os.fstat(fd).st_size // BLOCK_BYTES * BLOCK_BYTES
                for start, end in _gaps(entries, file_bytes):
                    found += self.io.scan(fd, segment.number, start, end)
        except OSError:
            # Evicted meanwhile, or a bad block: the other segments go on.
            is_searched = False
        self.count("recovered_objects", sum(record.state == LIVE for record in found))
        # A record that died before its writer put it into the index is dead all the same.
        dead = {record.sequence for record in entries if record.state == DEAD}
        records = [
            record
            for record in entries + found
            if record.state != LIVE or record.sequence not in dead
        ]
        self.index.learn(segment, records)
        return found if is_searched else None

    # Making and dropping; the directory is locked

    def _adopt(self, wanted_bytes: int) -> OpenSegment | None:
        with self._refresh_lock:
            unfinished = [segment for segment in self._segments.values() if not segment.is_sealed]
            unfinished.sort(key=lambda segment: segment.last_sequence, reverse=True)
            for segment in unfinished:
                try:
                    opened = self._take_over(segment, wanted_bytes)
                except OSError:
                    continue
                if opened is not None:
                    self.count("adopted_segments", 1)
                    return opened
        return None

    def _take_over(self, segment: Segment, wanted_bytes: int) -> OpenSegment | None:
        fd = self.io.open_fd(segment.path, os.O_RDWR)
        try:
            if lock_segment(fd):
                found = self._load(segment)
                file_bytes = os.fstat(fd).st_size // BLOCK_BYTES * BLOCK_BYTES
                if found is not None and file_bytes - segment.end >= wanted_bytes:
                    append_to(segment.index_path, _packed(found), self.count)
                    opened = OpenSegment(segment, fd, segment.end, file_bytes)
                    fd = -1
                    return opened
        finally:
            if fd >= 0:
                unlock(fd)
        return None

    def _create(self, size: int) -> OpenSegment:
        with self._refresh_lock:
            number = max([time.time_ns(), *(number + 1 for number in self._segments)])
            segment = Segment(number, self.directory.path)
            fd = -1
            while fd < 0:
                try:
                    fd = self._make(segment, size)
                except OSError as error:
                    _remove_files(segment)
                    # Others have filled the disk: as long as there is a quota, the oldest goes.
                    if error.errno not in FULL_ERRNOS or self.options.max_bytes is None:
                        raise
                    if not self._drop_oldest():
                        raise
            self._segments[number] = segment
        self.directory.change_stamp()
        return OpenSegment(segment, fd, 0, size)

    def _make(self, segment: Segment, size: int) -> int:
        """Make the files of a segment; the descriptor that holds its lock."""
        _allocate(segment.path, size)
        append_to(segment.index_path, b"", self.count)
        fd = self.io.open_fd(segment.path, os.O_RDWR)
        try:
            lock_segment(fd)
            if self.options.fsync:
                os.fsync(fd)
                sync_directory(self.directory.path)
                sync_directory(os.path.dirname(self.directory.path))
        except OSError:
            unlock(fd)
            raise
        return fd

    def _keep_quota(self, wanted_bytes: int) -> None:
        max_bytes = self.options.max_bytes
        if max_bytes is None:
            return
        with self._refresh_lock:
            while (used_bytes := self.directory.used_bytes()) + wanted_bytes > max_bytes:
                if not self._drop_oldest():
                    raise BackendFull(
                        f"{used_bytes} of max_bytes={max_bytes} are in use, and every segment is "
                        "being written to: raise max_bytes, or lower segment_bytes="
                        f"{self.options.segment_bytes}"
                    )

    def _drop_oldest(self) -> bool:
        by_age = sorted(self._segments.values(), key=lambda segment: segment.last_sequence)
        return any(self._drop(segment) for segment in by_age)

    def _drop(self, segment: Segment) -> bool:
        """Remove a segment unless somebody appends to it; whether it is gone."""
        try:
            fd = os.open(segment.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = -1
        if fd >= 0:
            try:
                if not lock_segment(fd) and os.path.exists(segment.path):
                    return False
                # Whoever has it open would keep its space: so it is cut first.
                os.ftruncate(fd, 0)
                _remove_files(segment)
            finally:
                unlock(fd)
        objects, stored_bytes = self.index.drop_segment(segment)
        self._segments.pop(segment.number, None)
        self.count("dropped_segments", 1)
        self.count("evicted_objects", objects)
        self.count("evicted_bytes", stored_bytes)
        self.directory.change_stamp()
        return True


def _own_entries(segment: Segment) -> Iterable[Record]:
    data = _read_from(segment.index_path, 0)
    for record, end in iter_index(data):
        segment.index_bytes = end
        if record.segment == segment.number:
            yield record


def _gaps(entries: Iterable[Record], file_bytes: int) -> list[tuple[int, int]]:
    """The parts of a segment that its index says nothing about."""
    gaps, position = [], 0
    for start, end in sorted(
        (record.offset, file_bytes if record.state == SEALED else record.end) for record in entries
    ):
        if start > position:
            gaps.append((position, start))
        position = max(position, end)
    if position < file_bytes:
        gaps.append((position, file_bytes))
    return gaps


def _packed(records: Iterable[Record]) -> bytes:
    return b"".join(record.pack() for record in records)


def _read_from(path: str, start: int) -> bytes:
    """An index from a place on; nothing where it cannot be read, for it is no more than a help."""
    parts = []
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while part := os.pread(fd, 1 << 20, start):
                parts.append(part)
                start += len(part)
        finally:
            os.close(fd)
    except OSError:
        pass
    return b"".join(parts)


def _allocate(path: str, size: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)


def _remove_files(segment: Segment) -> None:
    remove_file(segment.path)
    remove_file(segment.index_path)
