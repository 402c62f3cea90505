"""Choosing a spec by measured speeds: the model of costs, the meters, and when a choice changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from fake_backend import FakeBackend
from hypothesis import given
from hypothesis import strategies as st

from kvcodec import auto
from kvcodec.auto import BatchTimer, CodecCost, Link, LinkMeter, SpecChooser, measure_costs
from kvcodec.backend import GetResult, PutResult
from kvcodec.codec import Codec
from kvcodec.errors import ConfigError
from kvcodec.format import EncodedPage
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan
from kvcodec.sglang.options import AdapterOptions
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline, StoreOptions

LAYOUT = PageLayout.mha(
    dtype=DType.BF16, token_count=64, layer_count=2, head_count=2, head_size=128
)
NAMESPACE = Namespace(Identity(), LAYOUT)

#: Stored bytes per raw byte, and seconds per raw byte.
LARGE_AND_QUICK = CodecCost(stored=0.5, encode=1e-10, decode=1e-10)
SMALL_AND_SLOW = CodecCost(stored=0.2, encode=1e-9, decode=5e-10)


class Clock:
    """A time that passes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def pipelined(first: float, second: float, chunks: int) -> float:
    """The end of the last chunk, where each takes so long in either of two stages."""
    ready = done = 0.0
    for _ in range(chunks):
        ready += first
        done = max(ready, done) + second
    return done


@given(
    transfer=st.floats(1e-6, 10),
    work=st.floats(1e-6, 10),
    chunks=st.integers(1, 64),
)
def test_seconds_of_a_batch_are_those_of_two_stages(
    transfer: float, work: float, chunks: int
) -> None:
    link = Link(call=0.0, byte=transfer / 1000)
    cost = CodecCost(stored=1.0, encode=work / 1000, decode=0.0)
    expected = pipelined(transfer / chunks, work / chunks, chunks)
    assert link.batch_seconds(cost, cost.encode, 1000, chunks) == pytest.approx(expected)


def test_a_meter_tells_calls_from_bytes_where_batches_differ() -> None:
    meter = LinkMeter()
    for size in (1000, 4000, 2000, 8000, 1500):
        meter.add(size, 0.25 + size * 1e-4)
    link = meter.estimate()
    assert link is not None
    assert (link.call, link.byte) == (pytest.approx(0.25), pytest.approx(1e-4))


def test_batches_of_one_size_count_by_the_byte() -> None:
    meter = LinkMeter()
    for _ in range(5):
        meter.add(1000, 0.5)
    assert meter.estimate() == Link(0.0, pytest.approx(5e-4))


def test_a_meter_says_nothing_before_it_has_seen_batches() -> None:
    meter = LinkMeter()
    for _ in range(3):
        assert meter.estimate() is None
        meter.add(1000, 0.5)
    assert meter.estimate() is None


def test_a_meter_forgets_what_is_long_ago() -> None:
    meter = LinkMeter()
    for _ in range(100):
        meter.add(1000, 10.0)
    for _ in range(200):
        meter.add(1000, 0.1)
    link = meter.estimate()
    assert link is not None
    assert link.byte == pytest.approx(1e-4, rel=0.1)


def test_a_batch_that_moved_nothing_says_nothing() -> None:
    meter = LinkMeter()
    for _ in range(10):
        meter.add(0, 5.0)
    assert meter.estimate() is None


def test_chunks_at_the_store_together_count_once() -> None:
    timer, both = BatchTimer(), threading.Barrier(2)

    def work() -> None:
        with timer.chunk():
            both.wait()
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - start
    assert 0.05 <= timer.seconds <= wall


def test_a_chunk_still_at_the_store_counts_so_far() -> None:
    timer = BatchTimer()
    with timer.chunk():
        time.sleep(0.02)
        assert timer.seconds >= 0.02
    assert timer.seconds == timer.seconds


def feed(chooser: SpecChooser, bytes_per_second: float, batches: int = 60) -> None:
    for meter in (chooser.reads, chooser.writes):
        for _ in range(batches):
            meter.add(1 << 20, (1 << 20) / bytes_per_second)


def consider(chooser: SpecChooser, clock: Clock, times: int) -> list[int]:
    """The choice after each look."""
    chosen = []
    for _ in range(times):
        clock.now += 11
        chooser.consider()
        chosen.append(chooser.index)
    return chosen


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def chooser(clock: Clock) -> SpecChooser:
    costs = [LARGE_AND_QUICK, SMALL_AND_SLOW]
    return SpecChooser(costs, page_bytes=1 << 20, chunk_pages=1, clock=clock)


