"""Tokens per second through SGLang's real HiCacheController, beside SGLang's own file backend.

    make bench-controller

Backends take turns in one run: every round backs the same pages up and prefetches them again. Timed
is what SGLang's storage threads do, from the queue to the acknowledgement: hashing, exists, codec,
files. The files are in the page cache; their directory should be on a disk.

    make bench-disk

With ``--disk-rate`` they lie on a disk of so many bytes per second, and are read from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from controller_timing import GEOMETRIES, fill_host_pool, time_backup, time_prefetch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sglang_controller import ControllerSession
from sglang_harness import make_tokens
from shaped_disk import DiskUnavailable, ShapedDisk

from kvcodec.spec import CodecSpec

_DISK_BYTES = 6 << 30


@dataclass
class Round:
    """Seconds of one backup and one prefetch, tokens that came back, and bytes on disk."""

    backup: float
    prefetch: float
    tokens: int
    stored_bytes: int


def measure(
    case: str, options: argparse.Namespace, directory: Path, forget: Callable[[], None]
) -> Round:
    """One round trip of one backend: ``file``, or a kvcodec preset."""
    extra: dict[str, object] = {}
    if case != "file":
        extra = {"preset": case, "url": f"file://{directory}"}
        if CodecSpec.parse(case).can_derotate:
            extra["rotary"] = str(_model_config(options.geometry, directory.parent))
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(directory)
    with ControllerSession(
        layout=options.layout,
        page_size=64,
        backend="file" if case == "file" else "kvcodec",
        extra=extra,
        capacity_tokens=options.tokens,
        **GEOMETRIES[options.geometry],
    ) as session:
        return _round_trip(session, make_tokens(options.tokens, seed=1), directory, forget)


def _model_config(geometry: str, directory: Path) -> Path:
    """A config.json that says how keys are rotated, so that turning them back is timed as well."""
    path = directory / f"{geometry}.json"
    config = {
        "model_type": "qwen2",
        "head_dim": GEOMETRIES[geometry]["head_size"],
        "rope_theta": 1e6,
    }
    path.write_text(json.dumps(config))
    return path


def _round_trip(
    session: ControllerSession, tokens: list[int], directory: Path, forget: Callable[[], None]
) -> Round:
    fill_host_pool(session)
    backup = time_backup(session, tokens)
    stored = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    forget()
    prefetch = time_prefetch(session, tokens)
    return Round(backup.seconds, prefetch.seconds, prefetch.tokens, stored)


def run(options: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    """All rounds, the order turned each time; medians and spread per case."""
    cases: list[str] = options.cases.split(",")
    timings: dict[str, list[Round]] = {case: [] for case in cases}
    with ExitStack() as stack, Progress(console=console) as progress:
        parent: Path | None = options.directory
        forget: Callable[[], None] = lambda: None  # noqa: E731 - what a warm cache forgets
        if options.disk_rate:
            disk = stack.enter_context(ShapedDisk(options.disk_rate, size=_DISK_BYTES))
            parent, forget = disk.directory, disk.forget
        task = progress.add_task("rounds", total=(options.rounds + 1) * len(cases))
        for number in range(options.rounds + 1):
            for offset in range(len(cases)):
                case = cases[(number + offset) % len(cases)]
                directory = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
                directory.chmod(0o700)
                try:
                    timing = measure(case, options, directory, forget)
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


def _row(case: str, mine: list[Round], reference: list[Round], tokens: int) -> dict[str, object]:
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
    parser.add_argument(
        "--disk-rate", type=float, help="bytes per second of a disk to be made for this; root"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        rows = run(options, Console(stderr=True))
    except DiskUnavailable as error:
        raise SystemExit(f"no disk of a chosen rate can be made: {error}") from error
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
