"""A day of pages through one sidecar, as fast as it goes, and what its process holds meanwhile.

    make soak-sidecar

Clients, on the node and over TCP, put, find and read batches of pages that nobody has seen before,
so the memory tier and the store evict all the time. To reach after warm-up: no growth of the
sidecar's resident memory beyond 1 %, and as many descriptors and threads in the end as then, and as
many descriptors of the clients. Every page read is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from demo_sidecar import sidecar
from real_server import free_port
from rich.console import Console
from rich.progress import Progress

from kvcodec.backend import Backend, open_backend

_DAY_PAGES = 86_400 * 50
_BATCH = 64
_WARM_SHARE = 0.1
_CALL_SECONDS = 30.0


def _pid_of(socket: str) -> int:
    """The process that was started with this socket in its command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"--listen.unix={socket}".encode() in words:
                return int(entry.name)
    raise SystemExit(f"no process serves {socket}")


def look_at(pid: int) -> dict[str, int]:
    """What a process holds: resident KiB, descriptors, threads."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "rss_kib": int(status["VmRSS"].split()[0]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


class Client:
    """One client that never repeats a name; it counts pages, and what came back wrong."""

    def __init__(self, backend: Backend, page_bytes: int) -> None:
        self._backend = backend
        self._source = memoryview(bytearray(os.urandom(page_bytes)))
        self._targets = [memoryview(bytearray(page_bytes)) for _ in range(_BATCH)]
        self._namespace = os.urandom(16).hex()
        self.pages = 0
        self.missing = 0
        self.wrong = 0

    def work(self, batches: Iterator[int]) -> None:
        """Send pages there and back, as long as there are batches left for all clients."""
        for _ in batches:
            names = [f"{self._namespace}/{self.pages + i:064x}" for i in range(_BATCH)]
            self._source[:8] = self.pages.to_bytes(8, "little")
            sources = [self._source] * _BATCH
            self._backend.put(names, sources, timeout_seconds=_CALL_SECONDS)
            self._backend.exists(names, timeout_seconds=_CALL_SECONDS)
            found = self._backend.get_into(names, self._targets, timeout_seconds=_CALL_SECONDS)
            for answer, target in zip(found, self._targets, strict=True):
                self.missing += not isinstance(answer, int)
                self.wrong += isinstance(answer, int) and target != self._source
            self.pages += _BATCH


def main() -> None:
    """Soak, print what was found, write JSON; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=_DAY_PAGES)
    parser.add_argument("--page-bytes", type=int, default=16 << 10)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--remote-clients", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(stderr=True)
    samples: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        store = f"file://{folder}/store?engine=segments&max_bytes=512MiB"
        address = f"127.0.0.1:{free_port()}"
        with (
            sidecar(store, Path(folder) / "log", f"--listen.tcp={address}") as url,
            Progress(console=console) as progress,
        ):
            pid = _pid_of(url.removeprefix("sidecar+unix://"))
            urls = [url] * options.clients + [f"sidecar://{address}"] * options.remote_clients
            backends = [open_backend(url) for url in urls]
            clients = [Client(backend, options.page_bytes) for backend in backends]
            # Shared, so that nobody is alone in the end.
            batches = iter(range(-(-options.pages // _BATCH)))
            threads = [threading.Thread(target=client.work, args=(batches,)) for client in clients]
            task = progress.add_task("pages", total=options.pages)
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(1.0)
                pages = sum(client.pages for client in clients)
                own = {f"client_{name}": held for name, held in look_at(os.getpid()).items()}
                samples.append({"pages": pages} | look_at(pid) | own)
                progress.update(task, completed=pages)
            for backend in backends:
                backend.close()
    pages = sum(client.pages for client in clients)
    warm = [sample for sample in samples if sample["pages"] >= _WARM_SHARE * pages]
    tenth = max(1, len(warm) // 10)
    start = sum(sample["rss_kib"] for sample in warm[:tenth]) / tenth
    end = sum(sample["rss_kib"] for sample in warm[-tenth:]) / tenth
    result = {
        "pages": pages,
        "page_bytes": options.page_bytes,
        "seconds": len(samples),
        "missing": sum(client.missing for client in clients),
        "wrong": sum(client.wrong for client in clients),
        "rss_growth": end / start - 1,
        "first": warm[0],
        "last": warm[-1],
    }
    console.print_json(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result | {"samples": samples}, indent=1) + "\n")
    constant = ("descriptors", "threads", "client_descriptors")
    held = all(warm[0][name] == warm[-1][name] for name in constant)
    sys.exit(0 if held and not result["wrong"] and result["rss_growth"] < 0.01 else 1)


if __name__ == "__main__":
    main()
