"""file:// with engine=segments: the conformance suite, its options, what it writes and where."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import stat
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from file_store import name
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_store import (
    KIB,
    MIB,
    content,
    get_all,
    live_records,
    open_store,
    put_all,
    segment_paths,
)
from xxhash import xxh3_64_intdigest

from kvcodec.backend import Backend
from kvcodec.errors import BackendFull, ConfigError
from kvcodec.testing import BackendTests
from kvcodec_backends import _file_publish, segments
from kvcodec_backends._segment_records import LIVE, Record, iter_index
from kvcodec_backends.file import FileBackend


def plant_foreign_things(root: Path) -> None:
    segments = root / "segments"
    number = f"{1:016x}"
    (segments / "notes.txt").write_text("hello")
    (segments / f"{number}.segment").mkdir()
    (segments / f"{2:016x}.segment").symlink_to(__file__)
    os.mkfifo(segments / f"{3:016x}.segment")
    (segments / f"{4:016x}.segment").write_bytes(os.urandom(10_000))
    (segments / f"{4:016x}.index").write_bytes(os.urandom(10_000))
    (segments / f"{5:016x}.segment").touch()
    os.mkfifo(segments / f"{5:016x}.index")
    (segments / f"{6:016x}.index").write_text("without a segment")
    (segments / f"{7:016x}.SEGMENT").write_text("hello")
    (root / "LOCK").write_text("hello")


class SegmentConformance(BackendTests):
    options = ""
    max_object_bytes = 1 << 20

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"

    def open_backend(self) -> Backend:
        return FileBackend.from_url(f"file://{self.root}?engine=segments{self.options}")

    def plant_foreign_objects(self, namespace: str) -> bool:
        plant_foreign_things(self.root)
        return True

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return FileBackend, f"file://{self.root}?engine=segments&direct=1"

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return FileBackend, f"file://{self.root}/typo?engine=segments"


class TestConformance(SegmentConformance):
    options = "&segment_bytes=2MiB"


class TestConformanceWithQuota(SegmentConformance):
    """Segments come and go under the suite, yet nothing of one test is evicted."""

    options = "&max_bytes=64MiB&segment_bytes=1056KiB"


class TestConformanceWithSync(SegmentConformance):
    options = "&fsync=1&segment_bytes=8MiB&ttl_seconds=3600"
    model_examples = 5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


# --- URLs and options


@pytest.mark.parametrize(
    "query",
    [
        "engine=segment",
        "engine=",
        "engine=segments&engine=segments",
        "engine=segments&publish=link",
        "engine=segments&max_bytes=511KiB",
        "engine=segments&max_bytes=1MiB&segment_bytes=1MiB",
        "engine=segments&segment_bytes=60KiB",
        "engine=segments&segment_bytes=0",
        "engine=segments&ttl_seconds=0",
        "engine=segments&ttl_seconds=-1",
        "engine=segments&ttl_seconds=nan",
        "engine=segments&ttl_seconds=1h",
        "engine=segments&fsync=yes",
        "engine=segments#part",
        "engine=files&segment_bytes=1MiB",
        "engine=files&ttl_seconds=60",
    ],
)
def test_a_url_that_cannot_be_honoured_is_a_config_error(root: Path, query: str):
    with pytest.raises(ConfigError):
        FileBackend.from_url(f"file://{root}?{query}")
    assert not root.exists()


def test_the_store_that_is_there_decides_about_the_engine(root: Path, tmp_path: Path):
    files = tmp_path / "files"
    for path, engine, other in ((root, "segments", "files"), (files, "files", "segments")):
        with closing(FileBackend.from_url(f"file://{path}?engine={engine}")) as backend:
            kind = type(backend)
        with closing(FileBackend.from_url(f"file://{path}", create=False)) as backend:
            assert type(backend) is kind
        with pytest.raises(ConfigError, match=f"is of engine={engine}"):
            FileBackend.from_url(f"file://{path}?engine={other}")
    with closing(FileBackend.from_url(f"file://{tmp_path}/new")) as backend:
        assert type(backend) is FileBackend


def test_a_segment_is_256_mib_or_an_eighth_of_the_quota(root: Path, tmp_path: Path):
    for query, size in (("max_bytes=16MiB", 2 * MIB), ("segment_bytes=300000", 73 * 4096)):
        path = tmp_path / query
        with closing(open_store(path, query)) as backend:
            put_all(backend, {1: b"data"})
        assert [segment.stat().st_size for segment in segment_paths(path)] == [size]
    assert segments.DEFAULT_SEGMENT_BYTES == 256 * MIB


def test_backends_of_one_root_have_to_agree(root: Path):
    with closing(open_store(root)), pytest.raises(ConfigError, match="the same options"):
        open_store(root, "segment_bytes=2MiB")
    open_store(root, "segment_bytes=2MiB").close()


def test_a_mount_that_hosts_share_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_file_publish, "file_system_type", lambda path: "fuse.juicefs")
    monkeypatch.setattr(segments, "file_system_type", lambda path: "fuse.juicefs")
    with pytest.raises(ConfigError, match=r"fuse\.juicefs.*engine=files"):
        open_store(root)


def test_nobody_else_can_look_into_the_store(root: Path):
    with closing(open_store(root)) as backend:
        put_all(backend, {1: b"data"})
        for directory, _, files in os.walk(root):
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
            for file in files:
                assert stat.S_IMODE(os.stat(os.path.join(directory, file)).st_mode) == 0o600


def test_an_object_that_fits_into_no_segment_is_refused(root: Path):
    with closing(open_store(root, "segment_bytes=64KiB")) as backend:
        fits = content(1, 64 * KIB - 4096)
        put_all(backend, {1: fits})
        names = [name(2), name(3)]
        answers = backend.put(
            names, [memoryview(bytes(len(fits) + 4000)), memoryview(b"data")], timeout_seconds=9
        )
        assert isinstance(answers[0], BackendFull)
        assert "raise segment_bytes=65536" in str(answers[0])
        assert answers[1] is None
        assert get_all(backend, [1, 2, 3]) == {1: fits, 3: b"data"}


def test_sync_is_done_once_for_neighbours(root: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), real(fd)))
    objects = {number: content(number, 5000) for number in range(20)}
    for options, count in (("", 0), ("&fsync=1", 1)):
        with closing(open_store(root, f"segment_bytes=1MiB{options}")) as backend:
            put_all(backend, objects)
        assert len(synced) == count


def test_what_is_too_old_is_gone_and_its_segment_with_it(root: Path):
    with closing(open_store(root, "segment_bytes=64KiB&ttl_seconds=3")) as backend:
        put_all(backend, {number: content(number, 30_000) for number in range(4)})
        assert len(segment_paths(root)) == 2
        assert len(get_all(backend, list(range(4)))) == 4
        time.sleep(3.1)
        names = [name(number) for number in range(4)]
        assert get_all(backend, list(range(4))) == {}
        assert backend.exists(names, timeout_seconds=1) == [False] * 4
        assert backend.stat(names[0], timeout_seconds=1) is None
        assert list(backend.list()) == []
        put_all(backend, {9: content(9, 30_000)})
        assert len(segment_paths(root)) == 1
        assert backend.counters()["expired_objects"] == 4
        assert backend.counters()["expired_bytes"] == 4 * 30_000
        assert backend.counters()["evicted_objects"] == 0
    with closing(open_store(root, "segment_bytes=64KiB")) as backend:
        assert list(get_all(backend, list(range(10)))) == [9]


def test_bytes_of_its_segments_are_known(root: Path):
    with closing(open_store(root, "segment_bytes=64KiB&max_bytes=1MiB")) as backend:
        assert backend.gauges() == {"stored_bytes": 0, "limit_bytes": 1 << 20}
        put_all(backend, {number: content(number, 30_000) for number in range(4)})
        # Two segments, and what the file system may need to know where each of them lies.
        most = 2 * (64 + 4) << 10
        assert 120_000 <= backend.gauges()["stored_bytes"] <= most
    with closing(open_store(root, "segment_bytes=64KiB")) as backend:
        assert 120_000 <= backend.gauges()["stored_bytes"] <= most
        assert "limit_bytes" not in backend.gauges()


# --- format


def test_the_header_has_the_bytes_of_its_description():
    record = Record(LIVE, bytes(range(48)), 5000, 7, 8, 4096, 9)
    packed = record.pack()
    assert packed[:16] == b"kvcseg1\n\1" + bytes(7)
    assert packed[16:64] == bytes(range(48))
    numbers = [int.from_bytes(packed[at : at + 8], "little") for at in range(64, 128, 8)]
    assert numbers == [5000, 7, 8, 4096, 9, 0, 0, xxh3_64_intdigest(packed[:120])]
    assert Record.unpack(packed) == record
    for place in range(128):
        damaged = bytearray(packed)
        damaged[place] ^= 1
        assert Record.unpack(bytes(damaged)) is None
    assert Record.unpack(packed[:127]) is None


@pytest.mark.parametrize(
    ("size", "blocks"),
    [(1, 1), (3968, 1), (3969, 2), (4096, 2), (4097, 2), (4096 + 3968, 2), (4096 + 3969, 3)],
)
def test_the_tail_of_an_object_lies_behind_its_header(root: Path, size: int, blocks: int):
    with closing(open_store(root)) as backend:
        put_all(backend, {1: content(1, size), 2: b"next"})
        assert get_all(backend, [1, 2]) == {1: content(1, size), 2: b"next"}
    (path,) = segment_paths(root)
    first, second = live_records(path)
    assert (first.offset, second.offset) == (0, blocks * 4096)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 300).map(lambda size: ("torn", size)),
            st.integers(0, 300).map(lambda size: ("garbage", size)),
            st.just(("entry", 0)),
        ),
        max_size=12,
    )
)
def test_an_index_is_read_past_whatever_is_wrong_with_it(parts: list[tuple[str, int]]):
    data, expected = b"", []
    for number, (kind, size) in enumerate(parts):
        record = Record(LIVE, bytes(48), number + 1, number, 1, 4096 * number, 0)
        if kind == "entry":
            data += record.pack()
            expected.append(record)
        else:
            data += record.pack()[: min(size, 127)] if kind == "torn" else bytes(size)
    assert [record for record, _ in iter_index(data)] == expected


# --- the disk


def cached_pages(path: Path) -> int:
    """How many pages of a file are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        gc.collect()
        return sum(page & 1 for page in pages)


