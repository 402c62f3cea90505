"""The reference of lossless sections against FORMAT.md 3.9 with one element at a time, and what it
has to give on elements like those of a cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcodec._reference_stream import DamagedSection
from kvcodec.layout import DType
from kvcodec.reference_lossless import (
    decode_block,
    decode_lossless,
    encode_block,
    encode_lossless,
)

Rows = npt.NDArray[np.uint16]
DTYPES = [DType.BF16, DType.FP16]


def normal_rows(seed: int, shape: tuple[int, int, int], dtype: DType, spread: float) -> Rows:
    """Normal numbers; the channels' scales differ by e^spread."""
    random = np.random.default_rng(seed)
    scale = np.exp(spread * random.standard_normal((shape[0], 1, shape[2])))
    values = (scale * random.standard_normal(shape)).astype(np.float32)
    if dtype is DType.FP16:
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def naive_decode(stored: bytes, heads: int, tokens: int, size: int, dtype: DType) -> list[int]:
    """Elements in order, byte by byte."""
    bf16 = dtype is DType.BF16
    unit, planes = (1, 3) if bf16 else (4, 6)
    rows, blocks = heads * tokens, -(-size // 64)
    low_at = -(-(8 + 4 * heads) // 64) * 64
    plane_at = low_at + rows * size
    base_at = plane_at + rows * planes * -(-size // 8)
    escape_at = base_at + rows * blocks
    elements = []
    for row in range(rows):
        for block in range(blocks):
            count = min(64, size - 64 * block)
            width = -(-count // 8)
            for i in range(count):
                bits = [stored[plane_at + k * width + i // 8] >> i % 8 & 1 for k in range(planes)]
                code = bits[0] + 2 * bits[1] + 4 * bits[2]
                high = stored[base_at + row * blocks + block] - code * unit
                if code == 7:
                    high = stored[escape_at]
                    escape_at += 1
                if not bf16:
                    high += 128 * bits[3] + 2 * bits[4] + bits[5]
                word = high % 256 << 8 | stored[low_at + row * size + 64 * block + i]
                elements.append(word >> 1 | (word & 1) << 15 if bf16 else word)
            plane_at += planes * width
    assert escape_at == len(stored) - 64
    return elements


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 200), (1, 30, 64), (3, 9, 72)])
def test_blocks_by_the_document(shape: tuple[int, int, int], dtype: DType):
    rows = normal_rows(1, shape, dtype, 0.1)
    stored = encode_block(rows, dtype)
    assert len(stored) < rows.nbytes
    assert naive_decode(stored, *shape, dtype) == rows.reshape(-1).tolist()


def test_base_of_a_block_leaves_the_fewer_escapes():
    """Exponents of 64 elements, by hand: 60 times 120 and four others."""
    rows = np.full((1, 40, 64), 120 << 7, np.uint16)
    rows[:, :, :4] = np.array([123, 123, 124, 90], np.uint16) << 7
    stored = encode_block(rows, DType.BF16)
    # The mean is 119.7, and 2.375 above it is 122: two of 123, one of 124 and one of 90 lie outside
    # of 116...122; the next base, 123, leaves two escaped.
    base_at = 64 + 40 * 64 + 40 * 24
    assert stored[base_at : base_at + 40] == bytes([123] * 40)
    assert stored[base_at + 40 : -64] == bytes([124, 90] * 40)
    assert int.from_bytes(stored[8:12], "little") == 80


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_reference_gives_every_bit_back(data: st.DataObject):
    shape = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 90)))
    dtype = data.draw(st.sampled_from(DTYPES))
    rows = normal_rows(data.draw(st.integers(0, 99)), shape, dtype, 0.3)
    patch = data.draw(st.lists(st.integers(0, 0xFFFF), max_size=20))
    rows.reshape(-1)[: len(patch)] = patch[: rows.size]
    assert (decode_block(encode_block(rows, dtype), shape, dtype) == rows).all()
    per_channel = data.draw(st.booleans())
    stored = encode_lossless(rows, dtype, per_channel=per_channel)
    assert (decode_lossless(stored, shape, dtype, per_channel=per_channel) == rows).all()


@pytest.mark.parametrize("per_channel", [False, True])
def test_denormals_of_fp16_keep_their_upper_bits(per_channel: bool):
    """Every exponent is 0, and the sign and two bits of the mantissa are not."""
    rows = np.random.default_rng(2).integers(0, 1 << 10, (1, 64, 64)).astype(np.uint16)
    rows |= np.uint16(0x8000) * (rows & 1)
    stored = encode_lossless(rows, DType.FP16, per_channel=per_channel)
    assert len(stored) < rows.nbytes
    found = decode_lossless(stored, rows.shape, DType.FP16, per_channel=per_channel)
    assert (found == rows).all()


def test_ratios_on_normal_numbers():
    """Where each channel has its own scale, coding by channels takes back what that costs."""
    rows = normal_rows(3, (2, 64, 128), DType.BF16, 0.6)
    plain = normal_rows(3, (2, 64, 128), DType.BF16, 0.0)
    assert rows.nbytes > 1.35 * len(encode_block(rows, DType.BF16))
    assert plain.nbytes > 1.40 * len(encode_block(plain, DType.BF16))
    by_channel = len(encode_lossless(rows, DType.BF16, per_channel=True))
    assert rows.nbytes > 1.45 * by_channel
    assert by_channel < len(encode_lossless(rows, DType.BF16, per_channel=False))
    assert plain.nbytes > 1.45 * len(encode_lossless(plain, DType.BF16, per_channel=False))


@pytest.mark.parametrize("place", [0, 7, 8, 20, -64, -1])
def test_damage_outside_the_planes_is_found(place: int):
    shape = (1, 30, 64)
    made = bytearray(encode_block(normal_rows(1, shape, DType.BF16, 0.1), DType.BF16))
    made[place] ^= 4
    with pytest.raises(DamagedSection):
        decode_block(bytes(made), shape, DType.BF16)
    with pytest.raises(DamagedSection):
        decode_block(bytes(made[:100]), shape, DType.BF16)
