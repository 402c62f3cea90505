"""Elements as numbers and back: FORMAT.md 3.3."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvcodec.layout import DType

__all__ = ["bits_type", "from_float32", "to_float32"]

Bits = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_BITS = {DType.BF16: np.uint16, DType.FP16: np.uint16, DType.FP32: np.uint32}
_LARGEST = {DType.BF16: 0x7F7F0000, DType.FP16: 0x477FE000, DType.FP32: 0x7F7FFFFF}
_NAN = {DType.BF16: 0x7FC0, DType.FP16: 0x7E00, DType.FP32: 0x7FC00000}


def bits_type(dtype: DType) -> type[np.unsignedinteger[Any]]:
    """Of one element."""
    return _BITS.get(dtype, np.uint8)


def to_float32(bits: Bits, dtype: DType) -> Float32:
    """Element bits as numbers, exactly."""
    if dtype is DType.BF16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype is DType.FP16:
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return bits.astype(np.uint32).view(np.float32)


def from_float32(values: Float32, dtype: DType) -> Bits:
    """Clamp and round as in 3.3."""
    largest = np.uint32(_LARGEST[dtype]).view(np.float32)
    nan = np.isnan(values)
    clamped = np.clip(np.where(nan, np.float32(0), values), -largest, largest).astype(np.float32)
    bits: Bits
    if dtype is DType.BF16:
        bits = ((clamped.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    elif dtype is DType.FP16:
        bits = clamped.astype(np.float16).view(np.uint16)
    else:
        bits = clamped.view(np.uint32).copy()
    bits[nan] = _NAN[dtype]
    return bits
