"""Kill writers of a file store with SIGKILL at random moments, and look at what they leave.

Run as ``crash_writer.py DIRECTORY ROUNDS SEED MODE``; prints a JSON report. MODE is ``backend``,
``quota``, or ``in_place``: a writer that writes where readers look, to show that this test would
find a torn object.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from kvcodec_backends.file import FileBackend

NAMES = [f"{0:032x}/{number * 7:02x}{'0' * 60}{number:02x}" for number in range(24)]
MAX_OBJECT_BYTES = 256 << 10
QUOTA_BYTES = 1 << 20


def sealed(source: random.Random) -> bytes:
    """An object of random length that carries its own checksum."""
    body = source.randbytes(source.randrange(1, MAX_OBJECT_BYTES - 32))
    return hashlib.sha256(body).digest() + body


def write_for_ever(root: Path, seed: int, mode: str, ready: int) -> None:
    source = random.Random(seed)
    objects = [sealed(source) for _ in range(6)]
    backend = FileBackend(str(root), max_bytes=QUOTA_BYTES if mode == "quota" else None)
    os.write(ready, b"x")
    while True:
        names = source.sample(NAMES, 4)
        chosen = source.sample(objects, 4)
        if mode == "in_place":
            for name, data in zip(names, chosen, strict=True):
                path = root / "objects" / name[:32] / name[33:35] / name[33:]
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
                for start in range(0, len(data), 4096):
                    os.write(fd, data[start : start + 4096])
                os.ftruncate(fd, len(data))
                os.close(fd)
        else:
            backend.put(names, [memoryview(data) for data in chosen], timeout_seconds=10)


def kill_one_writer(root: Path, source: random.Random, mode: str) -> None:
    read_end, write_end = os.pipe()
    seed, delay_seconds = source.randrange(1 << 30), source.uniform(0, 0.01)
    pid = os.fork()
    if pid == 0:
        try:
            write_for_ever(root, seed, mode, write_end)
        finally:
            os._exit(1)
    os.read(read_end, 1)
    time.sleep(delay_seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    os.close(read_end)
    os.close(write_end)


def look(root: Path, mode: str, report: Counter[str]) -> None:
    """Open the store as the next process would, and read everything there is."""
    report["orphans"] += len(os.listdir(root / "tmp"))
    backend = FileBackend(str(root), max_bytes=QUOTA_BYTES if mode == "quota" else None)
    report["orphans_left"] += len(os.listdir(root / "tmp"))
    report["swept"] += backend.counters()["swept_orphans"]
    buffer = memoryview(bytearray(MAX_OBJECT_BYTES))
    total_bytes = 0
    for info in backend.list():
        (size,) = backend.get_into([info.name], [buffer], timeout_seconds=10)
        assert isinstance(size, int), size
        total_bytes += size
        report["objects"] += 1
        report["torn"] += hashlib.sha256(buffer[32:size]).digest() != bytes(buffer[:32])
    if mode == "quota":
        assert backend._quota is not None
        report["miscounted"] += backend._quota._ledger.exchange() != total_bytes
        report["above_quota"] += total_bytes > QUOTA_BYTES
    backend.close()


def main() -> None:
    root, rounds, seed, mode = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    source = random.Random(seed)
    report: Counter[str] = Counter(
        dict.fromkeys(
            ("objects", "torn", "orphans", "orphans_left", "swept", "miscounted", "above_quota"), 0
        )
    )
    FileBackend(str(root)).close()
    for _ in range(rounds):
        kill_one_writer(root, source, mode)
        look(root, mode, report)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
