"""kvcodec.lmcache.Connector, driven as LMCache drives it, without LMCache."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcodec.errors import ConfigError
from kvcodec.layout import DType
from kvcodec.lmcache import Connector
from kvcodec.lmcache.chunks import _DTYPES, ChunkKey, ChunkShape
from kvcodec.lmcache.options import _OWN_OPTIONS, ConnectorOptions
from kvcodec.lmcache.statistics import connector_counters

LAYERS, TOKENS, HEADS, HEAD_SIZE = 3, 16, 2, 64
LAYOUT = {
    "dtype": "float16",
    "token_count": TOKENS,
    "layer_count": LAYERS,
    "head_count": HEADS,
    "head_size": HEAD_SIZE,
}
MLA = {
    "dtype": "float16",
    "token_count": TOKENS,
    "layer_count": LAYERS,
    "latent_size": 64,
    "rope_size": 16,
}


def chunk(seed: int, shape: tuple[int, ...] = (2, LAYERS, TOKENS, HEADS * HEAD_SIZE)) -> np.ndarray:
    """KV with channels of unlike size."""
    random = np.random.default_rng(seed)
    scale = np.exp(0.6 * random.standard_normal(shape[-1]))
    return (random.standard_normal(shape) * scale).astype(np.float16)


def memory(array: np.ndarray) -> memoryview:
    """As LMCache hands it over: a view over a ctypes array at an address of its own."""
    kind = ctypes.c_ubyte * array.nbytes
    return memoryview(kind.from_address(array.ctypes.data))


def key(number: int, model: str = "org/model", group: int = 0, salt: str = "") -> str:
    text = f"{model}@01000100@{group:x}@{number:064x}"
    return f"{text}@{salt}" if salt else text


class Driver:
    """Submits a batch and waits for its completion."""

    def __init__(self, connector: Connector) -> None:
        self.connector = connector
        self.done: dict[int, tuple[int, bool, str, list[bool]]] = {}

    def wait(self, number: int) -> tuple[int, bool, str, list[bool]]:
        poller = select.poll()
        poller.register(self.connector.event_fd(), select.POLLIN)
        while number not in self.done:
            assert poller.poll(20_000), "no completion"
            self.done |= {done[0]: done for done in self.connector.drain_completions()}
        return self.done.pop(number)

    def set(self, keys: list[str], arrays: list[np.ndarray]) -> tuple[bool, str, list[bool]]:
        views = [memory(array) for array in arrays]
        return self.wait(self.connector.submit_batch_set(keys, views))[1:]

    def get(self, keys: list[str], like: np.ndarray) -> tuple[list[bool], list[np.ndarray]]:
        arrays = [np.zeros_like(like) for _ in keys]
        views = [memory(array) for array in arrays]
        results = self.wait(self.connector.submit_batch_get(keys, views))[3]
        return results, arrays

    def exists(self, keys: list[str]) -> list[bool]:
        return self.wait(self.connector.submit_batch_exists(keys))[3]

    def delete(self, keys: list[str]) -> list[bool]:
        return self.wait(self.connector.submit_batch_delete(keys))[3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


class Opened:
    """Connectors that end with the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.connectors: list[Connector] = []

    def __call__(self, **params: object) -> Driver:
        params = {"url": f"file://{self.root}", "layout": LAYOUT} | params
        params = {name: value for name, value in params.items() if value is not None}
        self.connectors.append(Connector(**params))
        return Driver(self.connectors[-1])


@pytest.fixture
def connect(root: Path) -> Iterator[Opened]:
    opened = Opened(root)
    yield opened
    for connector in opened.connectors:
        connector.close()


def damage(root: Path) -> int:
    """Flip a byte in the middle of each stored object."""
    files = [path for path in (root / "objects").rglob("*") if path.is_file()]
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x40
        path.write_bytes(data)
    return len(files)


# Round trips


def test_raw_chunks_come_back_bit_for_bit(connect: Opened):
    driver = connect(preset="raw")
    arrays = [chunk(seed) for seed in range(5)]
    keys = [key(number) for number in range(5)]
    assert driver.set(keys, arrays) == (True, "", [True] * 5)
    assert driver.exists([*keys, key(9)]) == [True] * 5 + [False]
    results, found = driver.get([*keys, key(9)], arrays[0])
    assert results == [True] * 5 + [False]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, found, strict=False))


