"""file:// with engine=segments: one quota and one set of objects for all processes of a root."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from file_store import finish_child, in_child, name, start_child
from segment_store import (
    KIB,
    MIB,
    content,
    disk_bytes,
    get_all,
    live_records,
    open_store,
    put_all,
    segment_paths,
)

from kvcodec.backend import Backend
from kvcodec.errors import BackendFull

SMALL = "segment_bytes=64KiB"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


class Steps:
    """Lets this process and a child of it take turns."""

    def __init__(self) -> None:
        self._pipes = [os.pipe(), os.pipe()]

    def _wait(self, pipe: int) -> None:
        assert os.read(self._pipes[pipe][0], 1) == b"x"

    def hand_over(self) -> None:
        """In the child: the parent's turn; comes back with the child's."""
        os.write(self._pipes[0][1], b"x")
        self._wait(1)

    def wait(self) -> None:
        self._wait(0)

    def go_on(self) -> None:
        os.write(self._pipes[1][1], b"x")

    @contextmanager
    def child(self, work: object) -> Iterator[None]:
        pid = start_child(work)  # type: ignore[arg-type]
        try:
            yield
        finally:
            finish_child(pid)


def test_processes_see_what_the_others_write_replace_and_delete(root: Path):
    steps = Steps()

    def other() -> None:
        with closing(open_store(root, SMALL)) as backend:
            put_all(backend, {number: content(number, 20_000) for number in range(8)})
            steps.hand_over()
            assert get_all(backend, [0, 1, 2]) == {0: b"replaced", 2: content(2, 20_000)}
            put_all(backend, {0: b"again", 20: b"new"})
            steps.hand_over()

    with steps.child(other), closing(open_store(root, SMALL)) as backend:
        steps.wait()
        # Some of these lie in segments that the other has finished.
        assert len(get_all(backend, list(range(8)))) == 8
        put_all(backend, {0: b"replaced"})
        assert backend.delete([name(1), name(7)], timeout_seconds=1) == [True, True]
        steps.go_on()
        steps.wait()
        assert get_all(backend, [0, 1, 20]) == {0: b"again", 20: b"new"}
        assert len(list(backend.list())) == 7
        steps.go_on()
    with closing(open_store(root, SMALL)) as backend:
        assert get_all(backend, [0, 1, 7, 20]) == {0: b"again", 20: b"new"}


def test_a_process_goes_on_where_the_last_one_ended(root: Path):
    for number in range(5):
        in_child(
            lambda number=number: put_all(open_store(root, "segment_bytes=1MiB"), {number: b"x"})
        )
    (path,) = segment_paths(root)
    assert [record.offset for record in live_records(path)] == [4096 * n for n in range(5)]


def test_a_segment_in_use_is_nobody_elses(root: Path):
    """Neither to append to nor to drop."""
    steps = Steps()
    options = "segment_bytes=64KiB&max_bytes=400KiB"

    def other() -> None:
        with closing(open_store(root, options)) as backend:
            put_all(backend, {1: b"slow"})
            steps.hand_over()
            put_all(backend, {2: b"still the same segment"})

    with steps.child(other), closing(open_store(root, options)) as backend:
        steps.wait()
        for number in range(10, 60):
            put_all(backend, {number: content(number, 20_000)})
        assert backend.counters()["evicted_objects"] > 20
        assert get_all(backend, [1, 10, 59]) == {1: b"slow", 59: content(59, 20_000)}
        steps.go_on()
    with closing(open_store(root, options)) as backend:
        assert get_all(backend, [1, 2]) == {1: b"slow", 2: b"still the same segment"}
        oldest = segment_paths(root)[0]
        assert [len(record.name) for record in live_records(oldest)] == [48, 48]


def test_more_processes_than_segments_are_told_so(root: Path):
    steps = Steps()
    options = "segment_bytes=64KiB&max_bytes=130KiB"

    def other() -> None:
        backend = open_store(root, options)
        put_all(backend, {1: b"one"})
        steps.hand_over()

    with steps.child(other), closing(open_store(root, options)) as backend:
        steps.wait()
        (answer,) = backend.put([name(2)], [memoryview(b"two")], timeout_seconds=5)
        assert type(answer) is BackendFull
        assert "raise max_bytes, or lower segment_bytes=65536" in str(answer)
        assert get_all(backend, [1, 2]) == {1: b"one"}
        steps.go_on()
    with closing(open_store(root, options)) as backend:
        put_all(backend, {2: b"two"})


# --- the quota


def test_the_oldest_segments_go_first_and_nothing_else(root: Path):
    with closing(open_store(root, "segment_bytes=64KiB&max_bytes=512KiB")) as backend:
        numbers = list(range(60))
        for number in numbers:
            put_all(backend, {number: content(number, 20_000)})
        there = get_all(backend, numbers)
        assert list(there) == numbers[-len(there) :]
        assert 15 <= len(there) <= 24
        counts = backend.counters()
        assert counts["evicted_objects"] == 60 - len(there)
        assert counts["evicted_bytes"] == 20_000 * (60 - len(there))
        assert disk_bytes(root) <= 512 * KIB
    with closing(open_store(root, "segment_bytes=64KiB&max_bytes=256KiB")) as backend:
        assert get_all(backend, numbers) == there
        for number in (100, 101, 102, 103):
            put_all(backend, {number: content(number, 20_000)})
        assert disk_bytes(root) <= 256 * KIB


def test_what_was_written_to_last_is_not_the_oldest(root: Path):
    """A slow writer's segment goes by its last record, not by the time it was made."""
    steps = Steps()
    options = "segment_bytes=64KiB&max_bytes=512KiB"

    def slow() -> None:
        with closing(open_store(root, options)) as backend:
            put_all(backend, {1: b"early"})
            steps.hand_over()
            put_all(backend, {2: b"late"})

    def fill(backend: Backend, first: int, count: int) -> None:
        for number in range(first, first + count):
            put_all(backend, {number: content(number, 20_000)})

    with closing(open_store(root, options)) as backend:
        with steps.child(slow):
            steps.wait()
            fill(backend, 10, 18)
            steps.go_on()
        # Nobody appends to it any more, and it was made first.
        fill(backend, 30, 9)
        assert backend.counters()["evicted_objects"] > 0
        assert get_all(backend, [1, 2]) == {1: b"early", 2: b"late"}


