"""Int sections whose rows are transformed: derotated keys and Hadamard rows, on every instruction
set, beside the reference and beside arithmetic so plain that it can be checked by eye.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pages import IDENTITY, native_decode, native_encode, reseal

from kvcodec._reference_transform import hadamard, turned
from kvcodec.codec import Codec
from kvcodec.derotation import ROTARY_EXTENSION
from kvcodec.errors import ConfigError, CorruptPage
from kvcodec.format import EncodedPage, Extension
from kvcodec.identity import Namespace
from kvcodec.layout import DType, PageLayout, Role
from kvcodec.plan import PagePlan
from kvcodec.reference import decode_section, encode_section, from_float32, to_float32
from kvcodec.rotary import INTERLEAVED, SPLIT, Rotary
from kvcodec.section import RAW, Axis, Kind, SectionCodec, Transform
from kvcodec.spec import CodecSpec

KEY = "7a17"
F32 = np.float32
DTYPES = [DType.BF16, DType.FP16, DType.FP32]

Bits = npt.NDArray[Any]


def rotary_of(size: int, style: int = SPLIT) -> Rotary:
    pairs = size // 2
    turns = F32(100.0) ** -(np.arange(pairs, dtype=F32) / pairs)
    return Rotary(size, style, tuple(turns.astype(float).tolist()))


class Section:
    """Keys of a shape and a codec, with a page around them whose values are raw."""

    def __init__(
        self, text: str, shape: tuple[int, int, int], dtype: DType, rotary: Rotary | None = None
    ) -> None:
        heads, tokens, size = shape
        self.shape, self.dtype = shape, dtype
        layout = PageLayout.mha(
            dtype=dtype, token_count=tokens, layer_count=1, head_count=heads, head_size=size
        )
        self.namespace = Namespace(IDENTITY, layout)
        codecs = [SectionCodec.parse(text), RAW]
        self.plan = PagePlan.build(self.namespace, codecs, len(KEY), rotary=rotary)
        self.codec, self.rotary = self.plan.codecs[0], self.plan.rotary

    def write(self, codec: Codec, rows: Bits) -> tuple[bytes, int]:
        return native_encode(codec, self.plan, KEY, [rows[None], np.zeros_like(rows)[None]])

    def read(self, codec: Codec, page: bytes) -> Bits:
        found = native_decode(codec, self.namespace, self.plan, KEY, page)
        assert isinstance(found, bytes), found
        kind = np.uint32 if self.dtype is DType.FP32 else np.uint16
        return np.frombuffer(found, kind, int(np.prod(self.shape))).reshape(self.shape)


def rows_of(shape: tuple[int, int, int], dtype: DType, seed: int) -> Bits:
    """Elements like those of a cache, and each time something that is odd."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * np.exp(random.standard_normal((shape[0], 1, shape[2])))
    values += 5 * random.standard_normal((shape[0], 1, shape[2]))
    if seed == 1:
        values[..., ::3] = 0
    if seed == 2:
        values[random.random(shape) < 0.01] = np.nan
    if seed == 3:
        values *= 3e38 if dtype is not DType.FP16 else 6e4
    if seed == 4:
        values *= 2.0**-130 if dtype is not DType.FP16 else 2.0**-18
    with np.errstate(over="ignore"):
        bits = from_float32(values.astype(F32), dtype)
    if seed == 5:
        bits = random.integers(0, 1 << 8 * bits.itemsize, shape).astype(bits.dtype)
    return bits


SPLIT_SHAPES = [  # heads, tokens, head size; rotated channels
    ((2, 64, 128), 128),
    ((3, 33, 64), 64),
    ((1, 70, 96), 96),
    ((2, 20, 80), 32),
    ((1, 130, 256), 256),
    ((2, 9, 56), 48),
    ((1, 1, 2), 2),
]
CASES = [
    *(
        (f"int{bits}-channel-derotated{rest}", shape, rotary_of(size, style))
        for bits, rest, style in (
            (4, "-asym-g64", SPLIT),
            (4, "-g32", INTERLEAVED),
            (2, "-asym-g16", SPLIT),
            (8, "-asym", INTERLEAVED),
            (8, "-g5", SPLIT),
        )
        for shape, size in SPLIT_SHAPES
    ),
    *(
        (f"int{bits}-hadamard{rest}", shape, None)
        for bits, rest in ((4, "-asym"), (4, "-g64"), (2, "-asym-g32"), (8, "-g20"), (8, ""))
        for shape in ((2, 64, 128), (3, 5, 64), (1, 7, 512), (2, 9, 32), (2, 3, 8), (1, 4, 1))
    ),
]


