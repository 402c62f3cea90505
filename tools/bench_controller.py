"""Tokens per second through SGLang's real HiCacheController, beside SGLang's own file backend.

    make bench-controller

Backends take turns in one run: every round backs the same pages up and prefetches them again. Timed
is what SGLang's storage threads do, from the queue to the acknowledgement: hashing, exists, codec,
files. The files are in the page cache; their directory should be on a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from sglang_controller import ControllerSession
from sglang_harness import WAIT_SECONDS, make_tokens

GEOMETRIES = {
    "qwen2.5-7b": {"layer_count": 28, "head_count": 4, "head_size": 128},
    "llama3.1-8b": {"layer_count": 32, "head_count": 8, "head_size": 128},
}


@dataclass
class Timing:
    """Seconds of one backup and one prefetch, tokens that came back, and bytes on disk."""

    backup: float
    prefetch: float
    tokens: int
    stored_bytes: int


def measure(case: str, layout: str, geometry: str, tokens: int, directory: Path) -> Timing:
    """One round trip of one backend: ``file``, or a kvcodec preset."""
    extra: dict[str, object] = {}
    if case != "file":
        extra = {"preset": case, "url": f"file://{directory}"}
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(directory)
    with ControllerSession(
        layout=layout,
        page_size=64,
        backend="file" if case == "file" else "kvcodec",
        extra=extra,
        capacity_tokens=tokens,
        **GEOMETRIES[geometry],
    ) as session:
        return _round_trip(session, make_tokens(tokens, seed=1), directory)


def _round_trip(session: ControllerSession, tokens: list[int], directory: Path) -> Timing:
    # Slow to import, and not needed for --help.
    import torch
    from sglang.srt.mem_cache.utils import get_hash_str

    controller = session.controller
    host_slots = controller.mem_pool_host.alloc(len(tokens))
    rows = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    bits = (rows.view(np.uint32) >> 16).astype(np.int16)
    flat = controller.mem_pool_host.kv_buffer.view(torch.int16).numpy().reshape(-1)
    for start in range(0, flat.size, bits.size):
        part = flat[start : start + bits.size]
        part[:] = bits[: part.size]
    hashes = get_hash_str(array("q", tokens), None, page_size=session.page_size)
    start = time.perf_counter()
    controller.write_storage(host_slots, tokens, hashes)
    controller.ack_backup_queue.get(timeout=WAIT_SECONDS)
    backup = time.perf_counter() - start
    controller.evict_host(host_slots)
    stored = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    start = time.perf_counter()
    controller.prefetch("request", tokens)
    operation = controller.prefetch_hit_queue.get(timeout=WAIT_SECONDS)
    operation.host_indices = controller.alloc_prefetch_host_buffers(
        operation, operation.storage_hit_count
    )
    controller.prefetch_buffer.put(operation)
    loaded = 0
    while not (
        acknowledgement := controller.ack_prefetch_queue.get(timeout=WAIT_SECONDS)
    ).completed_req:
        loaded = acknowledgement.completed_tokens or loaded
    prefetch = time.perf_counter() - start
    controller.evict_host(operation.host_indices)
    return Timing(backup, prefetch, loaded, stored)


def run(options: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    """All rounds, the order turned each time; medians and spread per case."""
    cases: list[str] = options.cases.split(",")
    timings: dict[str, list[Timing]] = {case: [] for case in cases}
    with Progress(console=console) as progress:
        task = progress.add_task("rounds", total=(options.rounds + 1) * len(cases))
        for number in range(options.rounds + 1):
            for offset in range(len(cases)):
                case = cases[(number + offset) % len(cases)]
                directory = Path(tempfile.mkdtemp(prefix="bench-", dir=options.directory))
                directory.chmod(0o700)
                try:
                    timing = measure(
                        case, options.layout, options.geometry, options.tokens, directory
                    )
                finally:
                    shutil.rmtree(directory)
                if timing.tokens != options.tokens:
                    raise SystemExit(
                        f"{case}: {timing.tokens} of {options.tokens} tokens came back"
                    )
                if number:  # the first round only warms caches and allocators
                    timings[case].append(timing)
                progress.advance(task)
    return [_row(case, timings[case], timings[cases[0]], options.tokens) for case in cases]


def _row(case: str, mine: list[Timing], reference: list[Timing], tokens: int) -> dict[str, object]:
    row: dict[str, object] = {"case": case, "stored_bytes": mine[0].stored_bytes}
    for name in ("backup", "prefetch"):
        seconds = [getattr(timing, name) for timing in mine]
        ratios = [getattr(r, name) / getattr(m, name) for m, r in zip(mine, reference, strict=True)]
        row[f"{name}_tokens_per_s"] = tokens / statistics.median(seconds)
        row[f"{name}_ratio"] = statistics.median(ratios)
        row[f"{name}_ratio_min"], row[f"{name}_ratio_max"] = min(ratios), max(ratios)
    return row


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases", default="file,raw,kv8,kv4", help="the first one is the reference"
    )
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="qwen2.5-7b")
    parser.add_argument("--layout", default="page_first")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--directory",
        type=lambda text: Path(text).resolve(),
        default=None,
        help="where stores are made (a disk, not tmpfs)",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = run(options, Console(stderr=True))
    table = Table("backend", "stored", "backup tok/s", "x file", "prefetch tok/s", "x file")
    for row in rows:
        cells = [str(row["case"]), f"{row['stored_bytes'] / 1e6:.0f} MB"]
        for name in ("backup", "prefetch"):
            ratio, low, high = (row[f"{name}_ratio{part}"] for part in ("", "_min", "_max"))
            cells += [f"{row[f'{name}_tokens_per_s']:,.0f}", f"{ratio:.2f} ({low:.2f}-{high:.2f})"]
        table.add_row(*cells)
    Console().print(table)
    if options.json:
        settings = {
            name: str(value)
            for name, value in vars(options).items()
            if name not in ("json", "directory")
        }
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
