"""Headers, sections and plans: `kvcodec.format` and `kvcodec.plan`."""

from __future__ import annotations

import array
import time
from dataclasses import replace

import numpy as np
import pytest
from pages import (
    CASES,
    IDENTITY,
    KEY,
    Case,
    decode_page,
    encode_page,
    make_rows,
    mha,
    mla,
    raw_bytes,
    reseal,
)

from kvcodec.errors import (
    ConfigError,
    CorruptPage,
    MismatchedPage,
    PageError,
    QualityBelowMinimum,
    UnsupportedPage,
)
from kvcodec.format import (
    MAX_EXTENSION_BYTES,
    EncodedPage,
    Extension,
    pad64,
    parameter_bytes,
    section_stored_bytes,
)
from kvcodec.identity import MAX_IDENTITY_BYTES, MAX_KEY_BYTES, Identity, Namespace
from kvcodec.layout import (
    MAX_LAYER_COUNT,
    MAX_STREAM_COUNT,
    DType,
    PageLayout,
    Role,
    Stream,
)
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec, Kind, SectionCodec

CASE = Case(name="page", layout=mha(layers=2, layer_start=4), spec="key=int8-g64 value=int4-asym")


@pytest.fixture(scope="module")
def page() -> bytes:
    return CASE.page()


# --- reading


@pytest.mark.parametrize(
    "wrap",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: np.frombuffer(data, np.uint8),
        lambda data: memoryview(array.array("Q", data)),
    ],
)
def test_page_is_read_from_any_buffer(page: bytes, wrap):
    """bytes, bytearray, memoryview and arrays of any item size hold the same page."""
    encoded = EncodedPage.parse(wrap(page))
    encoded.verify()
    assert decode_page(encoded) == decode_page(EncodedPage.parse(page))


def test_sections_lie_in_canonical_order_without_holes(page: bytes):
    """Sections follow the header layer by layer, each padded to 64 bytes, up to the last byte."""
    header = EncodedPage.parse(page).header
    at = header.header_bytes
    for offset, size in zip(header.section_offsets, header.stored_bytes, strict=True):
        assert offset == at
        at += pad64(size)
    assert at == header.page_bytes == len(page)
    assert len(header.codecs) == CASE.layout.section_count == 4
    assert [codec.bits for codec in header.codecs] == [8, 4, 8, 4]


def test_section_is_verified_when_it_is_used(page: bytes):
    """A damaged section is refused by `section` and `verify`; the others stay readable."""
    encoded = EncodedPage.parse(page)
    damaged = bytearray(page)
    damaged[encoded.header.section_offsets[2]] ^= 1
    encoded = EncodedPage.parse(damaged)
    for index in (0, 1, 3):
        encoded.section(index)
    for use in (lambda: encoded.section(2), encoded.verify):
        with pytest.raises(CorruptPage) as caught:
            use()
        assert caught.value.reason == "corrupt:section_checksum"


def test_section_that_changes_in_memory_is_noticed(page: bytes):
    """A page in memory that somebody else writes to is verified again at each use."""
    memory = bytearray(page)
    encoded = EncodedPage.parse(memory)
    encoded.section(0)
    memory[encoded.header.section_offsets[0]] ^= 0x80
    with pytest.raises(CorruptPage):
        encoded.section(0)


def test_cost_of_reading_follows_the_number_of_sections():
    """The largest table there can be is read and verified in less than a second, not in minutes."""
    streams = tuple(Stream(role, 1, 1) for role in list(Role)[:MAX_STREAM_COUNT])
    layout = PageLayout(
        dtype=DType.BF16, token_count=1, layer_count=MAX_LAYER_COUNT, streams=streams
    )
    plan = PagePlan.build(Namespace(IDENTITY, layout), CodecSpec().section_codecs(layout), len(KEY))
    page = encode_page(plan, KEY, make_rows(layout, seed=1))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        EncodedPage.parse(page).verify()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_newer_minor_version_is_read(page: bytes):
    """A minor change only adds what a reader may ignore."""
    newer = bytearray(page)
    newer[10] = 9
    newer[28:32] = b"\xff" * 4
    encoded = EncodedPage.parse(bytes(reseal(newer)))
    assert encoded.header.minor == 9
    assert decode_page(encoded) == decode_page(EncodedPage.parse(page))


