"""HiCacheBackend around SGLang's own file backend, and around some that a test plugs in."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from sglang_harness import HAS_SGLANG
from sglang_pools import start_sglang
from store_pages import NAMESPACE, empty_pages, keys_of, numbers, random_pages
from waiting import wait_until

from kvcodec.backend import Backend, open_backend
from kvcodec.errors import BackendError, BackendFull, BackendTimeout, ConfigError
from kvcodec.spec import CodecSpec
from kvcodec.store import open_store
from kvcodec.testing import BackendTests

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed; make sglang")

NAMES = [f"{3:032x}/{number:064x}" for number in range(8)]


@pytest.fixture(scope="module", autouse=True)
def _sglang() -> None:
    start_sglang()


@pytest.fixture
def plugin() -> Iterator[Any]:
    import hicache_plugin

    hicache_plugin.stores.clear()
    hicache_plugin.closed.clear()
    yield hicache_plugin
    hicache_plugin.running.set()


def dynamic_url(class_name: str = "DictStorageV1", options: str = "exact=1", **extra: Any) -> str:
    """A store of `hicache_plugin`, as SGLang's ``dynamic`` is told of it."""
    config = {
        "backend_name": "dict",
        "module_path": "hicache_plugin",
        "class_name": class_name,
        "interface_v1": int(class_name.endswith("V1")),
        "store": "test",
        **extra,
    }
    return f"hicache+dynamic://?{options}&json={quote(json.dumps(config))}"


def put(backend: Backend, *names: str, data: bytes = b"data", seconds: float = 10) -> list:
    return backend.put(names, [memoryview(data)] * len(names), timeout_seconds=seconds)


def get(backend: Backend, *names: str, size: int = 100, seconds: float = 10) -> list:
    buffers = [memoryview(bytearray(size)) for _ in names]
    return backend.get_into(names, buffers, timeout_seconds=seconds)


class TestFileConformance(BackendTests):
    """SGLang's file backend: pages of one size, written once."""

    can_delete = False
    can_list = False
    can_replace = False
    max_object_bytes = 1 << 20
    model_examples = 5

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.url = f"hicache+file://?file_storage_path={tmp_path}&slot_bytes=1028KiB"

    def open_backend(self) -> Backend:
        return open_backend(self.url)

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        from kvcodec.sglang.hicache import HiCacheBackend

        return HiCacheBackend, f"{self.url}&slots=4"


@pytest.mark.usefixtures("plugin")
class TestDynamicConformance(BackendTests):
    """A backend of somebody else's, with pages of any size and a way to delete."""

    can_list = False
    replaces_atomically = False
    model_examples = 10

    def open_backend(self) -> Backend:
        return open_backend(dynamic_url())


@pytest.mark.usefixtures("plugin")
class TestOldInterfaceConformance(BackendTests):
    """SGLang's older interface gives tensors, which may lie anywhere."""

    can_delete = False
    can_list = False
    can_replace = False
    max_object_bytes = 60_000
    model_examples = 5

    def open_backend(self) -> Backend:
        return open_backend(dynamic_url("DictStorage", "slot_bytes=64KiB"))


