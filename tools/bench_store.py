"""How fast ``file://`` stores and reads pages, beside the disk's own O_DIRECT rate in the same run.

    python tools/bench_store.py DIRECTORY --json docs/measurements/local-store.json \
        --picture docs/images/local-store.svg

Cases take turns, their order turned each round. Every case moves the same bytes in batches from the
same number of threads, as the I/O threads of a pipeline do: writes from memory that was touched,
then reads of all of it with nothing in the page cache. ``disk`` is a preallocated file, written and
read with O_DIRECT in blocks of one page; ``disk batch`` the same in blocks of one batch. ``segments
odd`` has the pages where a pipeline without aligned rows has them: beside the borders of 4 KiB.
``segments full`` begins with a full store, so that each segment takes the place of an older one.
``files`` writes into the page cache, so its write rate is that of memory for as long as that holds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvcodec.backend import Backend, open_backend
from kvcodec_backends._file_publish import file_system_type

KIB, MIB = 1 << 10, 1 << 20
CASES = (
    *("disk", "disk batch", "segments", "segments odd", "segments fsync", "segments full"),
    "files",
)
PAGES = {MIB: 4, 64 * KIB: 32}  # page bytes: pages of a batch
ODD_BYTES = 192


@dataclass(frozen=True)
class Work:
    """One page size: how many bytes in which portions, by how many threads."""

    page_bytes: int
    batch_pages: int
    total_bytes: int
    thread_count: int

    @property
    def batch_count(self) -> int:
        """Batches of all threads together."""
        return self.total_bytes // (self.page_bytes * self.batch_pages)


class Memory:
    """One batch of pages per thread, filled with noise."""

    def __init__(self, work: Work) -> None:
        size = work.page_bytes * work.batch_pages
        self.blocks = []
        for _ in range(work.thread_count):
            wanted = size + ODD_BYTES * (work.batch_pages + 1)
            block = mmap.mmap(-1, wanted, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            block.madvise(mmap.MADV_HUGEPAGE)  # as a pipeline's buffers are
            block.write(os.urandom(wanted))
            self.blocks.append(memoryview(block))
        self.work = work

    def pages(self, thread: int, *, odd: bool) -> list[memoryview]:
        """The pages of one batch, at borders of 4 KiB or beside them."""
        stride = self.work.page_bytes + (ODD_BYTES if odd else 0)
        start = ODD_BYTES if odd else 0
        return [
            self.blocks[thread][start + index * stride :][: self.work.page_bytes]
            for index in range(self.work.batch_pages)
        ]


def spread(work: Work, batch: Callable[[int, int], None]) -> float:
    """Bytes per second of `batch(thread, number)` over all batches."""
    errors: list[BaseException] = []

    def run(thread: int) -> None:
        try:
            for number in range(thread, work.batch_count, work.thread_count):
                batch(thread, number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(work.thread_count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return work.total_bytes / seconds


def measure_disk(directory: Path, memory: Memory, block_pages: int) -> tuple[float, float]:
    """Write and read rate of a preallocated file, in blocks of so many pages."""
    work = memory.work
    block = work.page_bytes * block_pages
    fd = os.open(directory / "disk", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(fd, 0, work.total_bytes)

    def each(call: Callable[[int, list[memoryview], int], int], thread: int, number: int) -> None:
        start = number * work.page_bytes * work.batch_pages
        for place in range(0, work.page_bytes * work.batch_pages, block):
            view = memory.blocks[thread][place : place + block]
            if call(fd, [view], start + place) != block:
                raise OSError("the disk moved less than asked")

    write = spread(work, lambda thread, number: each(os.pwritev, thread, number))
    read = spread(work, lambda thread, number: each(os.preadv, thread, number))
    os.close(fd)
    return write, read


def names_of(work: Work, number: int) -> list[str]:
    first = number * work.batch_pages
    return [
        f"{0:032x}/{(first + page) * 0x9E3779B97F4A7C15 % (1 << 64):016x}{0:048x}"
        for page in range(work.batch_pages)
    ]


def measure_backend(
    backend: Backend, directory: Path, memory: Memory, *, odd: bool
) -> tuple[float, float]:
    """Put and get rate; the page cache is emptied of the store's files in between."""
    work = memory.work
    pages = [memory.pages(thread, odd=odd) for thread in range(work.thread_count)]

    def put(thread: int, number: int) -> None:
        answers = backend.put(names_of(work, number), pages[thread], timeout_seconds=60)
        if any(answers):
            raise RuntimeError(f"not stored: {answers}")

    def get(thread: int, number: int) -> None:
        answers = backend.get_into(names_of(work, number), pages[thread], timeout_seconds=60)
        if set(answers) != {work.page_bytes}:
            raise RuntimeError(f"not read: {answers}")

    written = spread(work, put)
    drop_cache(directory)
    return written, spread(work, get)


def fill(backend: Backend, memory: Memory) -> None:
    """Write as much as there is room for: what comes now takes the place of what is old."""
    work = memory.work
    pages = memory.pages(0, odd=False)
    for number in range(work.batch_count, work.batch_count * 3):
        backend.put(names_of(work, number), pages, timeout_seconds=60)