def test_newer_major_version_is_unsupported_whatever_follows(page: bytes):
    """Nothing after the version is looked at: its place may have another meaning."""
    for tail in (page[10:], b"\xff" * 1000):
        newer = page[:8] + b"\x02\x00" + tail
        with pytest.raises(UnsupportedPage) as caught:
            EncodedPage.parse(newer)
        assert (caught.value.found, caught.value.supported) == (2, 1)


def test_extensions_come_back_as_written():
    """Extensions that a reader does not know are skipped, and handed out as they are."""
    extensions = (Extension(2, b"x" * 13), Extension(300, b""))
    case = replace(CASE, extensions=extensions)
    encoded = EncodedPage.parse(case.page())
    assert encoded.header.extensions == extensions
    assert decode_page(encoded) == decode_page(EncodedPage.parse(CASE.page()))


def test_critical_extension_is_unsupported():
    """A page that cannot be understood without an unknown extension is refused as a whole."""
    case = replace(CASE, extensions=(Extension(2, b"", critical=True),))
    with pytest.raises(UnsupportedPage) as caught:
        EncodedPage.parse(case.page())
    assert caught.value.reason == "unsupported:extension"
    assert caught.value.found == 2


# --- whose page is it


LAYOUT_CHANGES = {
    "dtype": replace(CASE.layout, dtype=DType.FP16),
    "token_count": replace(CASE.layout, token_count=6),
    "layer_start": replace(CASE.layout, layer_start=5),
    "layer_count": replace(CASE.layout, layer_count=1),
    "streams": mha(layers=2, layer_start=4, heads=4, size=48),
}
FIELDS = {
    "model": "example/other",
    "revision": "89ab",
    "dtype": "fp8_e4m3fnuz",
    "tp_rank": "1",
    "tp_size": "2",
    "pp_rank": "1",
    "pp_size": "2",
    "cp_rank": "1",
    "cp_size": "4",
    "dcp_size": "2",
    "pool": "swa",
    "page_size": "128",
    "lora": "b",
    "rope": "yarn-4",
    "tenant": "6b86b273",
    "engine": "lmcache",
    "hash": "blake3",
    "draft": "eagle",
}
OWN = Identity.of(**dict.fromkeys(FIELDS, "0"))


def test_page_of_the_namespace_is_accepted(page: bytes):
    EncodedPage.parse(page).header.expect(CASE.namespace, KEY)


@pytest.mark.parametrize("what", LAYOUT_CHANGES)
def test_page_of_another_layout_names_the_field(page: bytes, what: str):
    """A page of equal size but another shape is a mismatch that says which part of the shape."""
    namespace = Namespace(IDENTITY, LAYOUT_CHANGES[what])
    with pytest.raises(MismatchedPage) as caught:
        EncodedPage.parse(page).header.expect(namespace, KEY)
    assert caught.value.reason == f"mismatch:{what}"
    assert caught.value.found == getattr(CASE.layout, what)
    assert caught.value.expected == getattr(LAYOUT_CHANGES[what], what)


def test_page_of_another_head_range_is_a_mismatch():
    """Heads 0 to 1 and heads 2 to 3 of a model have the same shape and are not the same page."""
    ranges = [
        PageLayout(
            dtype=DType.BF16,
            token_count=2,
            layer_count=1,
            streams=(Stream(Role.KEY, 2, 8, start), Stream(Role.VALUE, 2, 8, start)),
        )
        for start in (0, 2)
    ]
    encoded = EncodedPage.parse(Case(name="x", layout=ranges[0], spec="kv8").page())
    with pytest.raises(MismatchedPage) as caught:
        encoded.header.expect(Namespace(IDENTITY, ranges[1]), KEY)
    assert caught.value.reason == "mismatch:streams"


@pytest.mark.parametrize("name", FIELDS)
def test_page_of_another_identity_names_the_field(name: str):
    """Each of 18 identity fields alone makes another page, and the reason names the field."""
    other = Identity.of(**(OWN.as_dict() | {name: FIELDS[name]}))
    encoded = EncodedPage.parse(replace(CASE, identity=other).page())
    with pytest.raises(MismatchedPage) as caught:
        encoded.header.expect(Namespace(OWN, CASE.layout), KEY)
    assert caught.value.reason == f"mismatch:{name}"
    assert (caught.value.found, caught.value.expected) == (FIELDS[name], "0")


