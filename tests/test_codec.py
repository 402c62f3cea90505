"""`kvcodec.codec`: what a batch may be, and the answers it gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pages import CASES, IDENTITY, Case, decode_page, mha, raw_bytes, rows_of_raw

from kvcodec.codec import Codec, encoded_size
from kvcodec.errors import (
    ConfigError,
    CorruptPage,
    MismatchedPage,
    NativeError,
    QualityBelowMinimum,
)
from kvcodec.format import EncodedPage, Extension
from kvcodec.identity import Namespace
from kvcodec.layout import PageViews
from kvcodec.plan import PagePlan

CASE = Case(name="batch", layout=mha(layers=2, size=64), spec="key=int8-g64 value=int4-g64")
KEYS = [b"page-0", b"page-1", b"page-2"]
PLAN = PagePlan.build(CASE.namespace, CASE.codecs, len(KEYS[0]))


def views_of(count: int, *, seed: int = 0) -> tuple[PageViews, list[npt.NDArray[Any]]]:
    random = np.random.default_rng(seed)
    shape = (count, 2, 2, 5, 64)
    arrays = [(random.standard_normal(shape)).astype(np.float16).view(np.uint16) for _ in "kv"]
    return PageViews.of_arrays(CASE.layout, arrays), arrays


def blank_views(count: int) -> tuple[PageViews, list[npt.NDArray[Any]]]:
    arrays = [np.zeros((count, 2, 2, 5, 64), np.uint16) for _ in "kv"]
    return PageViews.of_arrays(CASE.layout, arrays), arrays


def encoded(codec: Codec, plan: PagePlan = PLAN) -> list[npt.NDArray[np.uint8]]:
    pages = [np.empty(encoded_size(plan), np.uint8) for _ in KEYS]
    codec.encode_into(plan, KEYS, views_of(3)[0], pages)
    return pages


def with_spec(spec: str, **changes: Any) -> PagePlan:
    case = replace(CASE, spec=spec, **changes)
    return PagePlan.build(case.namespace, case.codecs, len(KEYS[0]), case.extensions)


def test_batch_round_trip(codec: Codec):
    """Every page of a batch decodes as the reference decodes it, into its own memory."""
    pages = encoded(codec)
    views, arrays = blank_views(3)
    assert codec.decode_into(CASE.namespace, PLAN, KEYS, pages, views) == [None] * 3
    for index, page in enumerate(pages):
        found = raw_bytes(CASE.layout, [array[index] for array in arrays])
        assert found == decode_page(EncodedPage.parse(page))


def test_empty_batch(codec: Codec):
    views, _ = views_of(0)
    assert codec.encode_into(PLAN, [], views, []).page_bytes.tolist() == []
    assert codec.decode_into(CASE.namespace, PLAN, [], [], views) == []


def test_every_page_has_its_own_answer(codec: Codec):
    """A damaged, a renamed and a sound page side by side: one error each, none for the sound."""
    pages = encoded(codec)
    pages[0] = pages[0][:-1]
    pages[1] = pages[2]
    views, _ = blank_views(3)
    errors = codec.decode_into(CASE.namespace, PLAN, KEYS, pages, views)
    assert [error and error.reason for error in errors] == [
        "corrupt:length", "mismatch:key", None,
    ]  # fmt: skip


@pytest.mark.parametrize("spec", ["raw", "kv2", "kv8-channel", "key=int4-g3 value=raw"])
def test_page_of_another_codec_is_read_by_its_own_header(codec: Codec, spec: str):
    """A fleet may mix codecs: what the reader itself would write does not matter."""
    theirs = encoded(codec, with_spec(spec, extensions=(Extension(9, b"hint"),)))
    ours = encoded(codec)
    views, arrays = blank_views(3)
    mixed = [theirs[0], ours[1], theirs[2]]
    assert codec.decode_into(CASE.namespace, PLAN, KEYS, mixed, views) == [None] * 3
    for index, page in enumerate(mixed):
        found = raw_bytes(CASE.layout, [array[index] for array in arrays])
        assert found == decode_page(EncodedPage.parse(page))


def test_header_of_a_kind_of_page_is_parsed_once(monkeypatch: pytest.MonkeyPatch):
    """Later pages encoded so are compared with what the first one said. That holds for pages of
    this namespace alone, and what was let pass for few bits is asked again for more.
    """
    codec, parsed = Codec(threads=2), []

    class Watched(EncodedPage):
        @classmethod
        def parse(cls, data: bytes | bytearray | memoryview) -> EncodedPage:
            parsed.append(len(data))
            return EncodedPage.parse(data)

    monkeypatch.setattr("kvcodec.codec.EncodedPage", Watched)
    kinds = [encoded(codec, with_spec(spec)) for spec in ("kv2-channel", "kv8", "raw")]
    mixed = [kind[index] for index, kind in enumerate(kinds)]
    for _ in range(2):
        views, arrays = blank_views(3)
        assert codec.decode_into(CASE.namespace, PLAN, KEYS, mixed, views) == [None] * 3
        for index, page in enumerate(mixed):
            found = raw_bytes(CASE.layout, [array[index] for array in arrays])
            assert found == decode_page(EncodedPage.parse(page))
    assert len(parsed) == len(mixed)
    damaged = mixed[1].copy()
    damaged[-1] ^= 1
    [error] = codec.decode_into(CASE.namespace, PLAN, KEYS[1:2], [damaged], views.select([1]))
    assert isinstance(error, CorruptPage) and len(parsed) == len(mixed)
    other = Namespace(replace(IDENTITY, fields=(("model", "other"),)), CASE.layout)
    errors = codec.decode_into(other, PagePlan.build(other, CASE.codecs, 6), KEYS, mixed, views)
    assert all(isinstance(error, MismatchedPage) for error in errors)
    errors = codec.decode_into(CASE.namespace, PLAN, KEYS, mixed, views, minimum_bits=8)
    assert [type(error) for error in errors] == [QualityBelowMinimum, type(None), type(None)]
    codec.close()


def test_page_of_another_namespace_is_refused(codec: Codec):
    other = Namespace(replace(IDENTITY, fields=(("model", "other"),)), CASE.layout)
    foreign = PagePlan.build(other, CASE.codecs, len(KEYS[0]))
    views, arrays = blank_views(3)
    errors = codec.decode_into(CASE.namespace, PLAN, KEYS, encoded(codec, foreign), views)
    assert all(isinstance(error, MismatchedPage) for error in errors)
    assert not any(array.any() for array in arrays)


@pytest.mark.parametrize("spec", ["kv4", "kv2", "key=raw value=int4"])
def test_minimum_quality_holds_whatever_the_reader_writes(codec: Codec, spec: str):
    """A page with too few bits is refused, be it of the reader's own codec or of another."""
    plan = with_spec(spec)
    pages = encoded(codec, plan)
    for expected in (plan, PLAN):
        views, arrays = blank_views(3)
        errors = codec.decode_into(CASE.namespace, expected, KEYS, pages, views, minimum_bits=8)
        assert all(isinstance(error, QualityBelowMinimum) for error in errors)
        assert not any(array.any() for array in arrays)
        errors = codec.decode_into(CASE.namespace, expected, KEYS, pages, views, minimum_bits=2)
        assert errors == [None] * 3