def test_quantized_chunks_come_back_within_half_a_step_of_their_group(connect: Opened):
    driver = connect(preset="kv4")
    array = chunk(1)
    assert driver.set([key(1)], [array])[0]
    (result,), (found,) = driver.get([key(1)], array)
    assert result
    groups, wanted = (a.astype(np.float32).reshape(-1, HEAD_SIZE) for a in (found, array))
    steps = np.abs(wanted).max(1, keepdims=True) / 7
    assert (np.abs(groups - wanted) <= 0.51 * steps).all()
    assert not np.array_equal(found, array)
    counters = driver.connector.counters()
    assert counters["backup.raw_bytes"] / counters["backup.encoded_bytes"] > 3


def test_keys_and_values_have_their_own_codecs(connect: Opened):
    """Tells whether the halves of a chunk are taken for what they are."""
    driver = connect(preset=None, spec="key=raw value=int2-asym-g64")
    array = chunk(1)
    driver.set([key(1)], [array])
    _, (found,) = driver.get([key(1)], array)
    assert np.array_equal(found[0], array[0])
    assert not np.array_equal(found[1], array[1])


def test_fused_chunks_have_keys_beside_values(connect: Opened):
    driver = connect(layout=LAYOUT | {"fused": True}, spec="key=raw value=int2-asym-g64")
    array = chunk(1, (LAYERS, TOKENS, HEADS, 2, HEAD_SIZE))
    assert driver.set([key(1)], [array])[0]
    _, (found,) = driver.get([key(1)], array)
    assert np.array_equal(found[..., 0, :], array[..., 0, :])
    assert not np.array_equal(found[..., 1, :], array[..., 1, :])


def test_latent_chunks_have_the_rope_part_behind(connect: Opened):
    driver = connect(layout=MLA, spec="key=int4-g64 value=int4-g64 rope=raw")
    array = chunk(1, (LAYERS, TOKENS, 80))
    assert driver.set([key(1)], [array])[0]
    _, (found,) = driver.get([key(1)], array)
    assert np.array_equal(found[..., 64:], array[..., 64:])
    assert not np.array_equal(found[..., :64], array[..., :64])


def test_a_latent_without_rope_is_one_stream(connect: Opened):
    driver = connect(layout=MLA | {"rope_size": 0}, preset="raw")
    array = chunk(1, (LAYERS, TOKENS, 64))
    assert driver.set([key(1)], [array])[0]
    assert np.array_equal(driver.get([key(1)], array)[1][0], array)


def test_objects_of_bytes_are_stored_bit_for_bit(connect: Opened):
    driver = connect(layout={"object_bytes": 1000}, preset="kv4")
    array = np.frombuffer(os.urandom(1000), np.uint8).copy()
    assert driver.set([key(1)], [array])[0]
    assert np.array_equal(driver.get([key(1)], array)[1][0], array)


def test_each_object_group_has_its_own_layout(connect: Opened):
    driver = connect(layout=None, layouts={"0": LAYOUT, "1": {"object_bytes": 64}})
    keys, arrays = [key(1), key(1, group=1)], [chunk(1), np.arange(64, dtype=np.uint8)]
    assert driver.set(keys, arrays)[2] == [True, True]
    assert np.array_equal(driver.get(keys[1:], arrays[1])[1][0], arrays[1])


def test_a_page_with_infinities_is_kept_raw(connect: Opened):
    driver = connect(preset="kv4")
    array = chunk(1)
    array[0, 0, 0, 0] = np.inf
    driver.set([key(1)], [array])
    assert np.array_equal(driver.get([key(1)], array)[1][0], array)


# Whose it is


@pytest.mark.parametrize(
    "other",
    [
        key(2),
        key(1, model="other"),
        key(1, salt="tenant"),
        key(1).replace("@01000100@", "@02010201@"),
    ],
)
def test_a_chunk_belongs_to_its_model_rank_hash_and_salt(connect: Opened, other: str):
    driver = connect()
    array = chunk(1)
    driver.set([key(1)], [array])
    assert driver.exists([key(1), other]) == [True, False]
    assert driver.get([other], array)[0] == [False]


