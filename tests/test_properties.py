"""What holds for every page: any shape, element type, codec and place in memory.

The reference codec is the oracle: every instruction set writes its bytes and reads its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pages import (
    decode_page,
    encode_page,
    outside_groups,
    raw_bytes,
    reseal,
    rows_of_raw,
    sections_of,
)
from profiles import examples

from kvcodec.codec import Codec
from kvcodec.errors import ConfigError
from kvcodec.format import EncodedPage, pad64, parameter_bytes
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout
from kvcodec.plan import PagePlan
from kvcodec.reference import decode_section, to_float32
from kvcodec.spec import CodecSpec, Kind
from kvcodec.testing.strategies import (
    RawPages,
    codec_specs,
    identities,
    page_keys,
    page_layouts,
    raw_pages,
)

QUANTIZABLE = st.sampled_from([dtype for dtype in DType if dtype.is_quantizable])
IDENTITY = Identity.of(model="m")


@pytest.fixture(scope="module")
def codecs() -> Iterator[list[Codec]]:
    """One of a single thread, one of several."""
    made = [Codec(threads=1), Codec(threads=3)]
    yield made
    for codec in made:
        codec.close()


def plan_of(layout: PageLayout, spec: CodecSpec, key_bytes: int = 3) -> PagePlan:
    return PagePlan.build(Namespace(IDENTITY, layout), spec.section_codecs(layout), key_bytes)


def blank(pages: RawPages) -> RawPages:
    """The same memory layout, without content."""
    memory = np.full_like(pages.memory, 0x5A)
    start = pages.memory.__array_interface__["data"][0]
    shift = memory.__array_interface__["data"][0] - start
    rows = tuple(
        np.ndarray(
            array.shape,
            array.dtype,
            memory.data,
            array.__array_interface__["data"][0] - start,
            array.strides,
        )
        for array in pages.rows
    )
    bases = (pages.views.bases.astype(np.int64) + shift).astype(np.uint64)
    views = type(pages.views)(
        layout=pages.views.layout, strides=pages.views.strides, bases=bases, owner=memory
    )
    return RawPages(views, memory, rows)


def page_rows(pages: RawPages, page: int) -> list[npt.NDArray[np.unsignedinteger]]:
    """One page's rows per stream, head groups put together: (layers, heads, tokens, head_size)."""
    rows = []
    for array in pages.rows:
        layers, groups, heads, tokens, size = array.shape[1:]
        rows.append(array[page].reshape(layers, groups * heads, tokens, size))
    return rows


KEYS = ["a00", "b11"]


@examples(50)
@given(st.data())
def test_native_encoder_writes_the_bytes_of_the_reference(
    known_isa: str, codecs: list[Codec], data: st.DataObject
):
    """Any layout, spec, strides and number of threads: byte for byte, over whatever stood there."""
    layout = data.draw(page_layouts())
    plan = plan_of(layout, data.draw(codec_specs()))
    pages = data.draw(raw_pages(layout, page_count=2))
    before = pages.memory.copy()
    slack = data.draw(st.sampled_from([0, 1, 64]))
    for codec, fill in zip(codecs, (0xA5, 0x00), strict=True):
        targets = [np.full(plan.page_bytes + slack, fill, np.uint8) for _ in KEYS]
        encoded = codec.encode_into(plan, [key.encode() for key in KEYS], pages.views, targets)
        for index, key in enumerate(KEYS):
            rows = page_rows(pages, index)
            assert targets[index][: plan.page_bytes].tobytes() == bytes(
                encode_page(plan, key, rows)
            )
            assert (targets[index][plan.page_bytes :] == fill).all()
            assert encoded.nonfinite_groups[index] == outside_groups(plan, rows)
    assert (pages.memory == before).all()


@examples(50)
@given(st.data())
def test_native_decoder_reads_the_numbers_of_the_reference(
    known_isa: str, codecs: list[Codec], data: st.DataObject
):
    """A page written from one arrangement of memory is read into any other, and only there."""
    layout = data.draw(page_layouts())
    plan = plan_of(layout, data.draw(codec_specs()))
    expected = plan if data.draw(st.booleans()) else plan_of(layout, data.draw(codec_specs()))
    source = data.draw(raw_pages(layout, page_count=2))
    encoded = [bytes(encode_page(plan, k, page_rows(source, i))) for i, k in enumerate(KEYS)]
    target = blank(data.draw(raw_pages(layout, page_count=2)))
    free = target.untouched()
    for codec in codecs:
        target.memory[:] = 0x5A
        errors = codec.decode_into(
            Namespace(IDENTITY, layout),
            expected,
            [key.encode() for key in KEYS],
            [np.frombuffer(page, np.uint8) for page in encoded],
            target.views,
        )
        assert errors == [None, None]
        for index, page in enumerate(encoded):
            found = raw_bytes(layout, page_rows(target, index))
            assert found == decode_page(EncodedPage.parse(page))
        assert (target.memory[free] == 0x5A).all()


@examples(50)
@given(st.data())
def test_any_stored_bytes_decode_alike(known_isa: str, codecs: list[Codec], data: st.DataObject):
    """Scales, zeros and codes that no encoder writes mean the same to every decoder."""
    layout = data.draw(page_layouts(dtypes=QUANTIZABLE, max_elements=1 << 10))
    plan = plan_of(layout, data.draw(codec_specs()))
    page = bytearray(encode_page(plan, KEYS[0], rows_of_raw(layout, bytes(layout.raw_bytes))))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    for offset, stored in zip(
        plan.section_offsets.tolist(), plan.stored_bytes.tolist(), strict=True
    ):
        page[offset : offset + stored] = random.bytes(stored)
    sealed = bytes(reseal(page))
    target = blank(data.draw(raw_pages(layout)))
    [error] = codecs[0].decode_into(
        Namespace(IDENTITY, layout),
        plan,
        [KEYS[0].encode()],
        [np.frombuffer(sealed, np.uint8)],
        target.views,
    )
    assert error is None
    assert raw_bytes(layout, page_rows(target, 0)) == decode_page(EncodedPage.parse(sealed))


