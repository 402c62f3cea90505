"""Numbers of 2, 3, 4 and 8 bits, packed into bytes along the last axis."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bits -> (numbers of a group, bytes of a group).
_GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1)}


def pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 numbers below 2**bits (..., n), as bytes (..., n x bits / 8), low bits first."""
    if bits == 8:
        return numbers
    count, size = _GROUPS[bits]
    groups = numbers.unflatten(-1, (-1, count)).to(torch.int32 if size > 1 else torch.uint8)
    word = groups[..., 0]
    for index in range(1, count):
        word = word | (groups[..., index] << (bits * index))
    if size == 1:
        return word
    parts = [(word >> (8 * index)) & 255 for index in range(size)]
    return torch.stack(parts, -1).flatten(-2).to(torch.uint8)


def unpack(stored: Tensor, bits: int) -> Tensor:
    """The numbers again, uint8."""
    if bits == 8:
        return stored
    count, size = _GROUPS[bits]
    word = stored
    if size > 1:
        parts = stored.unflatten(-1, (-1, size)).to(torch.int32)
        word = parts[..., 0] | (parts[..., 1] << 8) | (parts[..., 2] << 16)
    mask = (1 << bits) - 1
    numbers = [(word >> (bits * index)) & mask for index in range(count)]
    return torch.stack(numbers, -1).flatten(-2).to(torch.uint8)