def test_missing_identity_field_is_a_mismatch():
    """There are no wildcards: a page without a field is not the page that has it."""
    less = Identity(OWN.fields[1:])
    encoded = EncodedPage.parse(replace(CASE, identity=less).page())
    with pytest.raises(MismatchedPage) as caught:
        encoded.header.expect(Namespace(OWN, CASE.layout), KEY)
    assert caught.value.reason == f"mismatch:{OWN.fields[0][0]}"


def test_unknown_identity_field_has_a_bounded_reason():
    """A field that the reader does not have could have any name: no label for a counter."""
    more = Identity.of(**(OWN.as_dict() | {"surprise": "1"}))
    encoded = EncodedPage.parse(replace(CASE, identity=more).page())
    with pytest.raises(MismatchedPage) as caught:
        encoded.header.expect(Namespace(OWN, CASE.layout), KEY)
    assert caught.value.reason == "mismatch:identity"


@pytest.mark.parametrize("key", [KEY[:-1] + "6", KEY[:-1], KEY + "0", KEY.upper(), "", KEY + "\0"])
def test_page_of_another_key_is_a_mismatch(page: bytes, key: str):
    """A page that was renamed to another key in the store is not that key's page."""
    with pytest.raises(MismatchedPage) as caught:
        EncodedPage.parse(page).header.expect(CASE.namespace, key)
    assert caught.value.reason == "mismatch:key"


def test_codec_is_no_part_of_the_expectation():
    """A page is read as it says it is encoded, whatever this reader writes."""
    for spec in ("raw", "kv4", "kv2-channel", "key=raw value=int8-g1 layer.4=int2,raw"):
        encoded = EncodedPage.parse(replace(CASE, spec=spec).page())
        encoded.header.expect(CASE.namespace, KEY)
        assert len(decode_page(encoded)) == CASE.layout.raw_bytes


# --- quality


def test_page_below_the_minimum_quality_is_refused(page: bytes):
    """The coarsest section counts: 4 bits of values beside 8 bits of keys are 4."""
    header = EncodedPage.parse(page).header
    assert header.minimum_bits == 4
    header.expect(CASE.namespace, KEY, minimum_bits=4)
    with pytest.raises(QualityBelowMinimum) as caught:
        header.expect(CASE.namespace, KEY, minimum_bits=8)
    assert (caught.value.found, caught.value.minimum) == (4, 8)
    assert caught.value.reason == "quality:bits"


@pytest.mark.parametrize("dtype", DType)
def test_raw_page_satisfies_every_minimum(dtype: DType):
    """Nothing was lost in a raw page, be its elements 8 bits wide."""
    case = Case(name="raw", layout=mha(dtype=dtype), spec="raw")
    header = EncodedPage.parse(case.page()).header
    assert header.minimum_bits == 8 * dtype.itemsize
    header.expect(case.namespace, KEY, minimum_bits=32)


# --- writing


def test_namespace_is_that_of_the_writer(page: bytes):
    assert EncodedPage.parse(page).header.namespace == CASE.namespace


@pytest.mark.parametrize("name", ["int4-asym-bf16", "layers-mixed", "extensions", "minor-65535"])
def test_plan_of_a_page_is_the_plan_it_was_written_under(name: str):
    """A reader can rebuild from any page the plan that its siblings share."""
    case = CASES[name]
    encoded = EncodedPage.parse(case.page())
    found, plan = PagePlan.of_page(encoded.header, encoded.data), case.plan()
    for part in ("layout", "codecs", "header", "key_offset", "key_bytes", "page_bytes"):
        assert getattr(found, part) == getattr(plan, part), part
    for part in ("stored_bytes", "section_offsets", "checksum_offsets"):
        assert getattr(found, part).tolist() == getattr(plan, part).tolist(), part


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("codecs", ()),
        ("codecs", CASE.codecs[:3]),
        ("key_bytes", 0),
        ("key_bytes", MAX_KEY_BYTES + 1),
        ("extensions", (Extension(2, b""), Extension(1, b""))),
        ("extensions", (Extension(1, b""), Extension(1, b""))),
        ("extensions", (Extension(1, bytes(MAX_EXTENSION_BYTES)),)),
        ("extensions", (Extension(-1, b""),)),
        ("extensions", (Extension(65536, b""),)),
    ],
)
def test_plan_beyond_a_limit_is_refused(part: str, value: object):
    """What a reader would refuse is not written."""
    arguments = {"codecs": CASE.codecs, "key_bytes": 1, "extensions": ()} | {part: value}
    with pytest.raises(ConfigError):
        PagePlan.build(CASE.namespace, **arguments)