def inodes(root: Path) -> set[int]:
    return {path.stat().st_ino for path in segment_paths(root)}


def test_the_space_of_the_oldest_segment_is_used_again(root: Path):
    """And nothing of what was in it shows, with an index or without."""
    options = "segment_bytes=64KiB&max_bytes=400KiB"
    with closing(open_store(root, options)) as backend:
        put_all(backend, {number: content(number, 20_000) for number in range(15)})
        before = inodes(root)
        put_all(backend, {100: content(100, 20_000)})
        assert inodes(root) == before
        assert list(get_all(backend, [*range(15), 100])) == [*range(3, 15), 100]
        assert backend.counters()["evicted_objects"] == 3
        assert backend.counters()["damaged_objects"] == 0
    for index in (root / "segments").glob("*.index"):
        index.unlink()
    with closing(open_store(root, options)) as backend:
        assert list(get_all(backend, [*range(15), 100])) == [*range(3, 15), 100]


def test_a_segment_is_not_used_again_while_somebody_marks_what_is_dead_in_it(root: Path):
    """What arrives late must not hit a record of its heir."""
    options = "segment_bytes=64KiB&max_bytes=400KiB"
    with closing(open_store(root, options)) as backend:
        put_all(backend, {number: content(number, 20_000) for number in range(15)})
        oldest = segment_paths(root)[0]
        inode = oldest.stat().st_ino
        with open(oldest, "r+b") as late, open(oldest.with_suffix(".index"), "rb") as index:
            fcntl.flock(index, fcntl.LOCK_SH)
            put_all(backend, {100: content(100, 20_000)})
            assert inode not in inodes(root)
            late.write(bytes(65536))
        assert get_all(backend, [0, 100]) == {100: content(100, 20_000)}


def test_an_empty_segment_is_given_back_at_once(root: Path):
    with closing(open_store(root, SMALL)) as backend:
        put_all(backend, {number: content(number, 20_000) for number in range(9)})
        assert len(segment_paths(root)) == 3
        gone = [name(number) for number in range(3)]
        assert backend.delete(gone, timeout_seconds=1) == [True] * 3
        assert len(segment_paths(root)) == 2
        assert backend.counters()["evicted_objects"] == 0
        assert len(get_all(backend, list(range(9)))) == 6


def test_ten_times_the_quota_never_takes_more_than_the_quota_and_a_segment(root: Path):
    """Real blocks on the disk, while two processes write and readers hold on to segments."""
    quota, segment = 8 * MIB, 512 * KIB
    options = f"segment_bytes={segment}&max_bytes={quota}"

    def write(writer: int) -> None:
        with closing(open_store(root, options)) as backend:
            for number in range(writer, 10 * quota // 60_000, 2):
                put_all(backend, {number: content(number, 60_000)})
                if number % 50 < 2:
                    for other, data in get_all(backend, list(range(number - 80, number))).items():
                        assert data == content(other, 60_000)

    children = [start_child(lambda writer=writer: write(writer)) for writer in (0, 1)]
    peak, samples = 0, 0
    watcher_stop = threading.Event()

    def watch() -> None:
        nonlocal peak, samples
        while not watcher_stop.is_set():
            peak, samples = max(peak, disk_bytes(root)), samples + 1
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for child in children:
            finish_child(child)
    finally:
        watcher_stop.set()
        watcher.join()
    assert samples > 20
    assert quota * 0.8 < peak <= quota + segment
    with closing(open_store(root, options)) as backend:
        listed = [info.name for info in backend.list()]
        assert backend.exists(listed, timeout_seconds=1) == [True] * len(listed)
        assert len(listed) * 60_000 > quota * 0.7


def test_threads_that_fill_segments_at_once_lose_nothing(root: Path):
    """A segment is sealed only when the last write into it has ended."""
    with closing(open_store(root, "segment_bytes=128KiB")) as backend:
        failures: list[object] = []

        def work(worker: int) -> None:
            try:
                for batch in range(12):
                    first = worker * 1000 + batch * 6
                    objects = {n: content(n, 7000 + n % 900) for n in range(first, first + 6)}
                    put_all(backend, objects)
                    assert get_all(backend, list(objects)) == objects
            except BaseException as error:  # noqa: BLE001 - shown below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
    with closing(open_store(root, "segment_bytes=128KiB")) as backend:
        assert len(list(backend.list())) == 6 * 72
        assert backend.counters()["recovered_objects"] == 0