def test_pages_leave_no_trace_in_the_page_cache(root: Path, tmp_path: Path):
    with closing(open_store(root, "segment_bytes=16MiB")) as backend:
        objects = {number: content(number, 200_001) for number in range(60)}
        put_all(backend, objects)
        assert get_all(backend, list(objects)) == objects
        if backend.counters()["buffered"]:
            pytest.skip("this file system has no O_DIRECT")
        (path,) = segment_paths(root)
        assert cached_pages(path) == 0
    # The control: the same count sees what reading through the page cache does.
    path.read_bytes()
    assert cached_pages(path) > 2000


def test_memory_at_any_address_is_read_and_written(root: Path):
    size = 3 * 4096 + 100
    memory = memoryview(mmap.mmap(-1, 1 << 16))
    with closing(open_store(root)) as backend:
        for number, shift in enumerate((0, 1, 63, 512, 4096, 4097)):
            source, target = memory[shift : shift + size], memory[32768 + shift :][:size]
            source[:] = content(number, size)
            names = [name(number)]
            assert backend.put(names, [source], timeout_seconds=9) == [None]
            assert backend.get_into(names, [target], timeout_seconds=9) == [size]
            assert target == source


def test_neighbours_move_in_one_system_call(root: Path, monkeypatch: pytest.MonkeyPatch):
    counts: Counter[str] = Counter()
    objects = {number: content(number, 64 * KIB) for number in range(24)}
    with closing(open_store(root, "segment_bytes=4MiB")) as backend:
        put_all(backend, {99: b"first"})
        get_all(backend, [99])
        for call in ("pwritev", "preadv"):
            real = getattr(os, call)

            def counted(*arguments: object, call: str = call, real: object = real) -> object:
                counts[call] += 1
                return real(*arguments)  # type: ignore[operator]

            monkeypatch.setattr(os, call, counted)
        put_all(backend, objects)
        assert counts == {"pwritev": 1}
        backwards = list(objects)[::-1]
        assert get_all(backend, backwards) == objects
        assert counts == {"pwritev": 1, "preadv": 1}


def test_without_direct_io_everything_works_and_is_counted(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    real = os.open

    def refusing(path: str, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    with closing(open_store(root)) as backend:
        put_all(backend, {number: content(number, 5001) for number in range(10)})
        assert len(get_all(backend, list(range(10)))) == 10
        assert backend.counters()["buffered"] == 1
