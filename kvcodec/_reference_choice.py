"""What the encoder of ecq sections measures and decides before the trellis: FORMAT.md 3.10.

Arrays hold tiles of one shape: (tiles, ...). Every operation on numbers is one of binary32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcodec._reference_stream import Integers

__all__ = [
    "EMPTY",
    "Groups",
    "Statistics",
    "Steps",
    "choose_reference",
    "choose_scales",
    "measure",
    "power",
]

Float32 = npt.NDArray[np.float32]

EMPTY = 127  #: the scale of a group without elements in the stream
_NO_ENERGY = -252
_SHARPEST = 62
_OCTAVE = 4
_LARGEST_NUMBER = np.float32(64 * 124.25)
_LARGEST_MEAN = np.float32(2000)

# 2^(i/16), the nearest numbers of binary32.
_POWERS = np.array([2.0 ** (i / 16) for i in range(16)]).astype(np.float32)


def power(sixteenths: Integers) -> Float32:
    """2^(n/16) in binary32."""
    return np.ldexp(_POWERS[sixteenths & 15], sixteenths >> 4).astype(np.float32)


@dataclass(frozen=True)
class Steps:
    """The steps of groups, from the nominal `bits` per element times 16.

    Half of a channel's width and three quarters of a token's go into its step, the rest is the
    tile's: s = r - e.
    """

    bits: int
    per_channel: bool

    def sharpness(self, scales: Integers) -> Integers:
        """t: a group's deviation is 2^(t/16) steps."""
        share = 2 if self.per_channel else 1
        return np.minimum(-share * scales - (35 - self.bits), _SHARPEST)

    def exponent(self, reference: Integers, scales: Integers) -> Integers:
        """d: a group's step is 2^(d/16)."""
        return 4 * (reference - scales) - self.sharpness(scales)

    def classes(self, scales: Integers) -> Integers:
        """The class of a group's elements."""
        return np.clip((self.sharpness(scales) + 2 >> 2) + 10, 0, 32)

    def gains(self, scales: Integers) -> Float32:
        """What a half step is in the search: 64, and what makes up for its leaning to zero."""
        return (64 + np.maximum(17 - self.classes(scales) >> 1, 0)).astype(np.float32)

    def levelled(self, exponents: Integers, reference: Integers) -> Integers:
        """Within an octave of the reference a token's step follows it half of the way."""
        if self.per_channel:
            return exponents
        x = exponents - reference
        return np.where(x < -_OCTAVE, exponents, exponents - (np.minimum(x, _OCTAVE) >> 1))


