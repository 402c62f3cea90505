"""The golden pages of format 1: what every reader accepts and gives back, and what none accepts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pages import (
    Case,
    decode_page,
    encode_page,
    native_decode,
    native_encode,
    outside_groups,
    rows_of_raw,
)

from kvcodec import errors
from kvcodec.codec import Codec
from kvcodec.errors import PageError
from kvcodec.format import EncodedPage, Extension
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, Role, Stream
from kvcodec.plan import PagePlan
from kvcodec.rotary import Rotary
from kvcodec.section import Kind, Transform
from kvcodec.spec import CodecSpec

RAW_SPEC = CodecSpec()
GOLDEN = Path(__file__).parent / "golden" / "v1"

# Of the two manifests, which hold the digest of every file. A released page never changes.
MANIFEST_SHA256 = {
    "accepted": "21ef5b01f7d839650d70e6f8f839e488f9303edd730cb36e54c90536ea0187b7",
    "rejected": "3a4decf16274b643b7de83d69c249a2c837b5063340c9b326b5956820580b1ea",
}


def manifest(folder: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / folder / "manifest.json").read_bytes())
    return loaded


ACCEPTED: dict[str, dict[str, Any]] = manifest("accepted")["pages"]
REJECTED: dict[str, dict[str, str]] = manifest("rejected")["pages"]


def file_of(folder: str, name: str) -> bytes:
    return (GOLDEN / folder / name).read_bytes()


def case_of(name: str) -> Case:
    """The page as its manifest describes it; nothing of the page itself is looked at."""
    entry = ACCEPTED[name]
    streams = (Stream(Role[role.upper()], *sizes) for role, *sizes in entry["streams"])
    return Case(
        name=name,
        layout=PageLayout(
            dtype=DType[entry["dtype"].upper()],
            token_count=entry["token_count"],
            layer_start=entry["layer_start"],
            layer_count=entry["layer_count"],
            streams=tuple(streams),
        ),
        spec=entry["spec"],
        identity=Identity.of(**entry["identity"]),
        key=entry["key"],
        minor=entry["minor"],
        optional_flags=entry["optional_flags"],
        rotary=None
        if "rotary" not in entry
        else Rotary.from_record(bytes.fromhex(entry["rotary"])),
        extensions=tuple(
            Extension(kind, bytes.fromhex(data)) for kind, data in entry["extensions"]
        ),
    )


def decoded_of(name: str) -> bytes:
    return file_of("accepted", f"{name}.{'raw' if ACCEPTED[name]['lossless'] else 'decoded'}")


@pytest.mark.parametrize("folder", MANIFEST_SHA256)
def test_golden_files_are_those_that_were_released(folder: str):
    """No file is missing, added or changed; tools/make_golden.py adds files."""
    text = file_of(folder, "manifest.json")
    assert hashlib.sha256(text).hexdigest() == MANIFEST_SHA256[folder]
    pinned = json.loads(text)["sha256"]
    present = {path.name for path in (GOLDEN / folder).iterdir()} - {"manifest.json"}
    assert present == set(pinned)
    for name in present:
        assert hashlib.sha256(file_of(folder, name)).hexdigest() == pinned[name], name


def test_golden_pages_cover_every_codec():
    """Every bit width, symmetry and axis for every element type that can be quantized."""
    codecs = {
        (case.layout.dtype, codec.bits, codec.asymmetric, codec.axis)
        for case in map(case_of, ACCEPTED)
        for codec in case.codecs
        if codec.kind is Kind.INT
    }
    assert len(codecs) == 3 * 3 * 2 * 2
    coded = {
        (case.layout.dtype, codec.kind, codec.axis)
        for case in map(case_of, ACCEPTED)
        for codec in case.codecs
        if codec.kind.is_coded
    }
    assert len(coded) == 3 * 2 + 2 * 2 + 2
    transformed = {
        (case.layout.dtype, codec.transform)
        for case in map(case_of, ACCEPTED)
        for codec in case.codecs
    }
    assert len(transformed - {(dtype, Transform.NONE) for dtype in DType}) == 3 * 2
    fp8 = {case_of(name).layout.dtype for name in ACCEPTED if name.startswith("fp8")}
    assert fp8 == {DType.BF16, DType.FP16, DType.FP32}
    raw = {case_of(name).layout.dtype for name in ACCEPTED if name.startswith(("raw", "opaque"))}
    assert raw == set(DType)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_page_is_read(name: str):
    """Header, identity, key, codecs and every element of a golden page are as its manifest says."""
    case = case_of(name)
    page = EncodedPage.parse(file_of("accepted", f"{name}.page"))
    page.verify()
    page.header.expect(case.namespace, case.key)
    assert page.header.codecs == case.codecs
    assert page.header.extensions == case.extensions_in_page
    assert page.header.minor == case.minor
    assert page.header.namespace.digest == case.namespace.digest
    assert decode_page(page) == decoded_of(name)


@pytest.mark.parametrize("name", ACCEPTED)
def test_reference_encoder_reproduces_accepted_page(name: str):
    """The reference encoder makes the golden page, byte for byte, from its raw page."""
    case = case_of(name)
    rows = rows_of_raw(case.layout, file_of("accepted", f"{name}.raw"))
    assert encode_page(case.plan(), case.key, rows) == file_of("accepted", f"{name}.page")
    assert outside_groups(case.plan(), rows) == ACCEPTED[name]["outside_groups"]


def test_native_encoder_reproduces_accepted_pages(known_isa: str, codec: Codec):
    """Every instruction set makes the golden pages, byte for byte."""
    for name in ACCEPTED:
        case = case_of(name)
        rows = rows_of_raw(case.layout, file_of("accepted", f"{name}.raw"))
        page, outside = native_encode(codec, case.plan(), case.key, rows)
        assert page == file_of("accepted", f"{name}.page"), f"{name} with {known_isa}"
        assert outside == ACCEPTED[name]["outside_groups"]


def test_native_decoder_reads_accepted_pages(known_isa: str, codec: Codec):
    """Every instruction set decodes the golden pages alike, whatever plan the reader expected."""
    for name in ACCEPTED:
        case = case_of(name)
        raw = PagePlan.build(
            case.namespace, RAW_SPEC.section_codecs(case.layout), len(case.key.encode())
        )
        page = file_of("accepted", f"{name}.page")
        for plan in (case.plan(), raw):
            decoded = native_decode(codec, case.namespace, plan, case.key, page)
            assert decoded == decoded_of(name), f"{name} with {known_isa}: {decoded!r:.200}"


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_page_is_refused(name: str):
    """A page of the attacks folder is refused for the cause it is named after."""
    data = file_of("rejected", f"{name}.page")
    with pytest.raises(PageError) as caught:
        EncodedPage.parse(data).verify()
    assert caught.value.reason == REJECTED[name]["reason"]
    assert type(caught.value) is getattr(errors, REJECTED[name]["error"])


def test_native_decoder_refuses_rejected_pages(known_isa: str, codec: Codec):
    """The native path refuses them for the same reasons, under a plan that fits most of them."""
    layout = PageLayout.mha(
        dtype=DType.BF16, token_count=2, layer_count=1, head_count=1, head_size=17
    )
    namespace = Namespace(Identity.of(model="example", rank=0), layout)
    int4 = Case(name="", layout=layout, spec="key=int4-asym-g8 value=int4-asym-g8").codecs
    plan = PagePlan.build(namespace, int4, 3, extensions=[Extension(9, b"unknown")])
    for name, entry in REJECTED.items():
        page = file_of("rejected", f"{name}.page")
        error = native_decode(codec, namespace, plan, "key", page)
        assert isinstance(error, PageError), f"{name} was accepted with {known_isa}"
        assert error.reason == entry["reason"], name
