"""The trellis of ecq sections, FORMAT.md 3.6 and 3.10: indices from numbers, and back.

Arrays are (tiles, steps, lanes); a lane's path runs over the steps it is active in.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcodec._reference_stream import Integers

__all__ = ["half_steps", "search_path"]

Mask = npt.NDArray[np.bool_]

_DEAREST = 127  # of a price and of a total
# The square of a distance in 1/4 half step, by 64ths of the way through the four half steps around
# a point.
_SQUARES = ((2 * np.arange(64) - 63) ** 2 + 32) >> 6


def half_steps(indices: Integers, active: Mask) -> Integers:
    """Half steps u = 2k + o of every active element; 0 elsewhere."""
    tiles, steps, lanes = indices.shape
    o = np.zeros((tiles, lanes), np.int64)
    q = np.zeros((tiles, lanes), np.int64)
    out = np.zeros_like(indices)
    for step in range(steps):
        k, here = indices[:, step], active[:, step]
        u = (2 * k + o + 128 & 255) - 128
        out[:, step] = np.where(here, u, 0)
        o, q = np.where(here, q ^ (k & 1), o), np.where(here, o, q)
    return out


def search_path(numbers: Integers, active: Mask, costs: Integers) -> Integers:
    """The indices k of the cheapest path.

    `numbers` are 64ths of half steps; `costs` (tiles, steps, 64) is what each k from -32 to 31
    costs. State 2 * o + q; among equals the lower predecessor, at the end the lower state. Totals
    are relative to that of state 0, and kept within a byte.
    """
    tiles, steps, lanes = numbers.shape
    total = np.full((4, tiles, lanes), _DEAREST, np.int64)
    total[0] = 0
    begun = np.zeros((tiles, lanes), np.bool_)
    before = np.zeros((steps, 4, tiles, lanes), np.int8)
    chosen = np.zeros((steps, 4, tiles, lanes), np.int16)
    rows = np.arange(tiles)[:, None]
    for step in range(steps):
        v, here = numbers[:, step], active[:, step]
        indices, prices = [], []
        for coset in range(4):
            way = v - 64 * coset + 128
            k = 2 * (way >> 8) + (coset >> 1)
            cost = costs[:, step][rows, np.clip(k, -32, 31) + 32]
            indices.append(k)
            prices.append(np.minimum(_SQUARES[(way & 255) >> 2] + cost, _DEAREST))
        after = np.empty_like(total)
        for state in range(4):
            o, q = state >> 1, state & 1
            first, second = q + 2 * o, q + 2 * (1 - o)  # cosets from (q, 0) and from (q, 1)
            low = np.minimum(total[2 * q] + prices[first], _DEAREST)
            high = np.minimum(total[2 * q + 1] + prices[second], _DEAREST)
            better = high < low
            after[state] = np.where(better, high, low)
            before[step, state] = np.where(here, np.where(better, 2 * q + 1, 2 * q), state)
            chosen[step, state] = np.where(better, indices[second], indices[first])
        after = np.clip(after - after[0], -128, _DEAREST)
        after[1::2, ~begun] = _DEAREST  # no path of one element leads there
        begun |= here
        total = np.where(here, after, total)
    state = total.argmin(axis=0)
    out = np.zeros_like(numbers)
    lane = np.arange(lanes)[None, :]
    for step in reversed(range(steps)):
        out[:, step] = np.where(active[:, step], chosen[step, state, rows, lane], 0)
        state = before[step, state, rows, lane]
    return out
