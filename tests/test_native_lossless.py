"""Sections of kind lossless and block on every instruction set: the bytes of the reference, every
bit back, damage found.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import damaged_sections
from pages import IDENTITY, native_decode

from kvcodec import native
from kvcodec._reference_stream import DamagedSection
from kvcodec.codec import Codec, _native_plan
from kvcodec.errors import ConfigError, CorruptPage
from kvcodec.format import EncodedPage
from kvcodec.identity import Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan
from kvcodec.reference_lossless import (
    decode_block,
    decode_lossless,
    encode_block,
    encode_lossless,
)
from kvcodec.spec import Axis, CodecSpec, Kind, SectionCodec
from kvcodec.testing.strategies import head_sizes

KEY = "10551e55"
TEXTS = ["lossless-fast", "lossless", "lossless-channel"]
DTYPES = [DType.BF16, DType.FP16]
SHAPES = [  # heads, tokens, head size
    (1, 1, 200),
    (4, 64, 128),
    (3, 65, 64),
    (2, 16, 256),
    (1, 200, 80),
    (5, 7, 96),
    (2, 33, 129),
    (70, 2, 40),
    (1, 9, 576),
    (2, 128, 61),
]

Rows = npt.NDArray[np.uint16]


def make_section(seed: int, shape: tuple[int, int, int], dtype: DType) -> Rows:
    """Elements like those of a cache, and each time something else that is odd."""
    random = np.random.default_rng(seed)
    heads, tokens, size = shape
    scale = np.exp(random.standard_normal((heads, 1, size)) * random.choice([0.1, 0.6, 2]))
    values = (scale * random.standard_normal(shape)).astype(np.float32)
    odd = seed % 5
    if odd == 1:
        values[random.random(shape) < 0.3] = 0
    if odd == 2:
        values[:, :: max(1, tokens // 2)] *= np.float32(2.0**9)
    if odd == 3:
        values *= np.float32(2.0**-20)  # denormal in fp16
    if dtype is DType.FP16:
        rows = np.clip(values, -6e4, 6e4).astype(np.float16).view(np.uint16)
    else:
        rows = (values.view(np.uint32) >> 16).astype(np.uint16)
    if odd == 4:
        special = [0x7FC1, 0xFFFF, 0x7F80, 0xFF80, 0x7C00, 0xFC01, 0x8000, 0, 1, 0x8001, 0x7F7F]
        rows.reshape(-1)[random.integers(0, rows.size, 3 * len(special))] = special * 3
    return rows


def plan_of(text: str, shape: tuple[int, int, int], dtype: DType) -> PagePlan:
    heads, tokens, size = shape
    layout = PageLayout.mha(
        dtype=dtype, token_count=tokens, layer_count=1, head_count=heads, head_size=size
    )
    codecs = CodecSpec.parse(f"key={text} value=raw").section_codecs(layout)
    return PagePlan.build(Namespace(IDENTITY, layout), codecs, len(KEY))


def write_page(codec: Codec, plan: PagePlan, rows: Rows, *, heads_inside: bool = False) -> bytes:
    """A page of the rows as keys, and zeros as values. The heads of a token may be neighbours."""
    arrays = [rows[None, None].copy(), np.zeros_like(rows)[None, None]]
    if heads_inside:
        arrays = [np.ascontiguousarray(array.swapaxes(2, 3)).swapaxes(2, 3) for array in arrays]
    target = np.full(plan.page_bytes, 0xA5, np.uint8)
    views = PageViews.of_arrays(plan.layout, arrays)
    size = int(codec.encode_into(plan, [KEY.encode()], views, [target]).page_bytes[0])
    return target[:size].tobytes()


def section_of(page: bytes) -> bytes:
    encoded = EncodedPage.parse(page)
    return bytes(encoded.section(0))[: encoded.header.stored_bytes[0]]


def reference_encode(text: str, rows: Rows, dtype: DType) -> bytes:
    if text == "lossless-fast":
        return encode_block(rows, dtype)
    return encode_lossless(rows, dtype, per_channel="channel" in text)


def reference_decode(
    text: str, stored: bytes, shape: tuple[int, int, int], dtype: DType
) -> Rows | None:
    """None: damaged."""
    try:
        if text == "lossless-fast":
            return decode_block(stored, shape, dtype)
        return decode_lossless(stored, shape, dtype, per_channel="channel" in text)
    except DamagedSection:
        return None


@lru_cache(maxsize=1000)
def expected_section(text: str, seed: int, shape: tuple[int, int, int], dtype: DType) -> bytes:
    """What the reference writes, and has read again."""
    rows = make_section(seed, shape, dtype)
    stored = reference_encode(text, rows, dtype)
    assert np.array_equal(reference_decode(text, stored, shape, dtype), rows)
    return stored


def read_page(codec: Codec, plan: PagePlan, page: bytes) -> Rows | None:
    """The keys; None if they are damaged."""
    found = native_decode(codec, Namespace(IDENTITY, plan.layout), plan, KEY, page)
    if not isinstance(found, bytes):
        assert isinstance(found, CorruptPage)
        return None
    stream = plan.layout.streams[0]
    shape = (stream.head_count, plan.layout.token_count, stream.head_size)
    return np.frombuffer(found, np.uint16, int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_reference(
    codec: Codec, isa: str, text: str, dtype: DType, shape: tuple[int, int, int]
):
    plan = plan_of(text, shape, dtype)
    for seed in range(5):
        rows = make_section(seed, shape, dtype)
        page = write_page(codec, plan, rows, heads_inside=seed % 2 == 0)
        assert section_of(page) == expected_section(text, seed, shape, dtype)
        assert (read_page(codec, plan, page) == rows).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("text", TEXTS)
def test_every_bit_comes_back(codec: Codec, text: str, data: st.DataObject):
    """Any elements, on any instruction set; each writes what the first one wrote."""
    shape = data.draw(
        st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 16, 63, 64, 130]), head_sizes(160))
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    rows = make_section(data.draw(st.integers(0, 1000)), shape, dtype)
    patch = data.draw(st.lists(st.integers(0, 0xFFFF), max_size=40))
    rows.reshape(-1)[: len(patch)] = patch[: rows.size]
    plan = plan_of(text, shape, dtype)
    before = native.isa()
    pages = []
    for name in native.available_isas():
        native.set_isa(name)
        pages.append(write_page(codec, plan, rows, heads_inside=len(pages) % 2 == 1))
        assert (read_page(codec, plan, pages[0]) == rows).all()
    native.set_isa(before)
    assert len(set(pages)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", TEXTS)
def test_zeros_take_little(codec: Codec, isa: str, text: str, dtype: DType):
    shape = (2, 64, 128)
    plan = plan_of(text, shape, dtype)
    rows = np.zeros(shape, np.uint16)
    page = write_page(codec, plan, rows)
    assert len(section_of(page)) < 0.91 * rows.nbytes
    assert (read_page(codec, plan, page) == 0).all()


@pytest.mark.parametrize("text", TEXTS)
def test_noise_is_stored_raw(codec: Codec, isa: str, text: str):
    shape = (2, 64, 128)
    rows = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
    for heads_inside in (False, True):
        plan = plan_of(text, shape, DType.BF16)
        page = write_page(codec, plan, rows, heads_inside=heads_inside)
        assert section_of(page) == rows.tobytes()


def narrow_section(shape: tuple[int, int, int], dtype: DType) -> Rows:
    """Three exponents and all signs and mantissas: small in every codec, with few escapes."""
    random = np.random.default_rng(1)
    shift = 7 if dtype is DType.BF16 else 10
    exponent = random.choice([11, 12, 13, 3], shape, p=[0.3, 0.4, 0.29, 0.01])
    rest = random.integers(0, 1 << shift, shape) | random.integers(0, 2, shape) << 15
    return (exponent << shift | rest).astype(np.uint16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", TEXTS)
def test_all_readers_agree_on_damage(codec: Codec, text: str, dtype: DType):
    """With right checksums: each refuses what the reference refuses, and reads what it reads."""
    shape = (2, 20, 72)
    plan = plan_of(text, shape, dtype)
    page = write_page(codec, plan, narrow_section(shape, dtype))
    before = native.isa()
    refused = 0
    for made in damaged_sections(page, np.random.default_rng(7)):
        expected = reference_decode(text, section_of(made), shape, dtype)
        refused += expected is None
        for name in native.available_isas():
            native.set_isa(name)
            found = read_page(codec, plan, made)
            assert (found is None) == (expected is None)
            assert expected is None or (found == expected).all()
    native.set_isa(before)
    assert refused > 60


@pytest.mark.parametrize("text", TEXTS)
def test_verification_finds_what_decoding_finds(codec: Codec, isa: str, text: str):
    """Without a row to write to."""
    shape = (2, 20, 72)
    plan = plan_of(text, shape, DType.BF16)
    page = write_page(codec, plan, narrow_section(shape, DType.BF16))
    made = [page, *damaged_sections(page, np.random.default_rng(3))][::5]
    rows = [np.zeros((1, 1, *shape), np.uint16)] * 2
    strides = PageViews.of_arrays(plan.layout, rows).strides
    data = [np.frombuffer(one, np.uint8) for one in made]
    pool = native.Pool(1)
    batch = pool.submit(
        native.VERIFY,
        _native_plan(plan, strides),
        np.array([one.__array_interface__["data"][0] for one in data], np.uint64),
        np.array([len(one) for one in data], np.uint64),
        [KEY.encode()] * len(data),
        np.zeros((len(data), 2), np.uint64),
    )
    assert batch.wait(60)
    pool.close()
    good = [int(status) == native.OK for status in batch.status]
    assert good == [read_page(codec, plan, one) is not None for one in made]
    assert good[0] and not all(good)


def test_blocks_have_no_axis():
    """Neither in a codec's text, nor by an option, nor in a page."""
    with pytest.raises(ConfigError, match="wanted raw"):
        SectionCodec.parse("lossless-fast-channel")
    with pytest.raises(ConfigError, match="lossless-fast has no axis"):
        SectionCodec(Kind.BLOCK, axis=Axis.CHANNEL)
    with pytest.raises(ConfigError, match="axis_key has no effect"):
        CodecSpec.from_options({"preset": "lossless-fast", "axis_key": 1})
    block = {"dtype": 1, "head_count": 2, "token_count": 3, "head_size": 64, "kind": 4, "bits": 16}
    assert native.section_bytes(**block) == 2 * 3 * 64 * 2
    assert native.section_bytes(**block, channel=True) == 0
