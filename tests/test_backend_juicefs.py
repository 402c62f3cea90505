"""FileBackend on real JuiceFS mounts: the conformance suite, two mounts of one volume, a crash."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_store import get, name, put
from server_juicefs import Mount, Volume, juicefs_volume

from kvcodec.backend import Backend
from kvcodec.errors import BackendError, ConfigError
from kvcodec.testing import BackendTests
from kvcodec_backends.file import FileBackend


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volume]:
    with juicefs_volume(tmp_path_factory.mktemp("juicefs")) as volume:
        yield volume


@pytest.fixture(scope="module")
def mount(volume: Volume) -> Iterator[Mount]:
    with volume.mount() as mount:
        yield mount


@pytest.fixture(scope="module")
def other_mount(volume: Volume) -> Iterator[Mount]:
    with volume.mount() as mount:
        yield mount


class TestMount(BackendTests):
    replaces_atomically = False
    model_examples = 8

    @pytest.fixture(autouse=True)
    def _store(self, mount: Mount, tmp_path: Path) -> None:
        self.root = mount.path / tmp_path.name

    def open_backend(self) -> Backend:
        return FileBackend.from_url(f"file://{self.root}")

    def plant_foreign_objects(self, namespace: str) -> bool:
        shard = self.root / "objects" / namespace / "cd"
        shard.mkdir(parents=True)
        (shard / ("cd" + "0" * 62)).touch()
        (shard / ("ef" + "0" * 62)).write_text("in the wrong shard")
        (shard / "README").write_text("hello")
        return True

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return FileBackend, f"file://{self.root}?direct=1"

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return FileBackend, f"file://{self.root}/typo"


def sealed_by(number: int, size: int) -> bytes:
    """An object in which every byte says who wrote it."""
    return bytes([1 + number % 250]) * size


def test_objects_written_on_one_mount_are_read_whole_on_another(
    mount: Mount, other_mount: Mount, tmp_path: Path
):
    """Never empty, short, mixed or in error, though names are replaced and deleted meanwhile."""
    writer = FileBackend(str(mount.path / tmp_path.name))
    readers = [writer, FileBackend(str(other_mount.path / tmp_path.name))]
    assert all(reader._writer.publisher.is_shared for reader in readers)
    sizes = (200_000, 70_000, 300_000)
    outcomes: Counter[str] = Counter()
    stop_at = time.monotonic() + 3.0

    def write(seed: int) -> None:
        number = seed
        while time.monotonic() < stop_at:
            result = put(writer, number % 5, sealed_by(number, sizes[number % 3]))
            outcomes["stored" if result is None else f"put: {result}"] += 1
            if number % 7 == 0:
                writer.delete([name(number % 5)], timeout_seconds=5)
            number += 1
            time.sleep(0.01)

    def read(reader: FileBackend, which: str) -> None:
        while time.monotonic() < stop_at:
            for number in range(5):
                data = get(reader, number, 1 << 19)
                if isinstance(data, bytes):
                    whole = data and data == sealed_by(data[0] - 1, sizes[(data[0] - 1) % 3])
                    outcomes[f"{which}: {'whole' if whole else 'wrong'}"] += 1
                elif data is not None:
                    outcomes[f"{which}: {data}"] += 1

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (0, 60)]
    threads += [
        threading.Thread(target=read, args=(reader, which))
        for reader, which in zip(readers, ("same mount", "other mount"), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {"stored", "same mount: whole", "other mount: whole"}, outcomes


def test_a_new_object_is_on_the_other_mount_at_once(
    mount: Mount, other_mount: Mount, tmp_path: Path
):
    first = FileBackend(str(mount.path / tmp_path.name))
    second = FileBackend(str(other_mount.path / tmp_path.name))
    for number in range(1, 30):
        # Asked for in vain, so that its absence is known.
        assert get(second, number) is None
        data = os.urandom(5000)
        assert put(first, number, data) is None
        assert get(second, number) == data


def test_max_bytes_is_refused(mount: Mount, tmp_path: Path):
    """What one mount writes into the ledger another sees late: each would fill the quota."""
    with pytest.raises(ConfigError, match=r"max_bytes cannot be kept .*\(fuse\.juicefs\)"):
        FileBackend(str(mount.path / tmp_path.name), max_bytes=1 << 30)


def test_a_killed_mount_costs_errors_until_it_is_mounted_again(volume: Volume, tmp_path: Path):
    with volume.mount() as mount:
        backend = FileBackend(str(mount.path / tmp_path.name))
        assert put(backend, 1, b"before") is None
        writing = threading.Event()
        answers: list[object] = []

        def write() -> None:
            for number in range(100, 400):
                answers.append(put(backend, number, bytes([number % 256]) * 200_000))
                if number == 110:
                    writing.set()

        thread = threading.Thread(target=write)
        thread.start()
        assert writing.wait(30)
        mount.server.kill()
        thread.join(30)
        assert not thread.is_alive(), "a call hangs on the dead mount"

        started = time.monotonic()
        assert isinstance(get(backend, 1), BackendError)
        assert isinstance(put(backend, 2, b"meanwhile"), BackendError)
        assert backend.exists([name(1)], timeout_seconds=1) == [False]
        assert backend.delete([name(1)], timeout_seconds=1) == [False]
        with pytest.raises(BackendError):
            backend.stat(name(1), timeout_seconds=1)
        with pytest.raises(BackendError):
            list(backend.list())
        assert time.monotonic() - started < 5

        mount.mount_again()
        assert get(backend, 1) == b"before"
        assert put(backend, 2, b"after") is None
        assert get(backend, 2) == b"after"
        # What put said is true, and what it did not say is whole or not there.
        assert answers[0] is None and isinstance(answers[-1], BackendError)
        for number, answer in zip(range(100, 400), answers, strict=True):
            data = get(backend, number, 1 << 18)
            if answer is None or data is not None:
                assert data == bytes([number % 256]) * 200_000, (number, answer)
