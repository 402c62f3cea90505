"""Moving bytes between a segment and memory past the page cache: O_DIRECT, with aligned memory."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvcodec_backends._segment_records import (
    BLOCK_BYTES,
    HEADER_BYTES,
    LIVE,
    Record,
    body_bytes,
    has_magic,
)

__all__ = ["Bytes", "SegmentIO", "as_bytes"]

Bytes = npt.NDArray[np.uint8]

#: One system call moves about so much: enough to keep a disk busy, and to look at the clock.
_CALL_BYTES = 4 << 20
# Room for the first blocks of a call's records, too: else a few blocks would make a call of their
# own.
_SCRATCH_BYTES = _CALL_BYTES + (256 << 10)
_SCAN_BYTES = 1 << 20
_MAX_CALL_PARTS = 512
_KEPT_SCRATCH_COUNT = 8
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def as_bytes(view: memoryview) -> Bytes:
    """An array over the same memory, writable if that is."""
    return np.frombuffer(view, np.uint8) if len(view) else np.empty(0, np.uint8)


def _new_scratch() -> Bytes:
    memory = mmap.mmap(-1, _SCRATCH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class SegmentIO:
    """Opens segments, and moves runs of records: neighbours go in one system call.

    Memory that begins at a page is read and written where it is; the rest goes through scratch
    memory, which is kept for the next call. Thread-safe.
    """

    def __init__(self, count: Callable[[str, int], None]) -> None:
        self._count = count
        self._direct_flag = os.O_DIRECT
        self._is_probed = False
        self._lock = threading.Lock()
        self._free_scratch: list[Bytes] = []

    @contextmanager
    def open(self, path: str, flags: int) -> Iterator[int]:
        """A descriptor for one run; OSError as from `os.open`."""
        fd = self.open_fd(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def open_fd(self, path: str, flags: int) -> int:
        """A descriptor without the page cache, where the file system has that."""
        if self._direct_flag:
            try:
                fd = os.open(path, flags | _FLAGS | self._direct_flag, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                if self._is_direct(fd, flags):
                    return fd
                os.close(fd)
            self._direct_flag = 0
            self._count("buffered", 1)
        return os.open(path, flags | _FLAGS, 0o600)

    def write(self, fd: int, records: Sequence[tuple[Record, Bytes]]) -> None:
        """Write neighbours, headers and all. Raises OSError."""
        with self._scratch() as scratch:
            mover = _Mover(fd, records[0][0].offset, scratch)
            for record, payload in records:
                body = body_bytes(record.stored_bytes)
                first = np.zeros(BLOCK_BYTES, np.uint8)
                first[:HEADER_BYTES] = np.frombuffer(record.pack(), np.uint8)
                first[HEADER_BYTES : HEADER_BYTES + len(payload) - body] = payload[body:]
                mover.add(first)
                mover.add(payload[:body])
            mover.flush()

    def read(self, fd: int, offset: int, targets: Sequence[Bytes]) -> list[Record | None]:
        """Read neighbours into memory of just their lengths. Per object its header, None where the
        object is not whole.
        """
        firsts = []
        with self._scratch() as scratch:
            mover = _Mover(fd, offset, scratch, reading=True)
            for target in targets:
                firsts.append(np.zeros(BLOCK_BYTES, np.uint8))
                mover.add(firsts[-1])
                mover.add(target[: body_bytes(len(target))])
            mover.flush()
        records = []
        for first, target in zip(firsts, targets, strict=True):
            record = Record.unpack(first.data)
            if record is not None and record.state == LIVE and record.stored_bytes == len(target):
                body = body_bytes(len(target))
                target[body:] = first[HEADER_BYTES : HEADER_BYTES + len(target) - body]
                if xxh3_64_intdigest(target.data) != record.checksum:
                    record = None
            records.append(record)
        return records

    def write_header(self, path: str, record: Record) -> None:
        """Put another header over that of a record, and zeros over what is in its first block.
        Raises OSError.
        """
        first = np.zeros(BLOCK_BYTES, np.uint8)
        first[:HEADER_BYTES] = np.frombuffer(record.pack(), np.uint8)
        with self.open(path, os.O_WRONLY) as fd, self._scratch() as scratch:
            mover = _Mover(fd, record.offset, scratch)
            mover.add(first)
            mover.flush()

    def scan(self, fd: int, number: int, start: int, end: int) -> list[Record]:
        """The dead and the whole live records between two places of a segment, without the help of
        an index.
        """
        found: list[Record] = []
        position = start
        with self._scratch() as scratch:
            while (position := _next_data(fd, position)) < end:
                chunk = scratch[: min(_SCAN_BYTES, end - position)]
                count = os.preadv(fd, [chunk.data], position) // BLOCK_BYTES
                if count == 0:
                    break
                limit = position + count * BLOCK_BYTES
                for at in np.flatnonzero(has_magic(chunk[: count * BLOCK_BYTES])).tolist():
                    place = limit - (count - at) * BLOCK_BYTES
                    if place < position:
                        # Inside the object just found.
                        continue
                    record = Record.unpack(chunk.data, at * BLOCK_BYTES)
                    if (
                        record is not None
                        and (record.segment, record.offset) == (number, place)
                        and record.end <= end
                        and (record.state != LIVE or self._is_whole(fd, record))
                    ):
                        found.append(record)
                        position = record.end
                position = max(position, limit)
        return found

    def _is_whole(self, fd: int, record: Record) -> bool:
        target = np.empty(record.stored_bytes, np.uint8)
        return self.read(fd, record.offset, [target]) == [record]

    def _is_direct(self, fd: int, flags: int) -> bool:
        """Whether reads with our alignment work: some file systems want a larger one."""
        if self._is_probed or flags & os.O_ACCMODE == os.O_WRONLY:
            return True
        with self._scratch() as scratch:
            try:
                self._is_probed = os.preadv(fd, [scratch[:BLOCK_BYTES].data], 0) > 0
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return False
        return True

    @contextmanager
    def _scratch(self) -> Iterator[Bytes]:
        with self._lock:
            scratch = self._free_scratch.pop() if self._free_scratch else None
        if scratch is None:
            scratch = _new_scratch()
        try:
            yield scratch
        finally:
            with self._lock:
                if len(self._free_scratch) < _KEPT_SCRATCH_COUNT:
                    self._free_scratch.append(scratch)


class _Mover:
    """Moves pieces of memory to or from a file, one behind the other, each at a block.

    A piece that ends inside a block is written with zeros up to the block's end; what is read
    there is thrown away. A piece of read memory is filled when `flush` returns.
    """

    def __init__(self, fd: int, offset: int, scratch: Bytes, *, reading: bool = False) -> None:
        self._reading = reading
        self._fd = fd
        self._offset = offset
        self._scratch = scratch
        self._used_bytes = 0
        self._call_bytes = 0
        self._parts: list[memoryview] = []
        self._copies: list[tuple[Bytes, Bytes]] = []

    def add(self, piece: Bytes) -> None:
        """Take a piece up; it may move now or at the next flush."""
        if piece.__array_interface__["data"][0] % BLOCK_BYTES == 0:
            whole_bytes = len(piece) // BLOCK_BYTES * BLOCK_BYTES
            for start in range(0, whole_bytes, _CALL_BYTES):
                self._make_room()
                self._take(piece[start : min(start + _CALL_BYTES, whole_bytes)])
            piece = piece[whole_bytes:]
        while len(piece):
            self._make_room()
            part = piece[: len(self._scratch) - self._used_bytes]
            padded_bytes = -(-len(part) // BLOCK_BYTES) * BLOCK_BYTES
            place = self._scratch[self._used_bytes : self._used_bytes + padded_bytes]
            self._used_bytes += padded_bytes
            if self._reading:
                self._copies.append((part, place))
            else:
                place[: len(part)] = part
                place[len(part) :] = 0
            self._take(place)
            piece = piece[len(part) :]

    def flush(self) -> None:
        """Move everything taken up so far. Raises OSError; a read beyond the end leaves memory as
        it is.
        """
        while self._parts:
            call = os.preadv if self._reading else os.pwritev
            count = call(self._fd, self._parts, self._offset)
            if count == 0:
                if self._reading:
                    break
                raise OSError(errno.EIO, f"nothing could be written at {self._offset}")
            self._offset += count
            while self._parts and count >= len(self._parts[0]):
                count -= len(self._parts.pop(0))
            if count:
                self._parts[0] = self._parts[0][count:]
        for target, place in self._copies:
            target[:] = place[: len(target)]
        self._parts, self._copies = [], []
        self._used_bytes = self._call_bytes = 0

    def _make_room(self) -> None:
        if (
            self._used_bytes == len(self._scratch)
            or self._call_bytes >= _CALL_BYTES
            or len(self._parts) >= _MAX_CALL_PARTS
        ):
            self.flush()

    def _take(self, part: Bytes) -> None:
        self._parts.append(part.data)
        self._call_bytes += len(part)


def _next_data(fd: int, position: int) -> int:
    """Where the file has been written to next; a preallocated rest of 256 MiB is passed over so."""
    try:
        found = os.lseek(fd, position, os.SEEK_DATA) // BLOCK_BYTES * BLOCK_BYTES
    except OSError as error:
        # Beyond the last data; any other answer comes from a file system that cannot tell.
        return 1 << 62 if error.errno == errno.ENXIO else position
    return max(position, found)
