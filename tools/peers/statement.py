"""At how many bits ecq does what another codec does: between two measured points of its curve."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

#: The peer that the goal names, and the goal: the same error of the attention's output in so many
#: bits.
REFERENCE, GOAL_BITS = "KIVI 4 bit g64", 3.7

_ECQ = re.compile(r"ecq-[\d.]+")
_VALUES_ABOVE = re.compile(r"ecq-[\d.]+/[\d.]+")

Row = Mapping[str, Any]


def is_ecq(codec: str) -> bool:
    """Whether a codec is a point of the curve: ecq at one rate for keys and values."""
    return _ECQ.fullmatch(codec) is not None


def has_values_above(codec: str) -> bool:
    """Whether a codec is a point of the other curve: ecq, more bits for values than for keys."""
    return _VALUES_ABOVE.fullmatch(codec) is not None


def bits_at(curve: Sequence[tuple[float, float]], error: float) -> float | None:
    """Bits at which a curve of (bits, error) reaches an error, the logarithm of the error straight
    between two points; None outside of them.
    """
    points = sorted(curve)
    for (bits, high), (more, low) in pairwise(points):
        if low <= error <= high:
            share = math.log(high / error) / math.log(high / low) if high > low else 0.0
            return bits + share * (more - bits)
    return None


def equal_bits(
    rows: Sequence[Row], codec: str, metric: str, of: Callable[[str], bool] = is_ecq
) -> float | None:
    """Bits of a curve of ecq at the error that `codec` has, in the rows of one cache."""
    curve = [(row["bits_per_value"], row[metric]) for row in rows if of(row["codec"])]
    errors = [row[metric] for row in rows if row["codec"] == codec]
    return bits_at(curve, errors[0]) if errors and errors[0] > 0 else None


def statement(caches: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """What the goal asks: bits of ecq at the reference's error, for every cache and both curves."""
    even, above = (
        {name: equal_bits(rows, REFERENCE, "output_error", of) for name, rows in caches.items()}
        for of in (is_ecq, has_values_above)
    )
    bits = [
        row["bits_per_value"]
        for rows in caches.values()
        for row in rows
        if row["codec"] == REFERENCE
    ]
    return {
        "reference": REFERENCE,
        "reference_bits": max(bits),
        "goal_bits": GOAL_BITS,
        "ecq_bits": even,
        "values_above_bits": above,
        "is_reached": any(
            all(value is not None and value <= GOAL_BITS for value in found.values())
            for found in (even, above)
        ),
    }
