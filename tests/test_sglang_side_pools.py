"""SGLang's real pools beside the KV rows: states, compressed rows and the anchor without bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend
from sglang_fakes import KEYS, Opener, slots_of, storage_opener, transfer
from sglang_harness import HAS_SGLANG, HiCacheSession
from sglang_pools import start_sglang

from kvcodec.errors import ConfigError
from kvcodec.sglang.geometry import describe_pool

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed: make sglang")

PAGE_TOKENS = 16


@pytest.fixture
def open_storage() -> Iterator[Opener]:
    start_sglang()
    with storage_opener(FakeBackend(), preset="kv4") as opener:
        yield opener


def compressed_pool(layout: str) -> Any:
    """A DeepSeek V4 pool: packed rows of bytes, one per page and layer."""
    import torch
    from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool

    pool = DeepSeekV4PagedHostPool(
        "c4",
        device_buffers=[torch.zeros(8, 48, dtype=torch.uint8) for _ in range(3)],
        item_bytes=48,
        num_host_pages=6,
        slot_page_size=PAGE_TOKENS,
        layout=layout,
        pin_memory=False,
    )
    for buffer in pool.kv_buffer:
        buffer.copy_(torch.randint(0, 256, buffer.shape, dtype=torch.uint8))
    return pool


def state_pool(layout: str, temporal: str = "float32") -> Any:
    """A Mamba pool: one temporal and two convolution states per slot and layer."""
    import torch
    from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
    from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost

    info = MambaStateBufferInfo(
        temporal=torch.zeros(2, 8, 4, 8, dtype=getattr(torch, temporal)),
        conv=tuple(torch.zeros(2, 8, 5, width, dtype=torch.bfloat16) for width in (3, 4)),
    )
    pool = MambaPoolHost(info, 2.0, 0, device_capacity=8, pin_memory=False, layout=layout)
    for buffer in (pool.temporal_buffer, *pool.conv_buffer):
        buffer.copy_(torch.randn(buffer.shape))
    return pool


def pages_of(pool: Any, slots: list[int]) -> list[Any]:
    return [pool.get_data_page(slot, flat=True).clone() for slot in slots]


def check_round_trip(storage: Any, name: str, pool: Any, numbers: list[int]) -> None:
    """Pages leave the pool, are overwritten there, and return."""
    import torch

    storage.register_mem_host_pool_v2(pool, name)
    size = pool.page_size
    slots = np.concatenate([np.arange(n * size, (n + 1) * size) for n in numbers])
    starts = [number * size for number in numbers]
    request = [transfer(name, keys=KEYS[: len(numbers)], slots=torch.from_numpy(slots))]
    before = pages_of(pool, starts)
    others = pages_of(pool, [0])
    assert storage.batch_set_v2(request) == {name: [True] * len(numbers)}
    for start, page in zip(starts, before, strict=True):
        pool.set_from_flat_data_page(start, torch.zeros_like(page))
    assert storage.batch_get_v2(request) == {name: [True] * len(numbers)}
    for page, after in zip(before, pages_of(pool, starts), strict=True):
        assert torch.equal(page, after)
    assert torch.equal(others[0], pages_of(pool, [0])[0])


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_compressed_rows_beside_an_anchor_without_bytes(layout: str, open_storage: Opener):
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

    storage = open_storage(LogicalHostPool(6 * PAGE_TOKENS, PAGE_TOKENS, layout))
    assert storage.batch_exists(KEYS) == len(KEYS)
    check_round_trip(storage, "deepseek_v4_c4", compressed_pool(layout), [4, 2])
    assert storage.batch_set_v1(KEYS[:2], slots_of(0, 1)) == [True, True]
    query = [transfer("deepseek_v4_c4", keys=KEYS)]
    assert storage.batch_exists_v2(KEYS, query).kv_hit_pages == 2


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
def test_states_of_mamba_return_bit_exact(layout: str, open_storage: Opener):
    storage = open_storage(compressed_pool("page_first"))
    check_round_trip(storage, "mamba", state_pool(layout), [5, 1, 7])


def test_states_of_equal_size_and_another_dtype_are_misses(open_storage: Opener):
    writer, reader = (open_storage(compressed_pool("page_first")) for _ in range(2))
    writer.register_mem_host_pool_v2(state_pool("page_first", "float16"), "mamba")
    reader.register_mem_host_pool_v2(state_pool("page_first", "bfloat16"), "mamba")
    request = [transfer("mamba", keys=KEYS[:1], slots=np.array([3]))]
    assert writer.batch_set_v2(request) == {"mamba": [True]}
    assert reader.batch_get_v2(request) == {"mamba": [False]}
    assert writer.batch_get_v2(request) == {"mamba": [True]}


REAL_POOLS = [
    ("mha", "layer_first"),
    ("mha", "page_first"),
    ("mha", "page_first_direct"),
    ("mha", "page_head"),
    ("mla", "layer_first"),
    ("mla", "page_first"),
    ("mla", "page_first_direct"),
    ("asymmetric", "page_first"),
    ("asymmetric", "page_first_direct"),
]


@pytest.mark.parametrize(("kind", "layout"), REAL_POOLS)
def test_real_pools_confirm_the_addresses_of_their_pages(
    kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
):
    with HiCacheSession(kind=kind, layout=layout, backend=None) as session:
        pool = session.host_pool
        asked = []
        account = pool.get_page_buffer_meta

        def spy(indices: Any) -> Any:
            asked.append(account(indices))
            return asked[-1]

        monkeypatch.setattr(pool, "get_page_buffer_meta", spy)
        geometry = describe_pool(pool)
        assert geometry is not None
        ((addresses, sizes),) = asked
        assert sum(sizes) == geometry.layout.raw_bytes
        shifted = ([address + 64 for address in addresses], sizes)
        monkeypatch.setattr(pool, "get_page_buffer_meta", lambda indices: shifted)
        with pytest.raises(ConfigError, match="other addresses"):
            describe_pool(pool)
