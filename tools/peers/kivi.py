"""KIVI, re-implemented: keys per channel, values per token, asymmetric, in fp16.

Liu et al., ICML 2024, and its `quant/new_pack.py`: per group the smallest number and a scale in
fp16, numbers of 2 or 4 bits packed. What it leaves unquantized, its last 32 or 128 tokens, a store
of full pages has none of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peers.base import Origin, Stored, TensorPeer, bits_of
from peers.packing import pack, unpack

SOURCE = "arXiv 2402.02750; github.com/jy-yuan/KIVI, quant/new_pack.py (numerics)"


class Kivi(TensorPeer):
    """Groups of `group` tokens of a channel for keys, of `group` channels of a token for values."""

    def __init__(self, bits: int, group: int) -> None:
        super().__init__(f"KIVI {bits} bit g{group}", Origin(source=SOURCE))
        self.bits, self.group = bits, group

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """In fp16 throughout, as its kernels are."""
        turned = tensor.half().transpose(-1, -2) if is_key else tensor.half()
        rows = turned.unflatten(-1, (-1, self.group))
        smallest = rows.amin(-1, keepdim=True)
        highest = 2**self.bits - 1
        scale = (rows.amax(-1, keepdim=True) - smallest) / highest
        # A group of equal numbers has the scale 0, and none of its numbers matters.
        numbers = ((rows - smallest) / scale).nan_to_num(0.0).clamp(0, highest).round()
        packed = pack(numbers.to(torch.uint8).flatten(-2), self.bits)
        return Stored((packed, scale, smallest), bits_of(packed, scale, smallest))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """Number x scale + smallest, in fp16."""
        packed, scale, smallest = payload
        numbers = unpack(packed, self.bits).half().unflatten(-1, (-1, self.group))
        rows = (numbers * scale + smallest).flatten(-2)
        return rows.transpose(-1, -2) if is_key else rows


def peers() -> list[Kivi]:
    """Its two bit widths in groups of 32 and of a page."""
    return [Kivi(bits, group) for bits in (4, 2) for group in (64, 32)]
