"""Appending batches of objects to the one segment of this process, from many threads at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from kvcodec.backend import Deadline, PutResult
from kvcodec.errors import BackendError, BackendFull, BackendTimeout
from kvcodec_backends._file_io import as_backend_error
from kvcodec_backends._segment_directory import append_to
from kvcodec_backends._segment_io import Bytes, as_bytes
from kvcodec_backends._segment_records import LIVE, Record, raw_name, record_bytes
from kvcodec_backends._segment_space import OpenSegment, SegmentSpace
from kvcodec_backends._segment_store import SegmentStore

__all__ = ["SegmentWriter"]

#: Neighbours that are written, and answered for, together.
_RUN_BYTES = 8 << 20
_LOCK_POLL_SECONDS = 0.02


class SegmentWriter:
    """Writers take neighbouring places under a lock and fill them without it; then the records go
    into the index, and into memory.
    """

    def __init__(self, store: SegmentStore, space: SegmentSpace) -> None:
        self._store = store
        self._space = space
        self._lock = threading.Lock()
        self._opened: OpenSegment | None = None
        self._may_adopt = True
        self._closed = False

    def put(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[PutResult]:
        """Store objects; an answer for each."""
        results: list[PutResult] = []
        limit = self._store.options.segment_bytes
        while len(results) < len(pairs):
            rest = pairs[len(results) :]
            name, view = rest[0]
            if deadline.passed():
                results.append(deadline.error("put", name))
            elif record_bytes(len(view)) > limit:
                results.append(
                    BackendFull(
                        f"put {name}: {len(view)} bytes do not fit into a segment; "
                        f"raise segment_bytes={limit}"
                    )
                )
            else:
                try:
                    opened, start, count = self._reserve([len(view) for _, view in rest], deadline)
                except (BackendError, OSError) as error:
                    # Where there is no place for one there is none for the others.
                    results += [_answer(error, name) for name, _ in rest]
                    break
                results += self._put_run(rest[:count], opened, start)
        # What has been replaced must not come back when the newer version is evicted first.
        self._store.kill(self._store.index.take_losers())
        return results

    def close(self) -> None:
        """Leave the segment to the next process."""
        with self._lock:
            self._closed = True
            self._retire(seal=False)

    def _put_run(
        self, pairs: Sequence[tuple[str, memoryview]], opened: OpenSegment, start: int
    ) -> list[PutResult]:
        """Store neighbours, from a place on that was reserved for them."""
        try:
            records: list[tuple[Record, Bytes]] = []
            sequences = self._store.index.new_sequences(len(pairs))
            for (name, view), sequence in zip(pairs, sequences, strict=True):
                payload = as_bytes(view)
                checksum = xxh3_64_intdigest(payload.data)
                record = Record(
                    *(LIVE, raw_name(name), len(view), sequence),
                    *(opened.segment.number, start, checksum),
                )
                records.append((record, payload))
                start = record.end
            try:
                self._store.io.write(opened.fd, records)
                if self._store.options.fsync:
                    os.fdatasync(opened.fd)
            except OSError as error:
                return [_answer(error, name) for name, _ in pairs]
            lines = b"".join(record.pack() for record, _ in records)
            append_to(opened.segment.index_path, lines, self._store.count)
            self._store.index.learn(opened.segment, [record for record, _ in records])
        finally:
            self._finish(opened)
        return [None] * len(pairs)

    def _reserve(self, sizes: Sequence[int], deadline: Deadline) -> tuple[OpenSegment, int, int]:
        """A place for the first of the objects: the segment, the offset, and for how many."""
        self._acquire(deadline)
        try:
            if self._closed:
                raise BackendError("the store was closed meanwhile")
            opened = self._opened
            if opened is not None and os.fstat(opened.fd).st_nlink == 0:
                # Somebody removed the whole store: it is made anew.
                self._retire(seal=False)
                opened = None
            wanted = record_bytes(sizes[0])
            if opened is None or opened.end + wanted > opened.file_bytes:
                self._retire(seal=True)
                opened = self._space.open_segment(wanted, deadline, adopt=self._may_adopt)
                self._opened, self._may_adopt = opened, False
            start, count = opened.end, 0
            for size in sizes:
                end = opened.end + record_bytes(size)
                if end > opened.file_bytes or (count and end - start > _RUN_BYTES):
                    break
                opened.end = end
                count += 1
            opened.pending_count += 1
            return opened, start, count
        finally:
            self._lock.release()

    def _acquire(self, deadline: Deadline) -> None:
        while not self._lock.acquire(timeout=_LOCK_POLL_SECONDS):
            if deadline.passed():
                raise BackendTimeout("another writer is still making room")

    def _finish(self, opened: OpenSegment) -> None:
        with self._lock:
            opened.pending_count -= 1
            if opened.is_retired and not opened.pending_count:
                self._space.close_segment(opened, seal=not self._closed)

    def _retire(self, *, seal: bool) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.is_retired = True
            if not opened.pending_count:
                self._space.close_segment(opened, seal=seal)


def _answer(error: BackendError | OSError, name: str) -> BackendError:
    if isinstance(error, BackendError):
        return type(error)(f"put {name}: {error}")
    return as_backend_error(error, "put", name, writing=True)