def test_a_slow_store_gets_small_pages_and_a_fast_one_quick_ones(
    chooser: SpecChooser, clock: Clock
) -> None:
    feed(chooser, 100e6)
    assert consider(chooser, clock, 4) == [0, 0, 1, 1]
    feed(chooser, 20e9)
    assert consider(chooser, clock, 4) == [1, 1, 0, 0]


def test_nothing_changes_before_the_store_is_known(chooser: SpecChooser, clock: Clock) -> None:
    assert consider(chooser, clock, 5) == [0] * 5
    assert chooser.seconds(0) is None


def test_a_process_that_only_writes_chooses_by_what_it_writes(
    chooser: SpecChooser, clock: Clock
) -> None:
    for _ in range(10):
        chooser.writes.add(1 << 20, 1.0)
    assert consider(chooser, clock, 4) == [0, 0, 1, 1]


def test_one_look_or_two_change_nothing(chooser: SpecChooser, clock: Clock) -> None:
    for rate in (100e6, 100e6, 20e9) * 3:
        feed(chooser, rate)
        assert consider(chooser, clock, 1) == [0]


def test_looks_are_seconds_apart(chooser: SpecChooser, clock: Clock) -> None:
    feed(chooser, 100e6)
    for _ in range(99):
        clock.now += 0.1
        assert not chooser.consider()
    assert chooser.index == 0


def test_figures_around_the_turning_point_do_not_swing_the_choice(
    chooser: SpecChooser, clock: Clock
) -> None:
    rates = np.geomspace(100e6, 20e9, 400)
    differences = []
    for rate in rates:
        link = Link(0.0, 1 / rate)
        totals = [
            link.batch_seconds(cost, cost.encode, 1 << 27, 128)
            + link.batch_seconds(cost, cost.decode, 1 << 27, 128)
            for cost in (LARGE_AND_QUICK, SMALL_AND_SLOW)
        ]
        differences.append(abs(totals[0] - totals[1]))
    turning_point = rates[int(np.argmin(differences))]
    for number in range(12):
        feed(chooser, turning_point * (1.04 if number % 2 else 0.96))
        assert consider(chooser, clock, 4) == [0] * 4
    feed(chooser, turning_point / 4)
    assert consider(chooser, clock, 4)[-1] == 1
    for number in range(12):
        feed(chooser, turning_point * (0.90 if number % 2 else 0.80))
        assert consider(chooser, clock, 4) == [1] * 4


def test_sizes_follow_the_data(chooser: SpecChooser, clock: Clock) -> None:
    feed(chooser, 100e6)
    for _ in range(100):
        chooser.note_size(1, 1000, 900)
    assert chooser.costs[1].stored == pytest.approx(0.9, rel=0.01)
    assert consider(chooser, clock, 4) == [0] * 4


def test_costs_are_measured_on_pages_of_the_layout() -> None:
    codec = Codec(2)
    plans = [
        PagePlan.build(NAMESPACE, CodecSpec.parse(text).section_codecs(LAYOUT), 64)
        for text in ("raw", "kv8", "ecq-3")
    ]
    costs = measure_costs(codec, 2, NAMESPACE, plans)
    codec.close()
    shares = [cost.stored for cost in costs]
    assert shares[0] == plans[0].page_bytes / LAYOUT.raw_bytes
    assert shares[1] == plans[1].page_bytes / LAYOUT.raw_bytes
    assert 2.5 < 16 * shares[2] < 3.6
    assert all(cost.encode > 0 and cost.decode > 0 for cost in costs)


# --- a store


class SlowLink(FakeBackend):
    """Moves so many bytes per second, one object after the other."""

    def __init__(self, bytes_per_second: float) -> None:
        super().__init__(batch_size=1)
        self.bytes_per_second = bytes_per_second
        self._line = threading.Lock()

    def _transfer(self, byte_count: int) -> None:
        with self._line:
            time.sleep(byte_count / self.bytes_per_second)

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        self._transfer(sum(map(len, objects)))
        return super().put(names, objects, timeout_seconds=timeout_seconds)

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        self._transfer(sum(len(self.objects.get(name, b"")) for name in names))
        return super().get_into(names, buffers, timeout_seconds=timeout_seconds)


PAGES = 32


@pytest.fixture
def link() -> SlowLink:
    return SlowLink(20e6)


@pytest.fixture
def pipeline(link: SlowLink) -> Iterator[Pipeline]:
    pipeline = Pipeline(link, StoreOptions(prefetch_timeout_seconds=60, backup_timeout_seconds=60))
    yield pipeline
    pipeline.close()


def normal_views(seed: int) -> tuple[PageViews, list[np.ndarray]]:
    numbers = np.random.default_rng(seed).standard_normal((2, PAGES, 2, 2, 64, 128))
    bits = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return PageViews.of_arrays(LAYOUT, list(bits)), list(bits)


