"""Choosing a spec by measured speeds: the model of costs, the meters, and when a choice changes."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcodec.auto import BatchTimer, CodecCost, Link, LinkMeter, SpecChooser, measure_costs
from kvcodec.codec import Codec
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec

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


def test_nothing_changes_before_both_directions_are_known(
    chooser: SpecChooser, clock: Clock
) -> None:
    for _ in range(10):
        chooser.reads.add(1 << 20, 1.0)
    assert consider(chooser, clock, 5) == [0] * 5
    assert chooser.seconds(0) is None


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
