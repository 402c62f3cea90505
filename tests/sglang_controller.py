"""SGLang's bare ``HiCacheController``, without the radix tree above it.

The engine's decode offload manager uses it so. The session does by hand what the tree does: it
keeps the slots, asks for transfers, and takes acknowledgements from the controller's queues.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sglang_harness import WAIT_SECONDS, HiCacheSession, PrefetchResult
from sglang_pools import KVRows


@dataclass(kw_only=True)
class ControllerSession(HiCacheSession):
    """A HiCacheSession around ``HiCacheController`` alone; kinds "mha", "mla", "asymmetric"."""

    def _build_cache(self) -> None:
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_kv_host_pool

        if self.kind == "swa":
            raise ValueError("side pools belong to the hybrid controller; use HiCacheSession")
        self._host_pool = build_kv_host_pool(
            kv_pool=self.pools.full_pool, page_size=self.page_size, use_mla=self.kind == "mla"
        )
        self._controller = HiCacheController(
            self.pools.allocator,
            self._host_pool,
            self.page_size,
            self.tp_group,
            load_cache_event=threading.Event(),
            write_policy="write_through",
            io_backend=self.server_args.hicache_io_backend,
            storage_backend=self.backend,
            prefetch_threshold=self.page_size,
            model_name=self.served_model_name,
            storage_backend_extra_config=dict(self.extra),
        )

    def _close_cache(self) -> None:
        controller = self.__dict__.pop("_controller", None)
        if controller is not None:
            controller.detach_storage_backend()
            self._host_pool.destroy()

    @property
    def controller(self) -> Any:
        """SGLang's cache controller."""
        return self._controller

    def backup(
        self,
        tokens: Sequence[int],
        seed: int = 0,
        make_rows: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None,
    ) -> KVRows:
        """Give the tokens random device rows, and write them to the host and to storage."""
        from sglang.srt.mem_cache.utils import get_hash_str

        slots = self.pools.allocate(len(tokens))
        original = self.pools.fill(slots, np.random.default_rng(seed), make_rows)
        host_slots = self._controller.write(slots, node_id=1)
        self._controller.start_writing()
        self._controller.ack_write_queue.pop(0).finish_event.synchronize()
        hashes = get_hash_str(array("q", tokens), None, page_size=self.page_size)
        self._controller.write_storage(host_slots, list(tokens), hashes)
        self._controller.ack_backup_queue.get(timeout=WAIT_SECONDS)
        self._controller.evict_host(host_slots)
        self.pools.allocator.free(slots)
        return original

    def evict(self) -> None:
        """Overwrite device and host memory; ``backup`` has freed the slots already."""
        self.pools.poison_device()
        self.pools.poison_buffers(self._host_pool)

    def prefetch(self, tokens: Sequence[int]) -> PrefetchResult:
        """Read from storage what it has of these tokens, then load that back to the device."""
        controller = self._controller
        start = time.perf_counter()
        controller.prefetch("request", list(tokens))
        operation = controller.prefetch_hit_queue.get(timeout=WAIT_SECONDS)
        if not operation.storage_hit_count:
            return self._result(0, None, start)
        operation.host_indices = controller.alloc_prefetch_host_buffers(
            operation, operation.storage_hit_count
        )
        controller.prefetch_buffer.put(operation)
        loaded_tokens = 0
        while True:
            acknowledgement = controller.ack_prefetch_queue.get(timeout=WAIT_SECONDS)
            if acknowledgement.completed_req:
                break
            loaded_tokens = acknowledgement.completed_tokens or loaded_tokens
        rows = None
        if loaded_tokens:
            host_slots = operation.host_indices[:loaded_tokens]
            slots = controller.load(host_slots)
            controller.start_loading()
            controller.ack_load_queue.pop(0).finish_event.synchronize()
            rows = self.pools.read(slots)
            self.pools.allocator.free(slots)
        controller.evict_host(operation.host_indices)
        return self._result(loaded_tokens, rows, start)

    def _result(self, loaded_tokens: int, rows: KVRows | None, start: float) -> PrefetchResult:
        return PrefetchResult(
            storage_hit_tokens=loaded_tokens,
            host_hit_tokens=loaded_tokens,
            swa_hit_tokens=0,
            rows=rows,
            seconds=time.perf_counter() - start,
        )
