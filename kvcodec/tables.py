"""The static tables of coded sections, version 1: FORMAT.md 3.5 and its appendix A."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

__all__ = [
    "ESCAPE_LENGTH",
    "LARGEST_CLASS",
    "TABLE_VERSION",
    "CodingTable",
    "class_parts",
    "code_lengths",
    "lossless_table",
    "path_costs",
    "residual_table",
]

TABLE_VERSION = 1
LARGEST_CLASS = 32
#: The byte behind an escape, in the unit of `CodingTable.lengths`.
ESCAPE_LENGTH = 8 * 256


@dataclass(frozen=True)
class CodingTable:
    """Symbols `first`, `first + 1` ... and then an escape, with frequencies that sum to 256."""

    first: int
    frequencies: tuple[int, ...]

    @property
    def escape(self) -> int:
        """Index of the escape, and the number of symbols beside it."""
        return len(self.frequencies) - 1

    @cached_property
    def before(self) -> npt.NDArray[np.int64]:
        """Sum of the frequencies before each symbol."""
        counts = np.array(self.frequencies, np.int64)
        return np.cumsum(counts) - counts

    @cached_property
    def symbols(self) -> npt.NDArray[np.int64]:
        """The symbol of each of the 256 slots."""
        return np.repeat(np.arange(len(self.frequencies)), self.frequencies)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bits of each symbol in units of 1/256, rounded; the escape's without its byte."""
        return np.array([round(256 * math.log2(256 / f)) for f in self.frequencies], np.int64)


def _parse(text: str) -> dict[tuple[str, int, int], CodingTable]:
    tables = {}
    for line in text.replace("\n    ", " ").splitlines():
        head, _, numbers = line.partition(":")
        kind, family, index, _, first = head.split()
        frequencies = tuple(map(int, numbers.split()))
        tables[kind, int(family), int(index)] = CodingTable(int(first), frequencies)
    return tables


# Name, first symbol, frequencies; tools/make_tables.py writes it.
_TEXT = """\
residual 0 0 first 0: 255 1
residual 0 1 first -1: 1 253 1 1
residual 0 2 first -1: 1 253 1 1
residual 0 3 first -1: 6 247 2 1
residual 0 4 first -1: 30 220 5 1
residual 0 5 first -1: 58 190 7 1
residual 0 6 first -2: 1 72 167 15 1
residual 0 7 first -2: 2 78 153 21 1 1
residual 0 8 first -3: 1 8 82 130 33 1 1
residual 0 9 first -3: 1 14 80 116 40 4 1
residual 0 10 first -4: 1 3 22 75 98 46 9 1 1
residual 0 11 first -4: 1 6 28 70 85 48 14 2 1 1
residual 0 12 first -5: 1 2 10 32 63 74 48 19 5 1 1
residual 0 13 first -6: 1 1 5 15 34 56 63 45 23 9 2 1 1
residual 0 14 first -6: 1 3 8 19 34 49 54 42 26 12 5 1 1 1
residual 0 15 first -8: 1 1 2 5 11 21 32 43 46 38 26 16 8 3 1 1 1
residual 0 16 first -9: 1 1 2 4 8 14 22 30 37 39 33 26 17 10 6 3 1 1 1
residual 1 0 first -1: 1 253 1 1
residual 1 1 first -1: 1 253 1 1
residual 1 2 first -1: 2 251 2 1
residual 1 3 first -1: 8 243 4 1
residual 1 4 first -1: 31 218 6 1
residual 1 5 first -2: 1 57 190 7 1
residual 1 6 first -2: 2 69 170 13 1 1
residual 1 7 first -2: 3 74 159 18 1 1
residual 1 8 first -3: 1 8 77 139 27 2 1 1
residual 1 9 first -4: 1 2 12 76 127 32 4 1 1
residual 1 10 first -4: 1 4 18 73 111 37 8 2 1 1
residual 1 11 first -5: 1 1 6 22 69 100 40 11 3 1 1 1
residual 1 12 first -6: 1 1 3 8 25 65 89 41 15 5 1 1 1
residual 1 13 first -7: 1 1 2 4 11 27 60 78 41 18 7 3 1 1 1
residual 1 14 first -8: 1 1 1 3 6 14 28 55 69 39 20 10 4 2 1 1 1
residual 1 15 first -9: 1 1 1 2 4 9 16 28 49 60 37 21 12 6 3 2 1 1 1 1
residual 1 16 first -11: 1 1 1 1 2 3 6 10 17 28 44 51 35 22 13 8 5 3 1 1 1 1 1
lossless 0 0 first -3: 1 35 80 63 37 19 10 5 2 1 1 1 1
lossless 0 1 first -3: 4 51 80 56 31 16 8 4 2 1 1 1 1
lossless 0 2 first -3: 10 64 75 49 27 14 7 4 2 1 1 1 1
lossless 0 3 first -4: 1 21 74 70 42 22 12 6 3 1 1 1 1 1
lossless 1 0 first -4: 1 8 41 66 56 37 21 11 6 3 2 1 1 1 1
lossless 1 1 first -4: 1 14 51 66 52 32 18 10 5 3 1 1 1 1
lossless 1 2 first -4: 2 22 59 64 47 28 16 8 4 2 1 1 1 1
lossless 1 3 first -4: 4 31 63 61 42 25 13 7 4 2 1 1 1 1
"""

_TABLES = _parse(_TEXT)


def class_parts(index: int) -> tuple[int, int]:
    """Table number and shift of a class from 0 to LARGEST_CLASS."""
    if not 0 <= index <= LARGEST_CLASS:
        raise ValueError(f"class {index}; allowed is 0 to {LARGEST_CLASS}")
    shift = max(0, -(-(index - 16) // 4))
    return index - 4 * shift, shift


def residual_table(family: int, number: int) -> CodingTable:
    """Table of family 0 or 1 and number 0 to 16."""
    return _TABLES["residual", family, number]


def lossless_table(family: int, fraction: int) -> CodingTable:
    """Table of family 0 or 1 for groups whose e is `fraction` modulo 4."""
    return _TABLES["lossless", family, fraction]


@lru_cache(maxsize=2 * (LARGEST_CLASS + 1))
def code_lengths(family: int, index: int) -> npt.NDArray[np.int64]:
    """Bits in units of 1/256 of every integer k from -2048 to 2047 in a class, at k + 2048.

    Includes the escape's byte and the raw bits of the class. An integer that a class cannot hold
    has the length 2^20.
    """
    number, shift = class_parts(index)
    table = residual_table(family, number)
    high = np.arange(-2048, 2048) >> shift
    inside = (high >= table.first) & (high < table.first + table.escape)
    known = table.lengths[np.where(inside, high - table.first, 0)]
    escaped = np.where(np.abs(high + 0.5) < 128, table.lengths[-1] + ESCAPE_LENGTH, 1 << 20)
    return np.where(inside, known, escaped) + 256 * shift


@lru_cache(maxsize=LARGEST_CLASS + 1)
def path_costs(index: int) -> npt.NDArray[np.int64]:
    """What a path of the trellis pays for k from -32 to 31, at k + 32: FORMAT.md 3.10."""
    if class_parts(index)[1] > 0:
        return np.zeros(64, np.int64)
    lengths = np.minimum(code_lengths(0, index), code_lengths(1, index))
    return 13 * lengths[2048 - 32 : 2048 + 32] + 256 >> 9
