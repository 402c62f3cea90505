"""FileBackend: one quota over all threads, processes and restarts."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from file_store import (
    finish_child,
    get,
    ledger_bytes,
    name,
    path_of,
    put,
    remove_tree,
    start_child,
    stored_bytes,
)

from kvcodec.errors import BackendError, BackendFull
from kvcodec_backends.file import FileBackend


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_the_least_recently_used_goes_first(root: Path):
    backend = FileBackend(str(root), max_bytes=1000)
    for number in range(10):
        assert put(backend, number, bytes([number + 1]) * 100) is None
    get(backend, 0)
    for number in range(10, 14):
        assert put(backend, number, b"x" * 100) is None
    there = [bool(get(backend, number)) for number in range(14)]
    assert there == [True] + [False] * 4 + [True] * 9
    assert backend.counters()["evicted_objects"] == 4
    assert backend.counters()["evicted_bytes"] == 400
    assert ledger_bytes(backend) == stored_bytes(root) == 1000


def test_bytes_of_all_processes_are_known_with_a_quota(root: Path):
    assert FileBackend(str(root)).gauges() == {}
    one = FileBackend(str(root), max_bytes=1000)
    put(one, 0, b"x" * 100)
    assert one.gauges() == {"stored_bytes": 100, "limit_bytes": 1000}
    other = FileBackend(str(root), max_bytes=1000)
    assert other.gauges() == {"stored_bytes": 100, "limit_bytes": 1000}
    put(other, 1, b"x" * 200)
    put(one, 2, b"x" * 300)
    assert one.gauges()["stored_bytes"] == 600


def test_after_a_restart_the_oldest_goes_first(root: Path):
    FileBackend(str(root)).close()
    backend = FileBackend(str(root), max_bytes=1000)
    for number in range(10):
        put(backend, number, b"x" * 100)
        os.utime(path_of(root, name(number)), (0, 1_000_000 - number))
    backend.close()
    backend = FileBackend(str(root), max_bytes=1000)
    put(backend, 10, b"x" * 100)
    assert not get(backend, 9)
    assert get(backend, 8)


def test_a_smaller_quota_is_reached_at_the_next_put(root: Path):
    backend = FileBackend(str(root))
    for number in range(20):
        put(backend, number, b"x" * 100)
    backend.close()
    backend = FileBackend(str(root), max_bytes=500)
    assert put(backend, 20, b"x" * 100) is None
    assert stored_bytes(root) == 500
    assert get(backend, 20)


def test_an_object_above_the_quota_is_full_and_evicts_nothing(root: Path):
    backend = FileBackend(str(root), max_bytes=1000)
    put(backend, 1, b"x" * 500)
    assert isinstance(put(backend, 2, b"x" * 1001), BackendFull)
    assert get(backend, 1)
    assert put(backend, 2, b"x" * 1000) is None
    assert stored_bytes(root) == 1000


def test_overwriting_and_deleting_are_accounted(root: Path):
    backend = FileBackend(str(root), max_bytes=10_000)
    for size in (100, 500, 50):
        put(backend, 1, b"x" * size)
        put(backend, 2, b"x" * 100)
        assert ledger_bytes(backend) == stored_bytes(root) == size + 100
    assert backend.delete([name(1), name(1), name(3)], timeout_seconds=1) == [True, False, False]
    assert ledger_bytes(backend) == stored_bytes(root) == 100


def test_a_failed_put_gives_its_bytes_back(root: Path, monkeypatch: pytest.MonkeyPatch):
    backend = FileBackend(str(root), max_bytes=10_000)
    put(backend, 1, b"x" * 100)

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fail)
        assert isinstance(put(backend, 2, b"x" * 500), BackendError)
    assert ledger_bytes(backend) == stored_bytes(root) == 100
    assert isinstance(put(backend, 2, b"x" * 500, timeout_seconds=0), BackendError)
    assert ledger_bytes(backend) == 100


def test_backends_of_one_root_keep_one_quota(root: Path):
    first = FileBackend(str(root), max_bytes=1000)
    second = FileBackend(str(root), max_bytes=1000)
    for number in range(50):
        assert put(first if number % 2 else second, number, b"x" * 100) is None
        assert stored_bytes(root) <= 1000
        assert ledger_bytes(first) == ledger_bytes(second) == stored_bytes(root)
    first.close()
    assert put(second, 50, b"x" * 100) is None
    assert ledger_bytes(second) == stored_bytes(root)


def test_one_that_knows_nothing_to_evict_looks_at_the_tree_again(root: Path):
    late = FileBackend(str(root), max_bytes=1000)
    early = FileBackend(str(root), max_bytes=1000)
    for number in range(10):
        put(early, number, b"x" * 100)
    assert put(late, 10, b"x" * 100) is None
    assert stored_bytes(root) == 1000
    assert late.counters()["scans"] == 2


def test_an_account_mends_itself_when_files_vanish(root: Path):
    """An administrator or another tool removes files, and tells nobody."""
    backend = FileBackend(str(root), max_bytes=1000)
    for number in range(10):
        put(backend, number, b"x" * 100)
    for number in range(10):
        path_of(root, name(number)).unlink()
    for number in range(10, 20):
        assert put(backend, number, b"x" * 100) is None
    assert ledger_bytes(backend) == stored_bytes(root) == 1000


def test_a_dead_process_leaves_its_slot_and_its_bytes(root: Path):
    def child() -> None:
        opened = FileBackend(str(root), max_bytes=1000)
        for number in range(5):
            assert put(opened, number, b"x" * 100) is None

    pid = start_child(child)
    first = FileBackend(str(root), max_bytes=1000)
    finish_child(pid)
    second = FileBackend(str(root), max_bytes=1000)
    assert ledger_bytes(first) == ledger_bytes(second) == stored_bytes(root) == 500
    assert os.path.getsize(root / "ledger") <= 2 * 64


def test_the_ledger_survives_the_removal_of_the_root(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvcodec_backends._file_ledger.CHECK_INTERVAL_SECONDS", 0.0)
    first = FileBackend(str(root), max_bytes=1000)
    second = FileBackend(str(root), max_bytes=1000)
    put(first, 1, b"x" * 900)
    remove_tree(root)
    for number in range(20):
        assert put(first if number % 2 else second, number, b"x" * 100) is None
    assert stored_bytes(root) <= 1000
    assert ledger_bytes(first) == ledger_bytes(second) == stored_bytes(root)


@pytest.mark.parametrize("content", [b"", bytes(640), b"another owner".ljust(640, b"\0")])
def test_a_user_whose_slot_was_taken_opens_the_ledger_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
):
    """After a long silence another host takes this one for dead, and its slot over."""
    monkeypatch.setattr("kvcodec_backends._file_ledger.CHECK_INTERVAL_SECONDS", 0.0)
    backend = FileBackend(str(root), max_bytes=1000)
    for number in range(5):
        put(backend, number, b"x" * 100)
    (root / "ledger").write_bytes(content)
    assert put(backend, 5, b"x" * 100) is None
    assert ledger_bytes(backend) == stored_bytes(root) == 600


@pytest.mark.parametrize("content", [b"", b"garbage", os.urandom(1000), bytes(640)])
def test_a_damaged_ledger_is_written_anew(root: Path, content: bytes):
    backend = FileBackend(str(root), max_bytes=1000)
    put(backend, 1, b"x" * 300)
    backend.close()
    (root / "ledger").write_bytes(content)
    backend = FileBackend(str(root), max_bytes=1000)
    assert ledger_bytes(backend) == 300
    assert put(backend, 2, b"x" * 900) is None
    assert stored_bytes(root) == 900


def test_processes_share_the_quota_under_tenfold_overcommit(root: Path):
    """The ranks of one server: each its own namespace, one directory."""
    limit, size, writer_count = 2 << 20, 32 << 10, 3

    def write(writer: int) -> None:
        backend = FileBackend(str(root), max_bytes=limit)
        for start in range(0, 10 * limit // size // writer_count, 4):
            names = [name(start + index, f"{writer:032x}") for index in range(4)]
            results = backend.put(names, [memoryview(bytes(size))] * 4, timeout_seconds=10)
            assert results == [None] * 4
        if writer:
            backend.close()

    watcher = FileBackend(str(root), max_bytes=limit)
    children = [start_child(lambda writer=writer: write(writer)) for writer in range(writer_count)]
    peak = 0
    while children:
        peak = max(peak, stored_bytes(root))
        time.sleep(0.01)
        for pid in children[:]:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                finish_child(pid)
                children.remove(pid)
    assert limit * 0.5 < peak <= limit + size
    assert ledger_bytes(watcher) == stored_bytes(root)


def test_usage_stays_at_the_quota_under_tenfold_overcommit(root: Path):
    """Four threads write ten times what fits, somebody looks every 10 ms."""
    limit, size = 4 << 20, 64 << 10
    backend = FileBackend(str(root), max_bytes=limit)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, stored_bytes(root))

    def write(writer: int) -> None:
        for start in range(0, 160, 4):
            numbers = range(writer * 1000 + start, writer * 1000 + start + 4)
            results = backend.put(
                [name(number) for number in numbers],
                [memoryview(bytes(size - writer))] * 4,
                timeout_seconds=10,
            )
            assert results == [None] * 4

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    watcher.join()
    assert limit * 0.5 < peak <= limit + size
    assert ledger_bytes(backend) == stored_bytes(root)