@dataclass(frozen=True)
class Groups:
    """How the elements of a tile (tokens, channels) form groups and sequences."""

    per_channel: bool
    #: Channels (tokens, if per token) in the order of their sequences, and the group of each.
    order: Integers
    group: Integers
    #: Sequences of each group.
    sizes: Integers

    @classmethod
    def of(cls, tokens: int, channels: int, per_channel: bool, pairs: Integers | None) -> Groups:
        """`pairs` (n, 2): channels that share a group, where the tile is derotated."""
        if pairs is None:
            count = channels if per_channel else tokens
            each = np.arange(count)
            return cls(per_channel, each, each, np.ones(count, np.int64))
        rest = np.setdiff1d(np.arange(channels), pairs)
        order = np.concatenate([pairs.reshape(-1), rest])
        group = np.concatenate(
            [np.repeat(np.arange(len(pairs)), 2), len(pairs) + np.arange(len(rest))]
        )
        return cls(per_channel, order, group, np.bincount(group))

    @property
    def starts(self) -> Integers:
        """Index of each group's first sequence."""
        return np.cumsum(self.sizes) - self.sizes

    def sequences(self, tiles: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(tiles, sequences, elements) of (tiles, tokens, channels)."""
        return tiles.transpose(0, 2, 1)[:, self.order] if self.per_channel else tiles

    def tiles(self, sequences: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Inverse of `sequences`."""
        if not self.per_channel:
            return sequences
        out = np.empty_like(sequences)
        out[:, self.order] = sequences
        return out.transpose(0, 2, 1)


@dataclass(frozen=True)
class Statistics:
    """What the encoder knows of each group, (tiles, groups)."""

    mean: Float32  # (tiles, sequences)
    exponent: Integers  # round(4 * log2(rms)), or what the mean demands
    largest: Float32  # deviation from the mean
    top: Float32  # magnitude of a mean
    empty: npt.NDArray[np.bool_]


def _sum_in_order(terms: Float32) -> Float32:
    """Along the last axis, first to last."""
    total = np.zeros(terms.shape[:-1], np.float32)
    for at in range(terms.shape[-1]):
        total = total + terms[..., at]
    return total


def _sum_in_lanes(terms: Float32) -> Float32:
    """Along the last axis: neighbours into 16 sums in order, then halves onto halves."""
    lanes = np.zeros((*terms.shape[:-1], -(-terms.shape[-1] // 32) * 32), np.float32)
    lanes[..., : terms.shape[-1]] = terms
    total = np.zeros((*terms.shape[:-1], 16), np.float32)
    for at in range(0, lanes.shape[-1], 32):
        total = total + lanes[..., at : at + 32 : 2]
        total = total + lanes[..., at + 1 : at + 32 : 2]
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half : 2 * half]
    return total[..., 0]


def _biased_exponent(x: Float32) -> Integers:
    return (x.view(np.int32).astype(np.int64) >> 23) & 255


def _rounded_log(mean_square: Float32) -> Integers:
    """round(4 * log2(sqrt(x))), by comparisons of the mantissa."""
    mantissa = mean_square.view(np.int32) & 0x7FFFFF
    above = (mantissa >= 0x1837F0).astype(np.int64) + (mantissa >= 0x5744FD)
    exponent = _biased_exponent(mean_square)
    return np.where(exponent == 0, _NO_ENERGY, 2 * (exponent - 127) + above)


def measure(sequences: Float32, groups: Groups) -> Statistics:
    """Steps 2 and 3 of (tiles, sequences, elements)."""
    count = sequences.shape[-1]
    if groups.per_channel:
        mean = _sum_in_order(sequences) / np.float32(count)
        deviation = sequences - mean[..., None]
        energy = _sum_in_order(deviation * deviation)
    else:
        mean = np.zeros(sequences.shape[:-1], np.float32)
        deviation = sequences
        energy = _sum_in_lanes(deviation * deviation)
    energy = np.add.reduceat(energy, groups.starts, axis=-1)  # one or two terms
    largest = np.maximum.reduceat(np.abs(deviation).max(axis=-1), groups.starts, axis=-1)
    top = np.maximum.reduceat(np.abs(mean), groups.starts, axis=-1)
    exponent = _rounded_log(energy / (groups.sizes * count).astype(np.float32))
    floor = np.where(top > 0, 4 * (_biased_exponent(top) - 127) - 32, _NO_ENERGY)
    empty = (largest == 0) & (top == 0)
    return Statistics(mean, np.maximum(exponent, floor), largest, top, empty)


def choose_reference(found: Statistics, groups: Groups) -> Integers:
    """Step 5: r of each tile."""
    exponent = np.where(found.empty, -1000, found.exponent)
    floor = exponent.max(axis=-1, keepdims=True) - 48
    weight = np.where(found.empty, 0, groups.sizes)
    total = weight.sum(axis=-1)
    weighted = (weight * np.maximum(exponent, floor)).sum(axis=-1)
    mean = (2 * weighted + total) // np.maximum(2 * total, 1)
    return np.where(total == 0, -160, np.clip(mean, -160, 95))


def choose_scales(found: Statistics, reference: Integers, steps: Steps) -> Integers:
    """Step 6: s of each group."""
    r = reference[:, None]
    exponent = np.maximum(steps.levelled(found.exponent, r), r - 126)
    while True:
        inverse = power(16 - steps.exponent(r, r - exponent))
        factor = inverse * steps.gains(r - exponent)
        fails = found.largest * factor > _LARGEST_NUMBER
        fails |= found.top * inverse > _LARGEST_MEAN
        fails &= ~found.empty
        if not fails.any():
            break
        exponent = exponent + fails
    scales = np.where(found.empty, EMPTY, r - exponent)
    assert (scales >= -128).all()
    return scales
