"""SGLang's real hierarchical cache, in this process, around one storage backend.

``UnifiedRadixCache`` -> ``HybridCacheController`` with its threads -> host pools -> storage
backend: the classes that a scheduler process of SGLang 0.5.23 runs, on CPU tensors, and without a
model.

    with HiCacheSession(kind="mha", layout="page_first", backend="file", extra=...) as session:
        tokens = make_tokens(256, seed=1)
        original = session.backup(tokens, seed=1)   # random rows: device -> host -> storage
        session.evict()                             # device and host forget, storage remembers
        result = session.prefetch(tokens)           # storage -> host -> device
        assert result.storage_hit_tokens == 256
        assert result.rows.equals(original)

SGLang keeps one configuration per process, so sessions follow one another; opening a second one
beside another raises. Any number may follow in one process, each with its own configuration.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import json
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sglang_pools import KVRows, PoolShape, build_pools, start_sglang

WAIT_SECONDS = 60.0
HAS_SGLANG = all(map(importlib.util.find_spec, ("sglang", "sglang_cpu_bridge")))


def make_tokens(count: int, seed: int = 0) -> list[int]:
    """Token ids that differ from those of any other seed from the first page on."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 50_000, count)]


@dataclass(frozen=True, kw_only=True)
class PrefetchResult:
    """What one prefetch brought back.

    ``storage_hit_tokens`` came from storage, ``host_hit_tokens`` were then found in host memory,
    and ``rows`` are the device rows of those tokens after they were loaded back. For kind "swa",
    ``swa_hit_tokens`` counts the trailing tokens of the window, which ``rows.swa`` holds.
    """

    storage_hit_tokens: int
    host_hit_tokens: int
    swa_hit_tokens: int
    rows: KVRows | None
    seconds: float


