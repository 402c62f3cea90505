"""fp8 by PyTorch's own cast, without a scale: what LMCache's fp8 serde and an fp8 cache do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peers.base import Origin, Stored, TensorPeer, bits_of, installed


class Fp8(TensorPeer):
    """One byte a value, and nothing else."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        origin = Origin(source="as LMCache's fp8 serde", package=installed("torch"))
        super().__init__(name, origin)
        self.dtype = dtype

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """The cast."""
        del is_key
        stored = tensor.to(self.dtype)
        return Stored(stored, bits_of(stored))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """The cast back."""
        del is_key
        return payload.to(torch.bfloat16)


def peers() -> list[Fp8]:
    """Both types."""
    return [
        Fp8("fp8 e4m3, no scale", torch.float8_e4m3fn),
        Fp8("fp8 e5m2, no scale", torch.float8_e5m2),
    ]
