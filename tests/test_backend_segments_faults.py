"""file:// with engine=segments: crashes, damage, full disks, failing calls, forks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from failing_calls import FailingCalls
from file_store import in_child, name, remove_tree
from segment_store import (
    KIB,
    content,
    flip,
    get_all,
    header_at,
    live_records,
    open_store,
    overwrite,
    put_all,
    segment_paths,
)

from kvcodec.backend import Backend
from kvcodec.errors import (
    BackendError,
    BackendFull,
    BackendReadOnly,
    BackendTimeout,
    ConfigError,
)
from kvcodec_backends._segment_records import DEAD, HEADER_BYTES, LIVE

CRASH_WRITER = Path(__file__).parent / "fault" / "crash_segments.py"
SMALL = "segment_bytes=256KiB"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def stored(root: Path, objects: dict[int, bytes], options: str = SMALL) -> None:
    with closing(open_store(root, options)) as backend:
        put_all(backend, objects)


def pages(count: int, size: int = 10_000, first: int = 0) -> dict[int, bytes]:
    return {number: content(number, size + number) for number in range(first, first + count)}


# --- SIGKILL


def crash(root: Path, *arguments: object) -> dict[str, int]:
    """Kill two writers 20 times."""
    run = subprocess.run(
        [sys.executable, str(CRASH_WRITER), str(root), "20", "20261121", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, int] = json.loads(run.stdout)
    assert report["told"] > 200
    assert (report["torn"], report["unreadable"], report["came_back"]) == (0, 0, 0)
    # Unless it was just full, the next process goes on with what they left.
    assert report["adopted"] >= 10
    return report


def test_killed_writers_lose_nothing_they_answered_for(root: Path):
    report = crash(root)
    assert report["lost"] == 0
    assert report["recovered"] > 0


def test_writers_killed_while_they_evict_leave_nothing_torn(root: Path):
    report = crash(root, 4 << 20)
    assert report["above_quota"] == 0
    assert 20 * 40 < report["objects"] < 20 * 420


@pytest.mark.parametrize("place", [HEADER_BYTES, 4096, 4096 + 8191])
def test_a_torn_record_is_cut_and_nothing_else_lost(root: Path, place: int):
    """What a loss of power may leave: the header is there, a part of the object is not."""
    objects = pages(5)
    stored(root, objects)
    (path,) = segment_paths(root)
    last = live_records(path)[-1]
    flip(path, last.offset + place)
    path.with_suffix(".index").unlink()
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, list(objects)) == {n: objects[n] for n in range(4)}
        assert backend.counters()["recovered_objects"] == 4
        put_all(backend, {4: b"again", 5: objects[0]})
        assert get_all(backend, [3, 4, 5]) == {3: objects[3], 4: b"again", 5: objects[0]}
    assert segment_paths(root) == [path]
    assert live_records(path)[-2].offset == last.offset


# --- damage


@pytest.mark.parametrize("with_index", [True, False])
def test_a_damaged_header_costs_its_own_record_only(root: Path, with_index: bool):
    objects = pages(6)
    stored(root, objects)
    (path,) = segment_paths(root)
    flip(path, live_records(path)[2].offset + 70)
    if not with_index:
        path.with_suffix(".index").unlink()
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, list(objects)) == {n: objects[n] for n in objects if n != 2}
        assert backend.counters()["damaged_objects"] == int(with_index)
        assert backend.exists([name(2)], timeout_seconds=1) == [False]
        put_all(backend, {2: objects[2]})
        assert get_all(backend, list(objects)) == objects


@pytest.mark.parametrize("place", [HEADER_BYTES + 5, 5000, 4096 + 8000])
def test_a_damaged_object_is_a_miss(root: Path, place: int):
    objects = pages(3)
    stored(root, objects)
    (path,) = segment_paths(root)
    flip(path, live_records(path)[1].offset + place)
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, [0, 1, 2]) == {0: objects[0], 2: objects[2]}
        assert backend.counters()["damaged_objects"] == 1


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "garbage", "flipped", "directory"])
def test_the_index_is_never_needed(root: Path, damage: str):
    objects = pages(40)
    stored(root, objects)
    with closing(open_store(root, SMALL)) as backend:
        assert backend.delete([name(7)], timeout_seconds=1) == [True]
    assert len(segment_paths(root)) == 2
    for path in segment_paths(root):
        index = path.with_suffix(".index")
        data = bytearray(index.read_bytes())
        index.unlink()
        if damage == "empty":
            index.touch()
        elif damage == "cut":
            index.write_bytes(data[: len(data) // 2 + 40])
        elif damage == "garbage":
            index.write_bytes(random.Random(1).randbytes(300_000))
        elif damage == "flipped":
            data[3 * HEADER_BYTES + 30] ^= 1
            index.write_bytes(data)
        elif damage == "directory":
            index.mkdir()
    expected = {number: data for number, data in objects.items() if number != 7}
    for _ in range(2):
        with closing(open_store(root, SMALL)) as backend:
            assert get_all(backend, list(objects)) == expected
            assert backend.counters()["recovered_objects"] > 0
            assert backend.counters()["damaged_objects"] == 0
            put_all(backend, {7: objects[7]})
        expected = objects


def test_an_index_that_tells_of_what_is_not_there_makes_misses(root: Path):
    objects = pages(3)
    stored(root, objects)
    (path,) = segment_paths(root)
    record = live_records(path)[-1]
    made_up = record._replace(offset=record.end, sequence=record.sequence + 1, name=b"x" * 48)
    with open(path.with_suffix(".index"), "ab") as file:
        file.write(made_up.pack())
        # Of the right name, but in the middle of another object.
        file.write(record._replace(offset=4096, sequence=record.sequence + 2).pack())
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, [0, 1, 2]) == {0: objects[0], 1: objects[1]}
        text = f"{b'x'.hex() * 16}/{b'x'.hex() * 32}"
        buffer = memoryview(bytearray(20_000))
        assert backend.get_into([text], [buffer], timeout_seconds=1) == [None]


def test_the_image_of_a_record_inside_an_object_is_no_record(root: Path):
    """Somebody stores a segment in a segment."""
    stored(root, {1: content(1, 5000)})
    (path,) = segment_paths(root)
    image = path.read_bytes()[: 64 * KIB]
    stored(root, {2: image, 3: b"data"})
    path.with_suffix(".index").unlink()
    overwrite(path, live_offset(path, 2), b"\0" * 8)
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, [1, 2, 3]) == {1: content(1, 5000), 3: b"data"}
        assert len(list(backend.list())) == 2


def live_offset(path: Path, number: int) -> int:
    """Where an object's record begins, found without an index."""
    for offset in range(0, path.stat().st_size, 4096):
        record = header_at(path, offset)
        if record and record.state == LIVE and record.name.hex() == name(number).replace("/", ""):
            return offset
    raise AssertionError(f"no record of {number}")