# --- URLs


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("hicache://?slot_bytes=1MiB", "names no backend"),
        ("hicache+nosuch://?slot_bytes=1MiB", "no storage backend 'nosuch'; known: .*mooncake"),
        ("hicache+kvcodec://?slot_bytes=1MiB", "no storage backend"),
        ("hicache+eic://?slot_bytes=1MiB", "cannot be loaded"),
        ("hicache+file://?file_storage_path=/tmp", "give slot_bytes"),
        ("hicache+file://host?slot_bytes=1MiB", "no more"),
        ("hicache+file:///tmp?slot_bytes=1MiB", "no more"),
        ("hicache+file://?slot_bytes=1", "from 4096 to 1 GiB"),
        ("hicache+file://?slot_bytes=2GiB", "from 4096 to 1 GiB"),
        ("hicache+file://?slot_bytes=1MiB&exact=yes", "0 or 1"),
        ("hicache+file://?slot_bytes=1MiB&threads=0", "from 1 to 64"),
        ("hicache+file://?slot_bytes=1MiB&threads=two", "from 1 to 64"),
        ("hicache+file://?slot_bytes=1MiB&json=[1]", "must be an object"),
        ("hicache+file://?slot_bytes=1MiB&json={", "cannot be read"),
        ("hicache+file://?slot_bytes=1MiB&json=@/no/such/file", "cannot be read"),
        (
            'hicache+file://?slot_bytes=1MiB&file_storage_path=/a&json={"file_storage_path":"/b"}',
            "twice",
        ),
        ("hicache+file://?slot_bytes=1MiB&master_server_address=a:1", "unknown option"),
        ("hicache+dynamic://?slot_bytes=1MiB", "backend_name"),
    ],
)
def test_a_url_that_cannot_be_honoured_is_a_config_error(url: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        open_backend(url)


def test_options_of_sglangs_backend_reach_it_beside_those_in_json():
    from kvcodec.sglang._hicache_url import HiCacheURL

    options = {
        "client_server_address": "127.0.0.1:2",
        "device_name": "mlx5_0",
        "extra_backend_tag": "blue",
        "global_segment_size": "4gb",
        "local_hostname": "host",
        "master_metrics_port": 9003,
        "master_server_address": "127.0.0.1:1",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "tenant_id": "42",
    }
    query = "&".join(f"{name}={value}" for name, value in options.items())
    parsed = HiCacheURL.parse(f'hicache+mooncake://?{query}&json={{"check_server":true}}')
    assert parsed.extra_config == {**options, "tenant_id": 42, "check_server": True}


def test_the_configuration_may_lie_in_a_file(tmp_path: Path):
    configuration = tmp_path / "extra.json"
    configuration.write_text(json.dumps({"file_storage_path": str(tmp_path / "pages")}))
    with closing(open_backend(f"hicache+file://?slot_bytes=4096&json=@{configuration}")) as backend:
        assert put(backend, NAMES[0]) == [None]
    (page,) = (tmp_path / "pages").iterdir()
    assert page.name == f"kvcodec-{NAMES[0].replace('/', '-')}_.bin"


def test_slots_are_as_large_as_told_and_exact_stores_no_more(plugin: Any):
    for options, stored_bytes in (("exact=1", 36), ("slot_bytes=5000&exact=0", 8192)):
        plugin.stores["test"].clear()
        with closing(open_backend(dynamic_url(options=options))) as backend:
            assert put(backend, NAMES[0]) == [None]
        assert [len(data) for data in plugin.stores["test"].values()] == [stored_bytes]


def test_an_object_above_a_slot_is_refused_and_the_others_stored(plugin: Any):
    largest = 8192 - 32
    with closing(open_backend(dynamic_url(options="slot_bytes=8KiB&exact=1"))) as backend:
        views = [memoryview(bytes(size)) for size in (largest, largest + 1, 1)]
        answers = backend.put(NAMES[:3], views, timeout_seconds=5)
        assert [type(answer) for answer in answers] == [type(None), BackendFull, type(None)]
        assert "slot_bytes" in str(answers[1])
        assert get(backend, *NAMES[:3], size=9000) == [largest, None, 1]


# --- Trouble


def test_a_call_that_hangs_is_given_up_and_writes_nowhere(plugin: Any):
    with closing(open_backend(dynamic_url(options="exact=1&threads=2"))) as backend:
        assert put(backend, *NAMES, data=b"x" * 50) == [None] * 8
        buffers = [bytearray(100) for _ in NAMES]
        plugin.running.clear()
        started = time.monotonic()
        answers = backend.get_into(
            NAMES, [memoryview(each) for each in buffers], timeout_seconds=0.3
        )
        assert [type(answer) for answer in answers] == [BackendTimeout] * 8
        assert backend.exists(NAMES[:2], timeout_seconds=0.3) == [False, False]
        assert 0.5 < time.monotonic() - started < 10  # of a store that hangs for ever
        # Two threads hang now, and there are no more.
        (answer,) = put(backend, NAMES[0], seconds=0.1)
        assert isinstance(answer, BackendTimeout)
        assert "all 2 threads" in str(answer)
        assert len([t for t in threading.enumerate() if t.name == "kvcodec-hicache"]) >= 2
        plugin.running.set()
        assert get(backend, *NAMES) == [50] * 8
        assert all(each == bytes(100) for each in buffers)


def test_what_a_backend_raises_is_an_answer(plugin: Any):
    with closing(open_backend(dynamic_url("DictStorage", "slot_bytes=4096"))) as backend:
        assert put(backend, NAMES[0]) == [None]
        plugin.stores["test"].update((str(number), b"") for number in range(10_001))
        (answer,) = put(backend, NAMES[1])
        assert isinstance(answer, BackendError)
        assert "MemoryError: the dict is full" in str(answer)
        assert NAMES[1] in str(answer)
        assert get(backend, NAMES[0]) == [4]


def test_a_backend_that_cannot_be_made_yet_is_made_later(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
):
    from kvcodec.sglang import _hicache_lanes

    monkeypatch.setattr(_hicache_lanes, "_RETRY_SECONDS", 0.2)
    with closing(open_backend(dynamic_url(fails=1))) as backend:
        (answer,) = put(backend, NAMES[0])
        assert "RuntimeError: not today" in str(answer)
        assert isinstance(get(backend, NAMES[0])[0], BackendError)
        assert backend.exists(NAMES[:1], timeout_seconds=1) == [False]
        with pytest.raises(BackendError, match="not today"):
            backend.stat(NAMES[0], timeout_seconds=1)
        monkeypatch.setattr(
            plugin.DictStorage,
            "__init__",
            lambda self, *_: vars(self).update(name="test", objects=plugin.stores["test"]),
        )
        wait_until(lambda: put(backend, NAMES[0]) == [None])


def test_a_damaged_object_is_missing_and_makes_room(plugin: Any):
    with closing(open_backend(dynamic_url())) as backend:
        assert put(backend, NAMES[0], NAMES[1]) == [None, None]
        objects = plugin.stores["test"]
        key = next(iter(objects))
        objects[key] = objects[key][:-1] + b"!"
        assert get(backend, NAMES[0], NAMES[1]) == [None, 4]
        assert backend.counters() == {"damaged_objects": 1}
        assert list(objects) != [] and key not in objects
        assert put(backend, NAMES[0]) == [None]
        assert get(backend, NAMES[0]) == [4]


def test_a_backend_that_only_pretends_gives_nothing_of_another_object():
    """SGLang's ``sim`` says that it has read, and reads nothing."""
    with closing(open_backend("hicache+sim://?slot_bytes=4096&threads=1")) as backend:
        assert put(backend, *NAMES) == [None] * 8
        assert get(backend, *NAMES) == [None] * 8


def test_a_closed_backend_is_closed(plugin: Any):
    backend = open_backend(dynamic_url())
    assert put(backend, NAMES[0]) == [None]
    threads = [t for t in threading.enumerate() if t.name == "kvcodec-hicache" and t.is_alive()]
    backend.close()
    assert plugin.closed == ["test"]
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_child_process_makes_a_backend_of_its_own(plugin: Any):
    with closing(open_backend(dynamic_url())) as backend:
        assert put(backend, NAMES[0]) == [None]
        child = os.fork()
        if not child:
            os._exit(0 if get(backend, NAMES[0], seconds=20) == [4] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert get(backend, NAMES[0]) == [4]


# --- Pages


@pytest.mark.parametrize("spec", ["raw", "kv4"])
def test_pages_pass_through_sglangs_file_backend(tmp_path: Path, spec: str):
    url = f"hicache+file://?file_storage_path={tmp_path}&slot_bytes=64KiB"
    pipeline, store = open_store(url, NAMESPACE, CodecSpec.parse(spec))
    with closing(pipeline):
        source, views = random_pages(9)
        target, target_views = empty_pages(9)
        assert store.backup(keys_of(9), views) == [True] * 9
        assert store.exists_prefix(keys_of(10)) == 9
        assert store.prefetch(keys_of(9), target_views) == [True] * 9
    for before, after in zip(source, target, strict=True):
        if spec == "raw":
            np.testing.assert_array_equal(before, after)
        else:
            assert np.abs(numbers(before) - numbers(after)).max() < 1.0
