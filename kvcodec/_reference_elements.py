"""Elements as numbers and back: FORMAT.md 3.3, 3.11."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvcodec.layout import DType

__all__ = ["bits_type", "from_e4m3", "from_float32", "to_e4m3", "to_float32"]

Bits = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_BITS = {DType.BF16: np.uint16, DType.FP16: np.uint16, DType.FP32: np.uint32}
_LARGEST = {DType.BF16: 0x7F7F0000, DType.FP16: 0x477FE000, DType.FP32: 0x7F7FFFFF}
# The numbers of e4m3fn from 0 to 448 in the order of their bytes.
_E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
)
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


def to_e4m3(values: Float32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """The nearest bytes of e4m3fn, and which numbers lie beyond its range."""
    with np.errstate(invalid="ignore"):
        magnitude = np.abs(values).astype(np.float64)
        _, exponent = np.frexp(magnitude)
        step = np.ldexp(1.0, np.maximum(exponent - 1, -6) - 3)
        rounded = np.rint(magnitude / step) * step
        beyond = ~(rounded <= 448)
    rounded = np.where(beyond, 448, rounded)
    code = np.searchsorted(_E4M3, rounded).astype(np.uint8)
    code[np.isnan(values)] = 0x7F
    return code | np.where(np.signbit(values), np.uint8(0x80), np.uint8(0)), beyond


def from_e4m3(codes: npt.NDArray[np.uint8]) -> Float32:
    """Bytes of e4m3fn as numbers, exactly."""
    magnitude = np.append(_E4M3, np.nan)[codes & 0x7F]
    return np.where(codes >= 0x80, -magnitude, magnitude).astype(np.float32)
