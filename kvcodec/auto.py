"""Choosing a spec by measured speeds: the one with which pages come and go soonest.

A store moves a batch in chunks, and while one chunk is at the store another is with the codec. So

    seconds of a batch = max(transfer, work) + min(transfer, work) / chunks
    transfer           = seconds per call + seconds per stored byte × stored bytes
    work               = seconds per raw byte × raw bytes, on all threads of the codec

and what a spec costs is one backup and one prefetch of a batch. Speeds of the codec are measured
once, on pages of the store's own layout; those of the store all the time, from its batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.codec import Codec
from kvcodec.identity import Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan

__all__ = ["BatchTimer", "CodecCost", "Link", "LinkMeter", "SpecChooser", "measure_costs"]

#: Pages in the batch that costs are compared for: SGLang's storage threads move so many at once.
_BATCH_PAGES = 128
#: A batch counts half as much when so many others have followed.
_HALF_LIFE_BATCHES = 16
_FEWEST_BATCHES = 4

_CONSIDER_SECONDS = 10.0
#: A candidate listed earlier is taken as long as it costs at most so much more than the cheapest.
_TIE = 1.05
#: The present one stays until another costs less than this share of it, so many times in a row.
_WORTH_IT = 0.85
_IN_A_ROW = 3

_MEASURED_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class CodecCost:
    """What one spec costs: stored bytes per raw byte, and seconds per raw byte in each direction
    with all threads of the codec at work.
    """

    stored: float
    encode: float
    decode: float


@dataclass(frozen=True, slots=True)
class Link:
    """What a store takes for a batch: seconds for a call however small, and seconds per byte."""

    call: float
    byte: float

    def batch_seconds(
        self, cost: CodecCost, codec_seconds: float, raw_bytes: int, chunks: int
    ) -> float:
        """A batch of `raw_bytes` in so many chunks; `codec_seconds` is the cost's own direction."""
        transfer = self.call + self.byte * cost.stored * raw_bytes
        work = codec_seconds * raw_bytes
        return max(transfer, work) + min(transfer, work) / chunks


class LinkMeter:
    """A line through (bytes, seconds) of past batches, recent ones first. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = np.zeros(5)
        self._batches = 0

    def add(self, byte_count: int, seconds: float) -> None:
        """One batch; one that moved nothing says nothing."""
        if not byte_count:
            return
        x, y = float(byte_count), seconds
        with self._lock:
            self._sums *= 0.5 ** (1 / _HALF_LIFE_BATCHES)
            self._sums += (1.0, x, y, x * x, x * y)
            self._batches += 1

    def estimate(self) -> Link | None:
        """None before there are enough batches. Where all batches have about one size, what a call
        takes cannot be told from what its bytes take, and counts as theirs.
        """
        with self._lock:
            weight, x, y, xx, xy = self._sums.tolist()
            if self._batches < _FEWEST_BATCHES:
                return None
        spread = weight * xx - x * x
        slope = (weight * xy - x * y) / spread if spread > 0.01 * x * x else 0.0
        constant = (y - slope * x) / weight
        if slope <= 0 or constant <= 0:
            return Link(0.0, y / x)
        return Link(constant, slope)


class BatchTimer:
    """How long a store was at work on one batch: while any of its chunks was there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0
        self._seconds = 0.0
        #: Counted by the thread whose batch it is.
        self.bytes = 0

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """Around the store's work on one chunk, on any thread."""
        with self._lock:
            if not self._running:
                self._since = time.monotonic()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._seconds += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        """So far."""
        with self._lock:
            running = time.monotonic() - self._since if self._running else 0.0
            return self._seconds + running


