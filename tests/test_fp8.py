"""Kind fp8: the bytes of a plain cast to e4m3fn, on every instruction set and in every shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pages import IDENTITY, native_decode, native_encode

from kvcodec._reference_elements import from_e4m3, to_e4m3
from kvcodec.codec import Codec
from kvcodec.errors import ConfigError
from kvcodec.format import EncodedPage
from kvcodec.identity import Namespace
from kvcodec.layout import DType, PageLayout
from kvcodec.plan import PagePlan
from kvcodec.reference import decode_section, encode_section, from_float32, to_float32
from kvcodec.spec import CodecSpec, Kind, SectionCodec

KEY = "f8f8"
FP8 = SectionCodec.parse("fp8")
SIXTEEN_BITS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)

Bits = npt.NDArray[Any]


def every_number(dtype: DType) -> Bits:
    """All bit patterns of 16 bits; of fp32 those around every number and every tie of e4m3fn."""
    if dtype is not DType.FP32:
        return SIXTEEN_BITS
    numbers = from_e4m3(np.arange(0x7F, dtype=np.uint8)).astype(np.float64)
    ties = (numbers[1:] + numbers[:-1]) / 2
    places = np.concatenate([numbers, ties, [464, 480, 2.0**-10, 1e-30, 1e30, np.inf, np.nan]])
    bits = places.astype(np.float32).view(np.uint32)
    near = np.concatenate([bits - 1, bits, bits + 1])
    return np.concatenate([near, near | np.uint32(0x80000000)])


def test_numbers_of_e4m3fn():
    """One sign, four bits of exponent with bias 7, three of mantissa; no infinity, one NaN."""
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        value = np.nan if code & 0x7F == 0x7F else -value if code & 0x80 else value
        assert np.array_equal(from_e4m3(np.uint8([code]))[0], np.float32(value), equal_nan=True)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16, DType.FP32])
def test_bytes_are_those_of_torch(dtype: DType):
    """`tensor.to(torch.float8_e4m3fn)`, which LMCache's serde stores and engines without scales
    hold; both ways, within the range. Beyond it torch gave NaN before it learned to saturate.
    """
    torch = pytest.importorskip("torch")
    bits = every_number(dtype)
    kinds = {
        DType.BF16: (torch.bfloat16, np.int16),
        DType.FP16: (torch.float16, np.int16),
        DType.FP32: (torch.float32, np.int32),
    }
    kind, integer = kinds[dtype]
    cast = torch.from_numpy(bits.view(integer).copy()).view(kind).to(torch.float8_e4m3fn)
    stored, outside = encode_section(bits.reshape(1, -1, 1), dtype, FP8)
    values = to_float32(bits, dtype)
    known = np.abs(values) <= 464
    ours = np.frombuffer(stored, np.uint8)
    assert np.array_equal(ours[known], cast.view(torch.uint8).numpy()[known])
    assert set((ours[np.abs(values) > 464] & 0x7F).tolist()) == {0x7E}
    assert set((ours[np.isnan(values)] & 0x7F).tolist()) == {0x7F}
    assert outside == (~known).sum()
    back = decode_section(stored, (1, len(bits), 1), dtype, FP8).reshape(-1)
    wanted = cast.to(kind).view(getattr(torch, integer.__name__)).numpy().view(bits.dtype)
    assert np.array_equal(back[known], wanted[known])


def plan_of(dtype: DType, heads: int, tokens: int, size: int) -> PagePlan:
    layout = PageLayout.mha(
        dtype=dtype, token_count=tokens, layer_count=2, head_count=heads, head_size=size
    )
    codecs = CodecSpec.parse("fp8").section_codecs(layout)
    return PagePlan.build(Namespace(IDENTITY, layout), codecs, len(KEY))


@pytest.mark.parametrize(
    ("heads", "tokens", "size"), [(2, 64, 128), (3, 5, 32), (1, 70, 33), (2, 9, 1), (4, 3, 100)]
)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16, DType.FP32])
def test_every_instruction_set_equals_the_reference(
    isa: str, codec: Codec, dtype: DType, heads: int, tokens: int, size: int
):
    """Any bits: bytes, counts of rows outside the range, and what any bytes decode to."""
    plan = plan_of(dtype, heads, tokens, size)
    random = np.random.default_rng(size)
    shape = (2, heads, tokens, size)
    numbers = every_number(dtype)
    wild, usual = random.choice(numbers, shape), random.choice(numbers, shape)
    usual[~(np.abs(to_float32(usual, dtype)) < 300)] = 0
    usual[0, 0, 1, size - 1] = from_float32(np.float32([500]), dtype)[0]
    namespace = Namespace(IDENTITY, plan.layout)
    page, outside = native_encode(codec, plan, KEY, [wild, usual])
    assert len(page) == plan.page_bytes
    encoded = EncodedPage.parse(page)
    expected = 0
    for number, (rows, layer) in enumerate([(wild, 0), (usual, 0), (wild, 1), (usual, 1)]):
        stored, beyond = encode_section(rows[layer], dtype, FP8)
        assert bytes(encoded.section(number))[: len(stored)] == stored, (isa, number)
        expected += beyond
    assert outside == expected
    found = native_decode(codec, namespace, plan, KEY, page)
    assert isinstance(found, bytes)
    parts = [
        decode_section(bytes(encoded.section(i)), shape[1:], dtype, FP8).tobytes() for i in range(4)
    ]
    assert found == b"".join(parts)


def test_fp8_has_no_options():
    """It is eight bits a number, and nothing else can be asked of it."""
    assert (FP8.kind, FP8.text, FP8.nominal_bits) == (Kind.FP8, "fp8", 8)
    for changes in ({"asymmetric": True}, {"group_size": 64}, {"bits": 4}, {"axis": 1}):
        with pytest.raises(ConfigError, match="eight bits"):
            SectionCodec(**({"kind": Kind.FP8, "bits": 8} | changes))
    with pytest.raises(ConfigError, match="fp8"):
        SectionCodec.parse("fp8-g64")
    layout = PageLayout.mha(
        dtype=DType.FP8_E4M3, token_count=4, layer_count=1, head_count=1, head_size=32
    )
    with pytest.raises(ConfigError, match="stored raw"):
        PagePlan.build(Namespace(IDENTITY, layout), [FP8, FP8], len(KEY))


def test_rope_part_of_fp8_keys_is_fp8():
    layout = PageLayout.mla(
        dtype=DType.BF16, token_count=4, layer_count=1, latent_size=64, rope_size=32
    )
    assert CodecSpec.parse("fp8").section_codecs(layout) == (FP8, FP8)


def test_options_for_int_leave_fp8_alone():
    spec = CodecSpec.from_options({"spec": "key=fp8 value=int4-g64", "asym": True})
    assert spec.text == "key=fp8 value=int4-asym-g64"
    spec = CodecSpec.from_options({"preset": "fp8", "nbits_key": 4})
    assert spec.text == "key=int4-g64 value=fp8"
    with pytest.raises(ConfigError, match="asym has no effect"):
        CodecSpec.from_options({"preset": "fp8", "asym": True})


def test_rounding_is_monotone():
    """Rounding never turns two numbers round."""
    values = np.linspace(0, 470, 100_001).astype(np.float32)
    codes, _ = to_e4m3(values)
    assert (np.diff(codes.astype(int)) >= 0).all()
