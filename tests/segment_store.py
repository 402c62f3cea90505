"""Short forms for the tests of SegmentBackend."""

from __future__ import annotations

import hashlib
from pathlib import Path

from file_store import name

from kvcodec.backend import Backend
from kvcodec_backends._segment_records import HEADER_BYTES, LIVE, Record, iter_index
from kvcodec_backends.file import FileBackend

KIB, MIB = 1 << 10, 1 << 20


def open_store(root: Path, options: str = "segment_bytes=1MiB") -> Backend:
    return FileBackend.from_url(f"file://{root}?engine=segments&{options}")


def content(number: int, size: int) -> bytes:
    """Bytes that tell whose they are, and whether they are whole."""
    seed = hashlib.sha256(f"{number} {size}".encode()).digest()
    return (seed * (size // len(seed) + 1))[:size]


def put_all(backend: Backend, objects: dict[int, bytes], timeout_seconds: float = 30) -> None:
    names = [name(number) for number in objects]
    views = [memoryview(data) for data in objects.values()]
    answers = backend.put(names, views, timeout_seconds=timeout_seconds)
    assert answers == [None] * len(names), answers


def get_all(backend: Backend, numbers: list[int], buffer_bytes: int = MIB) -> dict[int, object]:
    """What there is: the bytes, or an error; what is missing is left out."""
    buffers = [memoryview(bytearray(buffer_bytes)) for _ in numbers]
    names = [name(number) for number in numbers]
    answers = backend.get_into(names, buffers, timeout_seconds=30)
    return {
        number: bytes(buffer[:answer]) if isinstance(answer, int) else answer
        for number, buffer, answer in zip(numbers, buffers, answers, strict=True)
        if answer is not None
    }


def segment_paths(root: Path) -> list[Path]:
    return sorted((root / "segments").glob("*.segment"))


def index_records(path: Path) -> list[Record]:
    """What the index beside a segment says."""
    return [record for record, _ in iter_index(path.with_suffix(".index").read_bytes())]


def live_records(path: Path) -> list[Record]:
    return [record for record in index_records(path) if record.state == LIVE]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    """Change every bit of one byte."""
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 0xFF]))


def header_at(path: Path, offset: int) -> Record | None:
    return Record.unpack(path.read_bytes()[offset : offset + HEADER_BYTES])


def disk_bytes(root: Path) -> int:
    """What the files of a store take on the disk."""
    total = 0
    for path in root.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total
