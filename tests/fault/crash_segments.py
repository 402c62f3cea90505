"""Kill writers of a segment store with SIGKILL at random moments, and look at what they leave.

Run as ``crash_segments.py DIRECTORY ROUNDS SEED [MAX_BYTES]``; prints a JSON report. In each round
two processes write and delete at once, tell through a pipe what was answered, and are killed. Then
the next process opens the store: what was answered for has to be so, and nothing may be torn. With
a quota what was stored may be gone again; what was deleted may not be back.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
import sys
import time
from collections import Counter
from pathlib import Path

from kvcodec.backend import Backend
from kvcodec_backends.file import FileBackend

MAX_OBJECT_BYTES = 40_000
ANSWER = struct.Struct("<QB")
STORED, DELETED, ASKED = 1, 2, 3


def name(number: int) -> str:
    return f"{0:032x}/{number:064x}"


def sealed(number: int) -> bytes:
    """The one content of a number: random in length and bytes, with its own checksum."""
    source = random.Random(number)
    body = number.to_bytes(8, "little") + source.randbytes(source.randrange(MAX_OBJECT_BYTES))
    return hashlib.sha256(body).digest() + body


def open_store(root: Path) -> Backend:
    options = "segment_bytes=1MiB"
    if len(sys.argv) > 4:
        options = f"segment_bytes=256KiB&max_bytes={sys.argv[4]}"
    return FileBackend.from_url(f"file://{root}?engine=segments&{options}")


def write_for_ever(root: Path, seed: int, pipe: int) -> None:
    backend = open_store(root)
    source, mine = random.Random(seed), []
    os.write(pipe, ANSWER.pack(0, 0))
    while True:
        numbers = [source.randrange(1, 1 << 60) for _ in range(4)]
        answers = backend.put(
            [name(number) for number in numbers],
            [memoryview(sealed(number)) for number in numbers],
            timeout_seconds=10,
        )
        assert answers == [None] * 4, answers
        os.write(pipe, b"".join(ANSWER.pack(number, STORED) for number in numbers))
        mine += numbers
        gone = source.choice(mine)
        os.write(pipe, ANSWER.pack(gone, ASKED))
        backend.delete([name(gone)], timeout_seconds=10)
        os.write(pipe, ANSWER.pack(gone, DELETED))


def run_writers(root: Path, source: random.Random, told: dict[int, int]) -> None:
    """Start two, kill them, and take down what they were answered."""
    writers = []
    for _ in range(2):
        read_end, write_end = os.pipe()
        seed = source.randrange(1 << 30)
        pid = os.fork()
        if pid == 0:
            try:
                write_for_ever(root, seed, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        writers.append((pid, read_end))
    for _, read_end in writers:
        os.read(read_end, ANSWER.size)
    time.sleep(source.uniform(0, 0.03))
    for pid, read_end in writers:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the writer ended by itself"
        answers = b""
        while part := os.read(read_end, 1 << 16):
            answers += part
        os.close(read_end)
        told.update(ANSWER.iter_unpack(answers))


def look(root: Path, told: dict[int, int], report: Counter[str]) -> None:
    """Open the store as the next process would, and compare."""
    backend = open_store(root)
    buffer = memoryview(bytearray(2 * MAX_OBJECT_BYTES))
    there = set()
    for info in backend.list():
        number = int(info.name[33:], 16)
        (size,) = backend.get_into([info.name], [buffer], timeout_seconds=10)
        report["objects"] += 1
        if size is None:
            # A record that is told of and cannot be read, such as one killed half way.
            report["unreadable"] += 1
            continue
        there.add(number)
        report["torn"] += buffer[:size] != sealed(number)
    for number, state in told.items():
        report["lost"] += state == STORED and number not in there
        report["came_back"] += state == DELETED and number in there
    if len(sys.argv) > 4:
        used = sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())
        report["above_quota"] += used > int(sys.argv[4])
    report["recovered"] += backend.counters()["recovered_objects"]
    # The next writers go on with what these left.
    backend.put([name(0)], [memoryview(sealed(0))], timeout_seconds=10)
    report["adopted"] += backend.counters()["adopted_segments"]
    backend.close()


def main() -> None:
    root, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    source = random.Random(seed)
    keys = (
        *("objects", "unreadable", "torn", "lost", "came_back", "recovered", "adopted"),
        "above_quota",
    )
    report: Counter[str] = Counter(dict.fromkeys(keys, 0))
    told: dict[int, int] = {}
    for _ in range(rounds):
        run_writers(root, source, told)
        look(root, told, report)
    report["told"] = len(told)
    report["segments"] = len(list((root / "segments").glob("*.segment")))
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