def round_trip(store: PageStore, name: str) -> float:
    """Back a batch up and prefetch it; the seconds of both together."""
    keys = [f"{name}-{number:02}" for number in range(PAGES)]
    source, target = normal_views(1)[0], normal_views(2)[0]
    start = time.monotonic()
    assert all(store.backup(keys, source))
    assert all(store.prefetch(keys, target))
    return time.monotonic() - start


def test_a_page_store_changes_to_smaller_pages_on_a_slow_link_and_reads_them_all(
    link: SlowLink, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "_CONSIDER_SECONDS", 0.0)
    large, small = CodecSpec.parse("kv8"), CodecSpec.parse("kv2")
    store = PageStore(pipeline, NAMESPACE, large, alternatives=[small])
    assert store.spec == large
    for number in range(8):
        round_trip(store, str(number))
    assert store.spec == small
    assert pipeline.counters()["auto.changed"] == 1
    texts = {EncodedPage.parse(page).header.codecs[0].text for page in link.objects.values()}
    assert texts == {"int8-g64", "int2-asym-g64"}


def test_one_spec_needs_no_measurements(pipeline: Pipeline) -> None:
    store = PageStore(pipeline, NAMESPACE, CodecSpec.parse("kv8"))
    round_trip(store, "pages")
    assert "auto.changed" not in pipeline.counters()


def test_elements_that_are_stored_raw_leave_no_choice(pipeline: Pipeline) -> None:
    layout = PageLayout.mha(
        dtype=DType.FP8_E4M3, token_count=16, layer_count=1, head_count=1, head_size=64
    )
    specs = [CodecSpec.parse(name) for name in ("kv8", "kv4")]
    store = PageStore(pipeline, Namespace(Identity(), layout), specs[0], alternatives=specs[1:])
    assert store.spec == specs[0]


def test_costs_foretell_what_another_candidate_takes(link: SlowLink, pipeline: Pipeline) -> None:
    """Measured with one spec, foretold for the others, and then measured with those."""
    specs = [CodecSpec.parse(name) for name in ("kv8", "ecq-3", "raw")]
    store = PageStore(pipeline, NAMESPACE, specs[0], alternatives=specs[1:])
    chooser = store._encoders._chooser
    assert chooser is not None
    for number in range(5):
        round_trip(store, str(number))
    reads, writes = chooser.reads.estimate(), chooser.writes.estimate()
    assert reads is not None and writes is not None
    for cost, spec in zip(chooser.costs, specs, strict=True):
        raw_bytes, chunks = PAGES * LAYOUT.raw_bytes, PAGES // store.chunk_pages or 1
        foretold = reads.batch_seconds(cost, cost.decode, raw_bytes, chunks)
        foretold += writes.batch_seconds(cost, cost.encode, raw_bytes, chunks)
        taken = round_trip(PageStore(pipeline, NAMESPACE, spec), f"again {spec.text}")
        assert 0.6 < taken / foretold < 1.7, spec.text


# --- the option


def test_the_preset_auto_has_candidates() -> None:
    options = AdapterOptions.parse({"url": "memory://", "preset": "auto"})
    assert (options.spec.text, len(options.alternatives)) == (
        CodecSpec.parse("kv8-channel").text,
        3,
    )
    assert options.can_derotate


def test_auto_candidates_are_what_may_be_chosen() -> None:
    names = ["key=int8-g64 value=int4-g64", "ecq-2.5"]
    options = AdapterOptions.parse({"url": "memory://", "preset": "auto", "auto_candidates": names})
    assert [options.spec, *options.alternatives] == [CodecSpec.parse(name) for name in names]
    assert options.as_raw().alternatives == ()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"auto_candidates": ["kv8", "kv4"]}, '"preset": "auto"'),
        ({"preset": "auto", "auto_candidates": ["kv8"]}, "two presets"),
        ({"preset": "auto", "auto_candidates": "kv8 kv4"}, "list"),
        ({"preset": "auto", "auto_candidates": ["kv8", 4]}, "wanted a text"),
        ({"preset": "auto", "auto_candidates": ["kv8", "kv3"]}, "'kv3'"),
        ({"preset": "auto", "nbits_key": 8}, "nbits_key"),
    ],
)
def test_auto_that_cannot_be_is_refused(extra: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdapterOptions.parse({"url": "memory://", **extra})


def test_layers_and_raw_pools_hold_for_every_candidate() -> None:
    names = ["key=int8-g64 value=int8-g64 layer.1=raw,raw", "kv4"]
    options = AdapterOptions.parse({"url": "memory://", "preset": "auto", "auto_candidates": names})
    assert options.has_layers
    assert not options.without_layers().has_layers
