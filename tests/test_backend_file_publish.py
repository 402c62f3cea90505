"""FileBackend where names are given by linking, as on mounts that several hosts share."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from file_store import get, name, path_of, put, temporary_files
from test_backend_file import FileConformance, in_the_way

from kvcodec.errors import BackendError, ConfigError
from kvcodec_backends import _file_publish
from kvcodec_backends.file import FileBackend


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def backend(root: Path) -> FileBackend:
    return FileBackend.from_url(f"file://{root}?publish=link")


class TestConformance(FileConformance):
    options = "?publish=link"
    replaces_atomically = False
    model_examples = 8


def test_an_unknown_way_to_publish_is_a_config_error(root: Path):
    with pytest.raises(ConfigError, match="publish is 'copy'"):
        FileBackend.from_url(f"file://{root}?publish=copy")


@pytest.mark.parametrize(
    ("line", "is_shared"),
    [
        ("fuse.juicefs JuiceFS:volume", True),
        ("fuse.sshfs host:/", True),
        ("nfs4 host:/export", True),
        ("ceph host:/", True),
        ("9p share", True),
        ("ext4 /dev/sda1", False),
        ("overlay overlay", False),
        ("fuse.fuse-overlayfs fuse-overlayfs", False),
        ("fuseblk /dev/sdb1", False),
    ],
)
def test_shared_file_systems_are_told_from_local_ones(
    root: Path, monkeypatch: pytest.MonkeyPatch, line: str, is_shared: bool
):
    root.mkdir(mode=0o700)
    device = os.stat(root).st_dev
    mounts = root / "mountinfo"
    mounts.write_text(
        "1 0 0:999 / /elsewhere rw - proc proc rw\n"
        f"2 1 {os.major(device)}:{os.minor(device)} / /mnt rw shared:1 - {line} rw\n"
    )
    monkeypatch.setattr(_file_publish, "_MOUNTS", str(mounts))
    assert FileBackend(str(root))._writer.publisher.is_shared == is_shared
    # What the user says goes before what is found.
    assert not FileBackend(str(root), publish="rename")._writer.publisher.is_shared
    assert FileBackend(str(root), publish="link")._writer.publisher.is_shared
    if is_shared:
        with pytest.raises(ConfigError, match=rf"max_bytes cannot .*\({line.split()[0]}\)"):
            FileBackend(str(root), max_bytes=1 << 20)
    FileBackend(str(root), max_bytes=1 << 20, publish="rename").close()


def test_without_mountinfo_a_file_system_counts_as_local(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_file_publish, "_MOUNTS", "/nowhere/mountinfo")
    assert not FileBackend(str(root))._writer.publisher.is_shared


def test_the_choice_follows_a_mount_that_comes_later(root: Path, monkeypatch: pytest.MonkeyPatch):
    backend = FileBackend(str(root))
    assert not backend._writer.publisher.is_shared
    monkeypatch.setattr(_file_publish, "file_system_type", lambda path: "fuse.juicefs")
    os.rename(root, root.with_name("moved"))
    root.mkdir(mode=0o700)
    assert put(backend, 1, b"data") is None
    assert backend._writer.publisher.is_shared


def test_a_replaced_or_deleted_file_is_readable_for_a_while(
    root: Path, backend: FileBackend, monkeypatch: pytest.MonkeyPatch
):
    """Whoever remembers the old file, on another host, still reads it whole."""
    assert [put(backend, 1, data) for data in (b"first", b"second")] == [None, None]
    assert backend.delete([name(1)], timeout_seconds=1) == [True]
    assert get(backend, 1) is None
    aside = [root / "tmp" / file for file in temporary_files(root)]
    assert {path.read_bytes() for path in aside} == {b"first", b"second"}
    monkeypatch.setattr(_file_publish.time, "monotonic", lambda: 1e9)
    assert put(backend, 2, b"other") is None
    assert temporary_files(root) == []


def test_what_was_put_aside_is_swept_as_an_orphan(root: Path, backend: FileBackend):
    """Its process ended before it was time to remove it."""
    assert [put(backend, 1, data) for data in (b"first", b"second")] == [None, None]
    (aside,) = temporary_files(root)
    _, pid, rest = aside.split("-", 2)
    gone = aside.replace(f"-{pid}-", f"-{2**22 + 1}-")
    os.rename(root / "tmp" / aside, root / "tmp" / gone)
    assert FileBackend(str(root)).counters()["swept_orphans"] == 1
    assert rest and get(backend, 1) == b"second"


@pytest.mark.parametrize("kind", ["fifo", "symlink", "loop", "directory", "socket", "empty"])
def test_what_is_in_the_way_is_replaced_except_a_directory(
    root: Path, backend: FileBackend, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    in_the_way(kind, path_of(root, name(1)), tmp_path)
    result = put(backend, 1, b"data")
    if kind == "directory":
        assert isinstance(result, BackendError) and "EISDIR" in str(result)
        assert temporary_files(root) == []
    else:
        assert result is None
        assert get(backend, 1) == b"data"
    if kind == "symlink":
        assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_links_files_are_renamed_and_counted(
    root: Path, backend: FileBackend, monkeypatch: pytest.MonkeyPatch, code: int
):
    def link(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_file_publish.os, "link", link)
    assert [put(backend, 1, data) for data in (b"first", b"second")] == [None, None]
    assert get(backend, 1) == b"second"
    assert backend.counters()["unlinkable_files"] == 2
    assert temporary_files(root) == []


def test_a_link_that_succeeded_and_says_it_did_not_has_succeeded(
    root: Path, backend: FileBackend, monkeypatch: pytest.MonkeyPatch
):
    """An NFS client that asks a second time is told that the name is taken: by itself."""
    real_link = os.link

    def link(source: str, target: str, **options: bool) -> None:
        real_link(source, target, **options)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(_file_publish.os, "link", link)
    assert put(backend, 1, b"data") is None
    assert get(backend, 1) == b"data"
    assert temporary_files(root) == []


def test_a_name_that_stays_taken_is_an_error(
    root: Path, backend: FileBackend, monkeypatch: pytest.MonkeyPatch
):
    def link(*arguments: object, **options: object) -> None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(_file_publish.os, "link", link)
    result = put(backend, 1, b"data")
    assert isinstance(result, BackendError) and "EBUSY" in str(result)
    assert temporary_files(root) == []
