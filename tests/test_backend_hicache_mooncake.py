"""HiCacheBackend around SGLang's Mooncake backend, on a real Mooncake master over TCP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_mooncake import MooncakeMaster, mooncake_provider, use_mooncake
from sglang_harness import HAS_SGLANG
from sglang_pools import start_sglang
from sglang_round_trip import PAGES, round_trip
from store_pages import NAMESPACE, empty_pages, keys_of, numbers, random_pages
from waiting import wait_until

from kvcodec.backend import Backend, open_backend
from kvcodec.errors import BackendError
from kvcodec.spec import CodecSpec
from kvcodec.store import open_store
from kvcodec.testing import BackendTests

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed; make sglang")


@pytest.fixture(scope="module", autouse=True)
def _imports() -> None:
    use_mooncake()
    start_sglang()


@pytest.fixture(scope="module")
def master() -> Iterator[MooncakeMaster]:
    with MooncakeMaster() as started, mooncake_provider(started):
        yield started


@pytest.fixture(scope="class")
def shared_client(master: MooncakeMaster) -> Iterator[None]:
    """One Mooncake client for all backends of the suite.

    It takes a second to close, and holds the interpreter meanwhile. Everything else is opened and
    closed by each test.
    """
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    from kvcodec.sglang._hicache_store import _MooncakeStore

    clients: list[Any] = []
    create = StorageBackendFactory.create_backend

    def create_once(*arguments: Any) -> Any:
        if not clients:
            clients.append(create(*arguments))
        return clients[0]

    def forget_slots(store: Any) -> None:
        store.backend.store.unregister_buffer(store.pool.kv_buffer.data_ptr())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageBackendFactory, "create_backend", create_once)
        patch.setattr(_MooncakeStore, "close", forget_slots)
        yield
    clients[0].store.close()


@pytest.mark.usefixtures("shared_client")
class TestMooncakeConformance(BackendTests):
    can_list = False
    replaces_atomically = False
    model_examples = 10

    @pytest.fixture(autouse=True)
    def _store(self, master: MooncakeMaster) -> None:
        self.master = master

    def open_backend(self) -> Backend:
        return open_backend(self.master.url)

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        from kvcodec.sglang.hicache import HiCacheBackend

        return HiCacheBackend, f"{self.master.url}&slots=4"

    def stalled(self) -> AbstractContextManager[None]:
        return self.master.stalled()


def put(backend: Backend, name: str, data: bytes, seconds: float = 10) -> object:
    (answer,) = backend.put([name], [memoryview(data)], timeout_seconds=seconds)
    return answer


def get(backend: Backend, name: str, size: int, seconds: float = 10) -> object:
    buffer = bytearray(size)
    (answer,) = backend.get_into([name], [memoryview(buffer)], timeout_seconds=seconds)
    return bytes(buffer[:answer]) if isinstance(answer, int) else answer


def test_an_object_is_stored_in_as_many_bytes_as_it_has(master: MooncakeMaster):
    """Mooncake is told the length of each object, not that of a slot."""
    name = f"{1:032x}/{1:064x}"
    with closing(open_backend(master.url)) as backend:
        assert put(backend, name, b"x" * 1000) is None
        client = backend._engine.connection.made().backend.store
        assert client.get_size(f"kvcodec-{name.replace('/', '-')}__k") == 1000 + 32
    with closing(open_backend(f"{master.url}&exact=0&slot_bytes=8KiB")) as backend:
        assert put(backend, name, b"x" * 1000) is None
        client = backend._engine.connection.made().backend.store
        assert client.get_size(f"kvcodec-{name.replace('/', '-')}__k") == 8192
        # Objects outlive the client that put them: they lie in the provider's memory.
        assert get(backend, name, 1000) == b"x" * 1000


def test_a_master_may_come_later_and_go_and_come_back():
    """Its objects go with it: a master keeps its books in memory."""
    master = MooncakeMaster()
    name, other = (f"{2:032x}/{number:064x}" for number in (1, 2))
    started = time.monotonic()
    with closing(open_backend(master.url.replace("size=0", "size=134217728"))) as backend:
        assert time.monotonic() - started < 10
        assert isinstance(put(backend, name, b"data"), BackendError)
        assert get(backend, name, 10).__class__ is BackendError
        assert backend.exists([name], timeout_seconds=1) == [False]
        with master:
            wait_until(lambda: put(backend, name, b"data") is None)
            assert get(backend, name, 10) == b"data"
            master.kill()
            started = time.monotonic()
            assert not isinstance(get(backend, name, 10, seconds=0.3), bytes)
            assert isinstance(put(backend, other, b"data", seconds=0.3), BackendError)
            assert backend.exists([name], timeout_seconds=0.3) == [False]
            assert time.monotonic() - started < 10
            master.start()
            wait_until(lambda: put(backend, other, b"data") is None)
            assert get(backend, other, 10) == b"data"
            assert get(backend, name, 10) is None
            # Mooncake's calls outlive their deadlines by seconds. A process that ends meanwhile
            # is aborted by Mooncake, so this test sees them out.
            wait_until(lambda: len(backend._engine.lanes) == 4)


# --- Pages


@pytest.mark.parametrize("spec", ["raw", "kv4"])
def test_pages_come_back_from_mooncake(master: MooncakeMaster, spec: str):
    pipeline, store = open_store(master.url, NAMESPACE, CodecSpec.parse(spec))
    with closing(pipeline):
        keys = keys_of(20, start=100 if spec == "raw" else 200)
        source, views = random_pages(20)
        target, target_views = empty_pages(20)
        assert store.exists_prefix(keys) == 0
        assert store.backup(keys, views) == [True] * 20
        assert store.exists_prefix(keys) == 20
        assert store.prefetch(keys, target_views) == [True] * 20
    for before, after in zip(source, target, strict=True):
        if spec == "raw":
            np.testing.assert_array_equal(before, after)
        else:
            step = np.abs(numbers(before)).max(axis=-1, keepdims=True) / 7 * (1 + 2**-7)
            assert (np.abs(numbers(before) - numbers(after)) <= step / 2 * 1.1).all()


def test_a_page_damaged_in_mooncake_is_a_miss_once(master: MooncakeMaster):
    """It is removed, lease or not, and the next backup stores it again."""
    pipeline, store = open_store(master.url, NAMESPACE, CodecSpec())
    with closing(pipeline):
        keys = keys_of(3, start=300)
        source, views = random_pages(3)
        target, target_views = empty_pages(3)
        assert store.backup(keys, views) == [True] * 3
        name = NAMESPACE.object_name(keys[1])
        assert put(pipeline.backend, name, b"no page at all") is None
        assert store.prefetch(keys, target_views) == [True, False, True]
        assert store.backup(keys, views) == [True] * 3
        assert store.prefetch(keys, target_views) == [True] * 3
        np.testing.assert_array_equal(source[0], target[0])


@pytest.mark.parametrize("preset", ["raw", "kv4"])
def test_pages_pass_through_sglangs_controller_to_mooncake(
    master: MooncakeMaster, tmp_path: Path, preset: str
):
    """Device, host, kvcodec, Mooncake's master and another process's memory, and back again."""
    options: dict[str, object] = {"url": master.url, "preset": preset, "namespace": preset}
    # Connecting to Mooncake takes its time on a busy machine.
    options |= {f"{call}_timeout_seconds": 20 for call in ("exists", "prefetch", "backup")}
    _, original, rows, counters = round_trip(tmp_path, options, kind="mha", layout="page_first")
    assert rows.token_count == original.token_count
    assert rows.equals(original) == (preset == "raw")
    assert counters["prefetch.hit"] == PAGES