def drop_cache(directory: Path) -> None:
    """Write everything back, and forget it."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(case: str, root: Path, memory: Memory) -> tuple[float, float]:
    """Write and read rate of one case, in bytes per second."""
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=root))
    try:
        if case.startswith("disk"):
            pages = memory.work.batch_pages if case == "disk batch" else 1
            return measure_disk(directory, memory, pages)
        url = f"file://{directory}?engine={case.partition(' ')[0]}"
        if case.endswith("fsync"):
            url += "&fsync=1"
        if case.endswith("full"):
            url += f"&max_bytes={memory.work.total_bytes * 3 // 2}&segment_bytes=32MiB"
        backend = open_backend(url)
        try:
            if case.endswith("full"):
                fill(backend, memory)
            return measure_backend(backend, directory, memory, odd=case.endswith("odd"))
        finally:
            backend.close()
    finally:
        shutil.rmtree(directory)


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def run(options: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    cases = options.cases.split(",")
    total = (options.rounds + 1) * len(cases) * len(PAGES)
    with Progress(console=console) as progress:
        task = progress.add_task("rounds", total=total)
        for page_bytes, batch_pages in PAGES.items():
            work = Work(page_bytes, batch_pages, options.mib * MIB, options.threads)
            memory = Memory(work)
            rates: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
            for number in range(options.rounds + 1):
                for offset in range(len(cases)):
                    case = cases[(number + offset) % len(cases)]
                    rate = measure(case, options.directory, memory)
                    if number:  # the first round only warms up
                        rates[case].append(rate)
                    progress.advance(task)
            rows += [row_of(case, page_bytes, rates) for case in cases]
    return rows


def row_of(
    case: str, page_bytes: int, rates: dict[str, list[tuple[float, float]]]
) -> dict[str, object]:
    """Medians and quartiles of the rates, and of the ratio to the disk in the same round."""
    row: dict[str, object] = {"case": case, "page_bytes": page_bytes}
    for index, name in enumerate(("write", "read")):
        mine = [rate[index] for rate in rates[case]]
        row[f"{name}_mb_per_s"] = [round(value / 1e6, 1) for value in quartiles(mine)]
        for other in [reference for reference in ("disk", "files") if reference in rates]:
            ratios = [
                rate / reference[index] for rate, reference in zip(mine, rates[other], strict=True)
            ]
            row[f"{name}_to_{other}"] = [round(value, 3) for value in quartiles(ratios)]
    return row


def draw(document: dict[str, Any], picture: Path) -> None:
    """Rates with their quartiles, one panel per page size and direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2 * len(PAGES), figsize=(12, 3.6), sharey=True)
    places = [(size, name) for size in PAGES for name in ("write", "read")]
    for panel, (page_bytes, name) in zip(panels, places, strict=True):
        rows = [row for row in document["rows"] if row["page_bytes"] == page_bytes]
        low, middle, high = zip(*(row[f"{name}_mb_per_s"] for row in rows), strict=True)
        errors = [
            [m - value for m, value in zip(middle, low, strict=True)],
            [value - m for m, value in zip(middle, high, strict=True)],
        ]
        colors = ["0.6" if row["case"].startswith("disk") else "tab:blue" for row in rows]
        panel.bar(range(len(rows)), middle, yerr=errors, color=colors, capsize=3)
        panel.set_xticks(range(len(rows)))
        panel.set_xticklabels([row["case"] for row in rows], rotation=40, ha="right", fontsize=8)
        panel.set_title(f"{name}, pages of {page_bytes // KIB} KiB", fontsize=10)
        panel.grid(True, axis="y", alpha=0.25)
    panels[0].set_ylabel("MB/s")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def main() -> None:
    """Measure, print a table, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", help="on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=512, help="bytes per case and page size")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--cases", default=",".join(CASES), help="disk among them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="draw what --json holds")
    options = parser.parse_args()
    if options.rounds < 2 or "disk" not in options.cases.split(","):
        parser.error("quartiles need two rounds, and ratios the case disk")
    console = Console()
    if options.directory is not None:
        document: dict[str, Any] = {
            "settings": {
                "threads": options.threads,
                "mib": options.mib,
                "rounds": options.rounds,
                "batch_pages": {str(size): count for size, count in PAGES.items()},
            },
            "machine": {
                "cores": os.cpu_count(),
                "kernel": platform.release().partition("-")[0],
                "file_system": file_system_type(str(options.directory)),
                "load": [round(os.getloadavg()[0], 1)],
            },
            "rows": run(options, console),
        }
        document["machine"]["load"].append(round(os.getloadavg()[0], 1))
        table = Table("pages", "case", "write MB/s", "of disk", "read MB/s", "of disk")
        for row in document["rows"]:
            cells = [f"{row['page_bytes'] // KIB} KiB", row["case"]]
            for name in ("write", "read"):
                low, middle, high = row[f"{name}_mb_per_s"]
                cells += [
                    f"{middle:.0f} ({low:.0f} to {high:.0f})",
                    f"{row[f'{name}_to_disk'][1]:.2f}",
                ]
            table.add_row(*cells)
        console.print(table)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.picture:
        draw(json.loads(options.json.read_text()), options.picture)


if __name__ == "__main__":
    main()
