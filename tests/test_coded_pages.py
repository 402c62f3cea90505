"""Pages with coded sections, whose length depends on the data: planned, written, measured, refused.

What the sections hold is tested with their codecs; here it is only that they come back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from cli_pages import make_page, run_json
from pages import IDENTITY, make_rows, native_encode, raw_bytes, reseal

from kvcodec.codec import Codec
from kvcodec.derotation import ROTARY_EXTENSION
from kvcodec.errors import ConfigError, CorruptPage, PageError, UnsupportedPage
from kvcodec.extension import Extension
from kvcodec.format import SECTION, EncodedPage, pad64
from kvcodec.identity import Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan, check_spec
from kvcodec.rotary import Rotary
from kvcodec.spec import Axis, CodecSpec, Kind, SectionCodec

KEY = "c0ded"
TABLE = 64 + 2 * 16


def layout_of(dtype: DType = DType.BF16, token_count: int = 64) -> PageLayout:
    return PageLayout.mha(
        dtype=dtype, token_count=token_count, layer_count=3, head_count=2, head_size=64
    )


def plan_of(text: str, layout: PageLayout | None = None) -> PagePlan:
    layout = layout or layout_of()
    codecs = CodecSpec.parse(text).section_codecs(layout)
    return PagePlan.build(Namespace(IDENTITY, layout), codecs, len(KEY))


def mixed_rows(layout: PageLayout) -> list[npt.NDArray[np.unsignedinteger]]:
    """Keys that no codec makes smaller, values that every codec does."""
    keys, values = make_rows(layout, seed=5)
    noise = np.random.default_rng(1).integers(0, 256, keys.nbytes, np.uint8)
    values[:] = np.array(1.5, np.float32).view(np.uint32) >> 16
    return [noise.view(keys.dtype).reshape(keys.shape), values]


@pytest.fixture(scope="module")
def codec() -> Iterator[Codec]:
    """An odd number of threads shares pages unevenly."""
    codec = Codec(threads=3)
    yield codec
    codec.close()


def decode(codec: Codec, plan: PagePlan, page: bytes) -> bytes | PageError:
    layout = plan.layout
    rows = [np.zeros_like(array) for array in make_rows(layout, seed=0)]
    views = PageViews.of_arrays(layout, [array[None] for array in rows])
    data = np.frombuffer(page, np.uint8).copy()
    namespace = Namespace(IDENTITY, layout)
    [error] = codec.decode_into(namespace, plan, [KEY.encode()], [data], views)
    return raw_bytes(layout, rows) if error is None else error


LOSSLESS = ["lossless", "lossless-fast", "key=raw value=lossless", "key=lossless-fast value=int8"]


@pytest.mark.parametrize("text", [*LOSSLESS, "ecq-3", "key=ecq-2.5 value=int4-g64"])
def test_a_page_says_how_long_it_is(codec: Codec, text: str):
    """Sizes in header, table and object agree, and the plan's are upper bounds."""
    plan = plan_of(text)
    assert not plan.is_fixed
    page, _ = native_encode(codec, plan, KEY, mixed_rows(plan.layout))
    encoded = EncodedPage.parse(page)
    encoded.verify()
    header = encoded.header
    assert header.codecs == plan.codecs
    assert header.page_bytes == len(page) <= plan.page_bytes
    assert all(
        0 < s <= most for s, most in zip(header.stored_bytes, plan.stored_bytes, strict=True)
    )
    assert len(page) == header.header_bytes + sum(map(pad64, header.stored_bytes))


@pytest.mark.parametrize("text", ["lossless", "lossless-fast", "key=raw value=lossless"])
def test_lossless_page_comes_back_bit_for_bit(codec: Codec, text: str):
    plan = plan_of(text)
    for rows in (mixed_rows(plan.layout), make_rows(plan.layout, seed=3)):
        page, outside = native_encode(codec, plan, KEY, rows)
        assert outside == 0
        assert decode(codec, plan, page) == raw_bytes(plan.layout, rows)


