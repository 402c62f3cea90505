"""What the preset ``auto`` foretells and chooses, beside what every candidate really takes.

    make bench-auto

A store in memory behind a line of a chosen rate; batches of 128 pages of Qwen2.5-7B through the
real pipeline. The store is measured with the first candidate only; the costs of the others are
foretold from that, and then measured. Candidates take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvcodec.backend import GetResult, PutResult
from kvcodec.cli.bench_memory import layout_of
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import PageViews
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline, StoreOptions
from kvcodec_backends.memory import MemoryBackend

_PAGES = 128
_BATCHES = 5
_DISTINCT_NUMBERS = 1 << 20
_SECONDS = 3600.0


class Line(MemoryBackend):
    """Objects in memory, behind a line that moves so many bytes per second in each direction."""

    def __init__(self, rate: float) -> None:
        super().__init__(max_bytes=2 << 30)
        self.rate = rate
        self._lines = {"put": threading.Lock(), "get": threading.Lock()}

    def _wait(self, byte_count: int, start: float) -> None:
        left = byte_count / self.rate - (time.monotonic() - start)
        if left > 0:
            time.sleep(left)

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """As a store in memory, but slower."""
        with self._lines["put"]:
            start = time.monotonic()
            answers = super().put(names, objects, timeout_seconds=timeout_seconds)
            self._wait(sum(map(len, objects)), start)
        return answers

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """As a store in memory, but slower."""
        with self._lines["get"]:
            start = time.monotonic()
            answers = super().get_into(names, buffers, timeout_seconds=timeout_seconds)
            moved = sum(answer for answer in answers if isinstance(answer, int))
            self._wait(moved, start)
        return answers


class Bench:
    """One pipeline on one line, and the pages that go through it."""

    def __init__(self, rate: float, threads: int) -> None:
        options = StoreOptions(
            codec_threads=threads,
            prefetch_timeout_seconds=_SECONDS,
            backup_timeout_seconds=_SECONDS,
        )
        self.pipeline = Pipeline(Line(rate), options)
        self.namespace = Namespace(Identity(), layout_of("qwen2.5-7b", 64))
        numbers = np.random.default_rng(0).standard_normal(_DISTINCT_NUMBERS).astype(np.float32)
        bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        self.source, self.target = self._views(bits), self._views(bits)

    def _views(self, bits: np.ndarray) -> PageViews:
        layout = self.namespace.layout
        stream = layout.streams[0]
        shape = (layout.layer_count, stream.head_count, layout.token_count, stream.head_size)
        return PageViews.of_arrays(layout, [np.resize(bits, (_PAGES, *shape)) for _ in range(2)])

    def round_trip(self, store: PageStore) -> tuple[float, float]:
        """Seconds of a backup and of a prefetch of all pages, into an empty store."""
        keys = [f"{number:064x}" for number in range(_PAGES)]
        store.clear()
        start = time.perf_counter()
        if not all(store.backup(keys, self.source)):
            raise SystemExit(f"a backup failed: {self.pipeline.counters()}")
        middle = time.perf_counter()
        if not all(store.prefetch(keys, self.target)):
            raise SystemExit(f"a prefetch failed: {self.pipeline.counters()}")
        return middle - start, time.perf_counter() - middle


def measure(
    rate: float, options: argparse.Namespace, progress: Progress
) -> list[dict[str, object]]:
    """Foretold and measured seconds of every candidate behind a line of that rate."""
    specs = [CodecSpec.parse(name) for name in options.candidates.split(",")]
    task = progress.add_task(f"{rate / 1e9:g} GB/s", total=_BATCHES + options.rounds * len(specs))
    bench = Bench(rate, options.codec_threads)
    try:
        first = PageStore(bench.pipeline, bench.namespace, specs[0], alternatives=specs[1:])
        chooser = first._encoders._chooser
        assert chooser is not None
        for _ in range(_BATCHES):
            bench.round_trip(first)
            progress.advance(task)
        foretold = [chooser.seconds(index) or 0.0 for index in range(len(specs))]
        taken: list[list[float]] = [[] for _ in specs]
        stores = [PageStore(bench.pipeline, bench.namespace, spec) for spec in specs]
        for number in range(options.rounds):
            for offset in range(len(specs)):
                index = (number + offset) % len(specs)
                taken[index].append(sum(bench.round_trip(stores[index])))
                progress.advance(task)
    finally:
        bench.pipeline.close()
    return [
        {
            "bytes_per_s": rate,
            "candidate": name,
            "foretold_s": foretold[index],
            "measured_s": statistics.median(taken[index]),
            "measured_range_s": [min(taken[index]), max(taken[index])],
            "is_chosen": index == chooser.cheapest(),
        }
        for index, name in enumerate(options.candidates.split(","))
    ]


def draw(rows: list[dict[str, object]], picture: Path) -> None:
    """Seconds of a batch against the line's rate: lines foretold, points measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6.5, 4))
    for number, name in enumerate(dict.fromkeys(str(row["candidate"]) for row in rows)):
        mine = [row for row in rows if row["candidate"] == name]
        rates = [float(str(row["bytes_per_s"])) / 1e9 for row in mine]
        panel.plot(rates, [row["foretold_s"] for row in mine], color=f"C{number}", label=name)
        panel.plot(rates, [row["measured_s"] for row in mine], "o", color=f"C{number}")
    panel.set(xscale="log", yscale="log", xlabel="GB/s of the store, each way")
    panel.set_ylabel("seconds to back 128 pages up and prefetch them")
    panel.set_title("auto: foretold (lines) and measured (points)")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def main() -> None:
    """Measure, print a table, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default="0.1e9,0.3e9,1e9,3e9,10e9", help="bytes per second")
    parser.add_argument("--candidates", default="kv8-channel,ecq-4,kv4-channel,ecq-3")
    parser.add_argument("--codec-threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with Progress(console=Console(stderr=True)) as progress:
        for rate in options.rates.split(","):
            rows += measure(float(rate), options, progress)
    table = Table("store", "candidate", "foretold", "measured", "chosen")
    for row in rows:
        seconds = [f"{float(str(row[name])) * 1e3:.0f} ms" for name in ("foretold_s", "measured_s")]
        rate = f"{float(str(row['bytes_per_s'])) / 1e9:g} GB/s"
        table.add_row(rate, str(row["candidate"]), *seconds, "yes" if row["is_chosen"] else "")
    Console().print(table)
    if options.json:
        settings = {"candidates": options.candidates, "codec_threads": options.codec_threads}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
