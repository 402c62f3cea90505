r"""How an object lies in a segment: one self-describing record of whole blocks.

A record begins at a block of 4 KiB. Its first block holds a header of 128 bytes and then the tail
of the object, as far as that fits; the blocks after it hold the rest, which so begins at a block
on disk as it does in an aligned buffer. All integers are little-endian::

    offset  bytes  field
         0      8  magic "kvcseg1\n", the version of the format with it
         8      1  state: 1 live, 2 dead, 3 sealed (in an index only)
         9      7  zero
        16     48  name: the namespace digest and the object digest
        64      8  length of the object
        72      8  sequence: of two records of one name the higher one counts. Nanoseconds since
                   the epoch, made higher than any sequence seen before
        80      8  number of the segment
        88      8  offset of the record in the segment
        96      8  XXH3 of the object; 0 in a dead record
       104     16  zero
       120      8  XXH3 of the 120 bytes before

Number and offset tell a record from the image of one inside somebody's object. An index file is
nothing but such headers again, in the order in which they came about.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

__all__ = [
    "BLOCK_BYTES",
    "DEAD",
    "HEADER_BYTES",
    "LIVE",
    "Record",
    "SEALED",
    "body_bytes",
    "has_magic",
    "iter_index",
    "raw_name",
    "record_bytes",
    "text_name",
]

BLOCK_BYTES = 4096
HEADER_BYTES = 128
LIVE, DEAD, SEALED = 1, 2, 3

_MAGIC = b"kvcseg1\n"
_HEADER = struct.Struct("<8sB7x48sQQQQQ16xQ")
_CHECKSUM_BYTES = 8
_CHECKED_BYTES = HEADER_BYTES - _CHECKSUM_BYTES
_INLINE_BYTES = BLOCK_BYTES - HEADER_BYTES
#: So many bytes without an entry, and an index is of no more use.
_MAX_GARBAGE_BYTES = 1 << 16


class Record(NamedTuple):
    """The fields of one header."""

    state: int
    name: bytes
    stored_bytes: int
    sequence: int
    segment: int
    offset: int
    checksum: int

    @property
    def end(self) -> int:
        """Where the next record may begin."""
        return self.offset + record_bytes(self.stored_bytes)

    def pack(self) -> bytes:
        """The header's bytes."""
        fields = _HEADER.pack(_MAGIC, *self, 0)[:_CHECKED_BYTES]
        return fields + xxh3_64_intdigest(fields).to_bytes(_CHECKSUM_BYTES, "little")

    @classmethod
    def unpack(cls, data: bytes | memoryview, place: int = 0) -> Record | None:
        """The header at a place of `data`, None if there is none or a damaged one."""
        if place + HEADER_BYTES > len(data):
            return None
        magic, *fields, checksum = _HEADER.unpack_from(data, place)
        if magic != _MAGIC or xxh3_64_intdigest(data[place : place + _CHECKED_BYTES]) != checksum:
            return None
        return cls._make(fields)


def body_bytes(stored_bytes: int) -> int:
    """How much of an object lies behind the first block; the rest is its tail, in the first."""
    tail_bytes = stored_bytes % BLOCK_BYTES
    return stored_bytes - tail_bytes if tail_bytes <= _INLINE_BYTES else stored_bytes


def record_bytes(stored_bytes: int) -> int:
    """How much of a segment an object takes."""
    return BLOCK_BYTES + -(-body_bytes(stored_bytes) // BLOCK_BYTES) * BLOCK_BYTES


def has_magic(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which blocks may begin with a header: almost none inside objects."""
    starts = blocks.reshape(-1, BLOCK_BYTES)[:, : len(_MAGIC)]
    found: npt.NDArray[np.bool_] = (starts == np.frombuffer(_MAGIC, np.uint8)).all(axis=1)
    return found


def iter_index(data: bytes) -> Iterator[tuple[Record, int]]:
    """The entries of an index, each with the place of its end; what is damaged is passed over.

    Stops before an entry that is not complete yet. Its writer may have been cut short, too: then
    the next one begins anywhere.
    """
    position = garbage_bytes = 0
    while position + HEADER_BYTES <= len(data) and garbage_bytes <= _MAX_GARBAGE_BYTES:
        record = Record.unpack(data, position)
        if record is None:
            following = data.find(_MAGIC, position + 1)
            if following < 0:
                return
            garbage_bytes += following - position
            position = following
            continue
        garbage_bytes = 0
        position += HEADER_BYTES
        yield record, position


def raw_name(name: str) -> bytes:
    """The 48 bytes of a name."""
    return bytes.fromhex(name[:32] + name[33:])


def text_name(raw: bytes) -> str:
    """The name of 48 bytes."""
    digits = raw.hex()
    return f"{digits[:32]}/{digits[32:]}"
