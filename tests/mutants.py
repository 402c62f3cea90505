"""Damaged pages, made at random from a seed: the same seed makes the same mutants."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pages import CASES, TINY_CASES, Case, reseal

from kvcodec.format import FIXED, SECTION, STREAM, EncodedPage, pad64

#: Offset and size of every field of the fixed part, of a stream and of a row of the section table.
FIXED_FIELDS = (
    (0, 8), (8, 2), (10, 2), (12, 4), (16, 8), (24, 4), (28, 4), (32, 1), (33, 1), (34, 2),
    (36, 4), (40, 4), (44, 4), (48, 2), (50, 2), (52, 4), (56, 8),
)  # fmt: skip
STREAM_FIELDS = ((0, 1), (1, 1), (2, 2), (4, 4), (8, 4), (12, 4))
SECTION_FIELDS = ((0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 4), (12, 4), (16, 8))


@dataclass(frozen=True)
class Original:
    """A sound page, and where its parts lie."""

    case: Case
    page: bytes
    header_bytes: int
    fields: tuple[tuple[int, int], ...]
    sections: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, case: Case) -> Original:
        page = case.page()
        header = EncodedPage.parse(page).header
        fields = list(FIXED_FIELDS)
        at = FIXED.size
        for _ in header.layout.streams:
            fields += [(at + offset, size) for offset, size in STREAM_FIELDS]
            at += STREAM.size
        for _ in header.codecs:
            fields += [(at + offset, size) for offset, size in SECTION_FIELDS]
            at += SECTION.itemsize
        # Identity, key and extensions: byte by byte, their lengths are among them.
        fields += [(offset, 1) for offset in range(at, header.header_bytes)]
        sections = zip(header.section_offsets, header.stored_bytes, strict=True)
        return cls(
            case=case,
            page=page,
            header_bytes=header.header_bytes,
            fields=tuple(fields),
            sections=tuple((offset, pad64(size)) for offset, size in sections),
        )


def originals() -> list[Original]:
    """One page per codec and element type, and a few with more sections and richer headers."""
    rich = ("layers-mixed", "mla-512-64-kv4", "extensions", "head-range", "identity-unicode")
    coded = ("ecq-3-bf16", "ecq-3-fp32", "lossless-fp16", "lossless-fast-bf16", "ecq-rotary")
    fixed = ("derotated-fp16", "hadamard-bf16", "derotated-mla")
    return [
        Original.of(case)
        for case in [*TINY_CASES.values(), *(CASES[name] for name in rich + coded + fixed)]
    ]


Random = random.Random


def _flip(page: bytearray, dice: Random, _: Sequence[Original], own: Original) -> bytearray:
    # Half of all flips hit the header, which is where the decisions are made.
    end = own.header_bytes if dice.random() < 0.5 else len(page)
    for _bit in range(dice.choice((1, 1, 1, 2, 3, 8))):
        at = dice.randrange(max(1, min(end, len(page)) * 8))
        if page:
            page[at // 8 % len(page)] ^= 1 << at % 8
    return page


def _truncate(page: bytearray, dice: Random, _: Sequence[Original], own: Original) -> bytearray:
    sizes = (dice.randrange(len(page) + 1), len(page) - 64, own.header_bytes, len(page) - 1)
    return page[: max(0, dice.choice(sizes))]


def _extend(page: bytearray, dice: Random, _: Sequence[Original], own: Original) -> bytearray:
    size = dice.choice((1, 8, 63, 64, 128, dice.randrange(1, 300)))
    return page + (bytes(size) if dice.random() < 0.5 else dice.randbytes(size))


def _splice(page: bytearray, dice: Random, others: Sequence[Original], own: Original) -> bytearray:
    other = dice.choice(others).page
    cut = dice.choice((dice.randrange(len(page) + 1), own.header_bytes, 64, 96))
    start = dice.choice((cut, dice.randrange(len(other) + 1)))
    return page[:cut] + other[start:]


def _field(page: bytearray, dice: Random, _: Sequence[Original], own: Original) -> bytearray:
    offset, size = dice.choice(own.fields)
    if offset + size > len(page):
        return page
    most = 256**size - 1
    value = int.from_bytes(page[offset : offset + size], "little")
    values = (0, 1, most, most - 1, most // 2, most // 2 + 1, value + 1, value - 1, value ^ 64)
    values += (
        value * 2,
        value + 64,
        value - 64,
        1 << dice.randrange(8 * size),
        dice.randrange(most),
    )
    page[offset : offset + size] = (dice.choice(values) & most).to_bytes(size, "little")
    return page


def _swap(page: bytearray, dice: Random, _: Sequence[Original], own: Original) -> bytearray:
    (first, size), (second, other) = dice.choice(own.sections), dice.choice(own.sections)
    size = min(size, other)
    if max(first, second) + size <= len(page):
        part = page[first : first + size]
        page[first : first + size] = page[second : second + size]
        page[second : second + size] = part
    return page


def _move(page: bytearray, dice: Random, _: Sequence[Original], own: Original) -> bytearray:
    """Cut bytes out, or put some in."""
    at, size = dice.randrange(len(page) + 1), dice.choice((1, 4, 8, 24, 64))
    if dice.random() < 0.5:
        return page[:at] + page[at + size :]
    return page[:at] + dice.randbytes(size) + page[at:]


def _blank(page: bytearray, dice: Random, _: Sequence[Original], own: Original) -> bytearray:
    """A block that was never written, as after a lost write."""
    at, size = dice.randrange(len(page) + 1), dice.choice((8, 64, 512))
    page[at : at + size] = bytes(len(page[at : at + size]))
    return page


def _length(page: bytearray, dice: Random, _: Sequence[Original], own: Original) -> bytearray:
    """Make page_bytes the true length, as a careful liar would."""
    if len(page) >= FIXED.size:
        struct.pack_into("<Q", page, 16, len(page))
    return page


OPERATIONS: tuple[Callable[[bytearray, Random, Sequence[Original], Original], bytearray], ...] = (
    _flip,
    _flip,
    _field,
    _field,
    _field,
    _truncate,
    _extend,
    _splice,
    _swap,
    _move,
    _blank,
    _length,
)


@dataclass(frozen=True)
class Mutant:
    """A page that was tampered with; `sealed` if its checksums were written anew."""

    original: Original
    page: bytes
    sealed: bool


def mutants(
    count: int, seed: int, pages: Sequence[Original], *, sealed: bool | None = None
) -> Iterator[Mutant]:
    """So many mutants; every second one sealed, unless told otherwise."""
    dice = random.Random(seed)
    for number in range(count):
        own = dice.choice(pages)
        page = bytearray(own.page)
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            page = dice.choice(OPERATIONS)(page, dice, pages, own)
        seal = number % 2 == 1 if sealed is None else sealed
        if seal:
            page = reseal(page)
        yield Mutant(own, bytes(page), seal)


def damaged_sections(page: bytes, random: np.random.Generator) -> Iterator[bytes]:
    """The page with bits of its first section turned, or a stretch of it replaced, and right
    checksums. Where a coded section starts and ends, most of all.
    """
    header = EncodedPage.parse(page).header
    start, size = header.section_offsets[0], header.stored_bytes[0]
    places = [*range(40), *range(40, 80, 2), *(size - 1 - i for i in range(0, 72, 3))]
    places += random.integers(0, size, 60).tolist()
    for place in places:
        made = bytearray(page)
        made[start + place] ^= 1 << int(random.integers(8))
        yield bytes(reseal(made))
    for _ in range(12):
        made = bytearray(page)
        at = start + int(random.integers(0, size))
        end = min(start + size, at + int(random.integers(1, 400)))
        made[at:end] = random.bytes(end - at)
        yield bytes(reseal(made))
