"""FileBackend: the conformance suite, its URLs, its directory, what lies in the way, its quota."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_store import (
    NAMESPACE,
    get,
    in_child,
    ledger_bytes,
    name,
    path_of,
    put,
    remove_tree,
    stored_bytes,
    temporary_files,
)

from kvcodec.backend import Backend
from kvcodec.errors import BackendError, BackendFull, BackendReadOnly, ConfigError
from kvcodec.testing import BackendTests
from kvcodec_backends import _file_io, _file_orphans
from kvcodec_backends.file import FileBackend


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def backend(root: Path) -> Iterator[FileBackend]:
    opened = FileBackend(str(root))
    yield opened
    opened.close()


def plant_foreign_things(root: Path, namespace: str) -> None:
    shard = root / "objects" / namespace / "cd"
    shard.mkdir(parents=True, exist_ok=True)
    digest = "cd" + "0" * 61
    (shard / (digest + "1")).mkdir()
    (shard / (digest + "2")).symlink_to(__file__)
    os.mkfifo(shard / (digest + "3"))
    (shard / (digest + "4")).touch()
    (shard / "README").write_text("hello")
    (shard / (digest + "5.tmp")).write_text("hello")
    (shard / ("ef" + "0" * 62)).write_text("in the wrong shard")
    (shard.parent / "lost+found").mkdir()
    (shard.parent / ("0" * 64)).write_text("without a shard")
    (shard.parent / "ce").symlink_to(shard)
    (root / "objects" / "notes.txt").write_text("hello")
    (root / "objects" / ("0" * 32)).symlink_to(root / "objects" / namespace)
    (root / "tmp" / "notes.txt").write_text("hello")
    (root / "tmp" / "directory").mkdir()
    (root / "LOCK").write_text("hello")


class FileConformance(BackendTests):
    options = ""

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"

    def open_backend(self) -> Backend:
        return FileBackend.from_url(f"file://{self.root}{self.options}")

    def plant_foreign_objects(self, namespace: str) -> bool:
        plant_foreign_things(self.root, namespace)
        return True

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return FileBackend, f"file://{self.root}?direct=1"

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return FileBackend, f"file://{self.root}/typo"


class TestConformance(FileConformance):
    pass


class TestConformanceWithQuota(FileConformance):
    options = "?max_bytes=64MiB"


class TestConformanceWithSync(FileConformance):
    options = "?fsync=1"
    model_examples = 5


# --- URLs and directories


@pytest.mark.parametrize(
    "url",
    [
        "file://relative/path",
        "file://",
        "file:///",
        "file:relative",
        "file://localhost/tmp/store",
        "file:///tmp/../etc",
        "file:///tmp/%00",
        "file:///tmp/store#part",
        "file:///tmp/store?max_bytes=0",
        "file:///tmp/store?max_bytes=-1",
        "file:///tmp/store?max_bytes=",
        "file:///tmp/store?max_bytes=10XB",
        "file:///tmp/store?fsync=yes",
        "file:///tmp/store?fsync=1&fsync=0",
        "file:///tmp/store?max_byte=10GB",
    ],
)
def test_a_url_that_cannot_be_honoured_is_a_config_error(url: str):
    with pytest.raises(ConfigError):
        FileBackend.from_url(url)
    assert not os.path.exists("/tmp/store")


def test_a_path_may_hold_any_character(tmp_path: Path):
    FileBackend.from_url(f"file://{tmp_path}/a%20b%23c%3Fd%C3%A9").close()
    assert (tmp_path / "a b#c?dé" / "objects").is_dir()


def test_nobody_else_can_look_into_the_store(root: Path, backend: FileBackend):
    assert put(backend, 1, b"data") is None
    for directory, _, files in os.walk(root):
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        for file in files:
            assert stat.S_IMODE(os.stat(os.path.join(directory, file)).st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_directory_that_others_can_write_to_is_refused(root: Path, mode: int):
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(ConfigError, match=r"writable by others.*chmod go-w"):
        FileBackend(str(root))
    FileBackend(str(root / "kvcodec")).close()


def test_a_symbolic_link_as_root_is_refused(tmp_path: Path, root: Path):
    (tmp_path / "target").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match=rf"symbolic link.*{tmp_path}/target"):
        FileBackend(str(root))


def test_a_file_as_root_is_refused(root: Path):
    root.write_text("")
    with pytest.raises(ConfigError, match="not a directory"):
        FileBackend(str(root))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(root: Path):
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        FileBackend(str(root))


def test_objects_are_spread_over_256_directories_of_their_namespace(
    root: Path, backend: FileBackend
):
    for number in range(1, 20):
        put(backend, number, b"data")
        path = path_of(root, name(number))
        assert path.read_bytes() == b"data"
        assert path.parent.name == path.name[:2]


# --- what lies in the way of an object


def in_the_way(kind: str, path: Path, tmp_path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "symlink":
        (tmp_path / "secret").write_text("secret")
        path.symlink_to(tmp_path / "secret")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        os.chdir(path.parent)  # a socket's path is limited to 107 bytes
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "empty":
        path.touch()


@pytest.mark.parametrize("kind", ["fifo", "symlink", "loop", "directory", "socket", "empty"])
def test_what_is_no_object_is_a_miss_and_never_blocks(
    root: Path, backend: FileBackend, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = path_of(root, name(1))
    in_the_way(kind, path, tmp_path)
    started = time.monotonic()
    assert get(backend, 1) is None
    assert backend.exists([name(1)], timeout_seconds=60) == [False]
    assert backend.stat(name(1), timeout_seconds=60) is None
    assert backend.delete([name(1)], timeout_seconds=60) == [False]
    assert list(backend.list()) == []
    assert time.monotonic() - started < 10
    result = put(backend, 1, b"data")
    if kind == "directory":
        assert isinstance(result, BackendError)
        assert "EISDIR" in str(result)
    else:
        # Everything else is simply replaced: the tier heals.
        assert result is None
        assert get(backend, 1) == b"data"
    assert temporary_files(root) == []
    if kind == "symlink":
        assert (tmp_path / "secret").read_text() == "secret"


def test_a_file_where_a_directory_should_be_is_a_miss(root: Path, backend: FileBackend):
    (root / "objects" / NAMESPACE).write_text("")
    assert get(backend, 1) is None
    assert backend.exists([name(1)], timeout_seconds=1) == [False]
    assert list(backend.list()) == []
    assert isinstance(put(backend, 1, b"data"), BackendError)
    assert temporary_files(root) == []


@pytest.mark.parametrize("change", [-1, -4000, 1, 4000])
def test_a_file_that_changes_its_size_meanwhile_is_an_error(
    root: Path, backend: FileBackend, monkeypatch: pytest.MonkeyPatch, change: int
):
    put(backend, 1, bytes(8192))
    path = path_of(root, name(1))
    real_fstat = os.fstat

    def fstat(fd: int) -> os.stat_result:
        status = real_fstat(fd)
        os.truncate(path, 8192 + change)
        return status

    monkeypatch.setattr(_file_io.os, "fstat", fstat)
    result = get(backend, 1)
    assert isinstance(result, BackendError)
    assert "8192 bytes long when opened" in str(result)


def test_short_reads_and_writes_are_continued(
    backend: FileBackend, monkeypatch: pytest.MonkeyPatch
):
    real_write, real_preadv = os.write, os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real_preadv(fd, [buffers[0][:7] if len(buffers[0]) else buffers[1]], offset)

    monkeypatch.setattr(_file_io.os, "write", lambda fd, data: real_write(fd, data[:7]))
    monkeypatch.setattr(_file_io.os, "preadv", preadv)
    data = os.urandom(1000)
    assert put(backend, 1, data) is None
    assert get(backend, 1) == data


def test_a_write_that_stores_nothing_ends(
    root: Path, backend: FileBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_file_io.os, "write", lambda fd, data: 0)
    assert isinstance(put(backend, 1, b"data"), BackendError)
    assert temporary_files(root) == []


# --- orphans


def make_orphan(root: Path, writer: object, *, age_seconds: float = 0) -> Path:
    path = root / "tmp" / f"{writer}.{os.urandom(8).hex()}.0"
    path.write_bytes(b"half a page")
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


def test_only_files_of_dead_writers_are_swept(root: Path):
    FileBackend(str(root)).close()
    here = _file_orphans.Writer.current()
    of = type(here)
    alive = [
        make_orphan(root, here),
        make_orphan(root, here, age_seconds=10**6),
        # Of another host nothing is known but the time of its last write.
        make_orphan(root, of("00000000", here.pid, 1)),
        root / "tmp" / "notes.txt",
        root / "tmp" / f"{here}.tmp",
    ]
    dead = [
        make_orphan(root, of(here.host, 2**22 + 1, 5)),
        make_orphan(root, of(here.host, here.pid, here.started + 1)),
        make_orphan(root, of("00000000", here.pid, 1), age_seconds=3700),
    ]
    for path in alive[3:]:
        path.write_text("hello")
    with_sweep = FileBackend(str(root))
    assert with_sweep.counters()["swept_orphans"] == len(dead)
    assert set(os.listdir(root / "tmp")) == {path.name for path in alive}


def test_a_writer_is_told_from_a_later_process_of_its_pid():
    here = _file_orphans.Writer.current()
    assert here == _file_orphans.Writer.parse(str(here))
    assert not here.is_dead(0)
    assert _file_orphans.Writer(here.host, here.pid, here.started + 1).is_dead(0)
    for text in ("", "x", f"{here}x", f"{here} ", "0-0-0"):
        assert _file_orphans.Writer.parse(text) is None


def test_a_forked_child_writes_under_its_own_name(root: Path):
    backend = FileBackend(str(root), max_bytes=1 << 20)
    assert put(backend, 1, b"parent") is None

    def child() -> None:
        assert [put(backend, number, b"child") for number in range(2, 5)] == [None] * 3
        backend.close()

    in_child(child)
    assert put(backend, 5, b"parent") is None
    assert len(list(backend.list())) == 5
    assert ledger_bytes(backend) == stored_bytes(root)


# --- time, permission, and a root that goes away


def test_a_deadline_is_looked_at_between_objects(
    backend: FileBackend, monkeypatch: pytest.MonkeyPatch
):
    real_open = os.open

    def slow_open(*arguments: object, **options: object) -> int:
        time.sleep(0.1)
        return real_open(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(_file_io.os, "open", slow_open)
    names = [name(number) for number in range(20)]
    results = backend.put(names, [memoryview(b"data")] * 20, timeout_seconds=0.5)
    assert results[0] is None
    assert isinstance(results[-1], TimeoutError)
    # What came too late was not done and then called late.
    monkeypatch.undo()
    assert backend.exists(names, timeout_seconds=60) == [result is None for result in results]


def test_a_removed_root_is_made_anew_at_the_next_put(root: Path, backend: FileBackend):
    put(backend, 1, b"data")
    remove_tree(root)
    assert get(backend, 1) is None
    assert backend.exists([name(1)], timeout_seconds=1) == [False]
    assert backend.delete([name(1)], timeout_seconds=1) == [False]
    assert list(backend.list()) == []
    assert put(backend, 1, b"again") is None
    assert get(backend, 1) == b"again"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_root_whose_parent_is_gone_is_not_made(tmp_path: Path):
    """A mount point that lost its mount must not be filled behind everybody's back."""
    backend = FileBackend(str(tmp_path / "mount" / "store"))
    remove_tree(tmp_path / "mount")
    result = put(backend, 1, b"data")
    assert isinstance(result, BackendError)
    assert "ENOENT" in str(result)
    assert not (tmp_path / "mount").exists()


def test_errors_have_the_class_of_their_cause(monkeypatch: pytest.MonkeyPatch, root: Path):
    expected = {
        errno.ENOSPC: BackendFull,
        errno.EDQUOT: BackendFull,
        errno.EROFS: BackendReadOnly,
        errno.EACCES: BackendReadOnly,
        errno.EPERM: BackendReadOnly,
        errno.EIO: BackendError,
        errno.EMFILE: BackendError,
    }
    backend = FileBackend(str(root))
    for code, error_class in expected.items():

        def fail(*arguments: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(_file_io.os, "open", fail)
            result = put(backend, 1, b"data")
            assert type(result) is error_class
            assert errno.errorcode[code] in str(result)
            assert name(1) in str(result)
            read = get(backend, 1)
            assert isinstance(read, BackendError)
            assert not isinstance(read, BackendReadOnly)
        assert put(backend, 1, b"data") is None
