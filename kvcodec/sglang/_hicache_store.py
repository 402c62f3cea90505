"""One of SGLang's storage backends, told to move slots: a set of keys in, one answer each out."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from kvcodec.errors import ConfigError
from kvcodec.sglang._hicache_slots import SlotPool

__all__ = ["HiCacheStore", "check_backend", "open_store"]

#: Backends that SGLang itself drives through batch_get_v1 and batch_set_v1, as its cache controller
#: lists them; the others take and give tensors.
_V1_BACKENDS = frozenset(
    {
        *("eic", "hf3fs", "mooncake", "mori", "nixl", "npu_memcache", "seaweedfs", "simm"),
        "tensorcast",
    }
)

_MASTER_SECONDS = 2.0


class HiCacheStore:
    """A backend of SGLang's, and the pool whose slots it reads and writes.

    Calls block for as long as the backend likes, and raise what it likes. One key at a time: some
    backends let a batch fail as a whole.
    """

    def __init__(self, backend: HiCacheStorage, pool: SlotPool) -> None:
        self.backend = backend
        self.pool = pool

    def set(self, keys: Sequence[str], slots: Sequence[int]) -> list[bool]:
        """Store slots. Most backends leave what is there under a key as it is, and say True."""
        return [
            bool(self.backend.batch_set([key], [self.pool.get_data_page(slot)]))
            for key, slot in zip(keys, slots, strict=True)
        ]

    def get(self, keys: Sequence[str], slots: Sequence[int]) -> list[bool]:
        """Read into slots; False for what is missing, and for what could not be read."""
        return [self._get_one(key, slot) for key, slot in zip(keys, slots, strict=True)]

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key is there: one question for each leading run, which is all one counts."""
        found: list[bool] = []
        while len(found) < len(keys):
            run = int(self.backend.batch_exists(list(keys[len(found) :])))
            found += [True] * run
            if len(found) < len(keys):
                found.append(False)
        return found

    def exists_prefix(self, keys: Sequence[str]) -> int:
        """How many keys from the first on are there."""
        return int(self.backend.batch_exists(list(keys)))

    def can_remove(self) -> bool:
        """Whether the backend has a ``delete(key)``, which is not part of SGLang's interface."""
        return callable(getattr(self.backend, "delete", None))

    def remove(self, keys: Sequence[str]) -> list[bool]:
        """True for each key that was there and is gone."""
        there = self.exists(keys)
        for key, is_there in zip(keys, there, strict=True):
            if is_there:
                self.backend.delete(key)
        left = self.exists(keys)
        return [was and not still for was, still in zip(there, left, strict=True)]

    def close(self) -> None:
        """Let go of connections; not every backend has a way to say so."""
        close = getattr(self.backend, "close", None)
        if close is not None:
            close()

    def _get_one(self, key: str, slot: int) -> bool:
        try:
            found = self.backend.batch_get([key], [self.pool.get_data_page(slot)])
        except OSError:
            # The file backend raises for a file that is shorter than a page: not one of ours.
            return False
        if not isinstance(found, list) or found[0] is None:
            return False
        self.pool.set_from_flat_data_page(slot, found[0])
        return True


class _V1Store(HiCacheStore):
    """A backend that moves pages of the pool by their index."""

    def set(self, keys: Sequence[str], slots: Sequence[int]) -> list[bool]:
        return [
            bool(self.backend.batch_set_v1([key], torch.tensor([slot]))[0])
            for key, slot in zip(keys, slots, strict=True)
        ]

    def _get_one(self, key: str, slot: int) -> bool:
        return bool(self.backend.batch_get_v1([key], torch.tensor([slot]))[0])


class _MooncakeStore(_V1Store):
    """Mooncake: answers for each key of a batch, and removes through its own client."""

    def set(self, keys: Sequence[str], slots: Sequence[int]) -> list[bool]:
        return [bool(done) for done in self.backend.batch_set_v1(list(keys), torch.tensor(slots))]

    def get(self, keys: Sequence[str], slots: Sequence[int]) -> list[bool]:
        return [bool(done) for done in self.backend.batch_get_v1(list(keys), torch.tensor(slots))]

    def can_remove(self) -> bool:
        return True

    def remove(self, keys: Sequence[str]) -> list[bool]:
        tagged = self.backend._tag_keys(list(keys))
        stored, _, _ = self.backend._get_mla_buffer_meta(tagged, torch.arange(len(keys)))
        # By force: whoever has just read an object holds a lease on it for seconds.
        return [code == 0 for code in self.backend.store.batch_remove(stored, True)]

    def close(self) -> None:
        self.backend.store.close()


def check_backend(name: str) -> None:
    """`ConfigError` if SGLang has no such backend, or what it needs is not installed."""
    if name == "dynamic":
        return
    entry = StorageBackendFactory._registry.get(name)
    if entry is None or name == "kvcodec":
        known = sorted({*StorageBackendFactory._registry, "dynamic"} - {"kvcodec"})
        raise ConfigError(f"SGLang has no storage backend {name!r}; known: {', '.join(known)}")
    try:
        entry["loader"]()
    except ImportError as error:
        raise ConfigError(f"SGLang's storage backend {name!r} cannot be loaded: {error}") from error


def open_store(name: str, extra_config: Mapping[str, Any], pool: SlotPool) -> HiCacheStore:
    """Connect. Raises whatever the backend raises, and takes as long as it takes."""
    config = HiCacheStorageConfig(
        # One rank of one, of a model without a name, whose pages need one key each: names are
        # unique without what SGLang would add to them, and the same for every process.
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=True,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name=None,
        extra_config=dict(extra_config),
    )
    if name == "mooncake":
        _meet_master(extra_config)
    backend = StorageBackendFactory.create_backend(name, config, pool)
    backend.register_mem_pool_host(pool)
    if hasattr(backend, "on_host_pools_registered"):  # since SGLang 0.5.23
        backend.on_host_pools_registered()
    if name == "mooncake":
        return _MooncakeStore(backend, pool)
    is_v1 = name in _V1_BACKENDS or (name == "dynamic" and bool(extra_config.get("interface_v1")))
    return (_V1Store if is_v1 else HiCacheStore)(backend, pool)


def _meet_master(extra_config: Mapping[str, Any]) -> None:
    """Raise if Mooncake's master is away: its client would try for 90 s without letting go of the
    interpreter, and with it of every other thread of the engine.
    """
    address = str(extra_config.get("master_server_address") or os.getenv("MOONCAKE_MASTER") or "")
    host, colon, port = address.rpartition(":")
    # Masters that are found by etcd or another service have a scheme, or stand in a list.
    if colon and port.isdecimal() and not any(mark in host for mark in ("//", ",", ";")):
        socket.create_connection((host, int(port)), timeout=_MASTER_SECONDS).close()