@examples(80)
@given(st.data())
def test_header_says_what_was_written(data: st.DataObject):
    """Identity, key, layout and codecs of any page come back from its bytes."""
    layout = data.draw(page_layouts(max_elements=256))
    namespace = Namespace(data.draw(identities()), layout)
    key = data.draw(page_keys())
    spec = data.draw(codec_specs())
    plan = PagePlan.build(namespace, spec.section_codecs(layout), len(key.encode()))
    page = encode_page(plan, key, rows_of_raw(layout, bytes(layout.raw_bytes)))
    header = EncodedPage.parse(page).header
    header.expect(namespace, key)
    assert header.namespace == namespace
    assert header.namespace.digest == namespace.digest
    assert header.codecs == spec.section_codecs(layout)
    assert PagePlan.of_page(header, memoryview(page)).header == plan.header


def ulp(values: npt.NDArray[np.float64], dtype: DType) -> npt.NDArray[np.float64]:
    """One unit in the last place."""
    digits, lowest = {DType.BF16: (7, -126), DType.FP16: (10, -14), DType.FP32: (23, -126)}[dtype]
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent - 1, lowest) - digits)


@examples(80)
@given(st.data())
def test_error_is_at_most_half_a_scale(data: st.DataObject):
    """|decoded - x| <= s * (1/2 + 2^(bits-22)) + 1 ulp, with the stored scale of the group.

    That is FORMAT.md 3.4; for bf16 and fp16 the small term disappears in the ulp. Of fp8, half a
    step of its three bits.
    """
    layout = data.draw(page_layouts(dtypes=QUANTIZABLE))
    plan = plan_of(layout, data.draw(codec_specs()))
    rows = page_rows(data.draw(raw_pages(layout, finite=True)), 0)
    assume(outside_groups(plan, rows) == 0)  # of fp32, a range can be outside though no element is
    page = EncodedPage.parse(encode_page(plan, "key", rows))
    for number, (layer, index, stream) in enumerate(sections_of(layout)):
        codec = page.header.codecs[number]
        stored = bytes(page.section(number))[: page.header.stored_bytes[number]]
        shape = (stream.head_count, layout.token_count, stream.head_size)
        decoded = decode_section(stored, shape, layout.dtype, codec)
        before = to_float32(rows[index][layer], layout.dtype).astype(np.float64)
        after = to_float32(decoded, layout.dtype).astype(np.float64)
        if not codec.bits:
            assert (decoded == rows[index][layer]).all()
            continue
        if codec.kind is Kind.FP8:
            assert (np.abs(after - before) <= np.maximum(np.abs(before) / 16, 2.0**-10)).all()
            continue
        count = parameter_bytes(stream, layout.token_count, codec)
        if codec.asymmetric:
            scale_bits = np.frombuffer(stored[:count], "<u2")[1::2]
        else:
            scale_bits = np.frombuffer(stored[:count], "<u2")
        scale = to_float32(scale_bits, DType.BF16).astype(np.float64)
        length = layout.token_count if codec.axis else stream.head_size
        group = np.arange(length) // codec.group_size
        groups = -(-length // codec.group_size)
        if codec.axis:
            scale = scale.reshape(shape[0], groups, shape[2])[:, group, :]
        else:
            scale = scale.reshape(shape[0], shape[1], groups)[:, :, group]
        one = ulp(np.maximum(np.abs(before), np.abs(after)), layout.dtype)
        allowed = scale * (0.5 + 2.0 ** (codec.bits - 22)) + one
        assert (np.abs(after - before) <= allowed).all()


@examples(60)
@given(st.data())
def test_nothing_finite_becomes_anything_else_outside_its_group(data: st.DataObject):
    """Whatever bits a page holds, only groups that are counted as outside the domain decode to NaN,
    and nothing decodes to an infinity.
    """
    layout = data.draw(page_layouts(dtypes=QUANTIZABLE))
    spec = data.draw(codec_specs())
    plan = plan_of(layout, spec)
    rows = page_rows(data.draw(raw_pages(layout)), 0)
    page = EncodedPage.parse(encode_page(plan, "key", rows))
    decoded = rows_of_raw(layout, decode_page(page))
    outside = outside_groups(plan, rows)
    for number, (layer, index, _) in enumerate(sections_of(layout)):
        if not page.header.codecs[number].bits:
            continue
        after = to_float32(decoded[index][layer], layout.dtype)
        assert not np.isinf(after).any()
        if outside == 0:
            assert not np.isnan(after).any()


@examples(60)
@given(page_layouts(), codec_specs(), st.integers(-2, 1100))
def test_sizes_are_known_before_anything_is_encoded(
    layout: PageLayout, spec: CodecSpec, key_bytes: int
):
    """A plan has its exact size, a multiple of 64, or refuses."""
    try:
        plan = plan_of(layout, spec, key_bytes)
    except ConfigError:
        assert not 1 <= key_bytes <= 1024
        return
    assert plan.page_bytes % 64 == 0
    assert plan.section_offsets[0] == len(plan.header)
    sizes = [pad64(size) for size in plan.stored_bytes.tolist()]
    assert plan.page_bytes == len(plan.header) + sum(sizes)
