"""Transcoder: which sections get another codec, and what the new page says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cli_pages import flipped, make_page, namespace_of
from hypothesis import given
from hypothesis import strategies as st
from pages import CASES, KEY, decode_page, encode_page, make_rows, reseal, rows_of_raw
from profiles import examples

from kvcodec import transcoding
from kvcodec.codec import Codec
from kvcodec.derotation import ROTARY_EXTENSION
from kvcodec.errors import CorruptPage
from kvcodec.extension import Extension
from kvcodec.format import EncodedPage
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout
from kvcodec.plan import PagePlan
from kvcodec.reference import decode_section, encode_section
from kvcodec.rotary import SPLIT, Rotary
from kvcodec.spec import CodecSpec
from kvcodec.transcoding import Outcome, Transcoder

ROTARY = Rotary(64, SPLIT, tuple(float(np.float32(10.0 ** (-i / 8))) for i in range(32)))
LAYOUT = PageLayout.mha(dtype=DType.BF16, token_count=16, layer_count=2, head_count=2, head_size=64)
CODECS = [
    "raw",
    "fp8",
    "lossless",
    "lossless-fast",
    "int8-g64",
    "int4-asym-g32",
    "int2",
    "ecq-4",
    "ecq-2",
]
KEYS = [*CODECS, "int4-channel-g16", "ecq-3-channel", "lossless-channel"]


def page_of(
    spec: str,
    layout: PageLayout = LAYOUT,
    *,
    rotary: Rotary | None = None,
    extensions: Sequence[Extension] = (),
    identity: Identity | None = None,
    seed: int = 1,
) -> EncodedPage:
    """A page by the slow encoder."""
    namespace = Namespace(identity or Identity.of(model="test"), layout)
    codecs = CodecSpec.parse(spec).section_codecs(layout)
    plan = PagePlan.build(namespace, codecs, len(KEY), extensions, rotary)
    return EncodedPage.parse(bytes(encode_page(plan, KEY, make_rows(layout, seed))))


def transcoded(
    codec: Codec, page: EncodedPage, spec: str, **options: object
) -> tuple[Outcome, EncodedPage | None]:
    worker = Transcoder(codec, CodecSpec.load(spec), **options)  # type: ignore[arg-type]
    outcome, found = worker.transcode(page)
    assert (outcome is Outcome.SMALLER) == (found is not None)
    if found is None:
        return outcome, None
    new = EncodedPage.parse(bytes(found))
    new.verify()
    return outcome, new


def sections(page: EncodedPage) -> list[bytes]:
    return [
        bytes(page.section(index))[:size] for index, size in enumerate(page.header.stored_bytes)
    ]


@examples(60)
@given(
    old=st.tuples(st.sampled_from(KEYS), st.sampled_from(CODECS)),
    new=st.tuples(st.sampled_from(KEYS), st.sampled_from(CODECS)),
    layer=st.none() | st.tuples(st.sampled_from(KEYS), st.sampled_from(CODECS)),
    is_rotated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_section_is_its_old_self_or_an_encoding_of_it(
    codec: Codec,
    old: tuple[str, str],
    new: tuple[str, str],
    layer: tuple[str, str] | None,
    is_rotated: bool,
    seed: int,
) -> None:
    """Decoded, the new page is decode(encode(decode(old))) wherever the new codec has fewer bits or
    loses less room, and otherwise the old page bit by bit. It is smaller, has the same name, and
    there is nothing to do for it any more.
    """
    rotary = ROTARY if is_rotated else None
    spec = f"key={new[0]} value={new[1]}" + (f" layer.1={layer[0]},{layer[1]}" if layer else "")
    page = page_of(f"key={old[0]} value={old[1]}", rotary=rotary, seed=seed)
    everything = [CodecSpec.parse(f"key={old[0]} value={old[1]}")]
    _, found = transcoded(codec, page, spec, only=everything, rotary=rotary)
    if found is None:
        return
    assert len(found.data) < len(page.data)
    assert found.header.namespace == page.header.namespace
    assert found.header.key == page.header.key
    wanted = CodecSpec.parse(spec).section_codecs(LAYOUT)
    before, after = sections(page), sections(found)
    for index, (was, now) in enumerate(zip(page.header.codecs, found.header.codecs, strict=True)):
        if was == now:
            assert after[index] == before[index]
            continue
        assert now == wanted[index]
        assert was.nominal_bits is None or (now.nominal_bits or 99) < was.nominal_bits
        turned = rotary if index % 2 == 0 else None
        rows = decode_section(before[index], (2, 16, 64), LAYOUT.dtype, was, turned)
        expected, _ = encode_section(rows, LAYOUT.dtype, now, turned)
        assert after[index] == expected
    again, _ = transcoded(codec, found, spec, only=everything, rotary=rotary)
    assert again is not Outcome.SMALLER


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ("kv8", "kv4", Outcome.SMALLER),
        ("kv8", "ecq-3", Outcome.SMALLER),
        ("kv8", "k8v4", Outcome.SMALLER),
        ("kv4", "kv4", Outcome.ALREADY),
        ("kv4", "kv8", Outcome.FEWER_BITS),
        ("kv8", "fp8", Outcome.FEWER_BITS),
        ("fp8", "kv8", Outcome.FEWER_BITS),
        ("fp8", "kv4", Outcome.SMALLER),
        ("kv4", "ecq-4", Outcome.FEWER_BITS),
        ("kv4", "lossless", Outcome.FEWER_BITS),
        ("ecq-3", "kv4", Outcome.FEWER_BITS),
        ("lossless", "raw", Outcome.FEWER_BITS),
        ("raw", "raw", Outcome.ALREADY),
        ("raw", "kv4", Outcome.RAW),
        ("key=raw value=int8", "kv4", Outcome.SMALLER),
        ("lossless", "key=int8-asym-g1 value=int8-asym-g2", Outcome.UNFIT),
    ],
)
def test_what_becomes_of_a_page(codec: Codec, old: str, new: str, outcome: Outcome) -> None:
    assert transcoded(codec, page_of(old), new)[0] is outcome


def test_only_pages_that_are_wanted_are_touched(codec: Codec) -> None:
    """Raw pages may be a sequence's first tokens: they have to be named."""
    only = [CodecSpec.parse("kv8"), CodecSpec.parse("raw")]
    for spec, outcome in {
        "kv8": Outcome.SMALLER,
        "raw": Outcome.SMALLER,
        "kv8-asym": Outcome.OTHER,
        "kv4": Outcome.ALREADY,
    }.items():
        assert transcoded(codec, page_of(spec), "kv4", only=only)[0] is outcome


