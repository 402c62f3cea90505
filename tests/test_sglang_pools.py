"""KVCodecStorage over pools of all kinds, side by side, and ranks that share pages or do not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace

import numpy as np
import pytest
from fake_backend import FakeBackend
from sglang_fakes import (
    KEYS,
    PAGE_COUNT,
    PAGE_SIZE,
    SLOTS,
    FlatPool,
    Opener,
    fake_pool,
    slots_of,
    storage_opener,
    tensors_of,
    transfer,
)

from kvcodec.errors import ConfigError
from kvcodec.format import EncodedPage


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def open_storage(backend: FakeBackend) -> Iterator[Opener]:
    with storage_opener(backend, preset="raw") as opener:
        yield opener


def wipe(pool: SimpleNamespace) -> list[np.ndarray]:
    """Zero a pool; returns what was in it."""
    before = [tensor.array.copy() for tensor in tensors_of(pool)]
    for tensor in tensors_of(pool):
        tensor.array[...] = 0
    return before


ROUND_TRIPS = [
    ("mha", "page_unified"),
    ("mha", "page_head"),
    ("mla", "page_unified"),
    ("mla", "page_first_kv_split"),
    ("keys", "layer_first"),
    ("asymmetric", "page_first"),
]


@pytest.mark.parametrize(("kind", "layout"), ROUND_TRIPS)
def test_pages_return_to_another_place_of_the_pool(kind: str, layout: str, open_storage: Opener):
    """Page i of the one pool becomes page 5 - i of the other."""
    pool, other = fake_pool(kind, layout), fake_pool(kind, layout, seed=9)
    writer, reader = open_storage(pool), open_storage(other)
    order = list(range(PAGE_COUNT))
    assert writer.batch_set_v1(KEYS, slots_of(*order)) == [True] * PAGE_COUNT
    assert reader.batch_get_v1(KEYS, slots_of(*reversed(order))) == [True] * PAGE_COUNT
    assert writer.batch_set_v1(["x"], slots_of(0)) == [True]
    assert reader.batch_get_v1(["x"], slots_of(0)) == [True]
    wipe(pool)
    assert writer.batch_get_v1(["x"], slots_of(0)) == [True]
    for mine, theirs in zip(tensors_of(pool), tensors_of(other), strict=True):
        axis = mine.shape.index(SLOTS) if SLOTS in mine.shape else mine.shape.index(PAGE_COUNT)
        first = range(PAGE_SIZE if SLOTS in mine.shape else 1)
        assert np.array_equal(np.take(mine.array, first, axis), np.take(theirs.array, first, axis))
        assert mine.array.any()


def test_page_of_one_layout_is_read_into_another(open_storage: Opener):
    unified, first = fake_pool("mha", "page_unified"), fake_pool("mha", "page_first", seed=3)
    assert open_storage(unified).batch_set_v1(KEYS[:1], slots_of(2)) == [True]
    assert open_storage(first).batch_get_v1(KEYS[:1], slots_of(1)) == [True]
    array = unified.kv_buffer.array[2]  # group, layer, component, token, head, element
    expected = array.transpose(2, 3, 1, 0, 4, 5).reshape(2, PAGE_SIZE, 5, 4, 16)
    found = first.kv_buffer.array[:, PAGE_SIZE : 2 * PAGE_SIZE]
    assert np.array_equal(found, expected)


# --- pools that pass through their flat form


@pytest.mark.parametrize("page_size", [1, 16])
def test_unknown_pools_pass_through_their_flat_form(page_size: int, open_storage: Opener):
    storage = open_storage(fake_pool("mha", "page_first"), preset="kv4")
    pool = FlatPool(page_size)
    storage.register_mem_host_pool_v2(pool, "mamba")
    before = pool.kv_buffer.clone()
    slots = np.concatenate([np.arange(n * page_size, (n + 1) * page_size) for n in (3, 5)])
    (stored,) = storage.batch_set_v2([transfer("mamba", keys=KEYS[:2], slots=slots)]).values()
    assert stored == [True, True]
    pool.kv_buffer[:] = 0
    wanted = [transfer("mamba", keys=[*KEYS[:1], "absent"], slots=slots)]
    assert storage.batch_get_v2(wanted) == {"mamba": [True, False]}
    assert pool.writes == [3 * page_size]
    assert bool((pool.kv_buffer[3] == before[3]).all())
    assert not pool.kv_buffer[5].any()


def test_damaged_state_never_touches_the_pool(backend: FakeBackend, open_storage: Opener):
    storage = open_storage(fake_pool("mha", "page_first"))
    pool = FlatPool()
    storage.register_mem_host_pool_v2(pool, "mamba")
    request = [transfer("mamba", keys=KEYS[:1], slots=np.array([3]))]
    assert storage.batch_set_v2(request) == {"mamba": [True]}
    (name,) = backend.objects
    damaged = bytearray(backend.objects[name])
    damaged[-1] ^= 1
    backend.objects[name] = bytes(damaged)
    assert storage.batch_get_v2(request) == {"mamba": [False]}
    assert pool.writes == []


def test_large_batches_of_states_go_in_parts(open_storage: Opener, monkeypatch: pytest.MonkeyPatch):
    from kvcodec.sglang import pools

    monkeypatch.setattr(pools, "_STAGING_BYTES", 250)
    storage = open_storage(fake_pool("mha", "page_first"))
    pool = FlatPool()
    storage.register_mem_host_pool_v2(pool, "mamba")
    request = [transfer("mamba", keys=KEYS, slots=np.arange(PAGE_COUNT))]
    before = pool.kv_buffer.clone()
    assert storage.batch_set_v2(request) == {"mamba": [True] * PAGE_COUNT}
    pool.kv_buffer[:] = 0
    assert storage.batch_get_v2(request) == {"mamba": [True] * PAGE_COUNT}
    assert bool((pool.kv_buffer[:PAGE_COUNT] == before[:PAGE_COUNT]).all())


def test_kv_pool_of_an_unknown_class_is_stored_raw(
    open_storage: Opener, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        storage = open_storage(FlatPool(16), preset="kv4")
    assert "stored raw" in caplog.text
    assert storage.batch_set_v1(KEYS[:2], np.arange(32)) == [True, True]
    assert storage.batch_get_v1(KEYS[:2], np.arange(32)) == [True, True]


def test_pool_without_bytes_owns_page_numbers_only(backend: FakeBackend, open_storage: Opener):
    logical = SimpleNamespace(kv_buffer=None, size_per_token=0, page_size=16, size=128)
    pool_class = type("LogicalHostPool", (SimpleNamespace,), {"__hash__": object.__hash__})
    storage = open_storage(pool_class(**vars(logical)))
    side = FlatPool(16)
    storage.register_mem_host_pool_v2(side, "deepseek_v4_c4")
    assert storage.batch_set_v1(KEYS, slots_of(*range(PAGE_COUNT))) == [True] * PAGE_COUNT
    assert backend.objects == {}
    assert storage.batch_exists(KEYS) == PAGE_COUNT
    assert storage.batch_get_v1(KEYS, slots_of(*range(PAGE_COUNT))) == [True] * PAGE_COUNT
    request = [transfer("deepseek_v4_c4", keys=KEYS[:3], slots=slots_of(0, 1, 2))]
    storage.batch_set_v2(request)
    answer = storage.batch_exists_v2(KEYS, request)
    assert answer.kv_hit_pages == 3
    assert answer.extra_pool_hit_pages == {"kv": PAGE_COUNT, "deepseek_v4_c4": 3}


def test_memoryless_pool_is_refused(open_storage: Opener):
    pool = fake_pool("mla", "page_first")
    pool.kv_buffer = None
    with pytest.raises(ConfigError, match="MLATokenToKVPoolHost"):
        open_storage(pool)


# --- ranks and identities

RANKS: dict[str, dict[str, object]] = {
    "tensor parallel": {"tp_rank": 1, "tp_size": 2},
    "tensor parallel size": {"tp_size": 2},
    "pipeline": {"pp_rank": 1, "pp_size": 2},
    "context": {"attn_cp_rank": 1, "attn_cp_size": 2},
    "model": {"model_name": "other"},
}


@pytest.mark.parametrize("other", sorted(RANKS))
def test_pages_of_another_rank_or_model_are_misses(other: str, open_storage: Opener):
    writer = open_storage(fake_pool("mha", "page_first"))
    assert writer.batch_set_v1(KEYS[:2], slots_of(0, 1)) == [True, True]
    reader = open_storage(fake_pool("mha", "page_first"), RANKS[other])
    assert reader.batch_exists(KEYS) == 0
    assert reader.batch_get_v1(KEYS[:2], slots_of(0, 1)) == [False, False]


def test_data_parallel_ranks_share_pages(open_storage: Opener):
    open_storage(fake_pool("mha", "page_first"), {"dp_rank": 0}).batch_set_v1(
        KEYS, slots_of(*range(6))
    )
    assert open_storage(fake_pool("mha", "page_first"), {"dp_rank": 1}).batch_exists(KEYS) == 6


def test_latent_pages_are_written_by_one_rank_and_read_by_all(
    backend: FakeBackend, open_storage: Opener
):
    ranks = [
        open_storage(
            fake_pool("mla", "page_first", seed=rank),
            {"is_mla_model": True, "tp_rank": rank, "tp_size": 2},
        )
        for rank in range(2)
    ]
    assert ranks[1].batch_set_v1(KEYS[:2], slots_of(0, 1)) == [True, True]
    assert ranks[1].batch_set(KEYS[:2], [None, None])
    assert backend.objects == {}
    assert ranks[0].batch_set_v1(KEYS[:2], slots_of(0, 1)) == [True, True]
    assert ranks[1].batch_exists(KEYS) == 2
    assert ranks[1].batch_get_v1(KEYS[:2], slots_of(0, 1)) == [True, True]
    first, second = (rank.mem_pool_host.kv_buffer.array for rank in ranks)
    assert np.array_equal(first[: 2 * PAGE_SIZE], second[: 2 * PAGE_SIZE])


@pytest.mark.parametrize(
    ("name", "pool", "shared"),
    [
        ("mamba", lambda: FlatPool(16), False),
        ("indexer", lambda: FlatPool(16), True),
        ("deepseek_v4_c4", lambda: FlatPool(16), True),
        ("draft", lambda: fake_pool("mha", "page_first"), False),
        ("draft", lambda: fake_pool("mla", "page_first"), True),
        ("of tomorrow", lambda: FlatPool(16), False),
    ],
)
def test_side_pools_beside_latents_are_shared_only_where_all_ranks_hold_the_same(
    name: str, pool: Callable[[], object], shared: bool, open_storage: Opener
):
    ranks = []
    for rank in range(2):
        config = {"is_mla_model": True, "tp_rank": rank, "tp_size": 2}
        ranks.append(open_storage(fake_pool("mla", "page_first"), config))
        ranks[rank].register_mem_host_pool_v2(pool(), name)
    request = [transfer(name, keys=KEYS[:1], slots=slots_of(0))]
    assert ranks[0].batch_set_v2(request) == {name: [True]}
    assert ranks[1].batch_get_v2(request) == {name: [shared]}
    assert ranks[1].batch_set_v2(request) == {name: [True]}
    assert ranks[1].batch_get_v2(request) == {name: [True]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dcp_size": 2}, "context parallelism"),
        ({"should_split_heads": True, "tp_lcm_size": 4}, "tp_lcm_size"),
        ({"tp_lcm_size": 4}, "tp_lcm_size"),
        ({"model_name": None}, "model name"),
        ({"model_name": ""}, "model name"),
    ],
)
def test_what_is_not_supported_ends_the_start_up(
    config: Mapping[str, object], message: str, open_storage: Opener
):
    with pytest.raises(ConfigError, match=message):
        open_storage(fake_pool("mha", "page_first"), config)


def test_namespace_stands_in_for_a_model_name(open_storage: Opener):
    config = {"model_name": None}
    storage = open_storage(fake_pool("mha", "page_first"), config, namespace="mine")
    assert storage.batch_set_v1(KEYS[:1], slots_of(0)) == [True]


def test_mxfp8_pools_are_refused(open_storage: Opener):
    pool = fake_pool("mha", "page_first", "uint8")
    pool_class = type("MHATokenToKVPoolMXFP8Host", (type(pool),), {})
    with pytest.raises(ConfigError, match="MXFP8"):
        open_storage(pool_class(**vars(pool)))


def test_failed_start_closes_the_store(backend: FakeBackend, open_storage: Opener):
    pool = fake_pool("mla", "page_first")
    pool.kv_buffer = None
    with pytest.raises(ConfigError):
        open_storage(pool)
    assert backend.closed


# --- side pools


@pytest.mark.parametrize(
    ("name", "encoded"),
    [("swa", True), ("draft", True), ("draft_swa", True), ("indexer", False), ("mamba", False)],
)
def test_codec_is_for_keys_and_values_alone(
    name: str, encoded: bool, backend: FakeBackend, open_storage: Opener
):
    storage = open_storage(fake_pool("mha", "page_first"), preset="kv4")
    storage.register_mem_host_pool_v2(fake_pool("mha", "page_first"), name)
    storage.batch_set_v2([transfer(name, keys=KEYS[:1], slots=slots_of(0))])
    (page,) = backend.objects.values()
    codecs = {codec.text for codec in EncodedPage.parse(page).header.codecs}
    assert codecs == ({"int4-g16"} if encoded else {"raw"})


def test_pools_of_equal_shape_do_not_share_pages(open_storage: Opener):
    storage = open_storage(fake_pool("mha", "page_first"))
    storage.register_mem_host_pool_v2(fake_pool("mha", "page_first"), "swa")
    storage.batch_set_v1(KEYS[:1], slots_of(0))
    request = [transfer("swa", keys=KEYS[:1], slots=slots_of(0))]
    assert storage.batch_get_v2(request) == {"swa": [False]}


def test_kv_pool_registered_by_name_again_is_the_same(open_storage: Opener):
    pool = fake_pool("mha", "page_first")
    storage = open_storage(pool)
    kept = storage._pools["kv"]
    storage.register_mem_pool_host(pool)
    storage.register_mem_host_pool_v2(pool, SimpleNamespace(value="kv"))
    assert storage._pools["kv"] is kept
    storage.batch_set_v1(KEYS[:1], slots_of(0))
    assert storage.batch_get_v2([transfer("kv", keys=KEYS[:1], slots=slots_of(0))]) == {
        "kv": [True]
    }


def test_draft_pools_take_no_layer_table(backend: FakeBackend, open_storage: Opener):
    storage = open_storage(
        fake_pool("mha", "page_first"), preset="kv4", per_layer_config={"0": {"nbits_key": 8}}
    )
    storage.register_mem_host_pool_v2(fake_pool("mha", "page_first"), "draft")
    storage.batch_set_v2([transfer("draft", keys=KEYS[:1], slots=slots_of(0))])
    (page,) = backend.objects.values()
    assert {codec.text for codec in EncodedPage.parse(page).header.codecs} == {"int4-g16"}


@pytest.mark.parametrize("name", ["swa", "auxiliary_swa", "mamba"])
def test_layer_table_is_refused_where_layers_are_numbered_anew(name: str, open_storage: Opener):
    storage = open_storage(
        fake_pool("mha", "page_first"), preset="kv4", per_layer_config={"0": {"nbits_key": 8}}
    )
    with pytest.raises(ConfigError, match=name):
        storage.register_mem_host_pool_v2(fake_pool("mha", "page_first"), name)


def test_query_folds_side_pools_into_the_hit(open_storage: Opener):
    storage = open_storage(fake_pool("mha", "page_first"))
    storage.register_mem_host_pool_v2(FlatPool(16), "mamba")
    storage.batch_set_v1(KEYS[:5], slots_of(*range(5)))
    for index in (1, 3):
        storage.batch_set_v2([transfer("mamba", keys=[KEYS[index]], slots=slots_of(index))])
    query = [transfer("mamba", "trailing_pages", ["?"])]
    answer = storage.batch_exists_v2(KEYS, query)
    assert answer.kv_hit_pages == 4
    assert answer.restorable_prefix_pages == [2, 4]
    assert answer.extra_pool_hit_pages == {"kv": 5, "mamba": 4}
    nothing = storage.batch_exists_v2(["absent"], query)
    assert (nothing.kv_hit_pages, nothing.extra_pool_hit_pages) == (0, {})
    assert storage.batch_exists_v2(KEYS).kv_hit_pages == 5
