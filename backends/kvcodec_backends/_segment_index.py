"""Which object lies where: all segments of one root, in the memory of one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvcodec_backends._segment_records import DEAD, LIVE, SEALED, Record

__all__ = ["Location", "Segment", "SegmentIndex"]


class Segment:
    """One segment: its file, and what this process knows of its records."""

    __slots__ = (
        "end",
        "index_bytes",
        "index_path",
        "is_sealed",
        "last_sequence",
        "live_count",
        "names",
        "number",
        "path",
    )

    def __init__(self, number: int, directory: str) -> None:
        self.number = number
        self.path = f"{directory}/{number:016x}.segment"
        self.index_path = f"{directory}/{number:016x}.index"
        #: How much of the index file has been read.
        self.index_bytes = 0
        #: Where the last known record ends.
        self.end = 0
        #: Nobody appends any more.
        self.is_sealed = False
        #: When the last record was written; segments go in this order.
        self.last_sequence = number
        #: Names of all records, those that were replaced since among them.
        self.names: list[bytes] = []
        self.live_count = 0


class Location(NamedTuple):
    """Where one version of an object lies."""

    segment: Segment
    offset: int
    stored_bytes: int
    sequence: int

    def record(self, name: bytes) -> Record:
        """Its header, but for the checksum."""
        return Record(
            LIVE, name, self.stored_bytes, self.sequence, self.segment.number, self.offset, 0
        )

    def is_at(self, record: Record | None, name: bytes) -> bool:
        """Whether a header is that of this very version, alive."""
        return record is not None and (
            record.state == LIVE
            and record.name == name
            and record.sequence == self.sequence
            and record.offset == self.offset
            and record.segment == self.segment.number
        )


class SegmentIndex:
    """Names and locations. Thread-safe; no call waits for a disk."""

    def __init__(self, ttl_seconds: float | None) -> None:
        self._ttl_ns = None if ttl_seconds is None else int(ttl_seconds * 1e9)
        self._lock = threading.Lock()
        self._locations: dict[bytes, Location] = {}
        self._last_sequence = 0
        # Versions that a newer one has replaced and that nobody has marked dead yet.
        self._losers: dict[tuple[int, int], tuple[bytes, Location]] = {}

    def new_sequences(self, count: int) -> range:
        """Sequences above all that were seen, and about the time now in nanoseconds."""
        with self._lock:
            first = max(time.time_ns(), self._last_sequence + 1)
            self._last_sequence = first + count - 1
        return range(first, first + count)

    def find(self, names: Iterable[bytes]) -> list[Location | None]:
        """Where objects lie; None for what is not there or too old."""
        oldest = self.oldest_sequence()
        with self._lock:
            found = [self._locations.get(name) for name in names]
        return [
            location if location is not None and location.sequence >= oldest else None
            for location in found
        ]

    def snapshot(self) -> list[tuple[bytes, Location]]:
        """All objects there are now."""
        oldest = self.oldest_sequence()
        with self._lock:
            entries = list(self._locations.items())
        return [(name, location) for name, location in entries if location.sequence >= oldest]

    def oldest_sequence(self) -> int:
        """What was written before this is too old."""
        return 0 if self._ttl_ns is None else time.time_ns() - self._ttl_ns

    def learn(self, segment: Segment, records: Sequence[Record]) -> None:
        """Take up records that lie in a segment, in the order in which they came about. Those that
        are known already change nothing.
        """
        with self._lock:
            for record in records:
                if record.state == LIVE:
                    self._add(segment, record)
                elif record.state == DEAD:
                    self._forget(record.name, segment.number, record.offset)
                elif record.state == SEALED:
                    segment.is_sealed = True
                segment.end = max(segment.end, record.end)
                segment.last_sequence = max(segment.last_sequence, record.sequence)
                self._last_sequence = max(self._last_sequence, record.sequence)

    def remove(self, name: bytes, location: Location) -> bool:
        """Take one version out; False if another thread or a newer version was quicker."""
        with self._lock:
            if self._locations.get(name) != location:
                return False
            self._forget(name, location.segment.number, location.offset)
            return True

    def put_back(self, name: bytes, location: Location) -> None:
        """Undo `remove`, unless there is a newer version by now."""
        with self._lock:
            self._add(location.segment, location.record(name))

    def drop_segment(self, segment: Segment) -> tuple[int, int]:
        """Forget a segment that is gone; how many objects, of how many bytes, went with it."""
        count = byte_count = 0
        with self._lock:
            for name in segment.names:
                location = self._locations.get(name)
                if location is not None and location.segment is segment:
                    del self._locations[name]
                    count += 1
                    byte_count += location.stored_bytes
            segment.names = []
            segment.live_count = 0
            for key in [key for key in self._losers if key[0] == segment.number]:
                del self._losers[key]
        return count, byte_count

    def take_losers(self) -> list[tuple[bytes, Location]]:
        """Replaced versions to mark as dead; the caller does it or leaves it."""
        if not self._losers:
            return []
        with self._lock:
            losers = list(self._losers.values())
            self._losers.clear()
        return losers

    def _add(self, segment: Segment, record: Record) -> None:
        name = record.name
        location = Location(segment, record.offset, record.stored_bytes, record.sequence)
        known = self._locations.get(name)
        if known is not None:
            if _order(known) == _order(location):
                return
            if _order(known) > _order(location):
                self._losers[segment.number, record.offset] = (name, location)
                return
            known.segment.live_count -= 1
            self._losers[known.segment.number, known.offset] = (name, known)
        self._locations[name] = location
        segment.names.append(name)
        segment.live_count += 1

    def _forget(self, name: bytes, number: int, offset: int) -> None:
        self._losers.pop((number, offset), None)
        known = self._locations.get(name)
        if known is not None and (known.segment.number, known.offset) == (number, offset):
            del self._locations[name]
            known.segment.live_count -= 1


def _order(location: Location) -> tuple[int, int]:
    return location.sequence, location.segment.number
