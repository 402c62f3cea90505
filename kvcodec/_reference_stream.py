"""Streams and parts of coded sections, FORMAT.md 3.5, symbol by symbol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.tables import CodingTable

__all__ = [
    "LANES",
    "CodedParts",
    "DamagedSection",
    "Integers",
    "StreamReader",
    "Symbols",
    "TileEntry",
    "join_parts",
    "split_parts",
    "tile_slices",
    "write_stream",
]

Integers = npt.NDArray[np.int64]

LANES = 32
TILE_TOKENS = 64
_TILE_CHANNELS = 256
_PREAMBLE = 8
_ENTRY = 6
_GUARD = 64
_STATE = 256


class DamagedSection(ValueError):
    """The bytes break a rule of FORMAT.md 3.5."""


def tile_slices(shape: tuple[int, int, int]) -> Iterator[tuple[int, slice, slice]]:
    """Head, tokens and channels of every tile of (heads, tokens, head_size), in order."""
    heads, tokens, size = shape
    for head in range(heads):
        for token in range(0, tokens, TILE_TOKENS):
            for channel in range(0, size, _TILE_CHANNELS):
                yield (
                    head,
                    slice(token, min(token + TILE_TOKENS, tokens)),
                    slice(channel, min(channel + _TILE_CHANNELS, size)),
                )


@dataclass(frozen=True, slots=True)
class TileEntry:
    """What the directory says of a tile, but for the length of its stream."""

    reference: int
    scale_class: int
    mean_class: int
    family: int


@dataclass(frozen=True, slots=True)
class CodedParts:
    """A stored section, taken apart."""

    flags: int
    entries: Sequence[TileEntry]
    plane: bytes
    streams: Sequence[bytes]


def _directory_bytes(tiles: int) -> int:
    return (_PREAMBLE + _ENTRY * tiles + 63) // 64 * 64


def join_parts(parts: CodedParts) -> bytes:
    """The stored section."""
    out = bytearray([parts.flags]).ljust(_PREAMBLE, b"\0")
    for entry, stream in zip(parts.entries, parts.streams, strict=True):
        out += len(stream).to_bytes(2, "little")
        out += bytes((entry.reference, entry.scale_class, entry.mean_class, entry.family))
    head = bytes(out).ljust(_directory_bytes(len(parts.entries)), b"\0")
    return head + parts.plane + b"".join(parts.streams) + bytes(_GUARD)


def split_parts(stored: bytes, tiles: int, plane_bytes: int, known_flags: int) -> CodedParts:
    """Inverse of `join_parts`. DamagedSection if a rule about anything outside the streams is
    broken.
    """
    head = _directory_bytes(tiles)
    start = head + plane_bytes
    if len(stored) < start + _GUARD:
        raise DamagedSection("shorter than its directory")
    used = _PREAMBLE + _ENTRY * tiles
    if stored[0] & ~known_flags or any(stored[1:_PREAMBLE] + stored[used:head] + stored[-_GUARD:]):
        raise DamagedSection("a reserved bit, padding or guard that is not zero")
    entries, streams = [], []
    for at in range(_PREAMBLE, used, _ENTRY):
        entry = TileEntry(*stored[at + 2 : at + _ENTRY])
        if entry.scale_class > 32 or entry.mean_class > 32 or entry.family > 1:
            raise DamagedSection("no such class or family")
        size = int.from_bytes(stored[at : at + 2], "little")
        entries.append(entry)
        streams.append(stored[start : start + size])
        start += size
    if start != len(stored) - _GUARD:
        raise DamagedSection("the streams do not fill the section")
    return CodedParts(stored[0], entries, stored[head : head + plane_bytes], streams)


@dataclass(frozen=True, slots=True)
class Symbols:
    """One sequence of a stream: integers whose upper part `>> shift` is a symbol of the table."""

    table: CodingTable
    shift: int
    values: Integers


def _steps(sequences: Sequence[Symbols]) -> list[Symbols]:
    return [
        Symbols(sequence.table, sequence.shift, sequence.values[at : at + LANES])
        for sequence in sequences
        for at in range(0, len(sequence.values), LANES)
    ]


def write_stream(sequences: Sequence[Symbols]) -> bytes:
    """A tile's stream. The coder runs from the last step to the first."""
    state = np.full(LANES, _STATE, np.int64)
    chunks = []
    for step in reversed(_steps(sequences)):
        table, lanes = step.table, slice(len(step.values))
        upper = step.values >> step.shift
        symbol = upper - table.first
        symbol = np.where((symbol >= 0) & (symbol < table.escape), symbol, table.escape)
        escaped = upper[symbol == table.escape]
        assert ((escaped >= -128) & (escaped <= 127)).all()
        frequency = np.array(table.frequencies)[symbol]
        x = state[lanes]
        full = x >= frequency << 8
        chunk = (x[full] & 255).astype(np.uint8).tobytes() + escaped.astype(np.int8).tobytes()
        for plane in range(step.shift):
            bits = (step.values >> plane) & 1
            chunk += int((bits << np.arange(len(bits))).sum()).to_bytes(4, "little")
        chunks.append(chunk)
        x = np.where(full, x >> 8, x)
        state[lanes] = (x // frequency << 8) + x % frequency + table.before[symbol]
    return state.astype("<u2").tobytes() + b"".join(reversed(chunks))


class StreamReader:
    """Reads what `write_stream` wrote, one sequence after the other."""

    def __init__(self, stream: bytes) -> None:
        self._rest = stream
        self._state = np.frombuffer(self._take(2 * LANES), "<u2").astype(np.int64)
        if (self._state < _STATE).any():
            raise DamagedSection("a state that no writer leaves")

    def _take(self, size: int) -> bytes:
        if size > len(self._rest):
            raise DamagedSection("a stream ends too early")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def read(self, table: CodingTable, shift: int, count: int) -> Integers:
        """The next sequence."""
        steps = [self._step(table, shift, min(LANES, count - at)) for at in range(0, count, LANES)]
        return np.concatenate(steps)

    def _step(self, table: CodingTable, shift: int, count: int) -> Integers:
        x = self._state[:count]
        slot = x & 255
        symbol = table.symbols[slot]
        x = np.array(table.frequencies)[symbol] * (x >> 8) + slot - table.before[symbol]
        low = x < _STATE
        x[low] = x[low] << 8 | np.frombuffer(self._take(int(low.sum())), np.uint8)
        self._state[:count] = x
        values = table.first + symbol
        escaped = symbol == table.escape
        values[escaped] = np.frombuffer(self._take(int(escaped.sum())), np.int8)
        values <<= shift
        for plane in range(shift):
            word = int.from_bytes(self._take(4), "little")
            values |= ((word >> np.arange(count)) & 1) << plane
        return values

    def finish(self) -> None:
        """DamagedSection unless the stream ends here, and in the states it has to."""
        if self._rest or (self._state != _STATE).any():
            raise DamagedSection("a stream does not end where it must")
