"""Storage backends as somebody may plug them into SGLang: a dict in the memory of this process.

SGLang imports them by ``dynamic``; `stores` holds what each name of a store holds.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

stores: dict[str, dict[str, bytes]] = defaultdict(dict)
closed: list[str] = []
#: Cleared, every call waits; a test that clears it sets it again.
running = threading.Event()
running.set()


class DictStorage(HiCacheStorage):
    """SGLang's older interface: tensors in, tensors out; what is there stays."""

    def __init__(self, storage_config: Any, _: Any) -> None:
        self.name = storage_config.extra_config["store"]
        self.objects = stores[self.name]
        if storage_config.extra_config.get("fails"):
            raise RuntimeError("not today")

    def exists(self, key: str) -> bool:
        running.wait()
        return key in self.objects

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        running.wait()
        data = self.objects.get(key)
        # A tensor of its own, as backends with buffers of their own give.
        return None if data is None else torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def batch_get(self, keys: Any, target_locations: Any = None, target_sizes: Any = None) -> Any:
        return [self.get(key) for key in keys]

    def set(self, key: str, value: Any = None, *_: Any, **__: Any) -> bool:
        running.wait()
        if len(self.objects) > 10_000:
            raise MemoryError("the dict is full")
        self.objects.setdefault(key, value.numpy().tobytes())
        return True

    def batch_set(self, keys: Any, values: Any = None, *_: Any, **__: Any) -> bool:
        return all(self.set(key, value) for key, value in zip(keys, values, strict=True))

    def close(self) -> None:
        closed.append(self.name)


class DictStorageV1(DictStorage):
    """SGLang's newer interface, pages of the host pool by their index, and a way to delete."""

    def batch_set_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> list[bool]:
        running.wait()
        pointers, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        for key, pointer, size in zip(keys, pointers, sizes, strict=True):
            self.objects.setdefault(key, ctypes.string_at(pointer, size))
        return [True] * len(keys)

    def batch_get_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> list[bool]:
        running.wait()
        pointers, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        answers = []
        for key, pointer, size in zip(keys, pointers, sizes, strict=True):
            data = self.objects.get(key)
            answers.append(data is not None and len(data) <= size)
            if answers[-1]:
                ctypes.memmove(pointer, data, len(data))
        return answers

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)
