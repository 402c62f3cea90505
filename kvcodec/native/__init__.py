"""libkvcodec from Python: plans, pools and batches.

A batch of pages is one descriptor: Python hands it over in one call, native threads do the work
without the GIL, and Python waits in one more call. Nothing here loops over pages except over their
keys.
"""

from __future__ import annotations

from kvcodec.native._library import available_isas, checksum, isa, section_bytes, set_isa
from kvcodec.native._plan import Plan, RotaryPairs, Section, StreamRows
from kvcodec.native._pool import Batch, Pool

__all__ = [
    "BAD_HEADER_CHECKSUM",
    "BAD_LENGTH",
    "BAD_PADDING",
    "BAD_SECTION_CHECKSUM",
    "BAD_STREAM",
    "CANCELLED",
    "DECODE",
    "ENCODE",
    "HEADER_DIFFERS",
    "OK",
    "OUT_OF_MEMORY",
    "VERIFY",
    "Batch",
    "Plan",
    "Pool",
    "RotaryPairs",
    "Section",
    "StreamRows",
    "available_isas",
    "checksum",
    "isa",
    "section_bytes",
    "set_isa",
]

ENCODE, DECODE, VERIFY = 0, 1, 2

#: What became of a page: the values of kvcodec.h.
OK = 0
HEADER_DIFFERS = 1
BAD_HEADER_CHECKSUM = 2
BAD_SECTION_CHECKSUM = 3
BAD_LENGTH = 4
BAD_PADDING = 5
CANCELLED = 6
OUT_OF_MEMORY = 7
BAD_STREAM = 8