@pytest.mark.parametrize(
    ("text", "shape", "rotary"), CASES, ids=[f"{text}-{shape}" for text, shape, _ in CASES]
)
def test_every_instruction_set_equals_the_reference(
    isa: str, codec: Codec, text: str, shape: tuple[int, int, int], rotary: Rotary | None
):
    """Bytes, groups outside the domain, and numbers: of usual rows and of any bits at all."""
    for seed in range(6):
        dtype = DTYPES[seed % 3 if "asym" in text else -seed % 3]
        section = Section(text, shape, dtype, rotary)
        assert section.codec.transform is not Transform.NONE
        rows = rows_of(shape, dtype, seed)
        page, outside = section.write(codec, rows)
        stored, beyond = encode_section(rows, dtype, section.codec, section.rotary)
        found = bytes(EncodedPage.parse(page).section(0))
        assert found[: len(stored)] == stored, (isa, seed)
        assert outside == beyond
        wanted = decode_section(stored, shape, dtype, section.codec, section.rotary)
        assert np.array_equal(section.read(codec, page), wanted), (isa, seed)


@pytest.mark.parametrize("text", ["int4-channel-derotated-asym-g64", "int4-hadamard-asym"])
def test_any_stored_bytes_decode_alike(isa: str, codec: Codec, text: str):
    """Scales and zeros that no encoder writes mean the same to every decoder."""
    rotary = rotary_of(128) if "derotated" in text else None
    random = np.random.default_rng(3)
    for dtype in DTYPES:
        section = Section(text, (2, 64, 128), dtype, rotary)
        page, _ = section.write(codec, rows_of(section.shape, dtype, 0))
        header = EncodedPage.parse(page).header
        start, size = header.section_offsets[0], header.stored_bytes[0]
        for _ in range(4):
            made = bytearray(page)
            made[start : start + size] = random.bytes(size)
            stored = bytes(made[start : start + size])
            wanted = decode_section(stored, section.shape, dtype, section.codec, section.rotary)
            found = section.read(codec, bytes(reseal(made)))
            assert np.array_equal(found, wanted), isa


# --- what a transform is


@pytest.mark.parametrize("style", [SPLIT, INTERLEAVED])
def test_a_turn_is_one_complex_product(style: int):
    """Written and read, pair by pair, against complex numbers."""
    rotary = rotary_of(12, style)
    rows = np.random.default_rng(0).standard_normal((1, 40, 16)).astype(F32)
    pairs = [(i, i + 6) if style == SPLIT else (2 * i, 2 * i + 1) for i in range(6)]
    for direction in (1, -1):
        found = turned(rows, rotary, [0], direction)
        assert np.array_equal(found[..., 12:], rows[..., 12:])
        for token in range(40):
            for (a, b), frequency in zip(pairs, rotary.frequencies, strict=True):
                number = complex(rows[0, token, a], rows[0, token, b])
                number *= np.exp(1j * direction * frequency * token)
                got = complex(found[0, token, a], found[0, token, b])
                assert abs(got - number) <= 1e-6 * abs(number)


def test_hadamard_is_the_matrix_of_signs():
    """Element i of the result is the sum of x[j], negative where i and j share an odd number of
    bits; twice is n times the row.
    """
    for size in (1, 2, 8, 64):
        rows = np.random.default_rng(size).integers(-99, 99, (2, 3, size)).astype(F32)
        signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
        assert np.array_equal(hadamard(rows), rows @ np.array(signs, F32))
        assert np.array_equal(hadamard(hadamard(rows)), size * rows)


