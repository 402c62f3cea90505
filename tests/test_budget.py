"""The byte budget of a store: no page is larger, and none loses more bits than it has to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from fake_backend import FakeBackend
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from kvcodec.budget import Ladder, Search
from kvcodec.codec import Codec
from kvcodec.encoding import PageEncoder
from kvcodec.errors import ConfigError
from kvcodec.extension import Extension
from kvcodec.format import EncodedPage
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan
from kvcodec.profile import PROFILE_EXTENSION, ProfileReference
from kvcodec.rotary import SPLIT, Rotary
from kvcodec.section import Kind
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline, StoreOptions
from kvcodec.testing.strategies import element_bits
from kvcodec.workers import Counters

LAYOUT = PageLayout.mha(dtype=DType.BF16, token_count=64, layer_count=3, head_count=2, head_size=64)
NAMESPACE = Namespace(Identity.of(model="tiny", tp_rank=0), LAYOUT)
ROTARY = Rotary(64, SPLIT, tuple(float(np.float32(10.0 ** (-i / 8))) for i in range(32)))
#: What a page of this layout takes with one bit in each element.
BIT_BYTES = LAYOUT.raw_bytes // 16
LAYERED = "key=ecq-4-channel value=ecq-3.5 layer.1=ecq-5-channel,ecq-4"
MIXED = "key=int4-g64 value=ecq-4 layer.2=ecq-3-channel,int2-asym-g64"


def keys_of(count: int, start: int = 0) -> list[str]:
    return [f"{index:064x}" for index in range(start, start + count)]


def normal_pages(count: int, seed: int = 0, widths: Sequence[float] = (1.0,)) -> list[np.ndarray]:
    """bf16 bits (pages, layers, heads, tokens, head_size) for keys and values; each page has one of
    the widths, in turns.
    """
    random = np.random.default_rng(seed)
    shape = (count, LAYOUT.layer_count, 2, LAYOUT.token_count, 64)
    width = np.resize(widths, count)[:, None, None, None, None]
    pages = [(random.standard_normal(shape) * width).astype(np.float32) for _ in "kv"]
    return [(page.view(np.uint32) >> 16).astype(np.uint16) for page in pages]


def views_of(arrays: Sequence[np.ndarray]) -> PageViews:
    return PageViews.of_arrays(LAYOUT, arrays)


class Writer:
    """A store over a dict, and what lies in it."""

    def __init__(
        self, spec: str | CodecSpec, limit: int, protected: str = "", **options: int
    ) -> None:
        self.backend = FakeBackend()
        self.pipeline = Pipeline(
            self.backend, StoreOptions(max_page_bytes=limit, breaker_failures=0, **options)
        )
        try:
            self.store = PageStore(
                self.pipeline,
                NAMESPACE,
                CodecSpec.parse(spec) if isinstance(spec, str) else spec,
                protected_spec=CodecSpec.parse(protected) if protected else None,
                rotary=ROTARY,
            )
        except BaseException:
            self.pipeline.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipeline.close()

    def count(self, name: str) -> int:
        return self.pipeline.counters().get(f"backup.{name}", 0)

    @property
    def pages(self) -> list[EncodedPage]:
        """In the order of their keys."""
        pages = [EncodedPage.parse(data) for data in self.backend.objects.values()]
        return sorted(pages, key=lambda page: page.header.key)


def bits_of(page: EncodedPage) -> list[int]:
    """Sixteenths of a bit of the ecq sections."""
    return [codec.bits for codec in page.header.codecs if codec.kind is Kind.ECQ]


@pytest.mark.parametrize("spec", ["ecq-4", LAYERED, MIXED])
def test_pages_that_are_too_large_lose_bits_until_they_fit(spec: str) -> None:
    """Every page has at most that many bytes and comes back; without the budget it had more."""
    arrays, keys = normal_pages(6), keys_of(6)
    with Writer(spec, 0) as free:
        assert free.store.backup(keys, views_of(arrays)) == [True] * 6
        sizes = [len(page.data) for page in free.pages]
        assert free.count("reencoded") == 0
    limit = min(sizes) * 9 // 10
    with Writer(spec, limit) as bound:
        assert bound.store.backup(keys, views_of(arrays)) == [True] * 6
        assert all(0.9 * limit < len(page.data) <= limit for page in bound.pages)
        assert bound.count("reencoded") > 0
        assert bound.count("over_budget") == 0
        target = [np.zeros_like(array) for array in arrays]
        assert bound.store.prefetch(keys, views_of(target)) == [True] * 6
        assert bound.count("encoded_bytes") == sum(len(page.data) for page in bound.pages)


def test_layers_keys_and_values_keep_their_distance() -> None:
    """All ecq sections lose the same number of sixteenths; int sections keep their bits."""
    for spec in (LAYERED, MIXED):
        before = CodecSpec.parse(spec).section_codecs(LAYOUT)
        limit = int(3.3 * BIT_BYTES) + 2048
        with Writer(spec, limit) as writer:
            assert writer.store.backup(keys_of(1), views_of(normal_pages(1))) == [True]
            [page] = writer.pages
        after = page.header.codecs
        lost = {old.bits - new.bits for old, new in zip(before, after, strict=True)}
        assert len(lost - {0}) == 1
        for old, new in zip(before, after, strict=True):
            assert (old.kind, old.axis, old.group_size) == (new.kind, new.axis, new.group_size)
            assert (old.kind is Kind.ECQ) == (old.bits != new.bits)


def test_pages_with_fewer_bits_still_name_their_profile() -> None:
    profile = ProfileReference(
        digest=bytes(range(32)), layers=3, kv_heads=2, key_head_size=64, value_head_size=64
    )
    spec = replace(CodecSpec.parse("ecq-4"), profile=profile)
    with Writer(spec, 3 * BIT_BYTES) as writer:
        assert all(writer.store.backup(keys_of(2), views_of(normal_pages(2))))
        for page in writer.pages:
            assert max(bits_of(page)) < 64
            assert Extension(PROFILE_EXTENSION, profile.digest) in page.header.extensions


def test_pages_that_fit_keep_all_their_bits() -> None:
    with Writer("ecq-4", 5 * BIT_BYTES) as writer:
        assert all(writer.store.backup(keys_of(3), views_of(normal_pages(3))))
        assert {bits for page in writer.pages for bits in bits_of(page)} == {64}
        assert writer.count("reencoded") == 0


def test_bits_come_back_when_pages_get_smaller_again() -> None:
    """A hard page costs the easy ones after it nothing: zeros, then noise, then zeros."""
    hard, easy = normal_pages(1), normal_pages(2, widths=[0.0])
    arrays = [np.concatenate([e[:1], h, e[1:]]) for h, e in zip(hard, easy, strict=True)]
    with Writer("ecq-4", 3 * BIT_BYTES) as writer:
        assert all(writer.store.backup(keys_of(3), views_of(arrays)))
        first, second, third = ({*bits_of(page)} for page in writer.pages)
    assert first == third == {64}
    assert max(second) < 50


def test_a_steady_stream_is_encoded_once_or_twice() -> None:
    """The search starts where the last page ended, so it is over at once for one like it."""
    with Writer("ecq-4", 3 * BIT_BYTES) as writer:
        for start in range(0, 60, 4):
            arrays = normal_pages(4, seed=start)
            assert all(writer.store.backup(keys_of(4, start), views_of(arrays)))
        assert 0 < writer.count("reencoded") <= 20
        assert all(min(bits_of(page)) >= 43 for page in writer.pages)


def test_what_does_not_fit_at_the_floor_is_not_stored() -> None:
    """`minimum_bits` is the floor. The page is a miss, which is counted, and its neighbours in the
    batch are stored.
    """
    arrays = normal_pages(5)
    for array in arrays:
        array[1:3] = 0x7FC0  # NaN: an ecq section stores it as it is
    with Writer("ecq-4", 3 * BIT_BYTES, minimum_bits=2) as writer:
        expected = [True, False, False, True, True]
        assert writer.store.backup(keys_of(5), views_of(arrays)) == expected
        assert writer.store.exists(keys_of(5)) == expected
        assert writer.count("over_budget") == writer.count("failed") == 2
        assert writer.count("raw_bytes") == 3 * LAYOUT.raw_bytes
        assert all(min(bits_of(page)) > 32 for page in writer.pages)
    with Writer("ecq-4", 3 * BIT_BYTES, minimum_bits=2) as writer:
        alone = [array[1:2].copy() for array in arrays]
        assert writer.store.backup(keys_of(1), views_of(alone)) == [False]
        assert "put" not in {operation for operation, _ in writer.backend.calls}


def test_a_page_kept_raw_has_to_fit_as_well() -> None:
    """Int sections cannot hold NaN; the whole page would be raw, which is more than allowed."""
    arrays = normal_pages(3)
    arrays[0][1, 0, 0, 0, 0] = 0x7FC0
    with Writer("kv4", 5 * BIT_BYTES) as writer:
        assert writer.store.backup(keys_of(3), views_of(arrays)) == [True, False, True]
        assert (writer.count("nonfinite"), writer.count("over_budget")) == (1, 1)
    with Writer("kv4", 17 * BIT_BYTES) as writer:
        assert writer.store.backup(keys_of(3), views_of(arrays)) == [True] * 3


def test_protected_pages_have_a_search_of_their_own() -> None:
    marks = [True, False, True, False]
    with Writer("ecq-2.5", 3 * BIT_BYTES, protected="key=ecq-5-channel value=ecq-5") as writer:
        views = views_of(normal_pages(4))
        assert all(writer.store.backup(keys_of(4), views, protected=marks))
        bits = [max(bits_of(page)) for page in writer.pages]
    assert [found > 40 for found in bits] == marks


@pytest.mark.parametrize(
    ("spec", "protected", "limit", "message"),
    [
        ("kv4", "", 20000, r"max_page_bytes is 20000, .* at least \d{5}: .*use an ecq codec"),
        ("ecq-4", "raw", 3 * BIT_BYTES, r"'key=raw value=raw' takes at least"),
        ("ecq-4", "", BIT_BYTES, r"at 1.5 bits takes about \d+: raise it, or use pages of fewer"),
        ("ecq-4", "", 2 * BIT_BYTES, r"at 3 bits .* lower minimum_bits"),
        (MIXED, "", 2 * BIT_BYTES, r"at 1.5 bits takes about"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(
    spec: str, protected: str, limit: int, message: str
) -> None:
    floor = 3 if "at 3 bits" in message else 0
    with pytest.raises(ConfigError, match=message):
        Writer(spec, limit, protected, minimum_bits=floor).pipeline.close()


@examples(200)
@given(
    sizes=st.lists(st.integers(0, 1000), min_size=74, max_size=74),
    limit=st.integers(0, 1000),
    first=st.integers(0, 73),
    falling=st.booleans(),
)
def test_search_ends_soon_with_a_page_that_fits(
    sizes: list[int], limit: int, first: int, falling: bool
) -> None:
    """Whatever sizes the steps have. Where they fall from step to step, it finds one if there is
    one.
    """
    codecs = CodecSpec.parse("key=ecq-6-channel value=ecq-6").section_codecs(LAYOUT)
    ladder = Ladder(LAYOUT, codecs)
    assert ladder.last_step == 72
    sizes = [64 * size for size in (sorted(sizes, reverse=True) if falling else sizes)]
    search = Search(ladder, 64 * limit, min(first, 72))
    tried = []
    verdict = None
    while verdict is None:
        tried.append(search.step)
        verdict = search.judge(sizes[search.step])
    assert len(tried) == search.encodings <= 10
    assert verdict == (sizes[tried[-1]] <= 64 * limit)
    if falling:
        assert verdict == (sizes[72] <= 64 * limit)


@examples(60)
@given(
    spec=st.sampled_from(
        [
            "key=ecq-6-channel value=ecq-6",
            "ecq-2.5",
            LAYERED,
            MIXED,
            "lossless",
            "key=raw value=ecq-4",
        ]
    ),
    bits=st.floats(1.2, 17),
    data=st.data(),
)
def test_no_page_is_ever_larger_than_the_budget(
    codec: Codec, spec: str, bits: float, data: st.DataObject
) -> None:
    """Pages of all kinds, one after the other. What is not kept is too large at the floor too."""
    limit = int(bits * BIT_BYTES)
    counts = Counters()
    encoder = PageEncoder(
        codec,
        NAMESPACE,
        counts,
        spec=CodecSpec.parse(spec),
        protected_spec=CodecSpec(),
        rotary=ROTARY,
        max_page_bytes=limit,
    )
    ladder = Ladder(LAYOUT, CodecSpec.parse(spec).section_codecs(LAYOUT))
    coarsest = PagePlan.build(NAMESPACE, ladder.codecs(ladder.last_step), 64, rotary=ROTARY)
    rows = [np.zeros(encoder.largest_page_bytes(64), np.uint8) for _ in range(2)]
    for _ in range(2):
        shape = (2, LAYOUT.layer_count, 2, LAYOUT.token_count, 64)
        arrays = [
            data.draw(element_bits(DType.BF16, int(np.prod(shape)))).reshape(shape) for _ in "kv"
        ]
        keys = [key.encode() for key in keys_of(2)]
        pages = encoder.encode("plain", keys, views_of(arrays), rows)
        for index, page in enumerate(pages):
            if page is not None:
                assert len(page) <= limit
                EncodedPage.parse(page).verify()
                continue
            view = views_of(arrays).select([index])
            found = codec.encode_into(coarsest, keys[:1], view, rows[:1])
            assert found.page_bytes[0] > limit or found.nonfinite_groups[0]