class SpecChooser:
    """Which of several candidates to encode with. Thread-safe.

    Candidates stand in the order in which they are preferred; the first one is taken until the
    store has been measured. A direction that this process never uses counts like the other one.
    """

    def __init__(
        self,
        costs: Sequence[CodecCost],
        *,
        page_bytes: int,
        chunk_pages: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`costs` of the candidates; `page_bytes` of a raw page."""
        self.costs = list(costs)
        self.reads, self.writes = LinkMeter(), LinkMeter()
        self.index = 0
        self._batch_bytes = _BATCH_PAGES * page_bytes
        self._chunks = max(1, _BATCH_PAGES // chunk_pages)
        self._clock = clock
        self._lock = threading.Lock()
        self._next = clock() + _CONSIDER_SECONDS
        self._in_a_row = 0

    def seconds(self, index: int) -> float | None:
        """What a backup and a prefetch of a batch cost with this candidate; None if not known."""
        reads = self.reads.estimate() or self.writes.estimate()
        writes = self.writes.estimate() or reads
        if reads is None or writes is None:
            return None
        cost = self.costs[index]
        return reads.batch_seconds(
            cost, cost.decode, self._batch_bytes, self._chunks
        ) + writes.batch_seconds(cost, cost.encode, self._batch_bytes, self._chunks)

    def cheapest(self) -> int:
        """The candidate with the lowest cost, or an earlier one that costs about the same."""
        known = [self.seconds(index) for index in range(len(self.costs))]
        seconds = [cost for cost in known if cost is not None]
        if len(seconds) < len(known):
            return self.index
        return next(i for i, cost in enumerate(seconds) if cost <= _TIE * min(seconds))

    def __str__(self) -> str:
        """A line for people: what the candidates cost."""
        known = [self.seconds(index) for index in range(len(self.costs))]
        return ", ".join("?" if cost is None else f"{cost * 1e3:.0f} ms" for cost in known)

    def note_size(self, index: int, raw_bytes: int, stored_bytes: int) -> None:
        """Pages of this candidate have come out so large: the data decide, with coded sections."""
        with self._lock:
            old = self.costs[index]
            share = old.stored + 0.1 * (stored_bytes / raw_bytes - old.stored)
            self.costs[index] = CodecCost(share, old.encode, old.decode)

    def consider(self) -> bool:
        """Look at the figures if it is time to, and change the choice if they ask for it; True if
        it changed.
        """
        with self._lock:
            if self._clock() < self._next:
                return False
            self._next = self._clock() + _CONSIDER_SECONDS
            wanted = self.cheapest()
            now, then = self.seconds(self.index), self.seconds(wanted)
            if now is None or then is None:
                return False
            # An earlier candidate is preferred: a tie is enough for the way back to it.
            is_better = wanted < self.index or then < _WORTH_IT * now
            self._in_a_row = self._in_a_row + 1 if is_better else 0
            if self._in_a_row < _IN_A_ROW:
                return False
            self.index, self._in_a_row = wanted, 0
            return True


def measure_costs(
    codec: Codec, threads: int, namespace: Namespace, plans: Sequence[PagePlan]
) -> list[CodecCost]:
    """Encode and decode a few pages of normal numbers under each plan; the best of three rounds.

    Some tenths of a second, and memory for twice as many raw pages as there are threads, three
    times.
    """
    layout, count = namespace.layout, 2 * threads
    source, target = _normal_pages(layout, count), _normal_pages(layout, count)
    costs = []
    for plan in plans:
        pages = list(np.zeros((count, plan.page_bytes), np.uint8))
        keys = [bytes(plan.key_bytes)] * count
        encode = decode = float("inf")
        stored: list[npt.NDArray[np.uint8]] = []
        for _ in range(_MEASURED_ROUNDS):
            start = time.perf_counter()
            encoded = codec.encode_into(plan, keys, source, pages)
            middle = time.perf_counter()
            sizes = encoded.page_bytes.tolist()
            stored = [page[:size] for page, size in zip(pages, sizes, strict=True)]
            codec.decode_into(namespace, plan, keys, stored, target)
            encode = min(encode, middle - start)
            decode = min(decode, time.perf_counter() - middle)
        raw_bytes = count * layout.raw_bytes
        share = sum(map(len, stored)) / raw_bytes
        costs.append(CodecCost(share, encode / raw_bytes, decode / raw_bytes))
    return costs


def _normal_pages(layout: PageLayout, count: int) -> PageViews:
    """Views of pages of normal numbers (zeros, where the element type has none)."""
    arrays = []
    for stream in layout.streams:
        shape = (count, layout.layer_count, stream.head_count, layout.token_count, stream.head_size)
        arrays.append(_normal_bits(layout.dtype, shape))
    return PageViews.of_arrays(layout, arrays)


def _normal_bits(dtype: DType, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    if not dtype.is_quantizable:
        return np.zeros(shape, f"u{dtype.itemsize}")
    # A table of them, for a page may have millions of elements and nobody looks at them.
    numbers = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    if dtype is DType.BF16:
        bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    else:
        bits = numbers.astype(f"f{dtype.itemsize}").view(f"u{dtype.itemsize}")
    return np.resize(bits, shape)
