"""What a sidecar costs: PageStore through it and without it, on the same store in one run.

    make bench-sidecar

Same node: batches of kv4 pages of Llama-3.1-8B geometry are backed up and prefetched through
shared memory and by the store in this process, in turns. Remote: the same encoded pages through
streams on the loopback interface, beside bare gRPC streams of the same chunks in the same run: one
that moves messages and nothing else, and one with the same store behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
from bench_streams import bench_streams
from rich.console import Console
from rich.table import Table

from kvcodec.backend import open_backend
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.pipeline import Pipeline, StoreOptions
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from server_sidecar import Sidecar

LAYOUT = PageLayout.mha(
    dtype=DType.BF16, token_count=64, layer_count=32, head_count=8, head_size=128
)
NAMESPACE = Namespace(Identity.of(model="meta-llama/Llama-3.1-8B"), LAYOUT)
PATIENCE = StoreOptions(prefetch_timeout_seconds=60, backup_timeout_seconds=60)


def raw_pages(count: int) -> tuple[PageViews, list[np.ndarray]]:
    """Pages as in a page-first host pool, with values of the size of KV."""
    shape = (count, LAYOUT.layer_count, 8, LAYOUT.token_count, 128)
    values = np.random.default_rng(1).standard_normal(1 << 22, np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    arrays = [np.resize(bits, shape) for _ in LAYOUT.streams]
    return PageViews.of_arrays(LAYOUT, arrays), arrays


class Side:
    """A page store, and its times."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.pipeline = Pipeline(open_backend(url), PATIENCE)
        self.store = PageStore(self.pipeline, NAMESPACE, CodecSpec.parse("kv4"))
        self.seconds: dict[str, list[float]] = {"backup": [], "prefetch": []}

    def round(self, keys: list[str], source: PageViews, target: PageViews, keep: bool) -> None:
        """Back up and prefetch once; `keep` the times."""
        names = [NAMESPACE.object_name(key) for key in keys]
        self.pipeline.backend.delete(names, timeout_seconds=30)
        for operation, call in (
            ("backup", lambda: self.store.backup(keys, source)),
            ("prefetch", lambda: self.store.prefetch(keys, target)),
        ):
            started = time.perf_counter()
            done = call()
            seconds = time.perf_counter() - started
            if not all(done):
                raise SystemExit(f"{self.name}: {operation} lost pages: {self.pipeline.counters()}")
            if keep:
                self.seconds[operation].append(seconds)


def bench_same_node(directory: Path, store: str, page_count: int, rounds: int) -> dict[str, object]:
    source, _ = raw_pages(page_count)
    target, arrays = raw_pages(page_count)
    keys = [f"{index:064x}" for index in range(page_count)]
    with Sidecar(directory, store) as sidecar:
        sides = [Side("in process", store), Side("sidecar", sidecar.unix_url)]
        for index in range(rounds + 1):
            for side in sides if index % 2 else reversed(sides):
                for array in arrays:
                    array[:, 0, 0, 0, 0] = 0
                side.round(keys, source, target, keep=index > 0)
        for side in sides:
            side.pipeline.close()
    return {
        "store": store.partition("?")[0],
        "pages": page_count,
        "moved": "raw pages",
        "bytes_per_page": LAYOUT.raw_bytes,
        "encoded_bytes_per_page": sides[0].store.plan().page_bytes,
        "seconds": {side.name: side.seconds for side in sides},
        "ratio": {
            operation: [
                own / through
                for own, through in zip(
                    sides[0].seconds[operation], sides[1].seconds[operation], strict=True
                )
            ]
            for operation in ("backup", "prefetch")
        },
    }


def bench_remote(_: Path, __: str, page_count: int, rounds: int) -> dict[str, object]:
    """Encoded pages of that size through streams."""
    size = PagePlan.build(NAMESPACE, CodecSpec.parse("kv4").section_codecs(LAYOUT), 64).page_bytes
    return bench_streams(page_count, size, rounds)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def show(results: dict[str, dict[str, object]]) -> None:
    table = Table("path", "operation", "GB/s", "of", "times as fast", title="medians (quartiles)")
    for kind, result in results.items():
        moved = result["pages"] * result["bytes_per_page"]
        for operation, ratios in result["ratio"].items():
            seconds = result["seconds"]
            verb = operation.partition(" ")[0]
            own = seconds.get("sidecar", seconds)
            own = own.get(operation, own[verb])
            speed = moved / spread(own)[1] / 1e9
            low, middle, high = spread(ratios)
            times = f"{middle:.2f} ({low:.2f}-{high:.2f})"
            row = (kind, operation, f"{speed:.2f}", result["moved"], times)
            table.add_row(*row)
    Console().print(table)
    remote = results.get("remote")
    if remote is not None:
        table = Table("call", "processor seconds", "another thread late, ms", title="streams")
        for name, used in remote["processor_seconds"].items():
            late = statistics.median(remote["late_seconds"][name])
            table.add_row(name, f"{used:.3f}", f"{1000 * late:.2f}")
        Console().print(table)


def plot(results: dict[str, dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    bars = [
        (
            f"{kind}\n{operation}".replace(" with", "\nwith")
            .replace(" dropped", "\ndropped")
            .replace(" over", "\nover"),
            ratios,
        )
        for kind, result in results.items()
        for operation, ratios in result["ratio"].items()
    ]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    axes.boxplot([ratios for _, ratios in bars], whis=(0, 100))
    axes.set_xticks(range(1, len(bars) + 1), [label for label, _ in bars], fontsize=8)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("speed, as a multiple")
    axes.set_title(
        "Sidecar beside the store in process, its streams beside bare gRPC streams", fontsize=9
    )
    figure.savefig(path, metadata={"Date": None})


PARTS = {"same node": bench_same_node, "remote": bench_remote}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", default="tier+ram://?bytes=1GiB&store=memory://?max_bytes=2GiB")
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=PARTS, help="the other part stays as it is in --json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    results = {}
    if arguments.only and arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())
    for kind, bench in PARTS.items():
        if arguments.only in (None, kind):
            load = os.getloadavg()[0]
            with tempfile.TemporaryDirectory() as directory:
                results[kind] = bench(
                    Path(directory), arguments.store, arguments.pages, arguments.rounds
                )
            results[kind]["about"] = {
                "machine": platform.processor() or platform.machine(),
                "cpus": os.cpu_count(),
                "load": [load, os.getloadavg()[0]],
                "grpcio": grpc.__version__,
            }
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
