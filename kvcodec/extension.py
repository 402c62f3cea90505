"""Extensions of a header: records that a newer writer may add (FORMAT.md, 2.6)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from kvcodec.errors import ConfigError, CorruptPage, UnsupportedPage

__all__ = ["MAX_EXTENSION_BYTES", "Extension", "extension_record", "parse_extensions"]

MAX_EXTENSION_BYTES = 65536

_EXTENSION = struct.Struct("<HHI")


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension record of a header."""

    type: int
    data: bytes
    critical: bool = False


def extension_record(extensions: Sequence[Extension]) -> bytes:
    """The extensions as they stand in a header. Raises `ConfigError` beyond a limit."""
    types = [extension.type for extension in extensions]
    if types != sorted(set(types)) or not all(0 <= number <= 0xFFFF for number in types):
        raise ConfigError(f"extension types {types} are not ascending numbers of 16 bits")
    record = b"".join(
        _EXTENSION.pack(e.type, int(e.critical), len(e.data)) + e.data + bytes(-len(e.data) % 8)
        for e in extensions
    )
    if len(record) > MAX_EXTENSION_BYTES:
        raise ConfigError(
            f"the extensions take {len(record)} bytes, allowed is {MAX_EXTENSION_BYTES}"
        )
    return record


def parse_extensions(record: bytes) -> tuple[Extension, ...]:
    """Extensions from their record. Raises `CorruptPage` or `UnsupportedPage`."""
    if len(record) > MAX_EXTENSION_BYTES or len(record) % 8:
        _corrupt(f"extensions of {len(record)} bytes")
    extensions: list[Extension] = []
    at = 0
    while at < len(record):
        kind, flags, size = _EXTENSION.unpack_from(record, at)
        end = at + _EXTENSION.size + size
        padded = -(-end // 8) * 8
        if padded > len(record) or any(record[end:padded]):
            _corrupt("an extension runs past the end or has padding that is not zero")
        if flags & ~1:
            raise UnsupportedPage("reserved", f"extension flags {flags:#x}", "bit 0")
        if extensions and kind <= extensions[-1].type:
            _corrupt(f"extension {kind} is out of order")
        if flags & 1:
            raise UnsupportedPage("extension", kind, "none that is critical")
        extensions.append(Extension(kind, record[at + _EXTENSION.size : end]))
        at = padded
    return tuple(extensions)


def _corrupt(message: str) -> NoReturn:
    raise CorruptPage("extensions", message)