def test_section_that_would_not_shrink_is_stored_raw(codec: Codec):
    """Noise takes what it takes raw, and decodes."""
    plan = plan_of("lossless")
    rows = mixed_rows(plan.layout)
    page, _ = native_encode(codec, plan, KEY, rows)
    header = EncodedPage.parse(page).header
    assert header.stored_bytes[0] == rows[0][0].nbytes
    assert bytes(page[header.section_offsets[0] :][: rows[0][0].nbytes]) == rows[0][0].tobytes()


def test_a_batch_tells_the_length_of_each_page(codec: Codec):
    plan = plan_of("lossless")
    rows = [np.stack([a, b]) for a, b in zip(*(mixed_rows(plan.layout),) * 2, strict=True)]
    rows[0][1] = rows[1][1]
    targets = [np.zeros(plan.page_bytes, np.uint8) for _ in range(2)]
    views = PageViews.of_arrays(plan.layout, rows)
    encoded = codec.encode_into(plan, [KEY.encode()] * 2, views, targets)
    for size, target in zip(encoded.page_bytes.tolist(), targets, strict=True):
        assert EncodedPage.parse(target[:size].tobytes()).header.page_bytes == size


def test_page_of_another_plan_is_read_by_its_own_header(codec: Codec):
    page, _ = native_encode(codec, plan_of("lossless"), KEY, mixed_rows(layout_of()))
    wanted = raw_bytes(layout_of(), mixed_rows(layout_of()))
    for text in ("raw", "kv4", "lossless-fast", "ecq-4"):
        assert decode(codec, plan_of(text), page) == wanted


def test_plan_of_a_page_is_the_plan_it_was_written_by(codec: Codec):
    plan = plan_of("ecq-3")
    page, _ = native_encode(codec, plan, KEY, mixed_rows(plan.layout))
    header = EncodedPage.parse(page).header
    found = PagePlan.of_page(header, memoryview(page))
    assert found.header == plan.header
    assert (found.page_bytes, found.size_offsets.tolist()) == (
        plan.page_bytes,
        plan.size_offsets.tolist(),
    )
    finished = plan.finished_header(KEY, header.checksums, header.stored_bytes)
    assert finished == page[: header.header_bytes]


def rewritten(page: bytes, section: int, stored_bytes: int, page_bytes: int | None = None) -> bytes:
    """The page with another length of a section in its table, and a right header checksum."""
    made = bytearray(page)
    struct.pack_into("<I", made, TABLE + section * SECTION.itemsize + 8, stored_bytes)
    if page_bytes is not None:
        struct.pack_into("<Q", made, 16, page_bytes)
    size = struct.unpack_from("<I", made, 12)[0]
    struct.pack_into("<Q", made, size - 8, xxhash.xxh3_64_intdigest(bytes(made[: size - 8])))
    return bytes(made)


@pytest.mark.parametrize("delta", [-(1 << 14), -128, -64, 64, 1 << 14, (1 << 32) - (1 << 15)])
def test_declared_length_is_not_believed(codec: Codec, delta: int):
    """A wrong length with right checksums is refused by both readers, before memory is touched."""
    plan = plan_of("lossless")
    page, _ = native_encode(codec, plan, KEY, mixed_rows(plan.layout))
    stored = EncodedPage.parse(page).header.stored_bytes
    for section, size in enumerate(stored):
        if not 0 <= size + delta < 1 << 32:
            continue
        for length in (None, len(page) + delta):
            lie = rewritten(page, section, size + delta, length)
            with pytest.raises(CorruptPage):
                EncodedPage.parse(lie)
            assert isinstance(decode(codec, plan, lie), CorruptPage)
    # Two lies that cancel each other: the header is consistent, the sections are not.
    if stored[1] + delta > 0 and 0 < stored[3] - delta <= plan.stored_bytes[3]:
        lie = rewritten(rewritten(page, 1, stored[1] + delta), 3, stored[3] - delta)
        assert isinstance(decode(codec, plan, lie), CorruptPage)


