"""The reference codec against arithmetic so plain that it can be checked by eye.

`naive_encode` and `naive_pack` follow FORMAT.md 3.2 to 3.4 with one element at a time and exact
fractions; they share no code with `kvcodec.reference`.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcodec.layout import DType
from kvcodec.reference import decode_section, encode_section, from_float32, to_float32
from kvcodec.spec import Axis, SectionCodec
from kvcodec.testing.strategies import element_bits, head_sizes

F32 = np.float32
QUANTIZABLE = [dtype for dtype in DType if dtype.is_quantizable]
CODECS = [
    SectionCodec.integer(bits, asymmetric=asymmetric, axis=axis, group_size=-1)
    for bits in (2, 4, 8)
    for asymmetric in (False, True)
    for axis in Axis
]


def bits16(x: np.float32) -> int:
    return int(x.view(np.uint32)) >> 16


def of_bits16(bits: int) -> np.float32:
    return np.uint32(bits << 16).view(F32)


def ceil16(x: np.float32) -> int:
    """Bits of the smallest bf16 not below x."""
    candidate = bits16(x)
    return candidate if of_bits16(candidate) >= x else candidate + 1


def round_half_even(x: Fraction) -> int:
    low = x.numerator // x.denominator
    rest = x - low
    return low + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1))


def naive_encode(
    values: list[np.float32], dtype: DType, bits: int, asymmetric: bool
) -> tuple[int, int, list[int]]:
    """Scale bits, zero bits and codes of one group."""
    outside = (0x7FC0, 0, [0] * len(values))
    if any(not abs(float(value)) < 2.0**127 for value in values):
        return outside
    zero, zero_bits, bias = F32(0), 0, 1 << (bits - 1)
    if asymmetric:
        zero = min(values, key=lambda x: (x, not np.signbit(x)))
        if dtype is DType.FP16:
            zero_bits = int(zero.astype(np.float16).view(np.uint16))
        else:
            zero_bits = bits16(zero)
            if of_bits16(zero_bits) > zero:  # truncation rounds up where negative
                zero_bits += 1
            zero = of_bits16(zero_bits)
        with np.errstate(over="ignore"):
            extent = max(values) - zero
        factor, bias = F32(1 / ((1 << bits) - 1)), 0
    else:
        extent = max(abs(value) for value in values)
        factor = F32(1 / (2 ** (bits - 1) - 0.5 - 2**-10))
    if np.isinf(extent):
        return outside
    if extent == 0:
        return 0, zero_bits, [bias] * len(values)
    product = extent * factor
    scale_bits = 0x0080 if product < 2.0**-126 else ceil16(product)
    inverse = F32(1) / of_bits16(scale_bits)
    distances = [Fraction(float(value - zero)) for value in values]
    codes = [round_half_even(distance * Fraction(float(inverse))) + bias for distance in distances]
    return scale_bits, zero_bits, codes


def naive_pack(codes: npt.NDArray[np.int64], bits: int, axis: Axis) -> bytes:
    """Codes (heads, tokens, head_size) as they are stored."""
    heads, tokens, size = codes.shape
    out = bytearray()
    if axis is Axis.TOKEN:
        for row in codes.reshape(-1, size):
            for start in range(0, size, 64):
                block = row[start : start + 64]
                height = -(-len(block) // (8 // bits))
                packed = bytearray(height)
                for index, code in enumerate(block):
                    packed[index % height] |= int(code) << (index // height * bits)
                out += packed
        return bytes(out)
    per_word = 32 // bits
    for head in range(heads):
        for first in range(0, tokens, per_word):
            for channel in range(size):
                word = 0
                for k, code in enumerate(codes[head, first : first + per_word, channel]):
                    word |= int(code) << (k * bits)
                out += word.to_bytes(4, "little")
    return bytes(out)


def naive_section(
    rows: npt.NDArray[np.unsignedinteger], dtype: DType, codec: SectionCodec
) -> bytes:
    heads, tokens, size = rows.shape
    codec = codec.resolved(size, tokens)
    values = to_float32(rows, dtype)
    codes = np.zeros(rows.shape, np.int64)
    parameters = bytearray()

    def encode(head: int, token: slice, channel: slice) -> None:
        group = [F32(value) for value in values[head, token, channel].reshape(-1)]
        scale, zero, found = naive_encode(group, dtype, codec.bits, codec.asymmetric)
        if codec.asymmetric:
            parameters.extend(zero.to_bytes(2, "little"))
        parameters.extend(scale.to_bytes(2, "little"))
        shape = codes[head, token, channel].shape
        codes[head, token, channel] = np.array(found).reshape(shape)

    step = codec.group_size
    for head in range(heads):
        if codec.axis is Axis.CHANNEL:
            for start in range(0, tokens, step):
                for channel in range(size):
                    encode(head, slice(start, start + step), slice(channel, channel + 1))
        else:
            for token in range(tokens):
                for start in range(0, size, step):
                    encode(head, slice(token, token + 1), slice(start, start + step))
    stored = bytes(parameters)
    return stored + bytes(-len(stored) % 64) + naive_pack(codes, codec.bits, codec.axis)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_section_is_what_the_document_says(data: st.DataObject):
    """Every codec, on every element type and odd shapes, stores what the plain arithmetic does."""
    dtype = data.draw(st.sampled_from(QUANTIZABLE))
    codec = data.draw(st.sampled_from(CODECS))
    codec = SectionCodec.integer(
        codec.bits,
        asymmetric=codec.asymmetric,
        axis=codec.axis,
        group_size=data.draw(st.sampled_from([-1, 1, 3, 8, 64])),
    )
    shape = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 20)), data.draw(head_sizes(70)))
    if shape[0] * shape[1] * shape[2] > 1500:
        shape = (1, 2, min(shape[2], 130))
    rows = data.draw(element_bits(dtype, shape[0] * shape[1] * shape[2])).reshape(shape)
    assert encode_section(rows, dtype, codec)[0] == naive_section(rows, dtype, codec)


# --- elements


def every_bit_pattern(dtype: DType) -> npt.NDArray[np.unsignedinteger]:
    if dtype is DType.FP32:
        random = np.random.default_rng(0)
        return random.integers(0, 2**32, 1 << 20, dtype=np.uint64).astype(np.uint32)
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


@pytest.mark.parametrize("dtype", QUANTIZABLE)
def test_element_survives_the_way_through_binary32(dtype: DType):
    """Widening is exact: rounding back gives the bits, the largest number for an infinity, and the
    one quiet NaN for every NaN.
    """
    bits = every_bit_pattern(dtype)
    values = to_float32(bits, dtype)
    back = from_float32(values, dtype)
    finite = np.isfinite(values)
    assert (back[finite] == bits[finite]).all()
    largest = {DType.BF16: 0x7F7F, DType.FP16: 0x7BFF, DType.FP32: 0x7F7FFFFF}[dtype]
    assert set(back[values == np.inf].tolist()) <= {largest}
    sign = 1 << (8 * bits.itemsize - 1)
    assert set(back[values == -np.inf].tolist()) <= {largest | sign}
    quiet = {DType.BF16: 0x7FC0, DType.FP16: 0x7E00, DType.FP32: 0x7FC00000}[dtype]
    assert set(back[np.isnan(values)].tolist()) == {quiet}


def test_bf16_rounds_ties_away_from_zero_and_fp16_to_even():
    for dtype, ulp, down, up in (
        (DType.BF16, 2.0**-7, 0x3F80, 0x3F81),
        (DType.FP16, 2.0**-10, 0x3C00, 0x3C01),
    ):
        tie = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 * (1 - 2**-12)], F32)
        away = dtype is DType.BF16
        assert from_float32(tie, dtype).tolist() == [up if away else down, up + 1, down]
        sign = 0x8000
        negative = [sign | bits for bits in from_float32(tie, dtype).tolist()]
        assert from_float32(-tie, dtype).tolist() == negative


def test_fp16_denormals_are_kept():
    values = np.array([2.0**-24, 2.0**-25, 3 * 2.0**-25, -(2.0**-24), 2.0**-14], F32)
    assert from_float32(values, DType.FP16).tolist() == [1, 0, 2, 0x8001, 0x0400]


# --- groups of one kind


def round_trip(values: list[float], dtype: DType, codec: SectionCodec) -> npt.NDArray[np.float32]:
    array = np.array(values, F32).reshape(1, 1, -1)
    if codec.axis is Axis.CHANNEL:
        array = array.transpose(0, 2, 1)
    rows = {
        DType.BF16: lambda: (array.view(np.uint32) >> 16).astype(np.uint16),
        DType.FP16: lambda: array.astype(np.float16).view(np.uint16),
        DType.FP32: lambda: array.view(np.uint32),
    }[dtype]()
    stored, _ = encode_section(np.ascontiguousarray(rows), dtype, codec)
    return to_float32(decode_section(stored, rows.shape, dtype, codec), dtype).reshape(-1)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.text)
@pytest.mark.parametrize("dtype", QUANTIZABLE)
def test_constant_asymmetric_group_is_exact(dtype: DType, codec: SectionCodec):
    """A range of zero takes no scale: asymmetric codecs keep the value, symmetric ones the zero."""
    for value in (0.0, 1.0, -1.0, 3.140625, -60000.0, 2.0**-14, -0.0):
        if codec.asymmetric or value == 0:
            value = float(F32(value).astype(np.float16)) if dtype is DType.FP16 else value
            value = float(of_bits16(bits16(F32(value)))) if dtype is not DType.FP16 else value
            assert (round_trip([value] * 9, dtype, codec) == value).all()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.text)
def test_largest_fp16_never_becomes_infinite(codec: SectionCodec):
    """65504 beside anything decodes to a finite number, though scales round up."""
    for values in ([65504.0, -65504.0], [65504.0, 0.0], [-65504.0, 60000.0], [65504.0, 65472.0]):
        decoded = round_trip(values * 3, DType.FP16, codec)
        assert np.isfinite(decoded).all()
        assert np.abs(decoded).max() <= 65504


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.text)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP32])
def test_end_of_the_domain_decodes_finite(dtype: DType, codec: SectionCodec):
    """The largest magnitude below 2^127 stays finite, on both sides at once where it can."""
    top = float(of_bits16(0x7EFF))
    for values in ([top, 0.0], [-top, 0.0], [-top, top], [top, top]):
        assert np.isfinite(round_trip(values, dtype, codec)).all()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.text)
@pytest.mark.parametrize("dtype", QUANTIZABLE)
@pytest.mark.parametrize("magnitude", [1e-8, 1e-38, 1e-40, 2.0**-133])
def test_tiny_groups_have_tiny_errors(dtype: DType, codec: SectionCodec, magnitude: float):
    """Denormals are numbers: the error is half of a scale of at least 2^-126, never a NaN."""
    decoded = round_trip([magnitude, -magnitude, 0.0, magnitude / 2], dtype, codec)
    scale = max(2 * magnitude, 2.0**-126)
    assert np.abs(decoded).max() <= magnitude + scale


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.text)
@pytest.mark.parametrize("dtype", QUANTIZABLE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127, -(2.0**127)])
def test_value_outside_the_domain_spoils_its_own_group_alone(
    dtype: DType, codec: SectionCodec, bad: float
):
    """The group is NaN as a whole and counted; its neighbours decode as if it were not there."""
    if dtype is DType.FP16 and abs(bad) == 2.0**127:
        bad = np.inf
    rows = np.linspace(-2, 2, 4 * 32, dtype=F32).reshape(1, 4, 32)
    codec = SectionCodec.integer(
        codec.bits,
        asymmetric=codec.asymmetric,
        axis=codec.axis,
        group_size=2 if codec.axis is Axis.CHANNEL else 8,
    )

    def decode(array: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], int]:
        if dtype is DType.BF16:
            bits = (array.view(np.uint32) >> 16).astype(np.uint16)
        elif dtype is DType.FP16:
            bits = array.astype(np.float16).view(np.uint16)
        else:
            bits = array.view(np.uint32)
        stored, outside = encode_section(bits, dtype, codec)
        return to_float32(decode_section(stored, bits.shape, dtype, codec), dtype), outside

    clean, none = decode(rows)
    spoilt = rows.copy()
    spoilt[0, 1, 11] = bad
    with np.errstate(over="ignore"):
        found, outside = decode(spoilt)
    own = np.zeros(rows.shape, np.bool_)
    if codec.axis is Axis.CHANNEL:
        own[0, 0:2, 11] = True
    else:
        own[0, 1, 8:16] = True
    assert (none, outside) == (0, 1)
    assert np.isnan(found[own]).all()
    assert (found[~own] == clean[~own]).all()


def test_sign_of_zero():
    """A zero keeps its sign where the document's arithmetic does: scale 0 times a negative code."""
    codec = SectionCodec.integer(8)
    stored = b"\0\0".ljust(64, b"\0") + bytes([127, 128, 129])
    decoded = decode_section(stored, (1, 1, 3), DType.BF16, codec)
    assert decoded.reshape(-1).tolist() == [0x8000, 0, 0]
