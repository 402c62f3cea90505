"""FileBackend when something goes wrong: killed writers, full disks, failing system calls."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from failing_calls import FailingCalls
from file_store import (
    NAMESPACE,
    finish_child,
    get,
    in_child,
    ledger_bytes,
    name,
    path_of,
    put,
    remove_tree,
    start_child,
    stored_bytes,
    temporary_files,
)

from kvcodec.errors import BackendError, BackendFull, BackendReadOnly, ConfigError
from kvcodec_backends.file import FileBackend

CRASH_WRITER = Path(__file__).parent / "fault" / "crash_writer.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


# --- SIGKILL


def crash(root: Path, rounds: int, mode: str) -> dict[str, int]:
    run = subprocess.run(
        [sys.executable, str(CRASH_WRITER), str(root), str(rounds), "20240229", mode],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, int] = json.loads(run.stdout)
    assert report["objects"] > rounds
    return report


def test_200_killed_writers_leave_no_torn_object_and_no_orphan(root: Path):
    report = crash(root, 200, "backend")
    assert report["torn"] == 0
    assert report["orphans_left"] == 0
    assert report["swept"] == report["orphans"]


def test_killed_writers_leave_a_right_account(root: Path):
    report = crash(root, 100, "quota")
    assert (report["torn"], report["orphans_left"], report["miscounted"]) == (0, 0, 0)
    assert report["above_quota"] == 0


def test_a_writer_in_place_would_have_been_found_out(root: Path):
    """The control: the same test sees what it is meant to see."""
    assert crash(root, 80, "in_place")["torn"] > 0


# --- two processes, one name


def test_processes_that_hammer_the_same_names_never_mix(root: Path):
    names = [name(number) for number in range(4)]
    sizes = {1: 200_000, 2: 150_000}
    stop_at = time.monotonic() + 1.5

    def write(writer: int) -> None:
        backend = FileBackend(str(root))
        views = [memoryview(bytes([writer]) * sizes[writer])] * len(names)
        while time.monotonic() < stop_at:
            assert backend.put(names, views, timeout_seconds=10) == [None] * len(names)

    children = [start_child(lambda writer=writer: write(writer)) for writer in sizes]
    backend = FileBackend(str(root))
    seen = set()
    while time.monotonic() < stop_at:
        for number in range(len(names)):
            data = get(backend, number, 250_000)
            if data is not None:
                assert isinstance(data, bytes)
                assert data == data[:1] * sizes[data[0]]
                seen.add(data[0])
    for child in children:
        finish_child(child)
    assert seen == {1, 2}


# --- disks


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the options given; skips where that is not allowed."""
    points: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(point)]
        try:
            run = subprocess.run(command, check=False, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if run.returncode:
            pytest.skip(f"this user may not mount a tmpfs: {run.stderr.strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def fill(backend: FileBackend, size: int = 100_000) -> list[int]:
    """Put objects until the store is full; which ones are there."""
    stored: list[int] = []
    while True:
        result = put(backend, len(stored), bytes([len(stored) % 251 + 1]) * size)
        if result is not None:
            assert type(result) is BackendFull, result
            return stored
        stored.append(len(stored))
        assert len(stored) < 10_000


@pytest.mark.parametrize("options", ["size=2m", "size=20m,nr_inodes=40"])
def test_a_full_disk_is_full_until_it_is_freed(mounted: Callable[[str], Path], options: str):
    root = mounted(options)
    backend = FileBackend(str(root))
    stored = fill(backend)
    assert len(stored) > 5
    assert temporary_files(root) == []
    for number in stored:
        assert get(backend, number, 100_000) == bytes([number % 251 + 1]) * 100_000
    gone = [name(number) for number in stored[:3]]
    assert backend.delete(gone, timeout_seconds=1) == [True] * 3
    assert put(backend, stored[0], b"x" * 100_000) is None
    assert len(get(backend, stored[0], 100_000)) == 100_000  # type: ignore[arg-type]


def test_a_disk_filled_by_others_evicts_within_a_quota(mounted: Callable[[str], Path]):
    root = mounted("size=2m")
    backend = FileBackend(str(root), max_bytes=100 << 20)
    for number in range(100):
        assert put(backend, number, b"x" * 100_000) is None
    assert get(backend, 99, 100_000)
    assert backend.counters()["displaced_objects"] >= 80
    assert backend.counters()["displaced_bytes"] >= 80 * 100_000
    assert backend.counters()["evicted_objects"] == 0
    assert ledger_bytes(backend) == stored_bytes(root)
    # Nothing of ours to evict, all of it taken by somebody else.
    backend.delete([name(number) for number in range(100)], timeout_seconds=1)
    with pytest.raises(OSError, match="No space"):
        (root / "foreign").write_bytes(bytes(3 << 20))
    assert type(put(backend, 1, b"x" * 100_000)) is BackendFull
    assert ledger_bytes(backend) == stored_bytes(root) == 0
    (root / "foreign").unlink()
    assert put(backend, 1, b"x" * 100_000) is None


@pytest.mark.parametrize("max_bytes", [None, 1 << 20])
def test_a_read_only_disk_is_read(mounted: Callable[[str], Path], max_bytes: int | None):
    root = mounted("size=4m")
    backend = FileBackend(str(root), max_bytes=max_bytes)
    for number in range(5):
        assert put(backend, number, b"data") is None
    if max_bytes:
        # Its ledger is open for writing, which a remount in good order refuses.
        backend.close()
        backend = FileBackend(str(root))
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    late = FileBackend(str(root), max_bytes=max_bytes)
    for opened in (backend, late):
        started = time.monotonic()
        assert type(put(opened, 9, b"data", timeout_seconds=60)) is BackendReadOnly
        assert time.monotonic() - started < 10
        assert [get(opened, number) for number in range(6)] == [b"data"] * 5 + [None]
        assert opened.delete([name(0)], timeout_seconds=1) == [False]
    subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
    assert put(backend, 9, b"data") is None
    assert put(late, 10, b"data") is None
    assert get(backend, 10) == b"data"


def test_lost_permission_is_read_only(tmp_path: Path):
    """As a user who is not root, whom permissions bind."""

    def child() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        with tempfile.TemporaryDirectory(dir="/tmp") as directory:
            root = Path(directory) / "store"
            backend = FileBackend(str(root))
            assert put(backend, 1, b"data") is None
            (root / "tmp").chmod(0o500)
            assert type(put(backend, 2, b"data")) is BackendReadOnly
            assert get(backend, 1) == b"data"
            (root / "tmp").chmod(0o700)
            path_of(root, name(1)).chmod(0)
            unreadable = get(backend, 1)
            assert type(unreadable) is BackendError
            assert "EACCES" in str(unreadable)
            (root / "objects").chmod(0)
            assert isinstance(get(backend, 1), BackendError)
            assert backend.exists([name(1)], timeout_seconds=1) == [False]
            assert backend.delete([name(1)], timeout_seconds=1) == [False]
            with pytest.raises(BackendError, match="EACCES"):
                list(backend.list())
            with pytest.raises(BackendError, match="EACCES"):
                backend.stat(name(1), timeout_seconds=1)
            (root / "objects").chmod(0o700)
            assert put(backend, 1, b"again") is None
            assert get(backend, 1) == b"again"

    in_child(child)


# --- the n-th system call fails

CALLS = (
    "close fstat fsync ftruncate kill mkdir open pread preadv pwrite rename scandir stat unlink "
    "write"
)


@pytest.fixture
def calls() -> Iterator[FailingCalls]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield FailingCalls(monkeypatch, CALLS)


CLASS_OF = {
    errno.EIO: BackendError,
    errno.EMFILE: BackendError,
    errno.ENOSPC: BackendFull,
    errno.EDQUOT: BackendFull,
    errno.EACCES: BackendReadOnly,
    errno.EROFS: BackendReadOnly,
}


@pytest.mark.parametrize("max_bytes", [None, 4000])
@pytest.mark.parametrize("code", CLASS_OF, ids=lambda code: errno.errorcode[code])
def test_the_nth_call_of_a_put_fails(
    root: Path, calls: FailingCalls, code: int, max_bytes: int | None
):
    """Whichever it is: nothing is left behind, old or new is whole, and the next put succeeds."""
    backend = FileBackend(str(root), max_bytes=max_bytes, fsync=True)
    old, new, other = b"o" * 1500, b"n" * 1200, b"x" * 1500
    put(backend, 1, old)
    failed_count = 0
    for number in range(1, 200):
        put(backend, 2 * number, other)
        with calls.failing(code, lambda count, number=number: count == number):
            result = put(backend, 1, new)
        if calls.count < number:
            break
        failed_count += result is not None
        assert result is None or type(result) is CLASS_OF[code], result
        assert temporary_files(root) == []
        data = get(backend, 1)
        # With a quota the old one may have been evicted for the new one.
        assert data == new if result is None else data in (old, new, None)
        assert put(backend, 1, old) is None
        assert get(backend, 1) == old
        if max_bytes is not None:
            assert stored_bytes(root) <= max_bytes
            assert ledger_bytes(backend) == stored_bytes(root)
    assert calls.count < number < 199
    assert failed_count >= 6


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_the_nth_call_of_a_get_fails(root: Path, calls: FailingCalls, code: int):
    backend = FileBackend(str(root))
    put(backend, 1, b"data")
    failed_count = 0
    for number in range(1, 20):
        with calls.failing(code, lambda count, number=number: count == number):
            result = get(backend, 1)
        if calls.count < number:
            break
        failed_count += 1
        assert type(result) is BackendError, result
        assert get(backend, 1) == b"data"
    assert failed_count == 4


def test_nothing_but_an_answer_comes_out_when_every_call_fails(root: Path, calls: FailingCalls):
    backend = FileBackend(str(root), max_bytes=10_000)
    put(backend, 1, b"data")
    for start in range(1, 40):
        with calls.failing(errno.EIO, lambda count, start=start: count >= start):
            assert isinstance(put(backend, 2, b"new"), BackendError | None)
            assert isinstance(get(backend, 1), BackendError | bytes)
            assert backend.exists([name(1)], timeout_seconds=1)[0] in (True, False)
            backend.delete([name(3)], timeout_seconds=1)
            try:
                list(backend.list())
                backend.stat(name(1), timeout_seconds=1)
            except BackendError:
                pass
        # What could not be removed while everything failed is removed by the next put.
        assert put(backend, 3, b"after") is None
        assert temporary_files(root) == []
        assert get(backend, 1) == b"data"
    assert ledger_bytes(backend) == stored_bytes(root)


def test_descriptors_are_closed_whatever_fails(root: Path, calls: FailingCalls):
    backend = FileBackend(str(root), max_bytes=100_000, fsync=True)
    put(backend, 1, b"data")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1, 40):
        with calls.failing(errno.EIO, lambda count, number=number: count == number):
            put(backend, number, b"data")
            get(backend, 1)
    assert len(os.listdir("/proc/self/fd")) == before
    backend.close()


def test_opening_survives_any_failing_call(root: Path, calls: FailingCalls):
    """A store that cannot be set up now answers so at each put, and serves reads."""
    FileBackend(str(root)).close()
    path = path_of(root, name(1))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"data")
    for number in range(1, 100):
        with calls.failing(errno.EIO, lambda count, number=number: count == number):
            try:
                backend = FileBackend(str(root), max_bytes=10_000)
            except ConfigError:
                continue
        assert get(backend, 1) == b"data"
        assert put(backend, 2, b"data") is None
        assert ledger_bytes(backend) == stored_bytes(root)
        backend.close()
        if calls.count < number:
            break
    assert number < 99


def test_a_directory_that_comes_and_goes_never_raises(root: Path):
    """Somebody removes the whole root again and again while threads of another process work."""
    opened, ended = multiprocessing.Event(), multiprocessing.Event()

    def work() -> None:
        backend = FileBackend(str(root), max_bytes=50_000)
        opened.set()
        while not ended.is_set():
            for number in range(8):
                assert isinstance(put(backend, number, b"x" * 1000), BackendError | None)
                assert isinstance(get(backend, number), bytes | None)

    child = start_child(work)
    assert opened.wait(60)  # a root that goes while a store is opened is a ConfigError
    stop_at = time.monotonic() + 1.0
    while time.monotonic() < stop_at:
        try:
            remove_tree(root)
        except OSError:
            pass
        time.sleep(0.005)
    ended.set()
    finish_child(child)
    backend = FileBackend(str(root))
    assert put(backend, 1, b"data") is None
    assert [info.name[:32] for info in backend.list(NAMESPACE)]
