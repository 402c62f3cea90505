"""Which prefixes of a request can be restored, given which pages of which pool are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["PoolHits", "Restorable", "leading_run", "restorable_prefixes"]


def leading_run(present: Sequence[bool]) -> int:
    """How many are True from the first on."""
    return list(present).index(False) if False in present else len(present)


@dataclass(frozen=True, slots=True)
class PoolHits:
    """What is stored of a side pool, page by page, and what SGLang's hit policy asks for.

    ``all_pages`` needs every page of the prefix, ``trailing_pages`` its last `window` pages. Any
    other policy does not gate the prefix.
    """

    name: str
    policy: str
    window: int
    present: Sequence[bool]

    def prefixes(self) -> set[int] | None:
        """Lengths in pages of the prefixes this pool can restore; None if it has no say."""
        count = len(self.present)
        if self.policy == "all_pages":
            return set(range(1, leading_run(self.present) + 1))
        if self.policy != "trailing_pages":
            return None
        found = set()
        run = 0
        for length in range(1, count + 1):
            run = run + 1 if self.present[length - 1] else 0
            if run >= min(self.window, length):
                found.add(length)
        return found


@dataclass(frozen=True, slots=True)
class Restorable:
    """The longest restorable prefix in pages, each pool's own boundary, and all legal lengths."""

    pages: int
    pool_pages: dict[str, int]
    lengths: list[int]


def restorable_prefixes(kv_pages: int, pools: Iterable[PoolHits], kv_name: str) -> Restorable:
    """Fold the pools' hits into what SGLang may restore. A pool without a hit is not listed."""
    lengths = set(range(1, kv_pages + 1))
    pool_pages = {kv_name: kv_pages} if kv_pages else {}
    for pool in pools:
        prefixes = pool.prefixes()
        if prefixes is None:
            continue
        if prefixes:
            pool_pages[pool.name] = max(prefixes)
        lengths &= prefixes
    return Restorable(max(lengths, default=0), pool_pages, sorted(lengths))
