"""The pages of one of SGLang's host pools: from keys and host indices to a page store.

Two kinds: pools whose memory is read and written in place, and pools whose pages pass through
SGLang's own flat form (Mamba states, indexers, DeepSeek V4, whatever is new), raw.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvcodec.errors import ConfigError
from kvcodec.layout import PageLayout, PageViews, StreamStrides
from kvcodec.sglang.geometry import PoolGeometry, class_names, page_numbers
from kvcodec.store import PageStore

if TYPE_CHECKING:
    import torch

__all__ = ["FlatPages", "MappedPages", "PoolPages", "flat_layout", "is_logical"]

_STAGING_BYTES = 64 << 20


def is_logical(pool: object) -> bool:
    """Whether this is the pool that hands out page numbers and holds no bytes (DeepSeek V4)."""
    return "LogicalHostPool" in class_names(pool) or (
        getattr(pool, "kv_buffer", None) is None and getattr(pool, "size_per_token", None) == 0
    )


def flat_layout(pool: object) -> PageLayout:
    """The layout of pages that are only bytes. Raises `ConfigError` if the pool gives none."""
    try:
        page = _flat_page(pool, 0)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"kvcodec cannot store the pages of {type(pool).__name__} with layout "
            f"{getattr(pool, 'layout', None)!r}: {error}"
        ) from error
    return PageLayout.opaque(page_bytes=page.nbytes)


def _flat_page(pool: object, slot: int) -> torch.Tensor:
    """One page as SGLang flattens it, contiguous; a copy or not, as it pleases the pool."""
    page = pool.get_data_page(slot, flat=True)  # type: ignore[attr-defined]
    return page.contiguous()


class PoolPages(Protocol):
    """The stored pages of one pool. Methods may raise; who calls them answers for that."""

    name: str
    store: PageStore
    page_size: int
    is_writer: bool

    def backup(
        self, keys: Sequence[str], host_indices: torch.Tensor, protected: Sequence[bool] | None
    ) -> list[bool]:
        """Store pages; True where a page is stored now."""

    def prefetch(self, keys: Sequence[str], host_indices: torch.Tensor) -> list[bool]:
        """Read pages into the pool; True where a page is there now."""

    def flat_views(self, pages: Sequence[torch.Tensor]) -> PageViews | None:
        """Views of pages in SGLang's flat form, None where that cannot be."""


def _numbers(pool: PoolPages, keys: Sequence[str], slots: object, page_count: int) -> list[int]:
    """Page numbers of host indices, one per key."""
    numbers = page_numbers(slots, pool.page_size, page_count)
    if len(numbers) != len(keys):
        raise ConfigError(f"{len(keys)} keys for {len(numbers)} pages of pool {pool.name}")
    return [int(number) for number in numbers]


def _addresses(pages: Sequence[torch.Tensor], page_bytes: int) -> list[int] | None:
    """Addresses of flat pages, None if one is not a whole page in contiguous host memory."""
    fits = all(
        page.nbytes == page_bytes and page.is_contiguous() and page.device.type == "cpu"
        for page in pages
    )
    return [page.data_ptr() for page in pages] if fits else None


class MappedPages:
    """Pages of a pool whose memory is read and written in place."""

    def __init__(
        self, name: str, geometry: PoolGeometry, store: PageStore, *, is_writer: bool
    ) -> None:
        self.name = name
        self.store = store
        self.page_size = geometry.layout.token_count
        self.is_writer = is_writer
        self._geometry = geometry

    def backup(
        self, keys: Sequence[str], host_indices: torch.Tensor, protected: Sequence[bool] | None
    ) -> list[bool]:
        """Store pages; True where a page is stored now."""
        return self.store.backup(keys, self._views(keys, host_indices), protected=protected)

    def prefetch(self, keys: Sequence[str], host_indices: torch.Tensor) -> list[bool]:
        """Read pages into the pool; True where a page is there now."""
        return self.store.prefetch(keys, self._views(keys, host_indices))

    def flat_views(self, pages: Sequence[torch.Tensor]) -> PageViews | None:
        """Views of pages in SGLang's flat form, None where that cannot be."""
        addresses = _addresses(pages, self.store.layout.raw_bytes)
        return None if addresses is None else self._geometry.flat_views(addresses, tuple(pages))

    def _views(self, keys: Sequence[str], host_indices: torch.Tensor) -> PageViews:
        numbers = _numbers(self, keys, host_indices, self._geometry.page_count)
        return self._geometry.views(np.array(numbers, np.int64))


class FlatPages:
    """Pages that SGLang's pool itself turns into bytes and back.

    This costs a copy; in return the pool is written with verified bytes only. A large batch goes in
    parts that bound the memory, and none begins after `timeout_seconds`.
    """

    def __init__(
        self, name: str, pool: object, store: PageStore, *, is_writer: bool, timeout_seconds: float
    ) -> None:
        self.name = name
        self.store = store
        self.page_size = int(getattr(pool, "page_size", 1) or 1)
        self.is_writer = is_writer
        self._pool = pool
        self._page_count = int(getattr(pool, "size", 0)) // self.page_size
        self._timeout_seconds = timeout_seconds
        self._part_pages = max(1, _STAGING_BYTES // store.layout.raw_bytes)

    def backup(
        self, keys: Sequence[str], host_indices: torch.Tensor, protected: Sequence[bool] | None
    ) -> list[bool]:
        """Store pages; True where a page is stored now. All are raw, so all are protected."""
        del protected
        slots = [n * self.page_size for n in _numbers(self, keys, host_indices, self._page_count)]
        results = [False] * len(keys)
        for part in self._parts(len(keys)):
            views = self.flat_views([_flat_page(self._pool, slot) for slot in slots[part]])
            if views is None:
                raise ConfigError(f"the pages of pool {self.name} changed their size")
            results[part] = self.store.backup(keys[part], views)
        return results

    def prefetch(self, keys: Sequence[str], host_indices: torch.Tensor) -> list[bool]:
        """Read pages into the pool; True where a page is there now."""
        slots = [n * self.page_size for n in _numbers(self, keys, host_indices, self._page_count)]
        results = [False] * len(keys)
        template = _flat_page(self._pool, 0)
        for part in self._parts(len(keys)):
            pages = [template.new_empty(template.shape) for _ in slots[part]]
            views = self.flat_views(pages)
            if views is None:
                raise ConfigError(f"the pages of pool {self.name} changed their size")
            results[part] = self.store.prefetch(keys[part], views)
            for slot, page, is_there in zip(slots[part], pages, results[part], strict=True):
                if is_there:
                    self._pool.set_from_flat_data_page(slot, page)  # type: ignore[attr-defined]
        return results

    def flat_views(self, pages: Sequence[torch.Tensor]) -> PageViews | None:
        """Views of pages in SGLang's flat form, None where that cannot be."""
        addresses = _addresses(pages, self.store.layout.raw_bytes)
        if addresses is None:
            return None
        layout = self.store.layout
        return PageViews(
            layout=layout,
            strides=(
                StreamStrides(
                    layer_bytes=layout.raw_bytes, head_bytes=0, token_bytes=0, group_heads=1
                ),
            ),
            bases=np.array(addresses, np.uint64)[:, None],
            owner=tuple(pages),
        )

    def _parts(self, count: int) -> Iterator[slice]:
        end = time.monotonic() + self._timeout_seconds
        for start in range(0, count, self._part_pages):
            if start and time.monotonic() > end:
                return
            yield slice(start, start + self._part_pages)
