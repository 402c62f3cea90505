"""KVCodecStorage by itself: its answers, and that it raises nothing and claims nothing untrue."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend
from sglang_fakes import (
    KEYS,
    PAGE_COUNT,
    PAGE_SIZE,
    FlatPool,
    Memory,
    Opener,
    fake_pool,
    slots_of,
    storage_opener,
    transfer,
)
from sglang_harness import HAS_SGLANG
from sglang_pools import start_sglang

from kvcodec.log import RateLimitedLog
from kvcodec.sglang.hits import PoolHits, leading_run, restorable_prefixes


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def open_storage(backend: FakeBackend) -> Iterator[Opener]:
    with storage_opener(backend, preset="raw") as opener:
        yield opener


# --- which prefixes can be restored


def brute_force(kv: int, pools: Sequence[PoolHits]) -> list[int]:
    """Every length up to `kv` that each pool can restore, by the words of SGLang's interface."""

    def restores(pool: PoolHits, length: int) -> bool:
        if pool.policy == "all_pages":
            return all(pool.present[:length])
        if pool.policy == "trailing_pages":
            return all(pool.present[max(0, length - pool.window) : length])
        return True

    return [n for n in range(1, kv + 1) if all(restores(pool, n) for pool in pools)]


@pytest.mark.parametrize("policy", ["all_pages", "trailing_pages", "block_groups"])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_restorable_prefixes_are_those_of_the_interface(policy: str, window: int):
    for present in itertools.product([False, True], repeat=4):
        pool = PoolHits("side", policy, window, present)
        other = PoolHits("other", "all_pages", 1, [True, True, True, False])
        found = restorable_prefixes(4, [pool, other], "kv")
        expected = brute_force(4, [pool, other])
        assert found.lengths == expected
        assert found.pages == max(expected, default=0)
        assert found.pool_pages["kv"] == 4
        assert found.pool_pages["other"] == 3
        alone = brute_force(4, [pool])
        if policy == "block_groups":
            assert "side" not in found.pool_pages
        else:
            assert found.pool_pages.get("side", 0) == max(alone, default=0)


def test_leading_run_ends_at_the_first_gap():
    assert leading_run([]) == 0
    assert leading_run([False, True]) == 0
    assert leading_run([True, True, False, True]) == 2
    assert leading_run([True]) == 1


