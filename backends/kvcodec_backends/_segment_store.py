"""What one process knows of the segments below a root, and how it learns it."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcodec_backends._segment_directory import (
    SegmentDirectory,
    append_to,
    is_locked,
    open_index,
    try_lock,
    unlock,
)
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

__all__ = ["SegmentOptions", "SegmentStore"]


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """What all users of a root in one process have to agree on."""

    segment_bytes: int
    max_bytes: int | None = None
    ttl_seconds: float | None = None
    fsync: bool = False


class SegmentStore:
    """The segments of one root. Thread-safe; methods raise OSError unless they say otherwise."""

    def __init__(self, root: str, options: SegmentOptions) -> None:
        self.options = options
        self._counts: Counter[str] = Counter(
            evicted_objects=0,
            evicted_bytes=0,
            expired_objects=0,
            expired_bytes=0,
            displaced_objects=0,
            displaced_bytes=0,
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
        #: Held by whoever changes `segments`.
        self.lock = threading.Lock()
        self.segments: dict[int, Segment] = {}
        self._stamp: bytes | None = None

    def count(self, counter: str, increment: int) -> None:
        """Add to a counter."""
        with self._counts_lock:
            self._counts[counter] += increment

    def counters(self) -> dict[str, int]:
        """All counters; waits for nobody."""
        return dict(self._counts)

    def gauges(self) -> dict[str, int]:
        """Bytes of all records this process knows of, dead ones among them; waits for nobody."""
        stored = sum(segment.end for segment in list(self.segments.values()))
        limit = self.options.max_bytes
        return {"stored_bytes": stored} | ({} if limit is None else {"limit_bytes": limit})

    def refresh(self) -> None:
        """Learn what other processes have done since the last call."""
        with self.lock:
            stamp = self.directory.stamp()
            if stamp is None or stamp != self._stamp:
                self._look_at_all()
                self._stamp = stamp
            for segment in self.segments.values():
                if not segment.is_sealed:
                    self._read_index(segment)

    def kill(self, entries: Sequence[tuple[bytes, Location]]) -> list[bool]:
        """Mark versions as dead on disk, so that no restart brings them back. False where it
        failed.
        """
        results: dict[tuple[bytes, Location], bool] = {}
        for segment in {location.segment for _, location in entries}:
            mine = [entry for entry in entries if entry[1].segment is segment]
            results.update(zip(mine, self._kill_in(segment, mine), strict=True))
        if results:
            self.directory.change_stamp()
        return [results[entry] for entry in entries]

    def _kill_in(self, segment: Segment, entries: Sequence[tuple[bytes, Location]]) -> list[bool]:
        try:
            fd = open_index(segment.index_path)
        except OSError as error:
            return [isinstance(error, FileNotFoundError)] * len(entries)
        try:
            # Whoever reuses the segment has the lock, or has removed this index: gone is gone.
            if not try_lock(fd, shared=True) or os.fstat(fd).st_nlink == 0:
                return [True] * len(entries)
            # The index goes first: a crash in between leaves nothing told of but not there.
            dead = [location.record(name)._replace(state=DEAD) for name, location in entries]
            append_to(segment.index_path, b"".join(record.pack() for record in dead), self.count)
            return [self._kill_record(segment, record) for record in dead]
        except OSError:
            return [False] * len(entries)
        finally:
            unlock(fd)

    def _kill_record(self, segment: Segment, dead: Record) -> bool:
        try:
            self.io.write_header(segment.path, dead)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _look_at_all(self) -> None:
        numbers = self.directory.numbers()
        for number in self.segments.keys() - numbers:
            self.index.drop_segment(self.segments.pop(number))
        for number in sorted(numbers):
            segment = self.segments.get(number)
            if segment is None:
                segment = Segment(number, self.directory.path)
                self.load(segment)
                self.segments[number] = segment
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

    def load(self, segment: Segment, *, is_ours: bool = False) -> list[Record] | None:
        """Take up a whole segment: its index, and the records where that has gaps. The latter are
        returned; None if not all of it could be searched.

        Where somebody else is appending, the index tells soon enough.
        """
        segment.index_bytes = 0
        entries = list(_own_entries(segment))
        found: list[Record] = []
        is_searched = True
        try:
            with self.io.open(segment.path, os.O_RDONLY) as fd:
                file_bytes = os.fstat(fd).st_size // BLOCK_BYTES * BLOCK_BYTES
                if is_ours or not is_locked(fd):
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
