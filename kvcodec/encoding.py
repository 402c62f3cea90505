"""PageEncoder: raw pages of one namespace become encoded ones, under the specs of a store and
within its byte budget.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcodec.budget import Ladder, Search
from kvcodec.codec import Codec
from kvcodec.identity import Namespace
from kvcodec.layout import PageViews
from kvcodec.plan import PagePlan
from kvcodec.rotary import Rotary
from kvcodec.spec import CodecSpec
from kvcodec.workers import Counters

__all__ = ["PageEncoder"]


Row = npt.NDArray[np.uint8]


class PageEncoder:
    """Encodes pages of one namespace: ``plain`` and ``protected`` ones each by their spec, ``raw``
    ones bit for bit. Thread-safe.

    With a byte budget, pages that are larger are encoded again with fewer bits in their `ecq`
    sections. A page starts where the last one ended, so most pages of a steady stream are encoded
    once.
    """

    def __init__(
        self,
        codec: Codec,
        namespace: Namespace,
        counts: Counters,
        *,
        spec: CodecSpec,
        protected_spec: CodecSpec,
        rotary: Rotary | None = None,
        max_page_bytes: int = 0,
        minimum_bits: int = 0,
    ) -> None:
        """`rotary` tells how the model rotates its keys, for codecs that can use it. No page is
        larger than `max_page_bytes`, 0 for no bound; `ecq` goes no lower than `minimum_bits`.
        """
        self._codec = codec
        self._namespace = namespace
        self._counts = counts
        self._rotary = rotary
        self._limit = max_page_bytes or sys.maxsize
        self._specs = {"plain": spec, "protected": protected_spec, "raw": CodecSpec()}
        self._ladders = {
            which: Ladder(namespace.layout, spec.section_codecs(namespace.layout), minimum_bits)
            for which, spec in self._specs.items()
        }
        #: Where the search for the next page's step starts.
        self._steps = dict.fromkeys(self._ladders, 0)
        self._plans: dict[tuple[str, int, int], PagePlan] = {}

    def plan(self, which: str, key_bytes: int, step: int = 0) -> PagePlan:
        """The plan of pages with keys of that length: ``plain``, ``protected`` or ``raw``; at a
        step of the byte budget, 0 for the spec itself.
        """
        plan = self._plans.get((which, key_bytes, step))
        if plan is None:
            plan = self._plans[which, key_bytes, step] = PagePlan.for_spec(
                self._namespace,
                self._specs[which],
                key_bytes,
                self._rotary,
                codecs=self._ladders[which].codecs(step),
            )
        return plan

    def likely_plan(self, key_bytes: int) -> PagePlan:
        """The plan that most pages of this encoder have."""
        return self.plan("plain", key_bytes, self._steps["plain"])

    def largest_page_bytes(self, key_bytes: int) -> int:
        """The most memory that encoding any page takes."""
        return max(self.plan(which, key_bytes).page_bytes for which in self._ladders)

    def encode(
        self, which: str, keys: Sequence[bytes], views: PageViews, rows: Sequence[Row]
    ) -> list[memoryview | None]:
        """Encode pages, whose keys have one length, into the starts of `rows`; what of each row is
        the page, or None for one that cannot be as small as the budget wants it.

        A page with values the codec cannot hold is encoded again, raw.
        """
        first = self._steps[which]
        searches = [Search(self._ladders[which], self._limit, first) for _ in keys]
        sizes = [0] * len(keys)
        waiting = list(range(len(keys)))
        while waiting:
            step = searches[waiting[0]].step
            group = [index for index in waiting if searches[index].step == step]
            encoded = self._codec.encode_into(
                self.plan(which, len(keys[0]), step),
                [keys[index] for index in group],
                views.select(group),
                [rows[index] for index in group],
            )
            for index, size, outside in zip(group, *map(np.ndarray.tolist, encoded), strict=True):
                sizes[index] = size
                if outside:
                    sizes[index] = self._encode_raw(keys[index], views.select([index]), rows[index])
                    fits: bool | None = sizes[index] <= self._limit
                else:
                    fits = searches[index].judge(size)
                    if fits:
                        self._steps[which] = searches[index].step
                if fits is None:
                    self._counts.add("backup.reencoded")
                    continue
                waiting.remove(index)
                if not fits:
                    self._counts.add("backup.over_budget")
                    sizes[index] = 0
        pages = [row.data[:size] if size else None for row, size in zip(rows, sizes, strict=True)]
        kept = len(pages) - pages.count(None)
        self._counts.add("backup.raw_bytes", self._namespace.layout.raw_bytes * kept)
        self._counts.add("backup.encoded_bytes", sum(sizes))
        return pages

    def _encode_raw(self, key: bytes, view: PageViews, row: Row) -> int:
        plan = self.plan("raw", len(key))
        self._codec.encode_into(plan, [key], view, [row])
        self._counts.add("backup.nonfinite")
        return plan.page_bytes
