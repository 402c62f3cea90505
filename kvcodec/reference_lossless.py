"""Sections of kind lossless and block in plain numpy, laid out like 3.8 and 3.9 of proto/FORMAT.md:
slow, and the oracle of the tests.

Rows are arrays of element bits (heads, tokens, head_size) as in `kvcodec.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcodec._reference_stream import (
    CodedParts,
    DamagedSection,
    Integers,
    StreamReader,
    Symbols,
    TileEntry,
    join_parts,
    split_parts,
    tile_slices,
    write_stream,
)
from kvcodec.format import pad64
from kvcodec.layout import DType
from kvcodec.tables import ESCAPE_LENGTH, class_parts, code_lengths, lossless_table, residual_table

__all__ = ["decode_block", "decode_lossless", "encode_block", "encode_lossless"]

Bits = npt.NDArray[Any]

_PREAMBLE = 8
_GUARD = 64
_BLOCK = 64  # elements
_BASE_ABOVE = 152  # 64ths of an exponent
_EMPTY = 127
_CHOICES = range(0, 33, 4)  # of scale_class


@dataclass(frozen=True)
class _Parts:
    """How an element splits: the exponent, raw bits of the stream, and a byte of the plane."""

    exponent_bits: int
    raw_bits: int
    byte_shift: int  # of the exponent in the high byte of a block's element

    def split(self, rows: Bits) -> tuple[Integers, Integers, npt.NDArray[np.uint8]]:
        """Exponent, raw bits, byte of the plane."""
        bits = rows.astype(np.int64)
        sign = bits >> 15
        if self.raw_bits == 0:
            plane = (bits << 1 & 254 | sign).astype(np.uint8)
            return bits >> 7 & 255, np.zeros_like(bits), plane
        return bits >> 10 & 31, sign << 2 | bits >> 8 & 3, (bits & 255).astype(np.uint8)

    def join(self, exponent: Integers, raw: Integers, plane: npt.NDArray[np.uint8]) -> Bits:
        """Inverse of `split`."""
        low = plane.astype(np.int64)
        if self.raw_bits == 0:
            return ((low & 1) << 15 | exponent << 7 | low >> 1).astype(np.uint16)
        return ((raw >> 2) << 15 | exponent << 10 | (raw & 3) << 8 | low).astype(np.uint16)


_PARTS = {DType.BF16: _Parts(8, 0, 0), DType.FP16: _Parts(5, 3, 2)}


def _scales(exponents: Integers, raw: Integers) -> tuple[int, Integers]:
    """The reference of a tile and the scale of each group (groups, elements)."""
    count = exponents.shape[1]
    e = (8 * exponents.sum(axis=1) + count) // (2 * count)
    full = (exponents | raw).any(axis=1)
    number = int(full.sum())
    reference = (int(e[full].sum()) + 2 * number) // (4 * number) if number else 0
    return reference, np.where(full, np.clip(4 * reference - e, -128, 126), _EMPTY)


def _symbol_length(symbols: Integers, family: int, fraction: int) -> int:
    table = lossless_table(family, fraction)
    index = symbols - table.first
    inside = (index >= 0) & (index < table.escape)
    lengths = table.lengths[np.where(inside, index, table.escape)]
    return int((lengths + np.where(inside, 0, ESCAPE_LENGTH)).sum())


def _tile_stream(exponents: Integers, raw: Integers, raw_bits: int) -> tuple[TileEntry, bytes]:
    """A tile of (groups, elements)."""
    reference, scales = _scales(exponents, raw)
    e = 4 * reference - scales
    symbols = (e >> 2)[:, None] - exponents
    symbols = (symbols + 128 & 255) - 128
    full = np.flatnonzero(scales != _EMPTY)
    by_family = [
        sum(_symbol_length(symbols[i], family, e[i] & 3) for i in full) for family in (0, 1)
    ]
    family = int(by_family[1] < by_family[0])

    def side_length(index: int) -> int:
        return int(code_lengths(0, index)[scales + 2048].sum())

    scale_class = min(_CHOICES, key=side_length)
    number, shift = class_parts(scale_class)
    sequences = [Symbols(residual_table(0, number), shift, scales)]
    sequences += [
        Symbols(lossless_table(family, e[i] & 3), raw_bits, symbols[i] << raw_bits | raw[i])
        for i in full
    ]
    return TileEntry(reference, scale_class, 0, family), write_stream(sequences)


def encode_lossless(rows: Bits, dtype: DType, *, per_channel: bool) -> bytes:
    """The stored bytes of a section without padding; the raw elements where coding does not pay."""
    parts = _PARTS[dtype]
    exponents, raw, plane = parts.split(rows)
    entries, streams = [], []
    for place in tile_slices(rows.shape):
        tile, rest = exponents[place], raw[place]
        if per_channel:
            tile, rest = tile.T, rest.T
        entry, stream = _tile_stream(tile, rest, parts.raw_bits)
        entries.append(entry)
        streams.append(stream)
    stored = join_parts(CodedParts(0, entries, plane.tobytes(), streams))
    return stored if len(stored) < rows.nbytes else np.ascontiguousarray(rows).tobytes()


def _read_tile(
    entry: TileEntry, stream: bytes, parts: _Parts, groups: int, length: int
) -> tuple[Integers, Integers]:
    """Exponents and raw bits (groups, elements)."""
    reader = StreamReader(stream)
    number, shift = class_parts(entry.scale_class)
    scales = reader.read(residual_table(0, number), shift, groups)
    scales = (scales + 128 & 255) - 128
    exponents = np.zeros((groups, length), np.int64)
    raw = np.zeros((groups, length), np.int64)
    for at, scale in enumerate(scales.tolist()):
        if scale == _EMPTY:
            continue
        e = 4 * entry.reference - scale
        read = reader.read(lossless_table(entry.family, e & 3), parts.raw_bits, length)
        exponents[at] = (e >> 2) - (read >> parts.raw_bits) & (1 << parts.exponent_bits) - 1
        raw[at] = read & (1 << parts.raw_bits) - 1
    reader.finish()
    return exponents, raw


def decode_lossless(
    stored: bytes, shape: tuple[int, int, int], dtype: DType, *, per_channel: bool
) -> Bits:
    """The rows (heads, tokens, head_size) of a section. DamagedSection if it is none."""
    elements = shape[0] * shape[1] * shape[2]
    if len(stored) == 2 * elements:
        return np.frombuffer(stored, np.uint16).reshape(shape).copy()
    parts = _PARTS[dtype]
    places = list(tile_slices(shape))
    found = split_parts(stored, len(places), elements, 0)
    exponents = np.zeros(shape, np.int64)
    raw = np.zeros(shape, np.int64)
    for place, entry, stream in zip(places, found.entries, found.streams, strict=True):
        groups, length = exponents[place].shape
        if per_channel:
            groups, length = length, groups
        tile, rest = _read_tile(entry, stream, parts, groups, length)
        exponents[place] = tile.T if per_channel else tile
        raw[place] = rest.T if per_channel else rest
    return parts.join(exponents, raw, np.frombuffer(found.plane, np.uint8).reshape(shape))


# --- block exponents


def _pack(bits: Bits) -> Bits:
    """Bits along the last axis -> bytes, the lowest bit first."""
    return np.packbits(bits.astype(np.uint8), axis=-1, bitorder="little")


def _encode_columns(exponents: Integers, raw: Integers, raw_bits: int) -> tuple[Bits, Bits, Bits]:
    """Blocks at the same place of all rows: planes (rows, bytes), bases and the escaped."""
    count = exponents.shape[1]
    first = (_BLOCK * exponents.sum(axis=1) // count + _BASE_ABOVE) // _BLOCK
    distances = [(first + more)[:, None] - exponents & 255 for more in (0, 1)]
    far = [(distance > 6).sum(axis=1) for distance in distances]
    second = far[1] < far[0]
    distance = np.where(second[:, None], distances[1], distances[0])
    code = np.minimum(distance, 7)
    planes = [code >> bit & 1 for bit in range(3)]
    planes += [raw >> bit & 1 for bit in reversed(range(raw_bits))]
    return np.concatenate([_pack(plane) for plane in planes], axis=1), first + second, code == 7


def encode_block(rows: Bits, dtype: DType) -> bytes:
    """The stored bytes of a section without padding; the raw elements where coding does not pay."""
    parts = _PARTS[dtype]
    heads, tokens, size = rows.shape
    exponents, raw, low = parts.split(rows.reshape(heads * tokens, size))
    columns = [
        _encode_columns(exponents[:, at : at + _BLOCK], raw[:, at : at + _BLOCK], parts.raw_bits)
        for at in range(0, size, _BLOCK)
    ]
    planes = np.concatenate([column[0] for column in columns], axis=1)
    bases = np.stack([column[1] for column in columns], axis=1) << parts.byte_shift
    escaped = np.concatenate([column[2] for column in columns], axis=1)
    escapes = (exponents[escaped] << parts.byte_shift).astype(np.uint8)
    counts = escaped.reshape(heads, -1).sum(axis=1)
    head = bytes(_PREAMBLE) + counts.astype("<u4").tobytes()
    stored = b"".join(
        (
            head.ljust(pad64(len(head)), b"\0"),
            low.tobytes(),
            planes.tobytes(),
            bases.astype(np.uint8).tobytes(),
            escapes.tobytes(),
            bytes(_GUARD),
        )
    )
    return stored if len(stored) < rows.nbytes else np.ascontiguousarray(rows).tobytes()


def _unpack_planes(planes: Bits, size: int, count: int) -> Integers:
    """Planes of whole rows (rows, bytes) -> their bits (count, rows, size)."""
    out, at = [], 0
    for start in range(0, size, _BLOCK):
        length = min(_BLOCK, size - start)
        width = -(-length // 8)
        block = planes[:, at : at + count * width].reshape(len(planes), count, width)
        out.append(np.unpackbits(block, axis=2, count=length, bitorder="little"))
        at += count * width
    return np.concatenate(out, axis=2).transpose(1, 0, 2).astype(np.int64)


def decode_block(stored: bytes, shape: tuple[int, int, int], dtype: DType) -> Bits:
    """The rows (heads, tokens, head_size) of a section. DamagedSection if it is none."""
    heads, tokens, size = shape
    rows, elements = heads * tokens, heads * tokens * size
    if len(stored) == 2 * elements:
        return np.frombuffer(stored, np.uint16).reshape(shape).copy()
    parts = _PARTS[dtype]
    plane_count = 3 + parts.raw_bits
    used = _PREAMBLE + 4 * heads
    ends = np.cumsum(
        [pad64(used), elements, rows * plane_count * -(-size // 8), rows * -(-size // _BLOCK)]
    ).tolist()
    if len(stored) < ends[3] + _GUARD:
        raise DamagedSection("shorter than its parts")
    if any(stored[:_PREAMBLE] + stored[used : ends[0]] + stored[-_GUARD:]):
        raise DamagedSection("a reserved bit, padding or guard that is not zero")
    data = np.frombuffer(stored, np.uint8)
    low, planes, bases = (data[a:b] for a, b in pairwise(ends))
    escapes = data[ends[3] : -_GUARD]
    bits = _unpack_planes(planes.reshape(rows, -1), size, plane_count)
    code = bits[0] | bits[1] << 1 | bits[2] << 2
    escaped = code == 7
    counts = np.frombuffer(stored, "<u4", heads, _PREAMBLE)
    if (
        counts.sum(dtype=np.uint64) != len(escapes)
        or (escaped.reshape(heads, -1).sum(axis=1) != counts).any()
    ):
        raise DamagedSection("the directory does not count the escapes")
    base = bases.reshape(rows, -1)[:, np.arange(size) // _BLOCK].astype(np.int64)
    high = base - (code << parts.byte_shift)
    high[escaped] = escapes
    element = low.reshape(rows, size).astype(np.int64)
    if parts.raw_bits:
        element |= (high + (bits[3] << 7 | bits[4] << 1 | bits[5]) & 255) << 8
    else:
        element |= (high & 255) << 8
        element = element >> 1 | (element & 1) << 15
    return element.astype(np.uint16).reshape(shape)