def test_long_prompts_are_asked_in_parts_and_not_beyond_a_gap(
    backend: FakeBackend, open_storage: Opener, monkeypatch: pytest.MonkeyPatch
):
    from kvcodec.sglang import storage as module

    monkeypatch.setattr(module, "_QUESTION_PAGES", 2)
    storage = open_storage(fake_pool("mha", "page_first"))
    storage.batch_set_v1(KEYS, slots_of(*range(PAGE_COUNT)))
    backend.calls.clear()
    absent = [f"absent {index}" for index in range(100)]
    assert storage.batch_exists(KEYS + absent) == PAGE_COUNT
    assert backend.calls == [("exists", 2)] * (PAGE_COUNT // 2 + 1)


def test_store_that_is_slow_to_answer_is_not_asked_for_ever(
    backend: FakeBackend, open_storage: Opener, monkeypatch: pytest.MonkeyPatch
):
    from kvcodec.sglang import storage as module

    monkeypatch.setattr(module, "_QUESTION_PAGES", 1)
    storage = open_storage(fake_pool("mha", "page_first"), exists_timeout_seconds=0.3)
    storage.batch_set_v1(KEYS, slots_of(*range(PAGE_COUNT)))
    backend.hook = lambda operation, names: time.sleep(0.2)
    backend.calls.clear()
    assert storage.batch_exists_v2(KEYS * 50).kv_hit_pages <= 2
    assert len(backend.calls) <= 3


# --- nothing raises, nothing is claimed that is not so

WRONG_INDICES = {
    "none": None,
    "too few": slots_of(0),
    "too many": slots_of(0, 1, 2),
    "unaligned": slots_of(0, 1) + 1,
    "outside": slots_of(0, PAGE_COUNT),
    "floats": slots_of(0, 1).astype(float),
    "text": "0, 1",
}


@pytest.mark.parametrize("wrong", sorted(WRONG_INDICES))
def test_wrong_host_indices_are_false_and_counted(
    wrong: str, backend: FakeBackend, open_storage: Opener
):
    storage = open_storage(fake_pool("mha", "page_first"))
    indices: Any = WRONG_INDICES[wrong]
    assert storage.batch_set_v1(KEYS[:2], indices) == [False, False]
    assert storage.batch_get_v1(KEYS[:2], indices) == [False, False]
    request = [transfer("kv", keys=KEYS[:2], slots=indices)]
    assert storage.batch_set_v2(request) == storage.batch_get_v2(request) == {"kv": [False, False]}
    assert backend.objects == {}
    counters = storage.counters()
    assert counters["sglang.batch_set_v1.raised"] == counters["sglang.batch_get_v2.raised"] == 1


@pytest.mark.parametrize("keys", [[""], ["k" * 2000], [None], [5]])
def test_impossible_keys_are_false(keys: list[Any], open_storage: Opener):
    storage = open_storage(fake_pool("mha", "page_first"))
    assert storage.batch_set_v1(keys, slots_of(0)) == [False]
    assert storage.batch_get_v1(keys, slots_of(0)) == [False]
    assert storage.batch_exists(keys) == 0
    assert storage.exists(keys[0]) is False


def test_unknown_pool_is_false_and_counted(open_storage: Opener):
    storage = open_storage(fake_pool("mha", "page_first"))
    request = [transfer("swa", keys=KEYS[:2], slots=slots_of(0, 1))]
    assert storage.batch_set_v2(request) == {"swa": [False, False]}
    assert storage.batch_get_v2(request) == {"swa": [False, False]}
    assert storage.counters()["sglang.unknown_pool:swa"] == 2


def test_storage_without_a_pool_finds_nothing(open_storage: Opener):
    storage = open_storage({})
    assert storage.batch_exists(KEYS) == 0
    assert storage.batch_get_v1(KEYS[:1], slots_of(0)) == [False]
    assert storage.get(KEYS[0], Memory(np.zeros(4))) is None
    assert not storage.set(KEYS[0], Memory(np.zeros(4)))


@pytest.mark.parametrize("pages", [None, [], [None], [Memory(np.zeros(10, np.uint8))], "page"])
def test_flat_pages_that_are_none_are_refused_and_counted(pages: Any, open_storage: Opener):
    storage = open_storage(fake_pool("mha", "page_first"))
    assert storage.batch_set(KEYS[:1], pages) is False
    assert storage.batch_get(KEYS[:1], pages) == [None]
    counters = storage.counters()
    assert counters["sglang.batch_set.unsupported"] == 1
    assert counters["sglang.batch_get.unsupported"] == 1


def test_pool_without_flat_form_refuses_flat_pages(open_storage: Opener):
    pool = fake_pool("asymmetric", "page_first")
    storage = open_storage(pool)
    page = Memory(np.zeros(PAGE_SIZE * pool.size_per_token, np.uint8))
    assert storage.set(KEYS[0], page) is False
    assert storage.get(KEYS[0], page) is None


def test_get_and_set_of_one_flat_page(open_storage: Opener):
    pool = fake_pool("mha", "page_head")
    storage = open_storage(pool)
    flat = Memory(np.ascontiguousarray(pool.kv_buffer.array[:, 2]).ravel())
    assert storage.set(KEYS[0], flat)
    target = Memory(np.zeros_like(flat.array))
    assert storage.get(KEYS[0], target) is target
    assert np.array_equal(target.array, flat.array)
    assert storage.get("absent", target) is None
    assert storage.batch_get_v1(KEYS[:1], slots_of(4)) == [True]
    assert np.array_equal(pool.kv_buffer.array[:, 4], pool.kv_buffer.array[:, 2])


def test_closed_storage_finds_nothing_and_raises_nothing(
    backend: FakeBackend, open_storage: Opener
):
    storage = open_storage(fake_pool("mha", "page_first"))
    storage.batch_set_v1(KEYS, slots_of(*range(PAGE_COUNT)))
    storage.close()
    storage.close()
    assert backend.closed
    assert storage.batch_exists(KEYS) == 0
    assert storage.exists(KEYS[0]) is False
    assert storage.batch_get_v1(KEYS[:1], slots_of(0)) == [False]
    assert storage.batch_set_v1(KEYS[:1], slots_of(0)) == [False]
    assert storage.batch_exists_v2(KEYS).kv_hit_pages == 0
    assert storage.clear() is False
    assert storage.get_stats() is None


def test_clear_leaves_what_others_stored(backend: FakeBackend, open_storage: Opener):
    mine = open_storage(fake_pool("mha", "page_first"))
    mine.register_mem_host_pool_v2(FlatPool(16), "mamba")
    mine.batch_set_v1(KEYS, slots_of(*range(PAGE_COUNT)))
    mine.batch_set_v2([transfer("mamba", keys=KEYS[:1], slots=slots_of(0))])
    other = open_storage(fake_pool("mha", "page_first"), {"model_name": "other"})
    other.batch_set_v1(KEYS, slots_of(*range(PAGE_COUNT)))
    assert mine.clear() is True
    assert mine.batch_exists(KEYS) == 0
    assert len(backend.objects) == PAGE_COUNT
    assert other.batch_exists(KEYS) == PAGE_COUNT


@pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed: make sglang")
def test_stats_are_taken_once_and_only_if_wanted(open_storage: Opener):
    start_sglang()
    quiet = open_storage(fake_pool("mha", "page_first"))
    quiet.batch_set_v1(KEYS[:2], slots_of(0, 1))
    assert quiet.get_stats() is None
    storage = open_storage(fake_pool("mha", "page_first"), {"enable_storage_metrics": True})
    storage.batch_set_v1(KEYS[:2], slots_of(0, 1))
    storage.batch_get_v1(KEYS[:3], slots_of(0, 1, 2))
    storage.batch_get_v1(["absent"], slots_of(0))
    stats = storage.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([2], [2])
    assert len(stats.backup_bandwidth) == len(stats.prefetch_bandwidth) == 1
    assert storage.get_stats().prefetch_pgs == []


# --- what is told


def test_one_line_tells_what_a_pool_became(open_storage: Opener, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "kvcodec"):
        storage = open_storage(fake_pool("mha", "page_first"), preset="kv4", salt="swordfish")
    (record,) = caplog.records
    line = record.getMessage()
    assert "swordfish" not in line
    namespace = storage._pools["kv"].store.namespace.digest.hex()
    for part in ("pool kv", "int4-g64", namespace, "page_first", "bf16", "bytes a page"):
        assert part in line


def test_fp8_of_unknown_kind_is_told(open_storage: Opener, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "kvcodec"):
        open_storage(fake_pool("mha", "page_first", "uint8"), preset="kv4")
    assert "stored raw" in caplog.text
    assert "kind of fp8" in caplog.text


def test_small_pages_are_warned_of(open_storage: Opener, caplog: pytest.LogCaptureFixture):
    pool = fake_pool("mha", "page_first")
    pool.page_size = 4
    with caplog.at_level(logging.WARNING, "kvcodec"):
        open_storage(pool)
    assert "--page-size" in caplog.text


def test_log_keeps_quiet_and_says_how_much_it_left_out(caplog: pytest.LogCaptureFixture):
    log = RateLimitedLog(logging.getLogger("kvcodec.test"), interval_seconds=60.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            log.report("kind", "%s is wrong", "it")
        log.report("another", "this too")
        assert [record.getMessage() for record in caplog.records] == [
            "kvcodec: it is wrong",
            "kvcodec: this too",
        ]
        log._quiet_until.clear()
        log.report("kind", "%s is wrong", "it")
    assert caplog.records[-1].getMessage().endswith("(4 like this since the last line)")
