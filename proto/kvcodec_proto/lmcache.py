"""The messages between the backend ``lmcache://`` and kvcodec's server module inside LMCache.

A request is a header, then one entry per object; in a put each entry is followed by the object::

    header    4 magic "KVL1" | 1 verb | 3 zero | 4 number of entries | 4 milliseconds it may take
    entry    16 namespace | 32 digest | 8 number      get: room for the object; put: its length;
                                                      list: 1 for this namespace, 0 for all

An answer is the magic and the number of answers, then one answer per entry, in order. In a get each
answer that is FOUND and fits is followed by the object. The answers to a list carry names::

    answer    1 status | 7 zero | 8 length of the object | 8 time of writing, seconds, a double
    listed   16 namespace | 32 digest | 8 length | 8 time of writing

Integers are little-endian. A peer that reads something else closes the connection.
"""

from __future__ import annotations

import enum
import struct

__all__ = [
    "ANSWER",
    "ANSWERS",
    "ENTRY",
    "LISTED",
    "MAGIC",
    "MAX_ENTRIES",
    "MAX_OBJECT_BYTES",
    "REQUEST",
    "Status",
    "Verb",
    "name_bytes",
    "name_text",
]

MAGIC = b"KVL1"
#: Entries of one request.
MAX_ENTRIES = 4096
MAX_OBJECT_BYTES = 1 << 32

REQUEST = struct.Struct("<4sB3xII")
ENTRY = struct.Struct("<48sQ")
ANSWERS = struct.Struct("<4sI")
ANSWER = struct.Struct("<B7xQd")
LISTED = struct.Struct("<48sQd")


class Verb(enum.IntEnum):
    """What is asked for."""

    PUT = 1
    GET = 2
    STAT = 3
    DELETE = 4
    LIST = 5


class Status(enum.IntEnum):
    """What became of one object."""

    FOUND = 0
    MISSING = 1
    FULL = 2
    FAILED = 3
    LATE = 4


def name_bytes(name: str) -> bytes:
    """An object name, ``<32 hex digits>/<64 hex digits>``, as it stands in an entry."""
    return bytes.fromhex(name[:32] + name[33:])


def name_text(data: bytes) -> str:
    """The inverse of `name_bytes`."""
    digits = data.hex()
    return f"{digits[:32]}/{digits[32:]}"