def test_symmetric_hadamard_rows_decode_without_rounding():
    """Sums of codes times one scale: exact in binary32, and so is what fp32 rows decode to."""
    codec = SectionCodec.parse("int8-hadamard")
    rows = np.random.default_rng(1).standard_normal((1, 2, 128)).astype(F32)
    stored, _ = encode_section(rows.view(np.uint32), DType.FP32, codec)
    scales = (np.frombuffer(stored[:4], "<u2").astype(np.uint32) << 16).view(F32)
    decoded = decode_section(stored, rows.shape, DType.FP32, codec).view(F32)
    for token in range(2):
        codes = [code - 128 for code in stored[64 + 128 * token :][:128]]
        for i in range(128):
            total = sum(c * (-1) ** (i & j).bit_count() for j, c in enumerate(codes))
            exact = Fraction(float(scales[token])) * total / 128
            assert Fraction(float(decoded[0, token, i])) == exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [Transform.DEROTATED, Transform.HADAMARD])
def test_section_is_an_int_section_of_the_transformed_numbers(dtype: DType, transform: Transform):
    """Parameters and codes are those of an fp32 page that holds these numbers."""
    axis = Axis.CHANNEL if transform is Transform.DEROTATED else Axis.TOKEN
    plain = SectionCodec.integer(4, asymmetric=True, axis=axis, group_size=32)
    rotary = rotary_of(64) if axis else None
    rows = rows_of((2, 64, 64), dtype, 0)
    values = to_float32(rows, dtype)
    numbers = hadamard(values) if rotary is None else turned(values, rotary, [0, 0], -1)
    wanted, _ = encode_section(numbers.view(np.uint32), DType.FP32, plain)
    found, _ = encode_section(rows, dtype, replace(plain, transform=transform), rotary)
    assert found == wanted


def biased_keys(rotary: Rotary, tokens: int) -> Bits:
    """Normal numbers with a bias of 100 in fast pairs, rotated by position."""
    random = np.random.default_rng(2)
    keys = random.standard_normal((2, tokens, rotary.size)).astype(F32)
    keys[..., rotary.pairs[:4, 0]] += 100
    position = turned(keys, rotary, [0, 0], 1)
    return from_float32(position, DType.BF16)


def error_of(rows: Bits, text: str, rotary: Rotary | None) -> float:
    codec = SectionCodec.parse(text)
    stored, _ = encode_section(rows, DType.BF16, codec, rotary)
    decoded = decode_section(stored, rows.shape, DType.BF16, codec, rotary)
    difference = to_float32(decoded, DType.BF16) - to_float32(rows, DType.BF16)
    return float(np.sqrt(np.square(difference).mean()))


def test_key_bias_disappears_in_the_zero_of_a_channel():
    """What derotation is for: a bias of keys in fast pairs costs no precision."""
    rotary = rotary_of(64)
    rows = biased_keys(rotary, 64)
    plain = error_of(rows, "int4-channel-asym-g64", None)
    assert error_of(rows, "int4-channel-derotated-asym-g64", rotary) < plain / 4


# --- specs and plans


@pytest.mark.parametrize(
    ("text", "transform", "axis"),
    [
        ("int4-channel-derotated-asym-g64", Transform.DEROTATED, Axis.CHANNEL),
        ("int8-channel-derotated", Transform.DEROTATED, Axis.CHANNEL),
        ("int2-hadamard-asym-g32", Transform.HADAMARD, Axis.TOKEN),
        ("int4-hadamard", Transform.HADAMARD, Axis.TOKEN),
    ],
)
def test_text_of_a_transformed_codec(text: str, transform: Transform, axis: Axis):
    codec = SectionCodec.parse(text)
    assert (codec.transform, codec.axis, codec.kind) == (transform, axis, Kind.INT)
    assert codec.text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4-derotated-asym", "groups per channel"),
        ("int4-channel-hadamard", "groups per token"),
        ("int4-asym-hadamard", "wanted raw"),
        ("ecq-3-channel-derotated", "wanted raw"),
        ("fp8-hadamard", "wanted raw"),
    ],
)
def test_transform_that_makes_no_sense_is_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        SectionCodec.parse(text)


def test_values_are_not_derotated():
    for text in (
        "key=raw value=int4-channel-derotated",
        "key=raw value=raw layer.3=raw,int4-channel-derotated",
    ):
        with pytest.raises(ConfigError, match="values are not rotated"):
            CodecSpec.parse(text)


