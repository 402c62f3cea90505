"""The bytes of libkvcodec on every instruction set: by hand, by the oracle, and left untouched."""

from __future__ import annotations

from collections.abc import Iterator

import native_pages as pages
import numpy as np
import pytest
from native_pages import Shape, make_plan, run

from kvcodec import native
from kvcodec.layout import DType
from kvcodec.reference import decode_section, from_float32
from kvcodec.spec import Axis, SectionCodec


@pytest.fixture(scope="module")
def pool() -> Iterator[native.Pool]:
    pool = native.Pool(2)
    yield pool
    pool.close()


def bf16(values: object) -> np.ndarray:
    return from_float32(np.array(values, np.float32), DType.BF16)


def encode_one(pool: native.Pool, dtype: DType, codec: SectionCodec, rows: np.ndarray) -> bytes:
    """The stored bytes of one section of (heads, tokens, head_size) elements, with padding."""
    heads, tokens, size = rows.shape
    shape = Shape(
        dtype=dtype, codecs=(codec,), head_count=heads, token_count=tokens, head_size=size
    )
    array = rows[None].copy()
    plan = make_plan(shape, array)
    return pages.section_of(plan, shape, pages.encoded(pool, plan, array), 0)


# --- bytes by hand


def test_asymmetric_tokens_by_hand(pool: native.Pool, isa: str):
    """0 ... 15 with four bits: zero 0, scale 1, and byte i of the block holds codes i and i + 8."""
    codec = SectionCodec.integer(4, asymmetric=True)
    stored = encode_one(pool, DType.BF16, codec, bf16([[range(16)]]))
    assert stored[:64] == b"\x00\x00\x80\x3f".ljust(64, b"\0")
    assert stored[64:] == bytes(i | (i + 8) << 4 for i in range(8)).ljust(64, b"\0")


def test_symmetric_tokens_by_hand(pool: native.Pool, isa: str):
    """-1.5, 0, 1.5 with two bits: the scale is just above 1, so the codes are 1, 2 and 3."""
    stored = encode_one(pool, DType.BF16, SectionCodec.integer(2), bf16([[[-1.5, 0, 1.5]]]))
    assert stored[:64] == b"\x81\x3f".ljust(64, b"\0")
    assert stored[64:] == bytes([1 | 2 << 2 | 3 << 4]).ljust(64, b"\0")


def test_channels_by_hand(pool: native.Pool, isa: str):
    """Five tokens of two channels with eight bits: two words a channel, the second is short."""
    codec = SectionCodec.integer(8, asymmetric=True, axis=Axis.CHANNEL)
    rows = bf16([[[0, -255], [51, 0], [102, -255], [153, -255], [255, -255]]])
    stored = encode_one(pool, DType.BF16, codec, rows)
    assert stored[:64] == b"\x00\x00\x80\x3f\x7f\xc3\x80\x3f".ljust(64, b"\0")
    words = bytes([0, 51, 102, 153]) + bytes([0, 255, 0, 0]) + bytes([255, 0, 0, 0]) + bytes(4)
    assert stored[64:] == words.ljust(64, b"\0")


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16, DType.FP32])
def test_group_outside_the_domain_decodes_to_nan_alone(pool: native.Pool, isa: str, dtype: DType):
    codec = SectionCodec.integer(4, group_size=32)
    shape = Shape(dtype=dtype, codecs=(codec,), head_count=1, token_count=2, head_size=64)
    values = np.linspace(-4, 4, 128, dtype=np.float32).reshape(shape.rows)
    values[0, 0, 1, 40] = np.inf
    rows = from_float32(values, dtype).astype(shape.item)
    if dtype is DType.FP16:
        rows[0, 0, 1, 40] = 0x7C00
    rows[0, 0, 1, 40] = {DType.BF16: 0x7F00, DType.FP16: 0x7C00, DType.FP32: 0x7F000000}[dtype]
    plan = make_plan(shape, rows)
    page = np.zeros(plan.page_bytes, np.uint8)
    batch = run(pool, native.ENCODE, plan, page, rows)
    assert batch.nonfinite_groups.tolist() == [1]
    out = np.zeros_like(rows)
    assert run(pool, native.DECODE, plan, page, out).status.tolist() == [native.OK]
    nan = {DType.BF16: 0x7FC0, DType.FP16: 0x7E00, DType.FP32: 0x7FC00000}[dtype]
    assert np.argwhere(out[0, 0] == nan)[:, 0].tolist() == [1] * 32
    assert (out[0, 0, 1, 32:] == nan).all()