@dataclass(kw_only=True)
class HiCacheSession:
    """A configuration of SGLang's hierarchical cache, running between enter and exit.

    kind: "mha", "mla", "swa" (full and sliding-window layers: the v2 interface) or "asymmetric"
        (K and V of different widths; reaches storage through ``get_page_buffer_meta`` only).
    layout: "layer_first", "page_first", "page_first_direct", "page_head" (the last for mha).
    io_backend: "kernel" or "direct"; None takes the one that fits the layout.
    dtype: "bf16", "fp16", "fp32", "fp8_e4m3", "fp8_e5m2"; fp8 pools hold uint8.
    extra: the storage backend's extra configuration; prefetch_threshold defaults to one page.
    tp_rank, tp_size: what the storage configuration says. With tp_group, a gloo process group of
        tp_size processes, ranks agree as in a server; without, this process acts alone.
    """

    kind: str = "mha"
    layout: str = "page_first"
    io_backend: str | None = None
    page_size: int = 16
    dtype: str = "bf16"
    layer_count: int = 3
    head_count: int = 2
    head_size: int = 64
    v_head_size: int | None = None
    kv_lora_rank: int = 512
    rope_head_size: int = 64
    window_tokens: int = 64
    backend: str | None = "file"
    extra: Mapping[str, object] = field(default_factory=dict)
    prefetch_policy: str = "wait_complete"
    capacity_tokens: int = 2048
    served_model_name: str = "tiny-random"
    tp_rank: int = 0
    tp_size: int = 1
    tp_group: Any = None
    enable_metrics: bool = False

    _open: HiCacheSession | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> HiCacheSession:
        if HiCacheSession._open is not None:
            raise RuntimeError("another HiCacheSession is open in this process")
        start_sglang()
        HiCacheSession._open = self
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self) -> None:
        self._request_numbers = itertools.count()
        self._scratch = tempfile.TemporaryDirectory(prefix="hicache-")
        self.server_args = self._publish_server_args()
        self.shape = PoolShape(
            kind=self.kind,
            page_size=self.page_size,
            dtype=self.dtype,
            layer_count=self.layer_count,
            head_count=self.head_count,
            head_size=self.head_size,
            v_head_size=self.v_head_size,
            kv_lora_rank=self.kv_lora_rank,
            rope_head_size=self.rope_head_size,
            capacity_tokens=self.capacity_tokens,
        )
        self.pools = build_pools(self.shape)
        self._build_cache()

    def _build_cache(self) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        requests = ReqToTokenPool(
            size=8,
            max_context_len=self.capacity_tokens,
            device="cpu",
            enable_memory_saver=False,
        )
        parameters = CacheInitParams(
            disable=False,
            req_to_token_pool=requests,
            token_to_kv_pool_allocator=self.pools.allocator,
            page_size=self.page_size,
            tree_components=self.pools.tree_components,
            sliding_window_size=self.window_tokens if self.kind == "swa" else None,
            tp_cache_group=self.tp_group,
            enable_metrics=self.enable_metrics,
        )
        self.cache = UnifiedRadixCache(parameters)
        self.cache.init_hicache(self.server_args, parameters)

    def _publish_server_args(self) -> Any:
        from sglang.srt.runtime_context import SpawnRanks, publish, reset_context
        from sglang.srt.server_args import ServerArgs

        reset_context()
        io_backend = self.io_backend
        if io_backend is None:
            io_backend = "direct" if self.layout == "page_first_direct" else "kernel"
        server_args = ServerArgs(
            model_path=self._write_model_config(),
            served_model_name=self.served_model_name,
            device="cpu",
            attention_backend="torch_native",
            sampling_backend="pytorch",
            tp_size=self.tp_size,
            page_size=self.page_size,
            enable_hierarchical_cache=True,
            hicache_ratio=2.0,
            hicache_size=0,
            hicache_mem_layout=self.layout,
            hicache_io_backend=io_backend,
            hicache_write_policy="write_through",
            hicache_storage_backend=self.backend,
            hicache_storage_prefetch_policy=self.prefetch_policy,
            hicache_storage_backend_extra_config=self._extra_json(self.extra),
        )
        server_args.resolve_once()
        publish(
            server_args,
            role="scheduler",
            ranks=SpawnRanks(world_rank=self.tp_rank, dp_rank=None, gpu_id=0),
        )
        return server_args

    def _extra_json(self, extra: Mapping[str, object]) -> str:
        return json.dumps({"prefetch_threshold": self.page_size, **extra})

    def _write_model_config(self) -> str:
        """A model directory without weights: SGLang reads the configuration only."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 512,
            "max_position_embeddings": 8192,
            "torch_dtype": "bfloat16",
        }
        directory = Path(self._scratch.name) / "model"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        return str(directory)

    def close(self) -> None:
        """Detach the storage backend, stop SGLang's threads, free the host pools."""
        self._close_cache()
        self.__dict__.pop("pools", None)
        if "_scratch" in self.__dict__:
            self._scratch.cleanup()
        if HiCacheSession._open is self:
            HiCacheSession._open = None

    def _close_cache(self) -> None:
        cache = self.__dict__.pop("cache", None)
        if cache is not None:
            cache.shutdown()
            atexit.unregister(cache.shutdown)
            cache.release_host_resources()

    @property
    def controller(self) -> Any:
        """SGLang's cache controller."""
        return self.cache.cache_controller

    @property
    def storage(self) -> Any:
        """The storage backend object that SGLang constructed, or None when detached."""
        return self.controller.storage_backend

    @property
    def host_pool(self) -> Any:
        """The host pool of the KV rows (of full attention, for kind "swa")."""
        return self.controller.storage_host_pool

    @property
    def raw_page_bytes(self) -> int:
        """Bytes of one page of the host pool."""
        return int(self.host_pool.size_per_token) * self.page_size

    def backup(
        self,
        tokens: Sequence[int],
        seed: int = 0,
        make_rows: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None,
    ) -> KVRows:
        """Give the tokens random device rows, insert them, and wait until storage has them.

        make_rows(generator, shape [token, head, head_size]) draws the rows of one layer's K or V;
        normally distributed by default. Returns the rows as they lie on the device.
        """
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        assert len(tokens) % self.page_size == 0, "whole pages, please"
        slots = self.pools.allocate(len(tokens))
        original = self.pools.fill(slots, np.random.default_rng(seed), make_rows)
        key = RadixKey(array("q", tokens))
        self.cache.insert(InsertParams(key=key, value=slots.clone()))
        self.cache.flush_pending_backups()
        controller = self.controller
        self.pump(
            lambda: (
                not controller.ack_write_queue
                and not self.cache.ongoing_write_through
                and not self.cache.ongoing_backup
                and (controller.storage_backend is None or controller.backup_queue.empty())
            ),
            "backup",
        )
        return original

    def expected_rows(
        self,
        token_count: int,
        seed: int = 0,
        make_rows: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None,
    ) -> KVRows:
        """The rows that ``backup`` gives so many tokens, for a session that only reads them."""
        slots = self.pools.allocate(token_count)
        rows = self.pools.fill(slots, np.random.default_rng(seed), make_rows)
        self.pools.allocator.free(slots)
        return rows

    def evict(self) -> None:
        """Make device and host memory forget everything; what lies in storage stays.

        Their bytes are overwritten, so that a row which is later not written back shows.
        """
        self.cache.reset()
        self.pools.allocator.clear()
        self.pools.poison_device()
        self.pools.poison_host(self.controller.mem_pool_host)

    def prefetch(self, tokens: Sequence[int]) -> PrefetchResult:
        """Read from storage what it has of these tokens, then load that back to the device."""
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key_tokens = array("q", tokens)
        match = MatchPrefixParams(key=RadixKey(key_tokens))
        before = self.cache.match_prefix(match)
        known = before.device_prefix_len + before.host_hit_length
        request = CacheRequestHandle(f"request-{next(self._request_numbers)}", 0)
        start = time.perf_counter()
        self.cache.prefetch_from_storage(
            request,
            before.last_host_node,
            key_tokens[known:],
            last_hash=self.cache.get_last_hash_value(before.last_host_node),
            prefix_keys=self._prefix_keys(before.last_host_node),
        )
        self.pump(lambda: self.cache.check_prefetch_progress(request), "prefetch")
        seconds = time.perf_counter() - start
        storage_hit_tokens = self.cache.pop_prefetch_loaded_tokens(request)
        after = self.cache.match_prefix(match)
        rows = None
        if after.host_hit_length:
            rows = self._load_back(before, after)
        return PrefetchResult(
            storage_hit_tokens=storage_hit_tokens,
            host_hit_tokens=after.host_hit_length,
            swa_hit_tokens=after.swa_host_hit_length,
            rows=rows,
            seconds=seconds,
        )

    def _prefix_keys(self, node: Any) -> list[str] | None:
        if not self.cache.hicache_storage_pass_prefix_keys:
            return None
        return list(self.cache.get_prefix_hash_values(node))

    def _load_back(self, before: Any, after: Any) -> KVRows:
        controller = self.controller
        assert self.cache.load_back(after.best_match_node), "SGLang declined to load back"
        self.cache.ready_to_load_host_cache()
        self.pump(lambda: not controller.ack_load_queue, "load back")
        slots = self.cache.tree_core.collect_full_device_indices(
            after.best_match_node, before.last_device_node
        )
        return self.pools.read(slots, swa_token_count=after.swa_host_hit_length)

    def pump(self, is_done: Callable[[], bool], what: str) -> None:
        """Run the scheduler's event round until all ranks of tp_group are done."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            self.cache.check_hicache_events()
            if self._on_all_ranks(is_done()):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} took more than {WAIT_SECONDS:.0f} s")
            time.sleep(0.001)

    def _on_all_ranks(self, value: bool) -> bool:
        """SGLang's event round is collective: each rank must take part equally often."""
        if self.tp_group is None:
            return value
        import torch

        vote = torch.tensor([int(value)])
        torch.distributed.all_reduce(vote, op=torch.distributed.ReduceOp.MIN, group=self.tp_group)
        return bool(vote.item())

    def attach(self, backend: str, extra: Mapping[str, object] | None = None) -> str:
        """Attach a storage backend as the server's admin interface does; returns its message."""
        attached, message = self.cache.attach_storage_backend(
            backend,
            storage_backend_extra_config_json=self._extra_json(extra or {}),
            served_model_name=self.served_model_name,
            hicache_storage_prefetch_policy=self.prefetch_policy,
        )
        if not attached:
            raise RuntimeError(message)
        return str(message)

    def detach(self) -> str:
        """Detach the storage backend; returns SGLang's message."""
        detached, message = self.cache.detach_storage_backend()
        if not detached:
            raise RuntimeError(message)
        return str(message)


def file_extra(directory: str | os.PathLike[str]) -> dict[str, object]:
    """Extra configuration of SGLang's own ``file`` backend."""
    return {"file_storage_path": os.fspath(directory)}