def test_axis_option_and_transform_exclude_each_other():
    with pytest.raises(ConfigError, match="groups per channel"):
        CodecSpec.from_options({"preset": "kv4-derotated", "axis_key": 0})
    with pytest.raises(ConfigError, match="groups per token"):
        CodecSpec.from_options({"preset": "kv4-hadamard", "axis_value": 1})


@pytest.mark.parametrize("size", [80, 96, 8192])
def test_hadamard_needs_a_power_of_two(size: int):
    with pytest.raises(ConfigError, match=f"power of two, up to 4096; key rows have {size}"):
        Section("int4-hadamard", (1, 4, size), DType.BF16)


MLA = PageLayout.mla(dtype=DType.BF16, token_count=32, layer_count=2, latent_size=128, rope_size=32)


def test_only_what_is_rotated_is_derotated():
    """Of MLA the RoPE part alone, at eight bits; the latent and values keep what they have."""
    codecs = CodecSpec.parse("kv4-derotated").section_codecs(MLA)
    plan = PagePlan.build(Namespace(IDENTITY, MLA), codecs, 4, rotary=rotary_of(32))
    assert [codec.text for codec in plan.codecs[:2]] == [
        "int4-channel-asym-g32",
        "int8-channel-derotated-asym-g32",
    ]


@pytest.mark.parametrize(
    ("size", "rotary"), [(64, None), (64, rotary_of(96)), (300, rotary_of(64))]
)
def test_without_a_rotation_that_fits_keys_are_plain(size: int, rotary: Rotary | None):
    """Unknown, too large, or rows of more than 256: per channel, and nothing says otherwise."""
    derotated = Section("int4-channel-derotated-asym", (1, 32, size), DType.BF16, rotary)
    plain = Section("int4-channel-asym", (1, 32, size), DType.BF16)
    assert derotated.plan.header == plain.plan.header
    assert derotated.rotary is None


def test_page_says_how_its_keys_are_turned(codec: Codec):
    """Any reader decodes it: flag and frequencies travel in the page."""
    rotary = rotary_of(64)
    section = Section("int4-channel-derotated-asym", (2, 64, 64), DType.BF16, rotary)
    page, _ = section.write(codec, biased_keys(rotary, 64))
    header = EncodedPage.parse(page).header
    assert header.codecs[0].transform is Transform.DEROTATED
    assert header.extensions == (Extension(ROTARY_EXTENSION, rotary.record),)
    assert PagePlan.of_page(header, memoryview(page)).header == section.plan.header
    other = Section("raw", (2, 64, 64), DType.BF16)
    found = native_decode(codec, other.namespace, other.plan, KEY, page)
    assert found == native_decode(codec, section.namespace, section.plan, KEY, page)
    assert isinstance(found, bytes)


def forged_plan(section: Section, **changes: object) -> EncodedPage | CorruptPage:
    """The page under a header with other extensions or another layout."""
    plan = replace(section.plan, **changes)
    sections = [bytes(int(size)) for size in plan.stored_bytes]
    page = bytearray(plan.finished_header(KEY, [0, 0], list(map(len, sections))))
    page += b"".join(part.ljust(-(-len(part) // 64) * 64, b"\0") for part in sections)
    try:
        return EncodedPage.parse(bytes(reseal(page)))
    except CorruptPage as error:
        return error


def test_derotated_section_without_a_rotation_is_damage(codec: Codec):
    """The flag needs the extension, rows that hold all pairs, and a stream that is rotated."""
    section = Section("int4-channel-derotated-asym", (1, 32, 64), DType.BF16, rotary_of(64))
    assert isinstance(forged_plan(section), EncodedPage)
    header = bytearray(section.plan.header)
    at = header.index(rotary_of(64).record[:4])
    for place, value in ((at - 8, 99), (at, 66)):  # extension of another type; more channels
        forged = bytearray(header)
        forged[place] = value
        error = forged_plan(section, header=bytes(forged))
        assert isinstance(error, CorruptPage), place
    for role in (Role.LATENT, Role.OPAQUE):
        forged = bytearray(header)
        forged[64] = role
        error = forged_plan(section, header=bytes(forged))
        assert isinstance(error, CorruptPage)
        assert error.reason == "corrupt:section"