def test_page_without_time_is_undecoded_not_damaged(codec: Codec):
    """Whoever removes damaged pages must not remove the one that came too late."""
    views, _ = blank_views(3)
    errors = codec.decode_into(
        CASE.namespace, PLAN, KEYS, encoded(codec), views, timeout_seconds=0.0
    )
    assert {error and error.kind for error in errors} <= {None, "undecoded"}


def test_values_outside_the_domain_are_counted_per_page(codec: Codec):
    """A caller learns which pages to keep raw."""
    _, arrays = views_of(3)
    arrays[0][1, 0, 0, 0, 0] = 0x7FC0
    arrays[1][1, 1, 1, 4, 63] = 0x7F80
    views = PageViews.of_arrays(CASE.layout, arrays)
    pages = [np.empty(PLAN.page_bytes, np.uint8) for _ in KEYS]
    assert codec.encode_into(PLAN, KEYS, views, pages).nonfinite_groups.tolist() == [0, 2, 0]


# --- what a batch may not be


@pytest.mark.parametrize(
    ("keys", "sizes", "count"),
    [
        (KEYS[:2], [PLAN.page_bytes] * 3, 3),
        (KEYS, [PLAN.page_bytes] * 2, 3),
        (KEYS, [PLAN.page_bytes] * 3, 2),
        ([b"page-0", b"page-1", b"page"], [PLAN.page_bytes] * 3, 3),
        ([b"page-0", b"page-1", b"page-\xff"], [PLAN.page_bytes] * 3, 3),
        (KEYS, [PLAN.page_bytes, PLAN.page_bytes, PLAN.page_bytes - 1], 3),
    ],
)
def test_batch_that_does_not_fit_is_refused(
    codec: Codec, keys: list[bytes], sizes: list[int], count: int
):
    """Numbers that differ, keys of another length or no text, a target too small."""
    with pytest.raises(ConfigError):
        codec.encode_into(PLAN, keys, views_of(count)[0], [np.empty(n, np.uint8) for n in sizes])


