"""The static tables of coded sections, version 1: FORMAT.md 3.5 and its appendix A."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from kvcodec._table_data import TEXT

__all__ = [
    "ESCAPE_LENGTH",
    "LARGEST_CLASS",
    "TABLE_VERSION",
    "CodingTable",
    "class_parts",
    "code_lengths",
    "lossless_table",
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


_TABLES = _parse(TEXT)


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
