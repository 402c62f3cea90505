"""FsspecBackend over fsspec's own file systems: memory, and one that publishes by moving."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from file_store import in_child
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from waiting import wait_until

from kvcodec.backend import Backend, open_backend
from kvcodec.errors import BackendError, BackendReadOnly, BackendTimeout
from kvcodec.testing import BackendTests
from kvcodec_backends import _fsspec_loop
from kvcodec_backends.fsspec import FsspecBackend


class Stall:
    """What every call of a file system waits for: nothing, until it is entered."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.over.set()

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.over.clear()
        try:
            yield
        finally:
            self.over.set()


class MovingFileSystem(LocalFileSystem):
    """A local disk under another name, as SFTP and WebDAV are: only a move is atomic there."""

    protocol: ClassVar[str] = "moving"
    stall: ClassVar[Stall] = Stall()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("moving://"))

    def info(self, path: str, **options: Any) -> Any:
        self.stall.over.wait()
        return super().info(path, **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.stall.over.wait()
        return super().open(path, mode, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        assert path.rpartition("/")[0].endswith("/tmp"), "written in place"
        super().pipe_file(path, value, mode, **options)


class AsyncFileSystemInMemory(AsyncFileSystem):
    """The smallest file system of coroutines that can move."""

    protocol: ClassVar[str] = "coroutines"
    stores: ClassVar[dict[str, dict[str, tuple[bytes, float]]]] = {}
    stall: ClassVar[Stall] = Stall()

    async def _answer(self, path: str) -> dict[str, tuple[bytes, float]]:
        while not self.stall.over.is_set():
            await asyncio.sleep(0.01)
        return self.stores.setdefault(path.partition("/")[0], {})

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        files = await self._answer(path)
        if path in files:
            data, modified = files[path]
            return {"name": path, "type": "file", "size": len(data), "mtime": modified}
        if any(file.startswith(f"{path}/") for file in files):
            return {"name": path, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        files = await self._answer(path)
        names = {
            "/".join(file.split("/")[: path.count("/") + 2])
            for file in files
            if file.startswith(f"{path}/")
        }
        return [await self._info(name) for name in names]

    async def _pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        assert path.rpartition("/")[0].endswith("/tmp"), "written in place"
        (await self._answer(path))[path] = (bytes(value), time.time())

    async def _cat_file(self, path: str, **_: Any) -> bytes:
        files = await self._answer(path)
        if path not in files:
            raise FileNotFoundError(path)
        return files[path][0]

    async def _mv_file(self, path1: str, path2: str, **_: Any) -> None:
        files = await self._answer(path1)
        files[path2] = files.pop(path1)

    async def _rm_file(self, path: str, **_: Any) -> None:
        if (await self._answer(path)).pop(path, None) is None:
            raise FileNotFoundError(path)


fsspec.register_implementation("moving", MovingFileSystem, clobber=True)
fsspec.register_implementation("coroutines", AsyncFileSystemInMemory, clobber=True)


class TestMemory(BackendTests):
    model_examples = 5

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.name = tmp_path.name

    def open_backend(self) -> Backend:
        return open_backend(f"fsspec+memory://{self.name}/pages")

    def plant_foreign_objects(self, namespace: str) -> bool:
        plant(fsspec.filesystem("memory"), f"/{self.name}/pages", namespace)
        return True

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return FsspecBackend, f"fsspec+memory://{self.name}?max_bytes=1"

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return FsspecBackend, f"fsspec+memory://{self.name}/typo"


class TestMoving(BackendTests):
    model_examples = 10

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"

    def open_backend(self) -> Backend:
        return open_backend(f"fsspec+moving://{self.root}")

    def plant_foreign_objects(self, namespace: str) -> bool:
        plant(LocalFileSystem(), str(self.root), namespace)
        return True

    def stalled(self) -> AbstractContextManager[None]:
        return MovingFileSystem.stall.entered()

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return FsspecBackend, f"fsspec+moving://{self.root}?direct=1"

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return FsspecBackend, f"fsspec+moving://{self.root}/typo"


class TestCoroutines(BackendTests):
    model_examples = 10

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.name = tmp_path.name

    def open_backend(self) -> Backend:
        return open_backend(f"fsspec+coroutines://{self.name}")

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return FsspecBackend, f"fsspec+coroutines://{self.name}?direct=1"

    def stalled(self) -> AbstractContextManager[None]:
        return AsyncFileSystemInMemory.stall.entered()


def plant(filesystem: fsspec.AbstractFileSystem, root: str, namespace: str) -> None:
    """Things that are no objects."""
    shard, digest = f"{root}/{namespace}/cd", "cd" + "0" * 61
    filesystem.makedirs(f"{shard}/{digest}1", exist_ok=True)
    for path in (
        f"{shard}/{digest}2.tmp",
        f"{shard}/README",
        f"{shard}/ef{'0' * 62}",
        f"{root}/{namespace}/{'0' * 64}",
        f"{root}/{namespace}/cd/deep/{digest}3",
        f"{root}/tmp/1.2.3",
        f"{root}/notes.txt",
        f"{root}/{'A' * 32}/cd/{digest}4",
    ):
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, b"hello")
    filesystem.pipe_file(f"{shard}/{digest}5", b"")


NAMES = [f"{'ab' * 16}/{number:064x}" for number in range(40)]


def put(backend: Backend, names: list[str], data: bytes, timeout_seconds: float = 10) -> Any:
    return backend.put(names, [memoryview(data)] * len(names), timeout_seconds=timeout_seconds)


def get(backend: Backend, name: str) -> Any:
    buffer = memoryview(bytearray(100))
    (result,) = backend.get_into([name], [buffer], timeout_seconds=10)
    return bytes(buffer[:result]) if isinstance(result, int) else result


def test_objects_lie_where_their_names_say(tmp_path: Path):
    backend = open_backend(f"fsspec+moving://{tmp_path}/store")
    assert put(backend, [f"{'ab' * 16}/{'cd' * 32}"], b"data") == [None]
    path = tmp_path / "store" / ("ab" * 16) / "cd" / ("cd" * 32)
    assert path.read_bytes() == b"data"
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def test_a_put_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backend = open_backend(f"fsspec+moving://{tmp_path}/store")
    assert put(backend, NAMES[:1], b"data") == [None]

    def mv(self: object, *paths: str, **_: Any) -> None:
        raise PermissionError("not today")

    monkeypatch.setattr(MovingFileSystem, "mv", mv)
    (answer,) = put(backend, NAMES[1:2], b"data")
    assert isinstance(answer, BackendReadOnly)
    assert "not today" in str(answer)
    wait_until(lambda: not os.listdir(tmp_path / "store" / "tmp"))


def test_where_a_move_replaces_nothing_the_old_object_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    backend = open_backend(f"fsspec+moving://{tmp_path}/store")
    real_mv = LocalFileSystem.mv

    def mv(self: LocalFileSystem, path1: str, path2: str, **options: Any) -> None:
        if os.path.exists(path2):
            raise FileExistsError(path2)
        real_mv(self, path1, path2, **options)

    monkeypatch.setattr(MovingFileSystem, "mv", mv)
    for data in (b"first", b"second"):
        assert put(backend, NAMES[:1], data) == [None]
    assert get(backend, NAMES[0]) == b"second"


def test_a_directory_that_somebody_else_just_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """SFTP answers "Failure" then, whatever it was asked to take for granted."""
    backend = open_backend(f"fsspec+moving://{tmp_path}/store")

    def makedirs(self: object, path: str, **_: Any) -> None:
        os.makedirs(path, exist_ok=True)
        raise OSError("Failure")

    monkeypatch.setattr(MovingFileSystem, "makedirs", makedirs)
    assert put(backend, NAMES, b"data") == [None] * len(NAMES)


def test_each_thread_has_a_file_system_of_its_own(tmp_path: Path):
    """Not every client library may be called from several threads at once."""
    users: dict[int, set[int]] = {}

    class Noting(MovingFileSystem):
        protocol: ClassVar[str] = "noting"

        def info(self, path: str, **options: Any) -> Any:
            users.setdefault(id(self), set()).add(threading.get_ident())
            time.sleep(0.01)
            return super().info(path.removeprefix("noting://"), **options)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("noting://"))

    fsspec.register_implementation("noting", Noting, clobber=True)
    backend = open_backend(f"fsspec+noting://{tmp_path}/store")
    backend.exists(NAMES, timeout_seconds=10)
    assert len(users) > 1
    assert all(len(threads) == 1 for threads in users.values())


def test_calls_that_hang_cost_no_call_after_them(tmp_path: Path):
    """Their threads hang too; what waits for a thread is dropped when its caller has gone."""
    backend = open_backend(f"fsspec+moving://{tmp_path}/store")
    with MovingFileSystem.stall.entered():
        for _ in range(3):
            assert backend.exists(NAMES, timeout_seconds=0.1) == [False] * len(NAMES)
    assert put(backend, NAMES, b"data", timeout_seconds=20) == [None] * len(NAMES)


@pytest.mark.parametrize("protocol", ["memory", "coroutines"])
def test_a_forked_child_goes_on_with_a_loop_of_its_own(protocol: str, tmp_path: Path):
    backend = open_backend(f"fsspec+{protocol}://{tmp_path.name}")
    assert put(backend, NAMES[:1], b"parent") == [None]

    def child() -> None:
        assert get(backend, NAMES[0]) == b"parent"
        assert put(backend, NAMES, b"child") == [None] * len(NAMES)
        backend.close()

    in_child(child)
    assert get(backend, NAMES[0]) == b"parent"


def test_closing_ends_the_thread(tmp_path: Path):
    before = threading.active_count()
    backend = open_backend(f"fsspec+memory://{tmp_path.name}")
    assert put(backend, NAMES, b"data") == [None] * len(NAMES)
    assert threading.active_count() > before
    backend.close()
    wait_until(lambda: threading.active_count() == before)


def test_closing_ends_calls_under_way(tmp_path: Path):
    backend = open_backend(f"fsspec+coroutines://{tmp_path.name}")
    assert put(backend, NAMES[:1], b"data") == [None]
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(get(backend, NAMES[0])))
    with AsyncFileSystemInMemory.stall.entered():
        thread.start()
        time.sleep(0.1)
        backend.close()
        thread.join(20)
    (answer,) = answers
    assert isinstance(answer, BackendError)


def test_a_listing_that_hangs_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backend = open_backend(f"fsspec+coroutines://{tmp_path.name}")
    monkeypatch.setattr(_fsspec_loop, "STEP_SECONDS", 0.1)
    with AsyncFileSystemInMemory.stall.entered(), pytest.raises(BackendTimeout):
        list(backend.list())
