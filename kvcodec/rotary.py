"""Rotary position embedding of keys: what a page says of it, and its table of rotations.

A page stores rotated keys. A codec that turns them back by the index of the token *within* the page
lines up each channel over time; the unknown angle of the page's first token is a constant that goes
into the channel's mean. FORMAT.md 3.7.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.errors import ConfigError

__all__ = ["INTERLEAVED", "LARGEST_FREQUENCY", "SPLIT", "Rotary"]

SPLIT = 0  #: channel i pairs with i + size / 2, as in Llama and Qwen
INTERLEAVED = 1  #: channel 2i pairs with 2i + 1, as in GPT-J and DeepSeek
#: Radians per token; a larger one is no position any more.
LARGEST_FREQUENCY = 8.0

_HEAD = struct.Struct("<HBBI")

# Constants of FORMAT.md 3.7.1: 2/pi, and pi/2 in two parts of 33 bits.
_QUARTERS = float.fromhex("0x1.45f306dc9c883p-1")
_QUARTER_HIGH = float.fromhex("0x1.921fb54400000p+0")
_QUARTER_LOW = float.fromhex("0x1.0b4611a600000p-34")
_SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(8))
_COS = tuple((-1) ** n / math.factorial(2 * n) for n in range(9))


def _polynomial(x: npt.NDArray[np.float64], factors: tuple[float, ...]) -> npt.NDArray[np.float64]:
    value = np.full(x.shape, factors[-1])
    for factor in reversed(factors[:-1]):
        value = value * x + factor
    return value


@dataclass(frozen=True, slots=True)
class Rotary:
    """The first `size` channels of a head are rotated in `size / 2` pairs.

    `frequencies`: radians per token of each pair, exact binary32 numbers in 0 ... 8.
    """

    size: int
    style: int
    frequencies: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.size % 2 or not 2 <= self.size <= 65534:
            raise ConfigError(f"{self.size} rotated channels; allowed is an even number from 2")
        if self.style not in (SPLIT, INTERLEAVED):
            raise ConfigError(f"rotary style {self.style}; allowed are 0 (split), 1 (interleaved)")
        if len(self.frequencies) != self.size // 2:
            raise ConfigError(
                f"{len(self.frequencies)} frequencies for {self.size} rotated channels; "
                f"{self.size // 2} are needed"
            )
        for frequency in self.frequencies:
            if not 0 <= frequency <= LARGEST_FREQUENCY:
                raise ConfigError(f"rotary frequency {frequency}; allowed is 0 to 8")
            if float(np.float32(frequency)) != frequency:
                raise ConfigError(f"rotary frequency {frequency!r} is not a number of binary32")

    @property
    def record(self) -> bytes:
        """Data of the page's header extension 2."""
        head = _HEAD.pack(self.size, self.style, 0, 0)
        return head + np.array(self.frequencies, "<f4").tobytes()

    @classmethod
    def from_record(cls, data: bytes) -> Rotary:
        """Inverse of `record`. ConfigError if the data is none."""
        if len(data) < _HEAD.size:
            raise ConfigError(f"rotary parameters of {len(data)} bytes; at least 12 are needed")
        size, style, *reserved = _HEAD.unpack_from(data)
        if any(reserved):
            raise ConfigError("rotary parameters with a reserved byte that is not zero")
        if len(data) != _HEAD.size + 2 * size:
            raise ConfigError(
                f"rotary parameters of {len(data)} bytes for {size} channels; "
                f"{_HEAD.size + 2 * size} are needed"
            )
        frequencies = np.frombuffer(data, "<f4", offset=_HEAD.size)
        return cls(size, style, tuple(frequencies.astype(float).tolist()))

    @property
    def pairs(self) -> npt.NDArray[np.int64]:
        """(size / 2, 2) channels of each pair."""
        first = np.arange(self.size // 2)
        if self.style == SPLIT:
            return np.stack([first, first + self.size // 2], axis=1)
        return np.stack([2 * first, 2 * first + 1], axis=1)

    def table(self, tokens: int) -> npt.NDArray[np.float32]:
        """(tokens, size / 2, 2): cosine and sine of each pair's angle at tokens 0, 1 ...

        The same bits on every machine: products, sums and roundings of binary64 alone.
        """
        token = np.arange(tokens, dtype=np.float64)[:, None]
        angle = np.array(self.frequencies, np.float64) * token  # exact
        quarter = np.rint(angle * _QUARTERS)
        rest = (angle - quarter * _QUARTER_HIGH) - quarter * _QUARTER_LOW
        square = rest * rest
        sin = rest * _polynomial(square, _SIN)
        cos = _polynomial(square, _COS)
        turn = quarter.astype(np.int64) & 3
        swap = (turn & 1).astype(bool)
        cosine = np.where(swap, sin, cos)
        sine = np.where(swap, cos, sin)
        cosine = np.where((turn == 1) | (turn == 2), -cosine, cosine)
        sine = np.where(turn >= 2, -sine, sine)
        return np.stack([cosine, sine], axis=-1).astype(np.float32)
