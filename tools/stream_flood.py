"""A hundred thousand streams, and other things nobody should do, against one sidecar.

    make flood-sidecar

Meanwhile two well-behaved clients, one on the Unix socket and one on TCP, read pages and note how
long it takes. What they are compared with is the same number of complete health checks a second on
as many connections, all of which are served: what a flood costs others beyond the processor time
that any client costs. To reach: their 99th percentile at most doubles, none of their calls outlives
its deadline, and the sidecar's memory and threads are bounded.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvcodec.backend import open_backend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import http2_flood
from sidecar_process import SidecarProcess

_DATA = os.urandom(64 << 10)
_NAME = f"{'e' * 32}/{'f' * 64}"
_DEADLINE_SECONDS = 5.0
_PAUSE_SECONDS = 0.005
_BASE = "health"
_FLOODS = ("silent_put", "silent_call", "silent_health", "unread_get", "gibibyte")
_NOISE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass
class Seen:
    """What one phase looked like."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    late: int = 0
    wrong: int = 0
    memory_mib: int = 0
    threads: int = 0
    processor: float = 0.0
    streams: dict[str, float] = field(default_factory=dict)

    @property
    def p99(self) -> float:
        """Seconds of a call that one in a hundred exceeds."""
        return statistics.quantiles(self.seconds, n=100)[98] if len(self.seconds) > 1 else 0.0


class Readers:
    """The well-behaved clients."""

    def __init__(self, *urls: str) -> None:
        self._seen = Seen()
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(url,)) for url in urls]
        for thread in self._threads:
            thread.start()

    def new_phase(self) -> Seen:
        """Note what happens from now on here."""
        self._seen = Seen()
        return self._seen

    def close(self) -> None:
        """End them."""
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _read(self, url: str) -> None:
        backend, buffer = open_backend(url), memoryview(bytearray(len(_DATA)))
        while not self._ending.is_set():
            seen, started = self._seen, time.monotonic()
            (answer,) = backend.get_into([_NAME], [buffer], timeout_seconds=_DEADLINE_SECONDS)
            seconds = time.monotonic() - started
            seen.seconds.append(seconds)
            seen.late += seconds > _DEADLINE_SECONDS + 0.05
            seen.refused += answer != len(_DATA)
            seen.wrong += answer == len(_DATA) and buffer != _DATA
            time.sleep(_PAUSE_SECONDS)
        backend.close()


def watch(pid: int, seen: Seen, work: Callable[[], object]) -> None:
    """Do the work in a thread, and look at the sidecar meanwhile."""
    worker = threading.Thread(target=work)
    started, before = time.monotonic(), _processor_seconds(pid)
    worker.start()
    while worker.is_alive():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        seen.memory_mib = max(seen.memory_mib, int(status["VmRSS"].split()[0]) >> 10)
        seen.threads = max(seen.threads, int(status["Threads"]))
        worker.join(0.1)
    seen.processor = (_processor_seconds(pid) - before) / (time.monotonic() - started)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def streams(target: str, kind: str, count: int, options: argparse.Namespace) -> dict[str, float]:
    """Open streams from a process of their own."""
    rate = options.per_second or 1e9
    words = (target, kind, str(count), str(options.connections), str(rate), "1")
    run = subprocess.run(
        [sys.executable, http2_flood.__file__, *words], check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(run.stdout))


def garbage(target: str, seconds: float) -> dict[str, float]:
    """Connections that do not speak HTTP/2, or only at first."""
    host, _, port = target.rpartition(":")
    ending, count = time.monotonic() + seconds, 0
    while time.monotonic() < ending:
        with socket.socket() as stranger:
            stranger.settimeout(1)
            try:
                stranger.connect((host, int(port)))
                stranger.sendall((_NOISE if count % 2 else b"") + os.urandom(20_000))
                stranger.recv(1000)
            except OSError:
                pass
        count += 1
        time.sleep(_PAUSE_SECONDS)
    return {"connections": count}


def main() -> None:
    """Flood, print what was found, write JSON; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--streams", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--per-second", type=float, default=2500.0, help="0: as fast as it goes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    share = options.streams // len(_FLOODS) // options.rounds
    seconds = share / options.per_second if options.per_second else 10.0
    phases: dict[str, list[Seen]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="flood-") as folder,
        SidecarProcess(Path(folder)) as sidecar,
    ):
        urls = [f"sidecar+unix://{sidecar.socket}", f"sidecar://{sidecar.target}"]
        writer = open_backend(urls[0])
        assert writer.put([_NAME], [memoryview(_DATA)], timeout_seconds=30) == [None]
        readers = Readers(*urls)
        for _ in range(options.rounds):
            for phase in ("alone", _BASE, *_FLOODS, "garbage"):
                seen = readers.new_phase()
                work: dict[str, Callable[[], object]] = {
                    "alone": lambda: time.sleep(seconds),
                    "garbage": lambda s=seen: s.streams.update(garbage(sidecar.target, seconds)),
                }
                flood = lambda s=seen, p=phase: s.streams.update(  # noqa: E731 - as those above
                    streams(sidecar.target, p, share, options)
                )
                watch(sidecar.pid, seen, work.get(phase, flood))
                phases.setdefault(phase, []).append(seen)
                readers.new_phase()
                time.sleep(1.0)
        readers.close()
        writer.close()
    sys.exit(report(phases, options))


def report(phases: dict[str, list[Seen]], options: argparse.Namespace) -> int:
    """Print and write what was seen; 1 if a promise was broken."""
    base = statistics.median(seen.p99 for seen in phases[_BASE])
    rows = []
    for phase, runs in phases.items():
        ended: dict[str, float] = {}
        for seen in runs:
            for name, count in seen.streams.items():
                ended[name] = (
                    max(ended.get(name, 0), count)
                    if name == "held_most"
                    else (ended.get(name, 0) + count)
                )
        p99 = statistics.median(seen.p99 for seen in runs)
        rows.append(
            {
                "phase": phase,
                "reads": sum(len(seen.seconds) for seen in runs),
                "reads_refused": sum(seen.refused for seen in runs),
                "reads_late": sum(seen.late for seen in runs),
                "reads_wrong": sum(seen.wrong for seen in runs),
                "p99_seconds": p99,
                "p99_ratio": p99 / base,
                "memory_mib": max(seen.memory_mib for seen in runs),
                "threads": max(seen.threads for seen in runs),
                "processor": statistics.median(seen.processor for seen in runs),
                "streams": ended,
            }
        )
    table = Table("phase", "reads", "refused", "p99", "of base", "MiB", "threads", "cpu", "streams")
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("phase", "reads", "reads_refused")),
            f"{1000 * row['p99_seconds']:.0f} ms",
            f"{row['p99_ratio']:.2f}",
            *(str(row[key]) for key in ("memory_mib", "threads")),
            f"{row['processor']:.2f}",
            ", ".join(f"{name} {count:g}" for name, count in row["streams"].items()),
        )
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return int(any(row["reads_late"] or row["reads_wrong"] or row["p99_ratio"] > 2 for row in rows))


if __name__ == "__main__":
    main()
