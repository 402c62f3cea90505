"""One timed round trip of pages through SGLang's real HiCacheController."""

from __future__ import annotations

import sys
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from sglang_controller import ControllerSession
from sglang_harness import WAIT_SECONDS

GEOMETRIES = {
    "qwen2.5-7b": {"layer_count": 28, "head_count": 4, "head_size": 128},
    "llama3.1-8b": {"layer_count": 32, "head_count": 8, "head_size": 128},
}


@dataclass(frozen=True)
class Timing:
    """Seconds from SGLang's queue to its acknowledgement: hashing, exists, codec, store."""

    seconds: float
    tokens: int


def fill_host_pool(session: ControllerSession) -> None:
    """Normal numbers in bf16, from a table: what is timed later does not depend on them."""
    import torch

    rows = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    bits = (rows.view(np.uint32) >> 16).astype(np.int16)
    flat = session.controller.mem_pool_host.kv_buffer.view(torch.int16).numpy().reshape(-1)
    for start in range(0, flat.size, bits.size):
        part = flat[start : start + bits.size]
        part[:] = bits[: part.size]


def time_backup(session: ControllerSession, tokens: list[int]) -> Timing:
    """Write the host pool's pages to storage under the keys of these tokens."""
    from sglang.srt.mem_cache.utils import get_hash_str

    controller = session.controller
    host_slots = controller.mem_pool_host.alloc(len(tokens))
    hashes = get_hash_str(array("q", tokens), None, page_size=session.page_size)
    start = time.perf_counter()
    controller.write_storage(host_slots, tokens, hashes)
    written = controller.ack_backup_queue.get(timeout=WAIT_SECONDS)
    seconds = time.perf_counter() - start
    controller.evict_host(host_slots)
    return Timing(seconds, written.completed_tokens)


def time_prefetch(session: ControllerSession, tokens: list[int]) -> Timing:
    """Read the pages of these tokens from storage into the host pool, and let them go again."""
    controller: Any = session.controller
    start = time.perf_counter()
    controller.prefetch("request", tokens)
    operation = controller.prefetch_hit_queue.get(timeout=WAIT_SECONDS)
    operation.host_indices = controller.alloc_prefetch_host_buffers(
        operation, operation.storage_hit_count
    )
    controller.prefetch_buffer.put(operation)
    loaded = 0
    while not (
        acknowledgement := controller.ack_prefetch_queue.get(timeout=WAIT_SECONDS)
    ).completed_req:
        loaded = acknowledgement.completed_tokens or loaded
    seconds = time.perf_counter() - start
    controller.evict_host(operation.host_indices)
    return Timing(seconds, loaded)
