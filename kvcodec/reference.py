"""The codec in plain numpy, laid out like section 3 of proto/FORMAT.md: slow, and the oracle of the
tests. Coded sections have modules of their own.

Rows are arrays of element *bits* of shape (heads, tokens, head_size): uint16 for bf16 and fp16,
uint32 for fp32, uint8 for everything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvcodec._reference_elements import (
    bits_type,
    from_e4m3,
    from_float32,
    to_e4m3,
    to_float32,
)
from kvcodec._reference_transform import hadamard, turned
from kvcodec.format import pad64, parameter_bytes, section_stored_bytes
from kvcodec.layout import DType, Role, Stream
from kvcodec.reference_ecq import EcqCodec, decode_ecq, encode_ecq
from kvcodec.reference_lossless import (
    decode_block,
    decode_lossless,
    encode_block,
    encode_lossless,
)
from kvcodec.rotary import Rotary
from kvcodec.section import Axis, Kind, SectionCodec, Transform

__all__ = ["decode_section", "encode_section", "from_float32", "to_float32"]

Bits = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_NAN_SCALE = 0x7FC0
_DOMAIN = np.float32(2.0**127)
_SMALLEST_SCALE = np.float32(2.0**-126)


def _ceil16(x: Float32) -> npt.NDArray[np.uint16]:
    return ((x.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def _ordered(values: Float32) -> npt.NDArray[np.int32]:
    """Integers in the order of the numbers, -0 below +0."""
    bits = values.view(np.int32)
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int32)


def _smallest(groups: Float32) -> Float32:
    keys = _ordered(groups).min(axis=-1)
    return np.where(keys < 0, keys ^ np.int32(0x7FFFFFFF), keys).astype(np.int32).view(np.float32)


def _encode_groups(
    groups: Float32, dtype: DType, codec: SectionCodec
) -> tuple[Bits, Bits, npt.NDArray[np.bool_]]:
    """3.4 for groups along the last axis: parameters, codes, and which groups lie outside the
    domain.
    """
    bits = codec.bits
    with np.errstate(all="ignore"):
        outside = ~(np.abs(groups) < _DOMAIN).all(axis=-1)
        groups = np.where(outside[..., None], np.float32(0), groups)
        if codec.asymmetric:
            zero = _smallest(groups)
            if dtype is DType.FP32:  # round down to bf16
                raw = zero.view(np.uint32)
                away = np.where(
                    (raw >> 31) & ((raw & 0xFFFF) != 0), np.uint32(0x10000), np.uint32(0)
                )
                zero = ((raw & np.uint32(0xFFFF0000)) + away).astype(np.uint32).view(np.float32)
            span = groups.max(axis=-1) - zero
            outside |= ~np.isfinite(span)
            factor = np.float32(1.0 / (2**bits - 1))
        else:
            zero = np.zeros(groups.shape[:-1], np.float32)
            span = np.abs(groups).max(axis=-1)
            factor = np.float32(1.0 / (2 ** (bits - 1) - 0.5 - 2.0**-10))
        scale = _ceil16(np.maximum(span * factor, _SMALLEST_SCALE))
        scale = np.where(span > 0, scale, np.uint16(0)).astype(np.uint16)
        value = (scale.astype(np.uint32) << np.uint32(16)).view(np.float32)
        inverse = np.where(scale > 0, np.float32(1) / value, np.float32(0)).astype(np.float32)
        distance = groups - zero[..., None]
        product = distance.astype(np.float64) * inverse[..., None].astype(np.float64)
    product[outside] = 0
    codes = np.rint(product).astype(np.int64)
    if not codec.asymmetric:
        codes += 1 << (bits - 1)
    assert ((codes >= 0) & (codes < 1 << bits)).all()
    codes[outside] = 0
    scale = np.where(outside, np.uint16(_NAN_SCALE), scale).astype(np.uint16)
    if not codec.asymmetric:
        return scale, codes.astype(np.uint32), outside
    zero_bits = from_float32(zero, DType.FP16 if dtype is DType.FP16 else DType.BF16)
    zero_bits = np.where(outside, np.uint16(0), zero_bits)
    return (scale.astype(np.uint32) << np.uint32(16)) | zero_bits, codes.astype(np.uint32), outside


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def encode_section(
    rows: Bits, dtype: DType, codec: SectionCodec, rotary: Rotary | None = None
) -> tuple[bytes, int]:
    """The stored bytes of a section without padding, and how many of its groups (of fp8: rows) lie
    outside the domain.

    `rotary` is the rotation of these rows, if they are keys of a page that knows it.
    """
    heads, tokens, size = rows.shape
    channel = codec.axis is Axis.CHANNEL
    if codec.kind is Kind.ECQ:
        return encode_ecq(rows, dtype, EcqCodec(codec.bits, channel, rotary)), 0
    if codec.kind is Kind.LOSSLESS:
        return encode_lossless(rows, dtype, per_channel=channel), 0
    if codec.kind is Kind.BLOCK:
        return encode_block(rows, dtype), 0
    if codec.kind is Kind.FP8:
        numbers, beyond = to_e4m3(to_float32(rows, dtype))
        return numbers.tobytes(), int(beyond.any(axis=-1).sum())
    codec = codec.resolved(size, tokens)
    if codec.kind is Kind.RAW:
        return np.ascontiguousarray(rows).tobytes(), 0
    values = to_float32(rows, dtype)
    dtype = DType.FP32 if codec.transform else dtype
    if codec.transform is Transform.DEROTATED:
        assert rotary is not None
        values = turned(values, rotary, [0] * heads, -1)
    elif codec.transform is Transform.HADAMARD:
        values = hadamard(values)
    if channel:  # groups along the last axis: (heads, channels, tokens)
        values = np.ascontiguousarray(values.transpose(0, 2, 1))
    parts = [
        _encode_groups(np.ascontiguousarray(values[..., part]), dtype, codec)
        for part in _slices(values.shape[-1], codec.group_size)
    ]
    parameters = np.stack([part[0] for part in parts], axis=1 if channel else -1)
    codes = np.concatenate([part[1] for part in parts], axis=-1)
    packed = _pack_channels(codes, codec.bits) if channel else _pack_rows(codes, codec.bits)
    head = parameters.astype("<u4" if codec.asymmetric else "<u2").tobytes()
    stored = head.ljust(pad64(len(head)), b"\0") + packed
    assert len(stored) == section_stored_bytes(dtype, Stream(Role.KEY, heads, size), tokens, codec)
    return stored, sum(int(part[2].sum()) for part in parts)


def decode_section(
    stored: bytes,
    shape: tuple[int, int, int],
    dtype: DType,
    codec: SectionCodec,
    rotary: Rotary | None = None,
) -> Bits:
    """The rows (heads, tokens, head_size) of a section from its stored bytes.

    DamagedSection if a coded section breaks the rules.
    """
    heads, tokens, size = shape
    channel = codec.axis is Axis.CHANNEL
    if codec.kind is Kind.ECQ:
        return decode_ecq(stored, shape, dtype, EcqCodec(codec.bits, channel, rotary))
    if codec.kind is Kind.LOSSLESS:
        return decode_lossless(stored, shape, dtype, per_channel=channel)
    if codec.kind is Kind.BLOCK:
        return decode_block(stored, shape, dtype)
    if codec.kind is Kind.FP8:
        numbers = np.frombuffer(stored, np.uint8, heads * tokens * size)
        return from_float32(from_e4m3(numbers), dtype).reshape(shape)
    codec = codec.resolved(size, tokens)
    if codec.kind is Kind.RAW:
        raw = np.frombuffer(stored, bits_type(dtype), heads * tokens * size)
        return raw.reshape(shape).copy()
    count = parameter_bytes(Stream(Role.KEY, heads, size), tokens, codec)
    packed = stored[pad64(count) :]
    parameters = np.frombuffer(stored[:count], "<u4" if codec.asymmetric else "<u2").astype(
        np.uint32
    )
    length = tokens if channel else size
    groups = -(-length // codec.group_size)
    index = np.arange(length) // codec.group_size
    if channel:
        codes = _unpack_channels(packed, shape, codec.bits)  # (heads, tokens, channels)
        parameters = parameters.reshape(heads, groups, size)[:, index, :]
    else:
        codes = _unpack_rows(packed, shape, codec.bits)
        parameters = parameters.reshape(heads, tokens, groups)[:, :, index]
    if codec.asymmetric:
        scale, zero = parameters >> np.uint32(16), parameters & np.uint32(0xFFFF)
        is_half = dtype is DType.FP16 and not codec.transform
        offset = to_float32(zero.astype(np.uint16), DType.FP16 if is_half else DType.BF16)
    else:
        # A sum with -0 is the product itself, the sign of a zero included.
        scale, offset = parameters, np.full(parameters.shape, -0.0, np.float32)
        codes -= 1 << (codec.bits - 1)
    step = (scale.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(all="ignore"):
        values = (offset + step * codes.astype(np.float32)).astype(np.float32)
    if codec.transform is Transform.DEROTATED:
        assert rotary is not None
        values = turned(values, rotary, [0] * heads, 1)
    elif codec.transform is Transform.HADAMARD:
        values = hadamard(values) * np.float32(1 / size)
    return from_float32(values, dtype)


def _pack_rows(codes: Bits, bits: int) -> bytes:
    """Blocks of 64 elements; byte i of a block holds codes i, i+h, i+2h ..."""
    per_byte = 8 // bits
    blocks = []
    for part in _slices(codes.shape[-1], 64):
        block = codes[..., part]
        height = -(-block.shape[-1] // per_byte)
        padded = np.zeros((*block.shape[:-1], height * per_byte), np.uint32)
        padded[..., : block.shape[-1]] = block
        planes = padded.reshape(*block.shape[:-1], per_byte, height)
        shifts = (np.arange(per_byte) * bits).astype(np.uint32)[:, None]
        blocks.append((planes << shifts).sum(axis=-2).astype(np.uint8))
    return np.concatenate(blocks, axis=-1).tobytes()


def _unpack_rows(packed: bytes, shape: tuple[int, int, int], bits: int) -> npt.NDArray[np.int64]:
    heads, tokens, size = shape
    per_byte = 8 // bits
    data = np.frombuffer(packed, np.uint8).reshape(heads, tokens, -1)
    parts, at = [], 0
    for part in _slices(size, 64):
        count = part.stop - part.start
        height = -(-count // per_byte)
        block = data[..., at : at + height].astype(np.int64)
        planes = [(block >> (bits * k)) & ((1 << bits) - 1) for k in range(per_byte)]
        parts.append(np.concatenate(planes, axis=-1)[..., :count])
        at += height
    return np.concatenate(parts, axis=-1)


def _pack_channels(codes: Bits, bits: int) -> bytes:
    """`codes` is (heads, channels, tokens); a word holds consecutive tokens of one channel."""
    heads, channels, tokens = codes.shape
    per_word = 32 // bits
    words = -(-tokens // per_word)
    padded = np.zeros((heads, channels, words * per_word), np.uint64)
    padded[..., :tokens] = codes
    shifts = (np.arange(per_word) * bits).astype(np.uint64)
    packed = (padded.reshape(heads, channels, words, per_word) << shifts).sum(axis=-1)
    return packed.transpose(0, 2, 1).astype("<u4").tobytes()


def _unpack_channels(
    packed: bytes, shape: tuple[int, int, int], bits: int
) -> npt.NDArray[np.int64]:
    heads, tokens, channels = shape
    per_word = 32 // bits
    words = -(-tokens // per_word)
    data = np.frombuffer(packed, "<u4").reshape(heads, words, channels).astype(np.int64)
    token = np.arange(tokens)
    shifts = (token % per_word * bits)[:, None]
    return (data[:, token // per_word, :] >> shifts) & ((1 << bits) - 1)
