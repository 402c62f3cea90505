"""``kvcodec bench codec``: its options, its progress, its table."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvcodec import native
from kvcodec.cli.bench_codec import Block, Row, measure_block
from kvcodec.cli.bench_memory import AXES, Memory, available_bytes, cache_bytes, fill, layout_of
from kvcodec.cli.bench_traffic import stream_isa
from kvcodec.cli.output import ExitCode, Json, bytes_text, write_json
from kvcodec.errors import ConfigError
from kvcodec.spec import CodecSpec, SectionCodec

__all__ = ["BenchOptions", "machine", "run_bench"]

_CHUNK_BYTES = 110_000_000
_SMALLEST_WORKING_SET = 512 << 20
_QUICK_WORKING_SET = 64 << 20
_TABLE_WIDTH = 140
_ROUNDS, _QUICK_ROUNDS = 24, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The options of the command, as texts. A working set or rounds of 0 are chosen here."""

    codecs: str
    isas: str
    threads: str
    layouts: str
    geometry: str
    page_tokens: int
    working_set_mb: int
    rounds: int
    quick: bool

    def blocks(self) -> list[Block]:
        """What to measure. Raises `ConfigError` for a name that is not known."""
        available, counts = native.available_isas(), _thread_counts()
        isas = _words("--isas", self.isas, available) if self.isas else available
        rounds = self.rounds or (_QUICK_ROUNDS if self.quick else _ROUNDS)
        return [
            Block(
                codec=codec,
                spec=_spec(codec),
                layout=layout,
                threads=int(threads),
                isas=tuple(isas),
                rounds=rounds,
            )
            for layout in _words("--layouts", self.layouts, tuple(AXES))
            for threads in _words("--threads", self.threads or ",".join(counts[:2]), counts)
            for codec in _words("--codecs", self.codecs)
        ]

    def working_set_bytes(self) -> int:
        """Raw bytes that are walked through: twice the largest cache, unless said otherwise."""
        if self.working_set_mb:
            return self.working_set_mb << 20
        if self.quick:
            return _QUICK_WORKING_SET
        return min(max(_SMALLEST_WORKING_SET, 2 * cache_bytes()), available_bytes() // 5)


def _thread_counts() -> tuple[str, ...]:
    return tuple(str(count) for count in range(1, min(64, len(os.sched_getaffinity(0))) + 1))


def _words(option: str, text: str, allowed: Sequence[str] = ()) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if allowed and word not in allowed:
            raise ConfigError(f"{option} has {word!r}, possible here are {', '.join(allowed)}")
    if not words or len(set(words)) != len(words):
        raise ConfigError(f"{option} is {text!r}, wanted is a comma-separated list, each once")
    return words


def _spec(text: str) -> CodecSpec:
    try:
        codec = SectionCodec.parse(text)
    except ConfigError:
        return CodecSpec.load(text)
    return CodecSpec(key=codec, value=codec)


def run_bench(options: BenchOptions, *, as_json: bool) -> ExitCode:
    """Measure and show."""
    blocks = options.blocks()
    layout = layout_of(options.geometry, options.page_tokens)
    for block in blocks:
        if block.spec.profile is not None:
            block.spec.profile.check(layout, is_whole=True)
    before = machine()
    memory = Memory.allocate(layout, options.working_set_bytes(), _CHUNK_BYTES)
    fill(memory)
    method: dict[str, Json] = {
        "geometry": options.geometry,
        "page_tokens": options.page_tokens,
        "page_raw_bytes": layout.raw_bytes,
        "working_set_bytes": len(memory.source),
        "chunk_bytes": memory.chunk_pages * layout.raw_bytes,
        "rounds": blocks[0].rounds,
        "quick": options.quick,
        "beyond_cache": len(memory.source) >= 2 * cache_bytes() > 0,
        "stream_isa": stream_isa(),
        "clock": "1 thread: CPU time of the working thread; more: wall time, without samples in "
        "which a thread was off its processor unless there are fewer than 5 others",
        "ratio": "time of memcpy (or stream) / time of the codec, same round, same thread count; "
        "median of rounds",
        "includes": "header, checksums of sections and header; destinations touched beforehand",
    }
    rows = _measured(blocks, memory)
    if as_json:
        found: Json = [row.as_json() for row in rows]
        write_json({"rows": found, "machine": before | _load("load_after"), "method": method})
    else:
        _show(rows, before, method, len(memory.source))
    return ExitCode.OK


def _measured(blocks: Sequence[Block], memory: Memory) -> list[Row]:
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Drawn between rounds only: a thread that refreshes it would take part in the measurement.
    shown = (
        Progress(*columns, console=console, auto_refresh=False)
        if console.is_terminal
        else nullcontext(None)
    )
    rows: list[Row] = []
    with shown as bar:
        total = sum(block.rounds for block in blocks)
        task = None if bar is None else bar.add_task("", total=total)

        def progress() -> None:
            if bar is not None and task is not None:
                bar.update(task, advance=1, refresh=True)

        for block in blocks:
            if bar is not None and task is not None:
                text = f"{block.codec}, {block.layout}, {block.threads} thread(s)"
                bar.update(task, description=text, refresh=True)
            rows += measure_block(block, memory, progress)
    return rows


def machine() -> dict[str, Json]:
    """What the figures depend on."""
    facts: dict[str, Json] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "largest_cache_bytes": cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "transparent_hugepages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "available_isas": list(native.available_isas()),
    }
    try:
        facts["kvcodec"] = version("kvcodec")
    except PackageNotFoundError:
        facts["kvcodec"] = None
    return facts | _load("load_before")


def _load(name: str) -> dict[str, Json]:
    return {name: round(os.getloadavg()[0], 2)}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _first_line(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return None


def _show(
    rows: Sequence[Row],
    facts: Mapping[str, Json],
    method: Mapping[str, Json],
    working_set_bytes: int,
) -> None:
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = _TABLE_WIDTH
    console.print(
        f"{facts['cpu']}, {facts['cpus']} CPUs, load {facts['load_before']}; {method['geometry']}, "
        f"{method['page_tokens']} tokens per page; working set {bytes_text(working_set_bytes)}",
        soft_wrap=True,
    )
    if not method["beyond_cache"]:
        console.print("The working set may fit the cache: these are no figures of memory.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("codec", "layout", "isa", "threads", "op"):
        table.add_column(name, no_wrap=True)
    for name in ("GB/s", "x memcpy", "quartiles", "x stream", "quartiles", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        disturbed = row.samples - min(row.samples, row.undisturbed_samples)
        table.add_row(
            row.codec,
            row.layout,
            row.isa,
            str(row.threads),
            row.op,
            f"{row.gb_per_s:.1f}",
            f"{row.memcpy.median:.2f}",
            f"{row.memcpy.p25:.2f}-{row.memcpy.p75:.2f}",
            f"{row.stream.median:.2f}",
            f"{row.stream.p25:.2f}-{row.stream.p75:.2f}",
            f"{row.samples} ({disturbed} disturbed)" if disturbed else str(row.samples),
        )
    console.print(table)