@pytest.mark.parametrize("field", ["zero", "more than raw"])
def test_length_beyond_its_bounds_is_damage(field: str, codec: Codec):
    plan = plan_of("lossless")
    page, _ = native_encode(codec, plan, KEY, mixed_rows(plan.layout))
    size = 0 if field == "zero" else int(plan.stored_bytes[1]) + 1
    lie = rewritten(page, 1, size)
    with pytest.raises(CorruptPage, match="coded section"):
        EncodedPage.parse(lie)
    assert isinstance(decode(codec, plan, lie), CorruptPage)


@pytest.mark.parametrize("length", [0, 1, 64, 127, 128, 512])
def test_page_cut_short_is_corrupt(codec: Codec, length: int):
    plan = plan_of("lossless")
    page, _ = native_encode(codec, plan, KEY, mixed_rows(plan.layout))
    assert isinstance(decode(codec, plan, page[:length]), CorruptPage)
    assert isinstance(decode(codec, plan, page[: len(page) - 64]), CorruptPage)
    assert isinstance(decode(codec, plan, page + bytes(64)), CorruptPage)


def test_another_table_version_is_unsupported(codec: Codec):
    plan = plan_of("lossless")
    page = bytearray(native_encode(codec, plan, KEY, mixed_rows(plan.layout))[0])
    page[TABLE + 3] = 2
    with pytest.raises(UnsupportedPage, match="coding table"):
        EncodedPage.parse(reseal(page))


@pytest.mark.parametrize(
    ("text", "kind", "bits", "axis"),
    [
        ("ecq-3", Kind.ECQ, 48, Axis.TOKEN),
        ("ecq-2.5-channel", Kind.ECQ, 40, Axis.CHANNEL),
        ("ecq-3.0625", Kind.ECQ, 49, Axis.TOKEN),
        ("lossless", Kind.LOSSLESS, 0, Axis.TOKEN),
        ("lossless-channel", Kind.LOSSLESS, 0, Axis.CHANNEL),
        ("lossless-fast", Kind.BLOCK, 0, Axis.TOKEN),
    ],
)
def test_text_of_coded_codecs(text: str, kind: Kind, bits: int, axis: Axis):
    codec = SectionCodec.parse(text)
    assert (codec.kind, codec.bits, codec.axis, codec.text) == (kind, bits, axis, text)


@pytest.mark.parametrize("text", ["ecq", "ecq-1", "ecq-6.25", "ecq-3.01", "ecq-3-asym"])
def test_codec_text_out_of_range_is_refused(text: str):
    with pytest.raises(ConfigError):
        SectionCodec.parse(text)


@pytest.mark.parametrize(("text", "whole"), [("ecq-3", 3), ("ecq-2.5", 2), ("lossless", 16)])
def test_minimum_bits_of_a_coded_page(codec: Codec, text: str, whole: int):
    """Nominal bits count, rounded down; what loses nothing has all bits."""
    plan = plan_of(text)
    page, _ = native_encode(codec, plan, KEY, mixed_rows(plan.layout))
    header = EncodedPage.parse(page).header
    assert header.minimum_bits == whole
    namespace = Namespace(IDENTITY, plan.layout)
    header.expect(namespace, KEY, minimum_bits=whole)
    if text != "lossless":
        with pytest.raises(PageError, match="demands at least"):
            header.expect(namespace, KEY, minimum_bits=whole + 1)


def test_pages_too_small_for_a_tile_are_refused():
    with pytest.raises(ConfigError, match="use pages of more tokens"):
        check_spec(CodecSpec.parse("ecq-3"), layout_of(token_count=4), 0)
    check_spec(CodecSpec.parse("ecq-3"), layout_of(token_count=8), 0)


