"""What a sidecar costs: PageStore through it and without it, on the same store in one run.

    make bench-sidecar

Same node: batches of kv4 pages of Llama-3.1-8B geometry are backed up and prefetched through
shared memory and by the store in this process, in turns. Remote: the same encoded pages through
streams on the loopback interface, beside bare gRPC streams of the same chunks in the same run: one
that moves bytes and nothing else, and one with the same store behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from kvcodec.backend import open_backend
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.pipeline import Pipeline, StoreOptions
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore
from kvcodec_server._frames import chunks

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


# A store of one copy each way: what a tier does besides is no matter of the stream.
REMOTE_STORE = "memory://?max_bytes=2GiB"

BARE_SERVER = """
import os, sys, time
from concurrent import futures
import grpc
from kvcodec.backend import open_backend
from kvcodec_server.malloc import keep_freed_memory
keep_freed_memory()
page_count, size, chunk_bytes = map(int, sys.argv[1:4])
store = open_backend(sys.argv[4])
names = [f"{0:032x}/{index:064x}" for index in range(page_count)]
chunks = [os.urandom(chunk_bytes) for _ in range(page_count * -(-size // chunk_bytes))]
page = memoryview(bytearray(size))
def get(request, context):
    return iter(chunks)
def put(requests, context):
    return b"%d" % sum(map(len, requests))
def get_stored(request, context):
    for name in names:
        store.get_into([name], [page], timeout_seconds=60)
        for at in range(0, size, chunk_bytes):
            yield bytes(page[at:at + chunk_bytes])
def put_stored(requests, context):
    for name in names:
        parts = [next(requests) for _ in range(0, size, chunk_bytes)]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        store.put([name], [memoryview(data)], timeout_seconds=60)
    return b""
generic = grpc.method_handlers_generic_handler("bare", {
    **{call.__name__: grpc.unary_stream_rpc_method_handler(call) for call in (get, get_stored)},
    **{call.__name__: grpc.stream_unary_rpc_method_handler(call) for call in (put, put_stored)}})
server = grpc.server(futures.ThreadPoolExecutor(4), options=[
    ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)])
server.add_generic_rpc_handlers((generic,))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
time.sleep(3600)
"""


def processor_seconds(pid: int) -> float:
    """Of all threads that this process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench_remote(directory: Path, _: str, page_count: int, rounds: int) -> dict[str, object]:
    """Encoded pages through streams, and bare streams of as many chunks of the same size.

    The client of all of them is this process, which copies what it gets into the same buffers. The
    one bare server has its chunks ready and drops what it is sent; the other reads them from such a
    store as the sidecar has, and writes them to it.
    """
    size = PagePlan.build(NAMESPACE, CodecSpec.parse("kv4").section_codecs(LAYOUT), 64).page_bytes
    chunk_bytes = len(next(chunks(memoryview(bytes(size)))))
    per_page = -(-size // chunk_bytes)
    names = [f"{0:032x}/{index:064x}" for index in range(page_count)]
    pages = [memoryview(bytearray(os.urandom(size))) for _ in names]
    arguments = [str(page_count), str(size), str(chunk_bytes), REMOTE_STORE]
    bare = subprocess.Popen(
        [sys.executable, "-c", BARE_SERVER, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert bare.stdout is not None
    channel = grpc.insecure_channel(
        f"127.0.0.1:{bare.stdout.readline().strip()}",
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )

    def bare_get(method: str) -> None:
        for index, chunk in enumerate(channel.unary_stream(f"/bare/{method}")(b"", timeout=60)):
            page, at = pages[index // per_page], index % per_page * chunk_bytes
            page[at : at + len(chunk)] = chunk[: size - at]

    def bare_put(method: str) -> None:
        parts = (
            bytes(page[at : at + chunk_bytes])
            for page in pages
            for at in range(0, size, chunk_bytes)
        )
        channel.stream_unary(f"/bare/{method}")(parts, timeout=60)

    seconds: dict[str, list[float]] = {}
    processor: Counter[str] = Counter()
    with Sidecar(directory, REMOTE_STORE) as sidecar:
        backend = open_backend(sidecar.url)
        calls: dict[str, Callable[[], object]] = {
            "put": lambda: backend.put(names, pages, timeout_seconds=60),
            "bare put": lambda: bare_put("put"),
            "bare put with store": lambda: bare_put("put_stored"),
            "get": lambda: backend.get_into(names, pages, timeout_seconds=60),
            "bare get": lambda: bare_get("get"),
            "bare get with store": lambda: bare_get("get_stored"),
        }
        for index in range(rounds + 1):  # the first fills the stores, and does not count
            for name in list(calls) if index % 2 == 0 else reversed(calls):
                server = bare.pid if name.startswith("bare") else sidecar.pid
                before = processor_seconds(os.getpid()) + processor_seconds(server)
                started = time.perf_counter()
                answers = calls[name]()
                if index:
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
                    used = processor_seconds(os.getpid()) + processor_seconds(server) - before
                    processor[name] += used
                assert answers in (None, [None] * page_count, [size] * page_count), answers
        backend.close()
    bare.terminate()
    bare.wait()
    ratio = {
        f"{verb}{kind}": [
            own / through
            for own, through in zip(seconds[f"bare {verb}{kind}"], seconds[verb], strict=True)
        ]
        for verb in ("get", "put")
        for kind in ("", " with store")
    }
    return {
        "store": REMOTE_STORE.partition("?")[0],
        "pages": page_count,
        "moved": "encoded pages",
        "bytes_per_page": size,
        "chunk_bytes": chunk_bytes,
        "processor_seconds": {name: used / rounds for name, used in processor.items()},
        "seconds": seconds,
        "ratio": ratio,
    }


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
            own = seconds["sidecar"][verb] if "sidecar" in seconds else seconds[verb]
            speed = moved / spread(own)[1] / 1e9
            low, middle, high = spread(ratios)
            times = f"{middle:.2f} ({low:.2f}-{high:.2f})"
            row = (kind, operation, f"{speed:.2f}", result["moved"], times)
            table.add_row(*row)
    Console().print(table)


def plot(results: dict[str, dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    bars = [
        (f"{kind}\n{operation}".replace(" with", "\nwith"), ratios)
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
