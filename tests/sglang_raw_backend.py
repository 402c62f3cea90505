"""The simplest storage backend of SGLang's v1 interface: raw bytes of each page, in a dict.

The harness is tried against it where SGLang's ``file`` backend cannot serve: pools of unequal K
and V reach storage only through ``get_page_buffer_meta``.
"""

from __future__ import annotations

import ctypes
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

RAW_EXTRA: dict[str, object] = {
    "backend_name": "raw",
    "module_path": "sglang_raw_backend",
    "class_name": "RawPageStorage",
    "interface_v1": 1,
}
"""Extra configuration for ``backend="dynamic"``."""


class RawPageStorage(HiCacheStorage):
    """Keeps the bytes that the host pool's page pointers name; shared by all instances."""

    pages: dict[str, list[bytes]] = {}  # noqa: RUF012

    def __init__(self, config: Any, options: Any) -> None:
        self.config = config

    def _pieces(self, index: int, key_count: int, host_indices: Any) -> list[tuple[int, int]]:
        addresses, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        pieces = list(zip(addresses, sizes, strict=True))
        per_page = len(pieces) // key_count
        return pieces[index * per_page : (index + 1) * per_page]

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        for index, key in enumerate(keys):
            pieces = self._pieces(index, len(keys), host_indices)
            self.pages[key] = [ctypes.string_at(address, size) for address, size in pieces]
        return [True] * len(keys)

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        for index, key in enumerate(keys):
            pieces = self._pieces(index, len(keys), host_indices)
            for (address, size), data in zip(pieces, self.pages.get(key, ()), strict=False):
                ctypes.memmove(address, data, size)
        return [key in self.pages for key in keys]

    def exists(self, key: str) -> bool:
        return key in self.pages

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        raise NotImplementedError("v1 only")

    batch_get = set = batch_set = get