@pytest.mark.parametrize(
    "change",
    [
        {"layout": LAYOUT | {"dtype": "bfloat16"}},
        {"layout": LAYOUT | {"head_count": 2 * HEADS, "head_size": HEAD_SIZE // 2}},
        {"layout": LAYOUT | {"fused": True}},
        {"layout": LAYOUT | {"token_count": 2 * TOKENS, "head_count": HEADS // 2}},
        {"namespace": "other"},
        {"revision": "2"},
    ],
)
def test_a_changed_configuration_is_a_miss_and_no_garbage(connect: Opened, change: dict):
    """All of these have objects of the same number of bytes."""
    array = chunk(1)
    assert connect().set([key(1)], [array])[0]
    changed = connect(**change)
    assert changed.exists([key(1)]) == [False]
    assert changed.get([key(1)], array)[0] == [False]


def test_another_preset_reads_what_is_there(connect: Opened):
    array = chunk(1)
    connect(preset="raw").set([key(1)], [array])
    assert np.array_equal(connect(preset="kv4").get([key(1)], array)[1][0], array)


def test_a_minimum_of_bits_turns_a_coarser_chunk_into_a_miss(connect: Opened):
    array = chunk(1)
    connect(preset="kv4").set([key(1)], [array])
    strict = connect(preset="kv8", minimum_bits=8)
    assert strict.get([key(1)], array)[0] == [False]


def test_a_salt_is_nowhere_in_the_store(connect: Opened, root: Path):
    connect().set([key(1, salt="open-sesame")], [chunk(1)])
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files
    assert all(b"sesame" not in path.read_bytes() for path in files)


# What goes wrong


def test_damage_is_a_miss_and_storing_again_repairs_it(connect: Opened, root: Path):
    driver = connect(preset="kv4")
    arrays, keys = [chunk(seed) for seed in range(4)], [key(number) for number in range(4)]
    driver.set(keys, arrays)
    assert damage(root) == 4
    assert driver.get(keys, arrays[0])[0] == [False] * 4
    counters = driver.connector.counters()
    assert sum(n for name, n in counters.items() if name.startswith("prefetch.corrupt")) == 4
    assert driver.set(keys, arrays)[0]
    assert driver.get(keys, arrays[0])[0] == [True] * 4


@pytest.mark.parametrize("size", [1, 64, 100_000])
def test_an_object_of_another_size_is_refused_and_counted(connect: Opened, size: int):
    driver = connect()
    odd = np.zeros(size, np.uint8)
    ok, text, results = driver.set([key(1), key(2)], [chunk(1), odd])
    assert (ok, results) == (False, [True, False])
    assert "1 of 2" in text
    assert driver.get([key(1)], odd)[0] == [False]
    assert driver.connector.counters()["lmcache.refused:object_bytes"] == 2


def test_an_object_group_without_a_layout_is_refused_and_counted(connect: Opened):
    driver = connect()
    assert driver.set([key(1, group=1)], [chunk(1)])[2] == [False]
    assert driver.exists([key(1, group=1)]) == [False]
    assert driver.connector.counters()["lmcache.refused:object_group"] == 2


@pytest.mark.parametrize("text", ["", "model", "m@xyz@0@ab", "m@1@z@ab", "m@1@0@", "m@1@0@a@b@c"])
def test_a_key_of_another_form_is_refused_and_counted(connect: Opened, text: str):
    driver = connect()
    assert driver.set([text, key(1)], [chunk(1), chunk(2)])[2] == [False, True]
    assert driver.connector.counters()["lmcache.refused:key"] == 1


def test_a_failing_store_completes_every_batch(connect: Opened, root: Path):
    driver = connect()
    array = chunk(1)
    driver.set([key(1)], [array])
    driver.connector._pipeline.backend.close()
    assert driver.get([key(1)], array)[0] == [False]
    assert driver.exists([key(1)]) == [False]
    assert driver.set([key(2)], [array])[0] is False
    assert driver.delete([key(1)]) == [False]


def test_an_unforeseen_error_completes_its_batch(connect: Opened, monkeypatch: pytest.MonkeyPatch):
    driver = connect()

    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(driver.connector, "_store", broken)
    ok, text, results = driver.set([key(1)], [chunk(1)])
    assert (ok, results) == (False, [False])
    assert text
    assert driver.connector.counters()["lmcache.refused:set.raised"] == 1


def test_deleting_tells_what_was_there(connect: Opened):
    driver = connect()
    driver.set([key(1)], [chunk(1)])
    assert driver.delete([key(1), key(2)]) == [True, False]
    assert driver.exists([key(1)]) == [False]


def test_batches_from_many_threads_complete_each_once(connect: Opened):
    driver = connect(workers=4)
    arrays = [chunk(seed) for seed in range(8)]
    submitted: list[int] = []

    def submit(worker: int) -> None:
        for number in range(5):
            view = memory(arrays[worker])
            submitted.append(
                driver.connector.submit_batch_set([key(100 * worker + number)], [view])
            )

    threads = [threading.Thread(target=submit, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(submitted)) == 40
    assert all(driver.wait(number)[1] for number in submitted)


def test_an_idle_connector_has_no_completions_and_closes_twice(connect: Opened):
    driver = connect()
    assert driver.connector.drain_completions() == []
    started = time.monotonic()
    driver.connector.close()
    driver.connector.close()
    assert time.monotonic() - started < 5


def test_the_counters_of_a_connector_are_seen_for_as_long_as_it_lives(root: Path):
    gc.collect()
    before = len(connector_counters())
    connector = Connector(url=f"file://{root}", layout=LAYOUT)
    Driver(connector).set([key(1)], [chunk(1)])
    assert 1 in [counters.get("backup.stored") for counters in connector_counters()]
    connector.close()
    del connector
    gc.collect()
    assert len(connector_counters()) == before


# Options


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"url": 1},
        {"preset": "kv5"},
        {"presett": "kv4"},
        {"layout": None},
        {"layouts": {"0": LAYOUT}},
        {"layout": 1},
        {"layout": {}},
        {"layout": LAYOUT | {"unknown": 1}},
        {"layout": LAYOUT | {"latent_size": 64}},
        {"layout": LAYOUT | {"dtype": "int4"}},
        {"layout": LAYOUT | {"head_size": 0}},
        {"layout": LAYOUT | {"head_size": True}},
        {"layout": LAYOUT | {"head_size": "64"}},
        {"layout": LAYOUT | {"fused": 1}},
        {"layout": MLA | {"rope_size": -1}},
        {"layout": {"object_bytes": 0}},
        {"layout": None, "layouts": {}},
        {"layout": None, "layouts": {"x": LAYOUT}},
        {"layout": None, "layouts": [LAYOUT]},
        {"workers": 0},
        {"workers": True},
        {"namespace": 1},
        {"buffer_bytes": 65536, "layout": LAYOUT | {"token_count": 64}},
        {"minimum_bits": 8},
        {"codec_threads": 0},
        {"url": "nowhere://x"},
    ],
)
def test_what_cannot_be_honoured_is_a_config_error_at_the_start(tmp_path: Path, params: dict):
    given = ({"url": f"file://{tmp_path}/store", "layout": LAYOUT} if params else {}) | params
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(ConfigError):
        Connector(**given)


def test_a_misspelt_option_is_answered_with_the_right_one():
    with pytest.raises(ConfigError, match="did you mean preset"):
        Connector(presett="kv4")


def test_every_limit_reaches_the_pipeline():
    options = ConnectorOptions.parse(
        {
            "url": "memory://",
            "layout": LAYOUT,
            "buffer_bytes": "64MiB",
            "codec_threads": 3,
            "prefetch_timeout_seconds": 1.5,
            "workers": 7,
        }
    )
    assert options.store.buffer_bytes == 64 << 20
    assert options.store.codec_threads == 3
    assert options.store.prefetch_timeout_seconds == 1.5
    assert options.workers == 7


def test_as_many_workers_as_wanted_run_at_once(connect: Opened, monkeypatch: pytest.MonkeyPatch):
    driver = connect(workers=3)
    barrier = threading.Barrier(3, timeout=10)

    def together(*_: object) -> list[bool]:
        barrier.wait()
        return [True]

    monkeypatch.setattr(driver.connector, "_exists", together)
    numbers = [driver.connector.submit_batch_exists([key(n)]) for n in range(3)]
    assert all(driver.wait(number)[3] == [True] for number in numbers)


def test_a_shape_knows_its_bytes_and_order():
    shape = ChunkShape.parse(LAYOUT, "layout")
    assert (shape.order, shape.layout.raw_bytes) == ("split", 2 * LAYERS * TOKENS * 2 * 64 * 2)
    assert shape.layout.dtype is DType.FP16
    assert ChunkShape.parse(MLA, "layout").order == "latent"


def test_a_key_may_have_a_salt():
    assert ChunkKey.parse("a/b@01000100@a@ff@x") == ChunkKey("a/b", "01000100", 10, "ff", "x")


# The documentation


def examples() -> list[dict]:
    """The JSON objects between single quotes in the document."""
    text = (Path(__file__).parents[1] / "docs" / "lmcache.md").read_text()
    return [json.loads(found) for found in re.findall(r"'(\{[^']*\})'", text)]


def test_the_documented_adapter_is_accepted():
    (adapter,) = [example for example in examples() if "adapter_params" in example]
    assert (adapter["module_path"], adapter["class_name"]) == ("kvcodec.lmcache", "Connector")
    options = ConnectorOptions.parse(adapter["adapter_params"])
    assert options.shapes[0].layout.token_count == 256


def test_the_document_names_every_option():
    text = (Path(__file__).parents[1] / "docs" / "lmcache.md").read_text()
    for option in [*_OWN_OPTIONS, *LAYOUT, *MLA, "fused", "object_bytes", *_DTYPES]:
        assert f"`{option}`" in text or f'"{option}"' in text, option


def test_importing_the_package_loads_no_codec_and_no_lmcache():
    code = "import sys, kvcodec.lmcache; print({'numpy', 'lmcache', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"
