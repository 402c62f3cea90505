"""NVFP4, re-implemented: blocks of 16 numbers of 4 bits, an e4m3 scale each, a float32 for all.

As NVIDIA describes the format: e2m1 numbers (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives),
rounded to the nearest and to the even one in the middle; block scales in e4m3, relative to one
float32 scale of the tensor, which makes the largest block scale 448. The tensor is one layer's keys
or values of a page here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peers.base import Origin, Stored, TensorPeer, bits_of
from peers.packing import pack, unpack

SOURCE = "NVFP4 as in TensorRT-LLM's cold pages (numerics of the format)"
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_LARGEST, _LARGEST_SCALE = 6.0, 448.0
_BLOCK = 16


def to_e2m1(numbers: Tensor) -> Tensor:
    """Codes of 4 bits, sign first; what is halfway goes to the code that is even."""
    sizes = numbers.abs().clamp(max=_LARGEST)
    middles = (GRID[1:] + GRID[:-1]) / 2
    lower = torch.bucketize(sizes, middles)
    upper = torch.bucketize(sizes, middles, right=True)
    codes = torch.where(lower % 2 == 0, lower, upper)
    return (codes | (numbers.signbit().long() << 3)).to(torch.uint8)


def from_e2m1(codes: Tensor) -> Tensor:
    """The numbers, float32."""
    return torch.cat((GRID, -GRID))[codes.int()]


class Nvfp4(TensorPeer):
    """Blocks lie along the head."""

    def __init__(self) -> None:
        super().__init__("NVFP4", Origin(source=SOURCE))

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """Keys and values alike."""
        del is_key
        blocks = tensor.float().unflatten(-1, (-1, _BLOCK))
        largest = blocks.abs().amax(-1, keepdim=True)
        whole = largest.amax((1, 2, 3, 4), keepdim=True) / (_LARGEST * _LARGEST_SCALE)
        whole = whole.clamp(min=torch.finfo(torch.float32).tiny)
        scale = (largest / (_LARGEST * whole)).to(torch.float8_e4m3fn)
        step = scale.float() * whole
        codes = to_e2m1(torch.where(step > 0, blocks / step, 0.0))
        packed = pack(codes.flatten(-2), 4)
        return Stored((packed, scale, whole), bits_of(packed, scale, whole))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """Code x block scale x tensor scale."""
        del is_key
        packed, scale, whole = payload
        numbers = from_e2m1(unpack(packed, 4)).unflatten(-1, (-1, _BLOCK))
        return (numbers * (scale.float() * whole)).flatten(-2)


def peers() -> list[Nvfp4]:
    """One."""
    return [Nvfp4()]