# --- what is gone stays gone


def test_neither_deleted_nor_replaced_objects_come_back(root: Path):
    """Not even when all that is left are the records of a segment, and the newer ones are lost."""
    stored(root, {1: b"old" * 5000, 2: content(2, 9000), 3: content(3, 9000)})
    (first,) = segment_paths(root)
    filler = pages(30, first=10)
    with closing(open_store(root, SMALL)) as backend:
        put_all(backend, filler)
        put_all(backend, {1: b"new"})
        assert backend.delete([name(2)], timeout_seconds=1) == [True]
    newest = segment_paths(root)[-1]
    assert newest != first
    assert {header_at(first, record.offset).state for record in live_records(first)[:2]} == {DEAD}  # type: ignore[union-attr]
    for index in (root / "segments").glob("*.index"):
        index.unlink()
    newest.unlink()
    with closing(open_store(root, SMALL)) as backend:
        assert list(get_all(backend, [1, 2, 3])) == [3]


def test_of_two_records_of_one_name_the_later_counts_wherever_it_lies(root: Path):
    """A crash between writing the new one and marking the old one leaves both."""
    stored(root, {1: b"first", 2: b"x"})
    (path,) = segment_paths(root)
    before = path.read_bytes()[:4096]
    stored(root, {1: b"second"})
    overwrite(path, 0, before)
    path.with_suffix(".index").unlink()
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, [1]) == {1: b"second"}
        put_all(backend, {3: b"any write cleans up"})
    assert header_at(path, 0).state == DEAD  # type: ignore[union-attr]


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


