"""What ``kvcodec bench codec`` measures.

A block is one codec, one memory layout and one number of threads. Its cases are memcpy, a stream
of the encoder's traffic and one of the decoder's, and encode and decode on each instruction set. A
round runs every case once on a chunk of pages, each case on the next chunk, in an order that turns
from round to round. What is compared was therefore measured within a fraction of a second, on
memory that is in no cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcodec import native
from kvcodec.cli.bench_memory import Memory
from kvcodec.cli.bench_traffic import MEMCPY, STREAM, Sample, run_traffic
from kvcodec.cli.output import Json
from kvcodec.codec import Codec
from kvcodec.errors import NativeError
from kvcodec.identity import Identity, Namespace
from kvcodec.plan import PagePlan
from kvcodec.rotary import SPLIT, Rotary
from kvcodec.spec import CodecSpec

__all__ = ["Block", "Row", "Spread", "measure_block", "seconds_of"]

_KEY_BYTES = 64
#: A case that took so long in all is left out of further rounds.
_SLOW_SECONDS = 2.0
#: No figure rests on fewer samples, if there were as many rounds.
_FEWEST_SAMPLES = 5
#: Several threads count as undisturbed if they were on their processors for this part of the time,
#: and for this part of what they were in the best sample.
_MINIMUM_OCCUPANCY = 0.9
_MINIMUM_OF_BEST = 0.97
_MOST_EXTRA_ROUNDS = 2


def _rotary_of(spec: CodecSpec, size: int) -> Rotary | None:
    """A rotation for codecs that make use of one; the time does not depend on which."""
    if not spec.can_derotate:
        return None
    frequencies = np.float32(10000.0) ** -(np.arange(0, size, 2, dtype=np.float32) / size)
    return Rotary(size, SPLIT, tuple(frequencies.astype(float).tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What one block measures."""

    codec: str
    spec: CodecSpec
    layout: str
    threads: int
    isas: tuple[str, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    p25: float
    median: float
    p75: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> Spread:
        """Of at least one value."""
        p25, median, p75 = np.percentile(values, [25, 50, 75]).tolist()
        return cls(p25, median, p75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result. Ratios are above 1 where the codec is faster than what it is compared with."""

    codec: str
    isa: str
    threads: int
    op: str
    layout: str
    raw_to_encoded: float
    gb_per_s: float
    gb_per_s_wall: float
    memcpy_gb_per_s: float
    stream_gb_per_s: float
    memcpy: Spread
    stream: Spread
    samples: int
    undisturbed_samples: int

    def as_json(self) -> Json:
        """One row of the document."""
        return {
            "codec": self.codec,
            "isa": self.isa,
            "threads": self.threads,
            "op": self.op,
            "layout": self.layout,
            "raw_to_encoded": round(self.raw_to_encoded, 4),
            "gb_per_s": round(self.gb_per_s, 3),
            "gb_per_s_wall": round(self.gb_per_s_wall, 3),
            "memcpy_gb_per_s": round(self.memcpy_gb_per_s, 3),
            "stream_gb_per_s": round(self.stream_gb_per_s, 3),
            "ratio_memcpy": round(self.memcpy.median, 4),
            "ratio_memcpy_p25": round(self.memcpy.p25, 4),
            "ratio_memcpy_p75": round(self.memcpy.p75, 4),
            "ratio_stream": round(self.stream.median, 4),
            "ratio_stream_p25": round(self.stream.p25, 4),
            "ratio_stream_p75": round(self.stream.p75, 4),
            "samples": self.samples,
            "undisturbed_samples": self.undisturbed_samples,
        }


@dataclass(slots=True)
class _Case:
    """Something timed once per round."""

    run: Callable[[int], Sample]
    samples: dict[int, Sample] = field(default_factory=dict)

    @property
    def is_slow(self) -> bool:
        """Whether it took long enough already, and often enough."""
        spent = sum(sample.wall_seconds for sample in self.samples.values())
        return len(self.samples) >= _FEWEST_SAMPLES and spent > _SLOW_SECONDS

    def undisturbed(self, threads: int) -> set[int]:
        """The rounds in which no thread had to wait for a processor.

        One thread is measured in CPU time, which waiting does not change.
        """
        if threads == 1:
            return set(self.samples)
        busy = self._busy()
        best = _MINIMUM_OF_BEST * max(busy.values(), default=0.0)
        least = max(best, _MINIMUM_OCCUPANCY * threads)
        return {at for at, share in busy.items() if share >= least}

    def chosen(self, threads: int) -> dict[int, Sample]:
        """The undisturbed samples by round; where they are few, the least disturbed ones too."""
        rounds = self.undisturbed(threads)
        if len(rounds) < _FEWEST_SAMPLES:
            busy = self._busy()
            rounds = set(sorted(busy, key=lambda at: -busy[at])[:_FEWEST_SAMPLES])
        return {at: self.samples[at] for at in sorted(rounds)}

    def _busy(self) -> dict[int, float]:
        return {at: s.cpu_seconds / s.wall_seconds for at, s in self.samples.items()}


def seconds_of(sample: Sample, threads: int) -> float:
    """The time that counts: CPU time of one thread, else by the clock."""
    return sample.cpu_seconds if threads == 1 else sample.wall_seconds


class _Workers:
    """A codec and the CPU clocks of its threads."""

    def __init__(self, threads: int, begin: Callable[[Codec], None]) -> None:
        before = _thread_ids()
        self.codec = Codec(threads)
        begin(self.codec)
        new = sorted(_thread_ids() - before)
        if len(new) != threads:
            raise NativeError(f"{len(new)} threads started in place of {threads}")
        # The kernel's number for the CPU-time clock of a thread; see clock_getcpuclockid(3).
        self._clocks = [~int(thread) << 3 | 6 for thread in new]

    def cpu_seconds(self) -> float:
        """CPU time of all workers so far."""
        return sum(time.clock_gettime_ns(clock) for clock in self._clocks) / 1e9


def _thread_ids() -> set[str]:
    try:
        return set(os.listdir("/proc/self/task"))
    except OSError as error:
        raise NativeError(f"thread times cannot be read, which needs Linux: {error}") from error


@contextmanager
def _isa(name: str) -> Iterator[None]:
    before = native.isa()
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa(before)


class _Bench:
    """The cases of a block in a memory."""

    def __init__(self, block: Block, memory: Memory) -> None:
        self.memory = memory
        layout = memory.layout
        self.namespace = Namespace(Identity.of(model="benchmark"), layout)
        rotary = _rotary_of(block.spec, layout.streams[0].head_size)
        self.plan = PagePlan.for_spec(self.namespace, block.spec, _KEY_BYTES, rotary)
        self.keys = [f"{page:064x}".encode() for page in range(memory.page_count)]
        self.slots = memory.slots(self.plan.page_bytes)
        self.source = memory.views(memory.source, block.layout)
        self.decoded = memory.views(memory.decoded, block.layout)
        self.threads = block.threads
        self.workers = _Workers(block.threads, self._encode_all)
        # No stream writes over the encoded pages.
        raw, page = layout.raw_bytes, int(self.page_bytes) // 64 * 64
        self.cases = {
            ("memcpy", ""): self._traffic(MEMCPY, memory.source, raw, memory.decoded, raw),
            ("stream", "encode"): self._traffic(STREAM, memory.source, raw, memory.streamed, page),
            ("stream", "decode"): self._traffic(STREAM, memory.encoded, page, memory.decoded, raw),
        }
        for isa in block.isas:
            self.cases[isa, "encode"] = _Case(self._timed(isa, self._encode))
            self.cases[isa, "decode"] = _Case(self._timed(isa, self._decode))

    def _encode_all(self, codec: Codec) -> None:
        encoded = codec.encode_into(self.plan, self.keys, self.source, self.slots)
        sizes = encoded.page_bytes.tolist()
        self.pages = [slot[:size] for slot, size in zip(self.slots, sizes, strict=True)]
        self.page_bytes = sum(sizes) / len(sizes)

    def _traffic(
        self,
        kind: int,
        source: npt.NDArray[np.uint8],
        read_bytes: int,
        target: npt.NDArray[np.uint8],
        write_bytes: int,
    ) -> _Case:
        chunks = [
            self.memory.ranges(chunk, source, read_bytes, target, write_bytes)
            for chunk in range(self.memory.chunk_count)
        ]
        return _Case(lambda chunk: run_traffic(kind, chunks[chunk], self.threads))

    def _timed(self, isa: str, operation: Callable[[int], None]) -> Callable[[int], Sample]:
        def run(chunk: int) -> Sample:
            with _isa(isa):
                cpu, wall = self.workers.cpu_seconds(), time.perf_counter()
                operation(chunk)
                wall = time.perf_counter() - wall
            return Sample(wall, self.workers.cpu_seconds() - cpu)

        return run

    def _encode(self, chunk: int) -> None:
        pages = self.memory.pages_of(chunk)
        part = slice(pages.start, pages.stop)
        self.workers.codec.encode_into(
            self.plan, self.keys[part], self.source.select(part), self.slots[part]
        )

    def _decode(self, chunk: int) -> None:
        pages = self.memory.pages_of(chunk)
        part = slice(pages.start, pages.stop)
        errors = self.workers.codec.decode_into(
            self.namespace, self.plan, self.keys[part], self.pages[part], self.decoded.select(part)
        )
        for error in errors:
            if error is not None:
                raise NativeError(f"a page that was just encoded does not decode: {error}")


def measure_block(block: Block, memory: Memory, progress: Callable[[], None]) -> list[Row]:
    """Run the rounds of a block; `progress` is called after each one.

    On several threads, rounds are added (up to three times as many in all) while a case has too few
    undisturbed samples.
    """
    bench = _Bench(block, memory)
    try:
        _run_rounds(bench, block, progress)
    finally:
        bench.workers.codec.close()
    return [_row(bench, block, isa, op) for isa in block.isas for op in ("encode", "decode")]


def _run_rounds(bench: _Bench, block: Block, progress: Callable[[], None]) -> None:
    cases = list(bench.cases.values())
    turn = 0
    for number in range(block.rounds * (1 + _MOST_EXTRA_ROUNDS)):
        if number >= block.rounds and _are_enough(cases, block):
            break
        start = number % len(cases)
        for case in cases[start:] + cases[:start]:
            if not case.is_slow:
                case.samples[number] = case.run(turn % bench.memory.chunk_count)
                turn += 1
        if number < block.rounds:
            progress()


def _are_enough(cases: Sequence[_Case], block: Block) -> bool:
    wanted = min(block.rounds, _FEWEST_SAMPLES)
    return all(len(case.undisturbed(block.threads)) >= wanted for case in cases)


def _row(bench: _Bench, block: Block, isa: str, op: str) -> Row:
    threads, raw_bytes = block.threads, bench.memory.chunk_pages * bench.memory.layout.raw_bytes
    case = bench.cases[isa, op]
    chosen = case.chosen(threads)
    seconds = np.array([seconds_of(sample, threads) for sample in chosen.values()])
    wall = np.array([sample.wall_seconds for sample in chosen.values()])
    compared = []
    rates = []
    for name in (("memcpy", ""), ("stream", op)):
        other = bench.cases[name].chosen(threads)
        other_seconds = {at: seconds_of(sample, threads) for at, sample in other.items()}
        median = float(np.median(list(other_seconds.values())))
        rates.append(raw_bytes / median / 1e9)
        # A round in which the other one was disturbed is compared with the other one's median.
        compared.append(
            [
                other_seconds.get(at, median) / seconds_of(sample, threads)
                for at, sample in chosen.items()
            ]
        )
    return Row(
        codec=block.codec,
        isa=isa,
        threads=threads,
        op=op,
        layout=block.layout,
        raw_to_encoded=bench.memory.layout.raw_bytes / bench.page_bytes,
        gb_per_s=raw_bytes / float(np.median(seconds)) / 1e9,
        gb_per_s_wall=raw_bytes / float(np.median(wall)) / 1e9,
        memcpy_gb_per_s=rates[0],
        stream_gb_per_s=rates[1],
        memcpy=Spread.of(np.array(compared[0])),
        stream=Spread.of(np.array(compared[1])),
        samples=len(chosen),
        undisturbed_samples=len(case.undisturbed(threads)),
    )
