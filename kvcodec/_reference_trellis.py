"""The trellis of ecq sections, FORMAT.md 3.6 and 3.10: indices from numbers, and back.

Arrays are (tiles, steps, lanes); a lane's path runs over the steps it is active in.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcodec._reference_stream import Integers

__all__ = ["half_steps", "search_path"]

Mask = npt.NDArray[np.bool_]

_NEVER = 1 << 28


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

    `numbers` are sixteenths of half steps; `costs` (tiles, steps, 64) is what each k from -32 to 31
    costs. State 2 * o + q; among equals the lower predecessor, at the end the lower state.
    """
    tiles, steps, lanes = numbers.shape
    total = np.full((4, tiles, lanes), _NEVER, np.int64)
    total[0] = 0
    before = np.zeros((steps, 4, tiles, lanes), np.int8)
    chosen = np.zeros((steps, 4, tiles, lanes), np.int16)
    rows = np.arange(tiles)[:, None]
    for step in range(steps):
        v, here = numbers[:, step], active[:, step]
        indices, prices = [], []
        for coset in range(4):
            u = coset + 4 * ((v - 16 * coset + 32) >> 6)
            k = (u - (coset & 1)) >> 1
            error = v - 16 * u
            price = error * error + costs[:, step][rows, np.clip(k, -32, 31) + 32]
            indices.append(k)
            prices.append(price)
        after = np.empty_like(total)
        for state in range(4):
            o, q = state >> 1, state & 1
            first, second = q + 2 * o, q + 2 * (1 - o)  # cosets from (q, 0) and from (q, 1)
            low, high = total[2 * q] + prices[first], total[2 * q + 1] + prices[second]
            better = high < low
            after[state] = np.where(here, np.where(better, high, low), total[state])
            before[step, state] = np.where(here, np.where(better, 2 * q + 1, 2 * q), state)
            chosen[step, state] = np.where(better, indices[second], indices[first])
        total = after
    state = total.argmin(axis=0)
    out = np.zeros_like(numbers)
    lane = np.arange(lanes)[None, :]
    for step in reversed(range(steps)):
        out[:, step] = np.where(active[:, step], chosen[step, state, rows, lane], 0)
        state = before[step, state, rows, lane]
    return out
