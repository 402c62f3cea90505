"""What is done to rows before they are quantized, in plain numpy: FORMAT.md 3.7 and 3.12.

Numbers are float32, and every product and every sum is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcodec.rotary import Rotary

__all__ = ["hadamard", "turned"]

Float32 = npt.NDArray[np.float32]


def turned(tiles: Float32, rotary: Rotary, first: Sequence[int], direction: int) -> Float32:
    """Tiles (n, tokens, channels) whose first tokens are `first`, with their pairs turned by the
    angles of their tokens: forth (1) or back (-1).
    """
    tokens = tiles.shape[1]
    table = rotary.table(max(first) + tokens)
    rotation = np.stack([table[start : start + tokens] for start in first])
    cos, sin = rotation[..., 0], rotation[..., 1] * np.float32(direction)
    left, right = rotary.pairs.T
    a, b = tiles[..., left], tiles[..., right]
    out: Float32 = tiles.copy()
    with np.errstate(all="ignore"):
        out[..., left] = a * cos - b * sin
        out[..., right] = b * cos + a * sin
    return out


def hadamard(rows: Float32) -> Float32:
    """Sums and differences over the last axis, whose length n is a power of two. Twice is n times
    the rows.
    """
    size = rows.shape[-1]
    out: Float32 = rows.copy()
    step = 1
    while step < size:
        pairs = out.reshape(*rows.shape[:-1], size // (2 * step), 2, step)
        a, b = pairs[..., 0, :].copy(), pairs[..., 1, :].copy()
        with np.errstate(all="ignore"):
            pairs[..., 0, :], pairs[..., 1, :] = a + b, a - b
        step *= 2
    return out
