"""KVCodecStorage: SGLang's HiCacheStorage over page stores.

The outermost place: nothing raises into the engine once the storage is attached. What goes wrong is
a miss or False, a counter, and at times a line in the log.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from kvcodec.backend import open_backend
from kvcodec.errors import ConfigError
from kvcodec.layout import PageViews
from kvcodec.log import RateLimitedLog
from kvcodec.sglang.hits import PoolHits, Restorable, leading_run, restorable_prefixes
from kvcodec.sglang.metrics import TransferStats
from kvcodec.sglang.options import AdapterOptions
from kvcodec.sglang.pools import PoolPages, is_logical
from kvcodec.sglang.registration import open_pool
from kvcodec.sglang.topology import Topology
from kvcodec.store import Pipeline

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
        PoolTransfer,
    )
    from sglang.srt.observability.metrics_collector import StorageMetrics

__all__ = ["KVCodecStorage"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KV = "kv"
#: Pages asked for at once.
_QUESTION_PAGES = 256
#: Pools beside which the KV pool holds some of the model's layers only, numbered anew.
_HYBRID_POOLS = frozenset({"swa", "auxiliary_swa", "mamba"})


def _name(pool_name: object) -> str:
    """Text of a PoolName: an enumeration of texts, or a text."""
    return str(getattr(pool_name, "value", pool_name))


def _transfer_result(found: Restorable) -> PoolTransferResult:
    """SGLang's answer to a query; older releases know no set of legal lengths."""
    answer: dict[str, object] = {
        "kv_hit_pages": found.pages,
        "extra_pool_hit_pages": found.pool_pages,
        "restorable_prefix_pages": found.lengths,
    }
    known = {field.name for field in dataclasses.fields(PoolTransferResult)}
    return PoolTransferResult(**{name: answer[name] for name in answer.keys() & known})


