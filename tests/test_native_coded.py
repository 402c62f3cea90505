"""Sections of kind ecq on every instruction set: the bytes and the rows of the reference, damage
found by all or by none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mutants import damaged_sections
from pages import IDENTITY, native_decode

from kvcodec import native
from kvcodec.codec import Codec
from kvcodec.errors import CorruptPage
from kvcodec.format import EncodedPage
from kvcodec.identity import Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan
from kvcodec.reference_ecq import DamagedSection, EcqCodec, decode_ecq, encode_ecq
from kvcodec.rotary import INTERLEAVED, SPLIT, Rotary
from kvcodec.spec import CodecSpec

KEY = "ecc0ded0"
SHAPES = [  # heads, tokens, head size
    (2, 64, 128),
    (5, 64, 64),
    (1, 65, 80),
    (3, 33, 40),
    (1, 130, 256),
    (2, 16, 300),
    (1, 9, 7),
]
# Bits, per channel, and the style and share of the rotation that is known.
CODECS = [
    (3.0, False, None),
    (4.0, False, None),
    (6.0, False, None),
    (1.5, True, None),
    (4.0, True, None),
    (3.0, True, (SPLIT, 1.0)),
    (5.0, True, (INTERLEAVED, 1.0)),
    (2.5, True, (SPLIT, 0.4)),
]

Bits = npt.NDArray[Any]


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    before = native.isa()
    yield native.available_isas()
    native.set_isa(before)


class Section:
    """A codec and a shape, with and without a page around them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: DType,
        bits: float,
        per_channel: bool,
        rotation: tuple[int, float] | None,
    ) -> None:
        heads, tokens, size = shape
        self.shape, self.dtype = shape, dtype
        rotary = None
        if rotation is not None:
            style, share = rotation
            pairs = max(1, int(size * share) // 2)
            turns = np.float32(100.0) ** -(np.arange(pairs, dtype=np.float32) / pairs)
            rotary = Rotary(2 * pairs, style, tuple(turns.astype(float).tolist()))
        layout = PageLayout.mha(
            dtype=dtype, token_count=tokens, layer_count=1, head_count=heads, head_size=size
        )
        self.namespace = Namespace(IDENTITY, layout)
        text = f"key=ecq-{bits}{'-channel' if per_channel else ''} value=raw"
        codecs = CodecSpec.parse(text).section_codecs(layout)
        self.plan = PagePlan.build(self.namespace, codecs, len(KEY), rotary=rotary)
        may_turn = rotary is not None and rotary.size <= size <= 256
        self.codec = EcqCodec(int(bits * 16), per_channel, rotary if may_turn else None)

    def rows(self, seed: int) -> Bits:
        """Elements like those of a cache, keys turned, and each time something that is odd."""
        random = np.random.default_rng(seed)
        heads, tokens, size = self.shape
        scale = np.exp(random.standard_normal((heads, 1, size)))
        middle = random.standard_normal((heads, 1, size)) * (random.random((heads, 1, size)) < 0.3)
        values = random.standard_normal(self.shape) * scale + 9 * middle
        rotary = self.codec.rotary
        if rotary is not None and seed % 2:
            left, right = rotary.pairs.T
            angle = np.arange(tokens)[:, None] * np.array(rotary.frequencies)
            a, b = values[..., left], values[..., right]
            values[..., left] = a * np.cos(angle) - b * np.sin(angle)
            values[..., right] = b * np.cos(angle) + a * np.sin(angle)
        if seed == 2:
            values[..., ::3] = 0
        if seed == 3:
            values[random.random(self.shape) < 0.02] *= 300
        if seed == 4:
            values *= 2.0**-18  # denormal in fp16
        return to_bits(values.astype(np.float32), self.dtype)

    def write(self, codec: Codec, rows: Bits) -> bytes:
        arrays = [rows[None, None].copy(), np.zeros_like(rows)[None, None]]
        views = PageViews.of_arrays(self.plan.layout, arrays)
        target = np.full(self.plan.page_bytes, 0xA5, np.uint8)
        size = codec.encode_into(self.plan, [KEY.encode()], views, [target]).page_bytes[0]
        return target[: int(size)].tobytes()

    def read(self, codec: Codec, page: bytes) -> Bits | None:
        """The keys; None if they are damaged."""
        found = native_decode(codec, self.namespace, self.plan, KEY, page)
        if not isinstance(found, bytes):
            assert isinstance(found, CorruptPage)
            return None
        kind = np.uint32 if self.dtype is DType.FP32 else np.uint16
        return np.frombuffer(found, kind, int(np.prod(self.shape))).reshape(self.shape)


def to_bits(values: npt.NDArray[np.float32], dtype: DType) -> Bits:
    if dtype is DType.FP32:
        return values.view(np.uint32)
    if dtype is DType.FP16:
        return np.clip(values, -6e4, 6e4).astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def stored_of(page: bytes) -> bytes:
    encoded = EncodedPage.parse(page)
    return bytes(encoded.section(0))[: encoded.header.stored_bytes[0]]


@lru_cache(maxsize=1000)
def expected(
    shape: tuple[int, int, int], dtype: DType, choice: int, seed: int
) -> tuple[bytes, Bits]:
    """What the reference writes, and what it reads."""
    section = Section(shape, dtype, *CODECS[choice])
    stored = encode_ecq(section.rows(seed), dtype, section.codec)
    return stored, decode_ecq(stored, shape, dtype, section.codec)


@pytest.mark.parametrize("choice", range(len(CODECS)), ids=[str(codec) for codec in CODECS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_reference(
    codec: Codec, every_isa: list[str], shape: tuple[int, int, int], choice: int
):
    dtypes = list(DType)[:3]
    for seed in range(5):
        dtype = dtypes[(seed + choice) % 3]
        section = Section(shape, dtype, *CODECS[choice])
        stored, values = expected(shape, dtype, choice, seed)
        for isa in every_isa:
            native.set_isa(isa)
            page = section.write(codec, section.rows(seed))
            assert stored_of(page) == stored, isa
            assert np.array_equal(section.read(codec, page), values), isa


def test_turned_keys_are_turned_back(codec: Codec, every_isa: list[str]):
    """A bias of rotated keys vanishes in the mean: fewer bytes, and a flag that says so."""
    turned = Section((2, 64, 128), DType.BF16, 3.0, True, (SPLIT, 1.0))
    plain = Section((2, 64, 128), DType.BF16, 3.0, True, None)
    for isa in every_isa:
        native.set_isa(isa)
        stored = stored_of(turned.write(codec, turned.rows(1)))
        assert stored[0] == 1
        assert len(stored) < len(stored_of(plain.write(codec, turned.rows(1))))


@pytest.mark.parametrize("special", [0x7F80, 0xFFC1, 0x4F00, 0xCF00])
def test_what_the_codec_cannot_hold_is_stored_raw(codec: Codec, every_isa: list[str], special: int):
    section = Section((2, 64, 128), DType.BF16, 3.0, False, None)
    rows = section.rows(0)
    rows[1, 63, 127] = special
    for isa in every_isa:
        native.set_isa(isa)
        assert stored_of(section.write(codec, rows)) == rows.tobytes()


@pytest.mark.parametrize("choice", [0, 5])
def test_all_readers_agree_on_damage(codec: Codec, every_isa: list[str], choice: int):
    """With right checksums: each refuses what the reference refuses, and reads what it reads."""
    section = Section((2, 20, 72), DType.BF16, *CODECS[choice])
    page = section.write(codec, section.rows(1))
    refused = 0
    for made in damaged_sections(page, np.random.default_rng(7)):
        try:
            values = decode_ecq(stored_of(made), section.shape, section.dtype, section.codec)
        except DamagedSection:
            values = None
            refused += 1
        for isa in every_isa:
            native.set_isa(isa)
            found = section.read(codec, made)
            assert (found is None) == (values is None), isa
            assert values is None or np.array_equal(found, values), isa
    assert refused > 50
