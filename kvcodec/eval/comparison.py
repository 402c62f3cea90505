"""Bits saved at equal divergence, with the error of having measured so few windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcodec.eval.metrics import Estimate
from kvcodec.eval.probing import Measured

__all__ = ["bits_at", "bits_saved"]


def bits_at(rows: Sequence[tuple[float, float]], divergence: float) -> float | None:
    """Where the curve through (bits, divergence) reaches a divergence: straight lines through its
    logarithm. Rows that another one beats in both are left out. None beyond the curve's ends.
    """
    best: list[tuple[float, float]] = []
    for bits, kl in sorted(rows):
        if kl > 0 and (not best or kl < best[-1][1]):
            best.append((bits, kl))
    if not best or not best[-1][1] <= divergence <= best[0][1]:
        return None
    logs = [-math.log(kl) for _, kl in best]
    return float(np.interp(-math.log(divergence), logs, [bits for bits, _ in best]))


def bits_saved(row: Measured, others: Sequence[Measured]) -> Estimate | None:
    """How many bits fewer `row` takes than the others at its divergence; None where they do not
    reach from below to above it.

    All were measured on the same windows. The standard error is that of the jackknife: the
    difference is computed again without each window in turn.
    """
    mine = np.array(row.divergences)
    theirs = [(other.bits, np.array(other.divergences)) for other in others]

    def saved(windows: npt.NDArray[np.bool_]) -> float | None:
        curve = [(bits, float(kl[windows].mean())) for bits, kl in theirs]
        found = bits_at(curve, float(mine[windows].mean()))
        return None if found is None else found - row.bits

    count = len(mine)
    whole = saved(np.ones(count, np.bool_))
    if whole is None:
        return None
    parts = [saved(np.arange(count) != left_out) for left_out in range(count)] if count > 1 else []
    known = [part for part in parts if part is not None]
    if len(known) < max(count, 2):
        return Estimate(whole, None)
    mean = math.fsum(known) / count
    spread = math.fsum((part - mean) ** 2 for part in known)
    return Estimate(whole, math.sqrt((count - 1) / count * spread))