class KVCodecStorage(HiCacheStorage):
    """Pages of SGLang's host pools, encoded and kept by a backend.

    SGLang constructs it as ``(storage_config, host_pool)``, or for the backend ``dynamic`` as
    ``(storage_config, options)`` and hands the host pool in later. Both raise `ConfigError` for
    what cannot be honoured.
    """

    def __init__(
        self, storage_config: HiCacheStorageConfig, mem_pool_host: object | None = None
    ) -> None:
        self._options = AdapterOptions.parse(getattr(storage_config, "extra_config", None))
        self._topology = Topology.of_config(storage_config, self._options)
        self._log = RateLimitedLog(logger)
        self._stats = TransferStats(is_wanted=self._topology.has_metrics)
        self._registered: dict[str, object] = {}
        self._pools: dict[str, PoolPages] = {}
        self._is_logical = False
        self._closed = False
        self._pipeline = Pipeline(open_backend(self._options.url), self._options.store)
        if mem_pool_host is not None and not isinstance(mem_pool_host, Mapping):
            try:
                self.register_mem_pool_host(mem_pool_host)
            except BaseException:
                self.close()
                raise

    def counters(self) -> dict[str, int]:
        """Every count so far, the adapter's own under ``sglang.``; never blocks."""
        return self._pipeline.counters()

    def register_mem_pool_host(self, mem_pool_host: object) -> None:
        """Take the pool of the KV rows. Raises `ConfigError` for a pool that cannot be served."""
        self.mem_pool_host = mem_pool_host
        self._register(_KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: object, host_pool_name: object) -> None:
        """Take a pool by name: that of the KV rows, or one beside it."""
        self._register(_name(host_pool_name), host_pool)

    def _register(self, name: str, pool: object) -> None:
        if self._registered.get(name) is pool:
            return
        if name in _HYBRID_POOLS and self._options.has_layers:
            raise ConfigError(
                f"a layer table cannot be applied to a model with a {name} pool: SGLang numbers "
                "the layers of each pool anew"
            )
        if is_logical(pool):
            self._is_logical = self._is_logical or name == _KV
        else:
            self._pools[name] = open_pool(name, pool, self._pipeline, self._topology, self._options)
        self._registered[name] = pool

    def _answer(self, operation: str, fallback: T, call: Callable[[], T]) -> T:
        """What `call` returns, or the fallback: SGLang's storage threads must outlive anything."""
        if self._closed:
            return fallback
        try:
            return call()
        # The border to the engine: before 0.5.22 an exception ends SGLang's backup or prefetch
        # thread for good, and no failure of a cache may end a request in any version.
        except Exception as error:  # noqa: BLE001
            self._pipeline.counts.add(f"sglang.{operation}.raised")
            self._log.report(operation, "%s: %r", operation, error)
            return fallback

    def _refused(self, name: str) -> None:
        self._pipeline.counts.add(f"sglang.{name}")
        self._log.report(name, "%s", name)

    # The one-pool interface: v1 with host indices, and its questions.

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Read KV pages into the host pool; True where a page is there now."""
        del extra_info
        return self._answer(
            "batch_get_v1", [False] * len(keys), lambda: self._prefetch(_KV, keys, host_indices)
        )

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Store KV pages of the host pool; True where a page is stored now."""
        return self._answer(
            "batch_set_v1",
            [False] * len(keys),
            lambda: self._backup(_KV, keys, host_indices, extra_info),
        )

    def exists(self, key: str) -> bool:
        """Whether a KV page is stored."""
        return self._answer("exists", False, lambda: self._exists(_KV, [key], until_gap=True)[0])

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many KV pages from the first on are stored without a gap."""
        del extra_info
        return self._answer("batch_exists", 0, lambda: self._kv_run(keys))

    # The many-pool interface, v2.

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Which prefixes can be restored, all pools considered."""
        del extra_info
        nothing = restorable_prefixes(0, (), _KV)
        found = self._answer(
            "batch_exists_v2", nothing, lambda: self._restorable(keys, pool_transfers or [])
        )
        return _transfer_result(found)

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Read pages of several pools; per pool, True where a page is there now."""
        del extra_info

        def prefetch(transfer: PoolTransfer) -> list[bool]:
            return self._prefetch(_name(transfer.name), transfer.keys or [], transfer.host_indices)

        return self._answer_each("batch_get_v2", transfers, prefetch)

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Store pages of several pools; per pool, True where a page is stored now."""

        def backup(transfer: PoolTransfer) -> list[bool]:
            name, keys = _name(transfer.name), transfer.keys or []
            return self._backup(name, keys, transfer.host_indices, extra_info)

        return self._answer_each("batch_set_v2", transfers, backup)

    def _answer_each(
        self,
        operation: str,
        transfers: Sequence[PoolTransfer],
        call: Callable[[PoolTransfer], list[bool]],
    ) -> dict[str, list[bool]]:
        return {
            transfer.name: self._answer(
                operation, [False] * len(transfer.keys or ()), partial(call, transfer)
            )
            for transfer in transfers
        }

    # The interface with pages as flat tensors, which SGLang uses where it knows no better.

    def get(
        self, key: str, target_location: object = None, target_sizes: object = None
    ) -> torch.Tensor | None:
        """Read a KV page into a flat tensor in the pool's order; None if it is not there."""
        return self.batch_get([key], [target_location], target_sizes)[0]

    def batch_get(
        self, keys: list[str], target_locations: object = None, target_sizes: object = None
    ) -> list[torch.Tensor | None]:
        """Read KV pages into flat tensors in the pool's order; None for what is not there."""
        del target_sizes
        nothing: list[torch.Tensor | None] = [None] * len(keys)
        return self._answer("batch_get", nothing, lambda: self._get_flat(keys, target_locations))

    def set(
        self,
        key: str,
        value: object = None,
        target_location: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Store a KV page given as a flat tensor in the pool's order."""
        return self.batch_set([key], [value], target_location, target_sizes)

    def batch_set(
        self,
        keys: list[str],
        values: object = None,
        target_locations: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Store KV pages given as flat tensors in the pool's order; True if all are stored now."""
        del target_locations, target_sizes
        return self._answer("batch_set", False, lambda: self._set_flat(keys, values))

    # What is left of the interface.

    def clear(self) -> bool:
        """Delete the pages of this rank's pools, and no others; SGLang takes no answer but True."""

        def clear() -> bool:
            for pool in self._pools.values():
                pool.store.clear()
            return True

        return self._answer("clear", False, clear)

    def get_stats(self) -> StorageMetrics:
        """Batches since the last question; runs in the scheduler's thread and waits for nothing."""
        return self._stats.take()

    def close(self) -> None:
        """Let go of threads and store; every later call finds nothing. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._pipeline.close()

    # How it is done.

    def _find(self, name: str) -> PoolPages | None:
        pool = self._pools.get(name)
        if pool is None:
            self._refused(f"unknown_pool:{name}")
        return pool

    def _exists(self, name: str, keys: Sequence[str], *, until_gap: bool) -> list[bool]:
        """Which pages are stored. A long list is asked in parts: what follows a gap is of no
        interest to who looks for a prefix, and what cannot be asked in time counts as absent.
        """
        if name == _KV and self._is_logical:
            return [True] * len(keys)
        pool = self._find(name)
        found: list[bool] = []
        end = time.monotonic() + self._options.store.exists_timeout_seconds
        while pool is not None and len(found) < len(keys):
            asked = keys[len(found) : len(found) + _QUESTION_PAGES]
            if until_gap:
                run = pool.store.exists_prefix(asked)
                part = [True] * run + [False] * (len(asked) - run)
            else:
                part = pool.store.exists(asked)
            found += part
            if (until_gap and False in part) or time.monotonic() > end:
                break
        return found + [False] * (len(keys) - len(found))

    def _prefetch(self, name: str, keys: Sequence[str], host_indices: torch.Tensor) -> list[bool]:
        if name == _KV and self._is_logical:
            return [True] * len(keys)
        pool = self._find(name)
        if pool is None or not keys:
            return [False] * len(keys)
        start = time.monotonic()
        results = pool.prefetch(keys, host_indices)
        self._stats.add_prefetch(results, pool.store.layout.raw_bytes, time.monotonic() - start)
        return results

    def _backup(
        self, name: str, keys: Sequence[str], host_indices: torch.Tensor, extra_info: object
    ) -> list[bool]:
        if name == _KV and self._is_logical:
            return [True] * len(keys)
        pool = self._find(name)
        if pool is None or not keys:
            return [False] * len(keys)
        if not pool.is_writer:
            return [True] * len(keys)
        start = time.monotonic()
        protected = self._protected(len(keys), pool.page_size, extra_info)
        results = pool.backup(keys, host_indices, protected)
        self._stats.add_backup(results, pool.store.layout.raw_bytes, time.monotonic() - start)
        return results

    def _protected(self, count: int, page_size: int, extra_info: object) -> list[bool] | None:
        """Which of a call's pages are stored with the protected spec: the last of the call and the
        first of the sequence. Where that is unknown, all are: too good is better than too bad.
        """
        tail = -(-self._options.residual_tokens // page_size)
        head = -(-self._options.sink_tokens // page_size)
        if not tail and not head:
            return None
        position = 0
        if head:
            prefix_keys = getattr(extra_info, "prefix_keys", None)
            if prefix_keys is None:
                self._refused("position_unknown")
                return [True] * count
            position = len(prefix_keys)
        return [position + i < head or i >= count - tail for i in range(count)]

    def _restorable(self, keys: Sequence[str], transfers: Sequence[PoolTransfer]) -> Restorable:
        kv_pages = self._kv_run(keys)
        pools = []
        for transfer in transfers:
            policy = _name(transfer.hit_policy)
            present = self._exists(
                _name(transfer.name), keys[:kv_pages], until_gap=policy == "all_pages"
            )
            window = max(1, len(transfer.keys or ()))
            pools.append(PoolHits(transfer.name, policy, window, present))
        return restorable_prefixes(kv_pages, pools, _KV)

    def _kv_run(self, keys: Sequence[str]) -> int:
        return leading_run(self._exists(_KV, keys, until_gap=True))

    def _flat_views(
        self, pool: PoolPages, keys: Sequence[str], pages: object, operation: str
    ) -> PageViews | None:
        """Views of SGLang's flat pages; None, counted, where they are none."""
        views = None
        if isinstance(pages, Sequence) and len(pages) == len(keys):
            flat = [page for page in pages if hasattr(page, "data_ptr")]
            views = pool.flat_views(flat) if len(flat) == len(keys) else None
        if views is None:
            self._refused(f"{operation}.unsupported")
        return views

    def _get_flat(self, keys: Sequence[str], pages: object) -> list[torch.Tensor | None]:
        pool = self._find(_KV)
        views = None if pool is None else self._flat_views(pool, keys, pages, "batch_get")
        if pool is None or views is None or not isinstance(pages, Sequence):
            return [None] * len(keys)
        found = pool.store.prefetch(keys, views)
        return [page if there else None for page, there in zip(pages, found, strict=True)]

    def _set_flat(self, keys: Sequence[str], pages: object) -> bool:
        pool = self._find(_KV)
        if pool is not None and not pool.is_writer:
            return True
        views = None if pool is None else self._flat_views(pool, keys, pages, "batch_set")
        if pool is None or views is None:
            return False
        protected = self._protected(len(keys), pool.page_size, None)
        return all(pool.store.backup(keys, views, protected=protected))