def test_lossless_pages_may_become_smaller_ones(codec: Codec) -> None:
    page = EncodedPage.parse(make_page(spec="lossless-fast"))
    _, found = transcoded(codec, page, "lossless")
    assert found is not None and decode_page(found) == decode_page(page)
    assert transcoded(codec, found, "lossless-fast")[0] is Outcome.FEWER_BITS


def test_sections_with_few_bits_stay_as_they_are(codec: Codec) -> None:
    """The values of a k8v4 page are int4 already: their bytes are taken over."""
    page = page_of("k8v4")
    _, found = transcoded(codec, page, "kv4")
    assert found is not None
    assert {codec.text for codec in found.header.codecs} == {"int4-g64"}
    assert sections(found)[1::2] == sections(page)[1::2]
    assert sections(found)[::2] != sections(page)[::2]


def test_a_page_that_does_not_get_smaller_stays(codec: Codec) -> None:
    """Noise has no exponents to gain from."""
    rows = [
        np.random.default_rng(3).integers(0, 1 << 16, array.shape).astype(array.dtype)
        for array in make_rows(LAYOUT, 0)
    ]
    codecs = CodecSpec.parse("lossless-fast").section_codecs(LAYOUT)
    plan = PagePlan.build(Namespace(Identity.of(model="test"), LAYOUT), codecs, len(KEY))
    page = EncodedPage.parse(bytes(encode_page(plan, KEY, rows)))
    assert transcoded(codec, page, "lossless")[0] is Outcome.NO_GAIN


@pytest.mark.parametrize("spec", ["kv4", "key=int4-g64 value=ecq-3"])
def test_nan_stays_what_it_is(codec: Codec, spec: str) -> None:
    page = EncodedPage.parse(make_page(spec="raw", nan=True))
    only = [CodecSpec.parse("raw")]
    assert transcoded(codec, page, spec, only=only)[0] is Outcome.NONFINITE


def test_state_beside_keys_and_values_is_not_touched(codec: Codec) -> None:
    """Such a pool may look like keys and values, but its bytes must not change."""
    only = [CodecSpec.parse("raw")]
    for pool, outcome in {"kv": Outcome.SMALLER, "mamba": Outcome.STATE}.items():
        page = page_of("raw", identity=Identity.of(model="test", pool=pool))
        assert transcoded(codec, page, "kv4", only=only)[0] is outcome
    for layout in (
        PageLayout.opaque(page_bytes=4096, dtype=DType.BF16),
        PageLayout.mha(
            dtype=DType.FP8_E4M3, token_count=16, layer_count=1, head_count=1, head_size=64
        ),
    ):
        assert transcoded(codec, page_of("raw", layout), "kv4", only=only)[0] is Outcome.ALREADY