def test_key_that_is_no_text_cannot_be_asked_for(codec: Codec):
    pages = encoded(codec, with_spec("raw"))
    with pytest.raises(ConfigError):
        codec.decode_into(CASE.namespace, PLAN, [b"page-\xff"] * 3, pages, blank_views(3)[0])


@pytest.mark.parametrize(
    "target",
    [
        np.frombuffer(bytes(PLAN.page_bytes), np.uint8),
        np.empty((1, PLAN.page_bytes), np.uint8),
        np.empty(PLAN.page_bytes, np.int8),
        np.empty(2 * PLAN.page_bytes, np.uint8)[::2],
    ],
    ids=["read-only", "two axes", "signed", "strided"],
)
def test_target_that_cannot_be_written_is_refused(codec: Codec, target: npt.NDArray[Any]):
    with pytest.raises(ConfigError):
        codec.encode_into(PLAN, KEYS[:1], views_of(1)[0], [target])


def test_views_that_cannot_be_written_are_refused(codec: Codec):
    """Memory that numpy holds read-only, such as bytes, is encoded from but never decoded into."""
    raw = bytes(CASE.layout.raw_bytes // 2)
    arrays = [np.frombuffer(raw, np.uint16).reshape(1, 2, 2, 5, 64) for _ in "kv"]
    views = PageViews.of_arrays(CASE.layout, arrays)
    pages = [np.empty(PLAN.page_bytes, np.uint8)]
    codec.encode_into(PLAN, KEYS[:1], views, pages)
    for wanted in (views, views.select([0])):
        with pytest.raises(ConfigError, match="read-only"):
            codec.decode_into(CASE.namespace, PLAN, KEYS[:1], pages, wanted)
    assert not any(raw)


def test_views_of_another_layout_are_refused(codec: Codec):
    other = CASES["raw-bf16-mha128"]
    rows = rows_of_raw(other.layout, bytes(other.layout.raw_bytes))
    views = PageViews.of_arrays(other.layout, [array[None] for array in rows])
    with pytest.raises(ConfigError, match="the views have the layout"):
        codec.encode_into(PLAN, KEYS[:1], views, [np.empty(PLAN.page_bytes, np.uint8)])


@pytest.mark.parametrize("threads", [0, 65, -1])
def test_number_of_threads_has_limits(threads: int):
    with pytest.raises(ConfigError, match="allowed is 1 to 64"):
        Codec(threads=threads)


def test_closed_codec_refuses_batches():
    codec = Codec(threads=1)
    codec.close()
    with pytest.raises(NativeError):
        encoded(codec)