def test_range_beyond_the_largest_float_is_outside_the_domain(pool: native.Pool, isa: str):
    """fp32 alone: the zero point rounds down to -2^127, infinitely far from the largest."""
    codec = SectionCodec.integer(4, asymmetric=True)
    rows = np.array([[[0xFEFFFFFF, 0x7EFFFFFF, 0, 0]]], np.uint32)
    assert encode_one(pool, DType.FP32, codec, rows)[:4] == b"\x00\x00\xc0\x7f"


# --- against the oracle, and instruction sets against each other


@pytest.mark.parametrize("seed", range(60))
def test_bytes_are_those_of_the_reference(pool: native.Pool, isa: str, seed: int):
    random = np.random.default_rng(seed)
    shape = pages.random_shape(random)
    rows = pages.random_values(random, shape)
    plan = make_plan(shape, rows)
    page = np.zeros(plan.page_bytes, np.uint8)
    batch = run(pool, native.ENCODE, plan, page, rows)
    expected = [pages.reference_section(shape, rows, index) for index in range(2)]
    for index in range(2):
        stored = expected[index][0].ljust(pages.pad64(len(expected[index][0])), b"\0")
        assert pages.section_of(plan, shape, page, index) == stored
    assert batch.nonfinite_groups.tolist() == [sum(outside for _, outside in expected)]
    out = np.zeros_like(rows)
    run(pool, native.DECODE, plan, page, out)
    for index in range(2):
        stored = expected[index][0]
        decoded = decode_section(stored, shape.rows[1:], shape.dtype, shape.codecs[index])
        assert np.array_equal(out[index], decoded)


@pytest.mark.parametrize("seed", range(60))
def test_only_what_is_described_is_written(pool: native.Pool, isa: str, seed: int):
    """Odd strides and addresses, over two fills: what is not a row or a page stays as it was."""
    random = np.random.default_rng(1000 + seed)
    shape = pages.random_shape(random)
    values = pages.random_values(random, shape)
    order = random.permutation(3).tolist()
    shifts = random.integers(0, 64, 2).tolist()
    results = []
    for fill in (0xAA, 0x55):
        gaps = np.random.default_rng(seed)
        _, source = pages.scattered(gaps, shape, fill, shifts[0], order)
        source[:] = values
        plan = make_plan(shape, source)
        space = np.full(plan.page_bytes + 128, fill, np.uint8)
        page = space[shifts[1] : shifts[1] + plan.page_bytes]
        run(pool, native.ENCODE, plan, page, source)
        assert (space[: shifts[1]] == fill).all()
        assert (space[shifts[1] + plan.page_bytes :] == fill).all()
        buffer, target = pages.scattered(np.random.default_rng(seed), shape, fill, shifts[0], order)
        assert run(pool, native.DECODE, plan, page, target).status.tolist() == [native.OK]
        decoded = target.copy()
        target[:] = np.frombuffer(bytes([fill]) * target.itemsize, target.dtype)
        assert (buffer == fill).all()
        results.append((page.tobytes(), decoded.tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("seed", range(40))
def test_any_stored_bytes_decode_as_the_reference_says(pool: native.Pool, isa: str, seed: int):
    """Parameters that no encoder writes: negative, infinite, NaN, or of products that overflow."""
    random = np.random.default_rng(2000 + seed)
    shape = pages.random_shape(random)
    rows = np.zeros(shape.rows, shape.item)
    plan = make_plan(shape, rows)
    page = pages.encoded(pool, plan, rows)
    stored = [len(pages.reference_section(shape, rows, index)[0]) for index in range(2)]
    expected = []
    start = plan.structure.header_bytes
    for index, size in enumerate(stored):
        extreme = random.choice([0x7F, 0xFF], size)
        hostile = np.where(random.random(size) < 0.3, extreme, random.integers(0, 256, size))
        page[start : start + size] = hostile
        data = page[start : start + size].tobytes()
        expected.append(decode_section(data, shape.rows[1:], shape.dtype, shape.codecs[index]))
        padded = page[start : start + pages.pad64(size)].tobytes()
        pages.store_checksum(page, pages.TABLE_OFFSET + pages.ENTRY_BYTES * index + 16, padded)
        start += pages.pad64(size)
    end = plan.structure.header_bytes - 8
    pages.store_checksum(page, end, page[:end].tobytes())
    assert run(pool, native.DECODE, plan, page, rows).status.tolist() == [native.OK]
    for index in range(2):
        assert np.array_equal(rows[index], expected[index])