def put_one(backend: Backend, number: int, data: bytes) -> object:
    return backend.put([name(number)], [memoryview(data)], timeout_seconds=10)[0]


def test_a_full_disk_is_full_until_a_segment_comes_free(mounted: Callable[[str], Path]):
    root = mounted("size=2m")
    with closing(open_store(root, SMALL)) as backend:
        count = 0
        while put_one(backend, count, content(count, 50_000)) is None:
            count += 1
        assert count > 20
        assert type(put_one(backend, 99, b"data")) is BackendFull
        assert get_all(backend, list(range(count))) == {
            number: content(number, 50_000) for number in range(count)
        }
        # Only all of a segment gives anything back.
        gone = [name(number) for number in range(4)]
        assert backend.delete(gone, timeout_seconds=1) == [True] * 4
        assert put_one(backend, 99, b"data") is None
        assert get_all(backend, [3, 4, 99]) == {4: content(4, 50_000), 99: b"data"}


def test_a_disk_filled_by_others_evicts_within_a_quota(mounted: Callable[[str], Path]):
    root = mounted("size=2m")
    with closing(open_store(root, SMALL + "&max_bytes=100MiB")) as backend:
        for number in range(100):
            assert put_one(backend, number, content(number, 50_000)) is None
        assert get_all(backend, [0, 99]) == {99: content(99, 50_000)}
        assert backend.counters()["displaced_objects"] > 50
        assert backend.counters()["displaced_bytes"] > 50 * 50_000
        assert backend.counters()["evicted_objects"] == 0


def test_a_read_only_disk_is_read(mounted: Callable[[str], Path]):
    root = mounted("size=4m")
    objects = pages(5)
    stored(root, objects)
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, list(objects)) == objects
        assert type(put_one(backend, 9, b"data")) is BackendReadOnly
        assert backend.delete([name(0)], timeout_seconds=1) == [False]
        assert get_all(backend, list(objects)) == objects
        subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
        assert put_one(backend, 9, b"data") is None
        assert backend.delete([name(0)], timeout_seconds=1) == [True]


def test_a_removed_root_is_made_anew_at_the_next_put(root: Path):
    with closing(open_store(root, SMALL)) as backend:
        put_all(backend, {1: b"data"})
        remove_tree(root)
        assert get_all(backend, [1]) == {}
        assert backend.exists([name(1)], timeout_seconds=1) == [False]
        assert backend.delete([name(1)], timeout_seconds=1) == [False]
        assert list(backend.list()) == []
        put_all(backend, {1: b"again"})
        assert get_all(backend, [1]) == {1: b"again"}
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, [1]) == {1: b"again"}


def test_a_root_whose_parent_is_gone_is_not_made(tmp_path: Path):
    with closing(open_store(tmp_path / "mount" / "store", SMALL)) as backend:
        remove_tree(tmp_path / "mount")
        answer = put_one(backend, 1, b"data")
        assert isinstance(answer, BackendError)
        assert "ENOENT" in str(answer)
        assert not (tmp_path / "mount").exists()


# --- a lock that nobody gives back