def test_lossless_of_fp32_is_refused():
    with pytest.raises(ConfigError, match="bf16 and fp16"):
        plan_of("lossless", layout_of(DType.FP32))


def test_kvtuner_options_over_a_coded_preset():
    """Bits replace the codec, the axis turns it, and what has no meaning for it is refused."""
    spec = CodecSpec.from_options({"preset": "ecq-3", "nbits_value": 8, "axis_key": 0})
    assert (spec.key.text, spec.value.text) == ("ecq-3", "int8-g64")
    with pytest.raises(ConfigError, match="asym has no effect: everything is stored ecq-3"):
        CodecSpec.from_options({"preset": "ecq-3", "asym": True})


ROTARY = Rotary(64, 0, tuple(float(np.float32(10000.0 ** (-i / 32))) for i in range(32)))


def test_page_names_the_rotation_that_its_codec_may_use(codec: Codec):
    """Rotary parameters travel in the page, and a reader with none of its own finds them there."""
    layout = layout_of()
    codecs = CodecSpec.parse("ecq-3").section_codecs(layout)
    namespace = Namespace(IDENTITY, layout)
    plan = PagePlan.build(namespace, codecs, len(KEY), rotary=ROTARY)
    page, _ = native_encode(codec, plan, KEY, make_rows(layout, seed=2))
    header = EncodedPage.parse(page).header
    [extension] = header.extensions
    assert (extension.type, extension.critical) == (ROTARY_EXTENSION, False)
    assert Rotary.from_record(extension.data) == ROTARY
    assert PagePlan.of_page(header, memoryview(page)).rotary == ROTARY
    own = decode(codec, plan, page)
    assert isinstance(own, bytes)
    assert decode(codec, plan_of("raw"), page) == own


@pytest.mark.parametrize(
    "text", ["raw", "kv4-channel", "lossless", "key=ecq-3 value=ecq-3-channel"]
)
def test_pages_that_cannot_use_a_rotation_do_not_name_it(text: str):
    layout = layout_of()
    codecs = CodecSpec.parse(text).section_codecs(layout)
    plan = PagePlan.build(Namespace(IDENTITY, layout), codecs, len(KEY), rotary=ROTARY)
    assert plan.rotary is None
    assert plan.header == plan_of(text).header


def test_rotary_parameters_that_are_none_are_damage(codec: Codec):
    """A page with such an extension and right checksums is refused, not guessed at."""
    layout = layout_of()
    codecs = CodecSpec.parse("ecq-3").section_codecs(layout)
    forged = [Extension(ROTARY_EXTENSION, bytes(8))]
    plan = PagePlan.build(Namespace(IDENTITY, layout), codecs, len(KEY), forged)
    page, _ = native_encode(codec, plan, KEY, make_rows(layout, seed=2))
    error = decode(codec, plan_of("raw"), page)
    assert isinstance(error, CorruptPage)
    assert error.reason == "corrupt:extensions"


def test_coded_layers_show_what_they_take(capsys, tmp_path):
    """Sizes of coded sections are those of this page; a run of layers shows their mean."""
    data = make_page(spec="key=ecq-3-channel value=lossless")
    path = tmp_path / "page"
    path.write_bytes(data)
    header = EncodedPage.parse(data).header
    code, document, _ = run_json(capsys, "inspect", str(path))
    assert code == 0
    [run] = document["pages"][0]["layers"]
    sizes = header.stored_bytes
    assert run["key"]["codec"] == "ecq-3-channel"
    assert run["key"]["stored_bytes"] == round(sum(sizes[0::2]) / 4)
    assert run["value"]["stored_bytes"] == round(sum(sizes[1::2]) / 4)
    assert len(set(sizes[0::2])) > 1
    assert max(sizes[0::2]) < 2 * 2 * 16 * 64 > max(sizes[1::2])
