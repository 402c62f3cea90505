"""Which page leaves memory first: S3-FIFO, counted in bytes.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. A page begins in a small
queue. If nobody reads it before it comes to the end it goes, and only its name is remembered for a
while; a page that is read there, or stored again while its name is remembered, moves to the main
queue. So a long prefix that is used once passes through a tenth of the memory and leaves the rest
alone, where it would have flushed a cache that evicts the least recently used.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["S3Fifo"]

#: The part of the bytes that pages have to prove themselves in.
_SMALL_SHARE = 10
_MOST_HITS = 3


class S3Fifo:
    """The order of eviction for names with sizes. The caller holds its lock, and evicts."""

    def __init__(self, limit_bytes: int) -> None:
        self._small_limit = limit_bytes // _SMALL_SHARE
        self._small: OrderedDict[str, int] = OrderedDict()
        self._main: OrderedDict[str, int] = OrderedDict()
        self._small_bytes = 0
        self._hits: dict[str, int] = {}
        # Hashes in place of names: a collision costs a page a place it did not earn, no more.
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hits)

    def insert(self, name: str, size_bytes: int) -> None:
        """A name that is not among them."""
        self._hits[name] = 0
        if hash(name) in self._ghosts:
            del self._ghosts[hash(name)]
            self._main[name] = size_bytes
        else:
            self._small[name] = size_bytes
            self._small_bytes += size_bytes

    def touch(self, name: str) -> None:
        """A name of theirs was read. Nothing moves, so a hit costs next to nothing."""
        self._hits[name] = min(self._hits[name] + 1, _MOST_HITS)

    def remove(self, name: str) -> None:
        """Forget a name of theirs; it was deleted, not evicted."""
        del self._hits[name]
        size_bytes = self._small.pop(name, None)
        if size_bytes is None:
            del self._main[name]
        else:
            self._small_bytes -= size_bytes

    def evict(self) -> str | None:
        """The name that has to go, which is theirs no more; None if there is none."""
        while self._hits:
            if self._small and (self._small_bytes > self._small_limit or not self._main):
                name, size_bytes = self._small.popitem(last=False)
                self._small_bytes -= size_bytes
                if self._hits[name]:
                    self._hits[name] = 0
                    self._main[name] = size_bytes
                    continue
                self._remember(name)
            else:
                name, size_bytes = self._main.popitem(last=False)
                if self._hits[name]:
                    self._hits[name] -= 1
                    self._main[name] = size_bytes
                    continue
            del self._hits[name]
            return name
        return None

    def _remember(self, name: str) -> None:
        self._ghosts[hash(name)] = None
        while len(self._ghosts) > len(self._hits):
            self._ghosts.popitem(last=False)