def test_layer_tables_are_of_the_model_s_own_layers(codec: Codec) -> None:
    spec = "key=int4 value=int4 layer.1=int8,int8"
    for pool, outcome in {"kv": Outcome.SMALLER, "draft": Outcome.UNFIT}.items():
        page = page_of("lossless", identity=Identity.of(model="test", pool=pool))
        assert transcoded(codec, page, spec)[0] is outcome


def test_a_page_of_a_newer_version_or_of_no_reasonable_size_is_left(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of("kv8")
    newer = bytearray(page.data)
    newer[10] = 1
    assert transcoded(codec, EncodedPage.parse(reseal(newer)), "kv4")[0] is Outcome.UNFIT
    monkeypatch.setattr(transcoding, "MAX_RAW_BYTES", LAYOUT.raw_bytes - 1)
    worker = Transcoder(codec, CodecSpec.parse("kv4"))
    assert worker.transcode(page)[0] is Outcome.UNFIT
    assert worker.reasons == {f"{LAYOUT.raw_bytes} raw bytes; allowed are {LAYOUT.raw_bytes - 1}"}


def test_a_damaged_section_is_an_error(codec: Codec) -> None:
    page = EncodedPage.parse(flipped(bytes(page_of("kv8").data), -1))
    with pytest.raises(CorruptPage, match="checksum"):
        transcoded(codec, page, "kv4")


# --- what the header says


def test_rotation_that_the_page_knows_is_used_and_kept(codec: Codec) -> None:
    page = page_of("key=ecq-5-channel value=ecq-5", rotary=ROTARY)
    _, found = transcoded(codec, page, "ecq-3", rotary=None)
    assert found is not None
    assert found.header.extensions == page.header.extensions
    rows = rows_of_raw(LAYOUT, decode_page(page))
    plan = PagePlan.build(
        page.header.namespace,
        CodecSpec.parse("ecq-3").section_codecs(LAYOUT),
        len(KEY),
        rotary=ROTARY,
    )
    assert bytes(found.data) == bytes(encode_page(plan, KEY, rows))
    # Int sections have no use for it, but who makes ecq of them may have.
    _, found = transcoded(codec, page, "kv2")
    assert found is not None
    assert found.header.extensions == page.header.extensions


def test_rotation_may_be_told_for_pages_that_do_not_know(codec: Codec) -> None:
    page = page_of("kv8")
    _, plain = transcoded(codec, page, "ecq-3")
    _, told = transcoded(codec, page, "ecq-3", rotary=ROTARY)
    assert plain is not None and told is not None
    assert plain.header.extensions == ()
    assert told.header.extensions == (Extension(ROTARY_EXTENSION, ROTARY.record),)
    other = page_of("key=ecq-5-channel value=ecq-5", rotary=ROTARY)
    half = Rotary(32, SPLIT, ROTARY.frequencies[:16])
    _, kept = transcoded(codec, other, "ecq-3", rotary=half)
    assert kept is not None and kept.header.extensions == other.header.extensions


def test_other_extensions_stay_and_the_profile_is_the_new_one(codec: Codec, tmp_path: Path) -> None:
    kept = Extension(7, b"of somebody else")
    page = page_of("kv8", extensions=[Extension(1, b"the old profile's digest"), kept])
    _, found = transcoded(codec, page, "ecq-3")
    assert found is not None and found.header.extensions == (kept,)
    model = {"layers": 2, "kv_heads": 2, "key_head_size": 64, "value_head_size": 64}
    points = [{"bits": 3.0, "spec": "key=ecq-3-channel value=ecq-3"}]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"kvcodec_profile": 1, "model": model, "points": points}))
    _, found = transcoded(codec, page, f"profile:{path}@3")
    assert found is not None
    digest = hashlib.sha256(path.read_bytes()).digest()
    assert found.header.extensions == (Extension(1, digest), kept)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_golden_page_can_be_looked_at(codec: Codec, case) -> None:
    """Pages of all layouts and codecs: one that changes is smaller and sound."""
    page = EncodedPage.parse(case.page())
    only = [CodecSpec.parse("raw"), CodecSpec.parse(case.spec)]
    for spec in ("kv2", "ecq-2.5", "lossless"):
        _, found = transcoded(codec, page, spec, only=only)
        if found is not None:
            assert len(found.data) < len(page.data)
            found.header.expect(page.header.namespace, page.header.key)


def test_one_transcoder_takes_pages_of_all_shapes(codec: Codec) -> None:
    """Its buffers fit the page at hand."""
    worker = Transcoder(codec, CodecSpec.parse("kv2"))
    for layers in (4, 1, 4, 2):
        space = namespace_of(layers=layers)
        page = EncodedPage.parse(make_page(namespace=space, spec="kv8"))
        outcome, found = worker.transcode(page)
        assert outcome is Outcome.SMALLER and found is not None
        new = EncodedPage.parse(bytes(found))
        new.verify()
        assert new.header.namespace == space
