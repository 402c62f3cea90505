"""KVTuner's quantizer, re-implemented: integers and integer zero points in the cache's type.

It has no licence, so that none of its code is here. What it computes (flexible_quant, as of May
2025): per group a scale (largest - smallest) / (2^n - 1), at least 1e-5; a zero point, the smallest
over the scale, rounded, which is kept as a number of the cache's type; signed integers, each stored
in a byte whatever n is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peers.base import Origin, Stored, TensorPeer, bits_of

SOURCE = "github.com/cmd2001/KVTuner, flexible_quant (numerics; no code)"
_SMALLEST_SCALE = 1e-5


class KVTuner(TensorPeer):
    """`key_bits` and `value_bits` per number; per token over a head, or, with `per_channel` keys,
    KIVI's way in groups of 32.
    """

    def __init__(self, name: str, key_bits: int, value_bits: int, *, per_channel: bool) -> None:
        super().__init__(name, Origin(source=SOURCE, remark="stores every number in a byte"))
        self.bits = {True: key_bits, False: value_bits}
        self.per_channel = per_channel

    @property
    def packed_bits(self) -> float:  # type: ignore[override]
        """Nominal bits, with a scale and a zero point of 16 bits for every group."""
        group = 32 if self.per_channel else 128
        return sum(self.bits.values()) / 2 + 32 / group

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """All arithmetic is that of the cache's type."""
        turned = tensor.transpose(-1, -2) if is_key and self.per_channel else tensor
        group = 32 if self.per_channel else tensor.shape[-1]
        rows = turned.reshape(-1, group)
        highest = 2 ** (self.bits[is_key] - 1) - 1
        lowest = -highest - 1
        largest, smallest = rows.amax(1, keepdim=True), rows.amin(1, keepdim=True)
        scale = (largest - smallest).clamp(min=_SMALLEST_SCALE) / (highest - lowest)
        zero = (smallest / scale).round() - lowest
        numbers = (rows / scale - zero).round().clamp(lowest, highest).to(torch.int8)
        return Stored((numbers, scale, zero, turned.shape), bits_of(numbers, scale, zero))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """(number + zero point) x scale."""
        numbers, scale, zero, shape = payload
        rows = ((numbers + zero) * scale).reshape(shape)
        return rows.transpose(-1, -2) if is_key and self.per_channel else rows


def peers() -> list[KVTuner]:
    """Per token as its presets do, and KIVI's axes in its groups of 32."""
    found = [
        KVTuner(f"KVTuner {name} per token", key, value, per_channel=False)
        for name, key, value in (("KV8", 8, 8), ("K8V4", 8, 4), ("KV4", 4, 4), ("KV2", 2, 2))
    ]
    found += [
        KVTuner(f"KVTuner KIVI g32 KV{bits}", bits, bits, per_channel=True) for bits in (8, 4, 2)
    ]
    return found
