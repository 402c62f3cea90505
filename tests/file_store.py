"""Short forms for the tests of FileBackend."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

from kvcodec_backends.file import FileBackend

NAMESPACE = "ab" * 16


def name(number: int, namespace: str = NAMESPACE) -> str:
    return f"{namespace}/{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 256):064x}"


def path_of(root: Path, object_name: str) -> Path:
    return root / "objects" / object_name[:32] / object_name[33:35] / object_name[33:]


def put(backend: FileBackend, number: int, data: bytes, timeout_seconds: float = 10) -> object:
    return backend.put([name(number)], [memoryview(data)], timeout_seconds=timeout_seconds)[0]


def get(backend: FileBackend, number: int, buffer_bytes: int = 1 << 16) -> object:
    buffer = memoryview(bytearray(buffer_bytes))
    (result,) = backend.get_into([name(number)], [buffer], timeout_seconds=10)
    return bytes(buffer[:result]) if isinstance(result, int) else result


def stored_bytes(root: Path) -> int:
    total = 0
    for folder in ("objects", "tmp"):
        for directory, _, files in os.walk(root / folder):
            for file in files:
                try:
                    total += os.lstat(os.path.join(directory, file)).st_size
                except FileNotFoundError:
                    pass
    return total


def temporary_files(root: Path) -> list[str]:
    return os.listdir(root / "tmp")


def ledger_bytes(backend: FileBackend) -> int:
    """What the account of a backend says is stored, by all users of the root."""
    quota = backend._quota
    assert quota is not None
    return quota._ledger.exchange()


def remove_tree(root: Path) -> None:
    for directory, directories, files in os.walk(root, topdown=False):
        for file in files:
            os.unlink(os.path.join(directory, file))
        for folder in directories:
            os.rmdir(os.path.join(directory, folder))
    os.rmdir(root)


def start_child(work: Callable[[], object]) -> int:
    """Run `work` in a fork of this process; its PID for `finish_child`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the parent sees the exit status
        traceback.print_exc()
    finally:
        os._exit(status)


def finish_child(pid: int) -> None:
    """Wait for a child; what failed in it fails here."""
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def in_child(work: Callable[[], object]) -> None:
    """Run `work` in another process to its end."""
    finish_child(start_child(work))