def test_a_stopped_process_costs_a_writer_its_deadline_and_readers_nothing(root: Path):
    stored(root, {1: b"data"})
    with (
        open(root / "segments" / "lock", "rb") as lock,
        closing(open_store(root, SMALL)) as backend,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        (answer,) = backend.put([name(2)], [memoryview(b"data")], timeout_seconds=0.2)
        assert type(answer) is BackendTimeout
        assert 0.15 < time.monotonic() - started < 10
        assert get_all(backend, [1]) == {1: b"data"}
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert put_one(backend, 2, b"data") is None


# --- the n-th system call fails

CALLS = (
    "close fdatasync fstat fsync ftruncate lseek mkdir open posix_fallocate pread preadv pwrite "
    "pwritev scandir stat unlink write"
)


@pytest.fixture
def calls() -> Iterator[FailingCalls]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield FailingCalls(monkeypatch, CALLS)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EINVAL])
def test_the_nth_call_of_a_put_fails(root: Path, calls: FailingCalls, code: int):
    """Whichever it is: old or new is whole, the next put succeeds, and so does the next process."""
    options = "segment_bytes=64KiB&max_bytes=512KiB&fsync=1"
    old, new = content(1, 15_000), content(2, 14_000)
    failed_count = 0
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1, 200):
        with closing(open_store(root, options)) as backend:
            put_all(backend, {1: old, 2: content(3, 20_000), 3: content(4, 15_000)})
            with calls.failing(code, lambda count, number=number: count == number):
                # It does not fit any more: a segment is sealed, and one made.
                answer = put_one(backend, 1, new)
            reached = calls.count >= number
            failed_count += answer is not None
            found = get_all(backend, [1]).get(1)
            assert found == new if answer is None else found in (old, new, None), answer
            put_all(backend, {1: old})
            assert get_all(backend, [1]) == {1: old}
        with closing(open_store(root, options)) as backend:
            assert get_all(backend, [1]) == {1: old}
        if not reached:
            break
    assert number < 199
    assert failed_count >= 5
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_the_nth_call_of_other_verbs_fails(root: Path, calls: FailingCalls, code: int):
    objects = pages(3)
    stored(root, objects)
    for number in range(1, 200):
        with calls.failing(code, lambda count, number=number: count == number):
            try:
                backend = open_store(root, SMALL)
            except ConfigError:
                continue
            answers = get_all(backend, [0, 1])
            assert all(isinstance(a, BackendError) or a == objects[n] for n, a in answers.items())
            backend.exists([name(1)], timeout_seconds=1)
            backend.delete([name(99)], timeout_seconds=1)
            try:
                list(backend.list())
                backend.stat(name(1), timeout_seconds=1)
            except BackendError:
                pass
        backend.close()
        with closing(open_store(root, SMALL)) as backend:
            assert get_all(backend, [0, 1, 2]) == objects
        if calls.count < number:
            break
    assert 10 < number < 199


def test_one_bad_block_costs_its_own_object_only(root: Path, monkeypatch: pytest.MonkeyPatch):
    objects = pages(6)
    real = os.preadv
    with closing(open_store(root, SMALL)) as backend:
        put_all(backend, objects)
        (path,) = segment_paths(root)
        bad = live_records(path)[3].offset

        def preadv(fd: int, parts: list[memoryview], offset: int) -> int:
            if offset <= bad < offset + sum(map(len, parts)):
                raise OSError(errno.EIO, "bad block")
            return real(fd, parts, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        answers = get_all(backend, list(objects))
        assert isinstance(answers.pop(3), BackendError)
        assert answers == {number: objects[number] for number in objects if number != 3}


def test_a_fork_goes_its_own_way(root: Path):
    with closing(open_store(root, SMALL)) as backend:
        put_all(backend, {1: b"parent"})

        def child() -> None:
            assert get_all(backend, [1]) == {1: b"parent"}
            put_all(backend, {2: b"child"})
            assert len(segment_paths(root)) == 2
            backend.close()

        in_child(child)
        put_all(backend, {3: b"parent"})
        assert get_all(backend, [1, 2, 3]) == {1: b"parent", 2: b"child", 3: b"parent"}
        assert len(segment_paths(root)) == 2


def test_a_fork_while_threads_write_does_not_hang(root: Path):
    stop = threading.Event()
    with closing(open_store(root, SMALL + "&max_bytes=4MiB")) as backend:

        def write(writer: int) -> None:
            number = writer * 1000
            while not stop.is_set():
                put_one(backend, number, content(number, 20_000))
                number += 1

        threads = [threading.Thread(target=write, args=(writer,)) for writer in (1, 2, 3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(5):
                time.sleep(0.02)
                in_child(lambda number=number: put_all(backend, {number: b"child"}))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        # Of what the children wrote, much is evicted by now.
        put_all(backend, {9: b"parent"})
        assert get_all(backend, [9]) == {9: b"parent"}