def test_int_codec_of_fp8_cannot_be_planned():
    layout = mha(dtype=DType.FP8_E4M3)
    with pytest.raises(ConfigError, match="fp8_e4m3 pages are stored raw"):
        PagePlan.build(Namespace(IDENTITY, layout), [SectionCodec.integer(8)] * 2, 1)


def test_section_above_the_limit_cannot_be_planned():
    """Groups of one element make a section larger than raw, and can make it too large."""
    layout = PageLayout.opaque(page_bytes=10**9, dtype=DType.BF16)
    namespace = Namespace(IDENTITY, layout)
    PagePlan.build(namespace, [SectionCodec()], 1)
    with pytest.raises(ConfigError, match="section would take"):
        PagePlan.build(namespace, [SectionCodec.integer(8, asymmetric=True, group_size=1)], 1)


def test_largest_header_there_can_be_is_read():
    """All limits of the format at once still make a page."""
    streams = tuple(Stream(role, 1, 1) for role in list(Role)[:MAX_STREAM_COUNT])
    layout = PageLayout(dtype=DType.U8, token_count=1, layer_count=MAX_LAYER_COUNT, streams=streams)
    identity = Identity.of(a="x" * (MAX_IDENTITY_BYTES - 4))
    extensions = [Extension(1, bytes(MAX_EXTENSION_BYTES - 8))]
    key = "k" * MAX_KEY_BYTES
    namespace = Namespace(identity, layout)
    plan = PagePlan.build(namespace, [SectionCodec()] * 4096, len(key), extensions)
    encoded = EncodedPage.parse(encode_page(plan, key, make_rows(layout, seed=2)))
    encoded.verify()
    encoded.header.expect(namespace, key)


# --- sizes


@pytest.mark.parametrize("name", CASES)
def test_sizes_follow_from_layout_and_codec(name: str):
    """Parameters and stored bytes of each section are what the formulas of FORMAT.md 3 say, and a
    coded one takes at most what it takes raw.
    """
    case = CASES[name]
    header = EncodedPage.parse(case.page()).header
    tokens, item = case.layout.token_count, case.layout.dtype.itemsize
    streams = case.layout.streams * case.layout.layer_count
    for stream, codec, stored in zip(streams, header.codecs, header.stored_bytes, strict=True):
        heads, size = stream.head_count, stream.head_size
        if codec.kind is Kind.FP8:
            assert stored == heads * tokens * size
            assert section_stored_bytes(case.layout.dtype, stream, tokens, codec) == stored
            continue
        if codec.kind is not Kind.INT:
            raw = heads * tokens * size * item
            assert section_stored_bytes(case.layout.dtype, stream, tokens, codec) == raw
            assert stored == raw or (codec.kind.is_coded and 0 < stored < raw)
            continue
        width = 4 if codec.asymmetric else 2
        if codec.axis:
            parameters = heads * -(-tokens // codec.group_size) * size * width
            codes = heads * -(-tokens // (32 // codec.bits)) * size * 4
        else:
            parameters = heads * tokens * -(-size // codec.group_size) * width
            blocks = [min(64, size - at) for at in range(0, size, 64)]
            codes = heads * tokens * sum(-(-block * codec.bits // 8) for block in blocks)
        assert parameter_bytes(stream, tokens, codec) == parameters
        assert section_stored_bytes(case.layout.dtype, stream, tokens, codec) == stored
        assert stored == -(-parameters // 64) * 64 + codes


@pytest.mark.parametrize(
    ("size", "padded"), [(0, 0), (1, 64), (64, 64), (65, 128), (2**31 - 1, 2**31)]
)
def test_pad64(size: int, padded: int):
    assert pad64(size) == padded


def test_every_failure_to_read_is_a_page_error(page: bytes):
    """Cut anywhere, a page is corrupt and nothing else."""
    for length in range(len(page)):
        with pytest.raises(PageError) as caught:
            EncodedPage.parse(page[:length])
        assert caught.value.reason == "corrupt:length"


def test_mla_page_has_latent_and_rope():
    case = Case(name="mla", layout=mla(), spec="kv4")
    header = EncodedPage.parse(case.page()).header
    assert [stream.role for stream in header.layout.streams] == [Role.LATENT, Role.ROPE]
    assert [codec.bits for codec in header.codecs] == [4, 8]
    assert len(raw_bytes(case.layout, case.rows())) == case.layout.raw_bytes
