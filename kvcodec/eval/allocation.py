"""Which codec each section gets: the least sum of losses for a size, exactly.

A section is the keys or the values of one layer. What an error in it costs is measured alone, and
losses of sections add up, because divergence is quadratic in errors that know nothing of each
other. So an allocation is a knapsack with one choice per section, solved by dynamic programming
over the size. Where losses fall as 2^-2R it gives every section the same slope, that is steps
proportional to 1 / sqrt(sensitivity); it asks for no such law, so it serves any codecs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Curve", "Frontier"]

#: Beyond the measured points a loss goes on as the nearest two do, within this range of powers of
#: two per bit; -2 is the theory, and one noisy point must not promise a miracle.
_STEEPEST, _FLATTEST = -3.0, -1.0
_SMALLEST_LOSS = 1e-12
#: Sizes are counted in this part of a sixteenth of a bit of the average section.
_PARTS = 4


@dataclass(frozen=True, slots=True)
class Curve:
    """A section's loss, and its size in bits per value of the page, at a few numbers of bits.

    `bits` ascending, at least two.
    """

    bits: tuple[float, ...]
    losses: tuple[float, ...]
    sizes: tuple[float, ...]

    def loss(self, bits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Losses at other numbers of bits: straight lines through the logarithms."""
        falling = np.minimum.accumulate(np.maximum(self.losses, _SMALLEST_LOSS))
        return np.asarray(2.0 ** _lines(bits, self.bits, np.log2(falling), _STEEPEST, _FLATTEST))

    def size(self, bits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sizes at other numbers of bits."""
        return _lines(bits, self.bits, np.array(self.sizes), 0.0, np.inf)


def _lines(
    x: npt.NDArray[np.float64],
    at: Sequence[float],
    values: npt.NDArray[np.float64],
    lowest: float,
    highest: float,
) -> npt.NDArray[np.float64]:
    """`values` at `at`, straight in between; beyond the ends with the slope there, limited."""
    slopes = np.clip(np.diff(values) / np.diff(at), lowest, highest)
    inside = np.interp(x, at, values)
    below, above = np.minimum(x - at[0], 0), np.maximum(x - at[-1], 0)
    return np.asarray(inside + slopes[0] * below + slopes[-1] * above)


class Frontier:
    """The best allocations of all sizes: for every section one of its options.

    `losses` and `sizes`: for each section a number per option; sizes in bits per value of the page,
    so that they sum up to the average.
    """

    def __init__(
        self,
        losses: Sequence[npt.NDArray[np.float64]],
        sizes: Sequence[npt.NDArray[np.float64]],
        largest: float,
    ) -> None:
        self._losses = losses
        self._unit = 1 / (16 * _PARTS * len(losses))
        self._costs = [np.rint(size / self._unit).astype(np.int64) for size in sizes]
        count = int(largest / self._unit) + 1
        self._best = np.zeros(count)
        self._choices = []
        for loss, cost in zip(losses, self._costs, strict=True):
            table = np.full((len(loss), count), np.inf)
            for option, (more, step) in enumerate(zip(loss.tolist(), cost.tolist(), strict=True)):
                if step < count:
                    table[option, step:] = self._best[: count - step] + more
            self._choices.append(table.argmin(0).astype(np.int16))
            self._best = table.min(0)

    def of_size(self, size: float) -> list[int] | None:
        """The options of the least loss at no more than `size` bits per value, to rounding; None
        where even the smallest options are larger.
        """
        at = min(int(size / self._unit + 1e-6), len(self._best) - 1)
        return self._options(at) if at >= 0 and np.isfinite(self._best[at]) else None

    def of_loss(self, loss: float) -> list[int] | None:
        """The options of the smallest size at no more than `loss`; None if nothing reaches it."""
        reached = np.flatnonzero(self._best <= loss)
        return self._options(int(reached[0])) if len(reached) else None

    def loss(self, options: Sequence[int]) -> float:
        """The sum of the losses."""
        return float(sum(loss[option] for loss, option in zip(self._losses, options, strict=True)))

    def _options(self, at: int) -> list[int]:
        options = []
        for choice, cost in zip(reversed(self._choices), reversed(self._costs), strict=True):
            options.append(int(choice[at]))
            at -= int(cost[options[-1]])
        return options[::-1]
