"""PageEncoder: raw pages of one namespace become encoded ones, under the specs of a store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcodec.codec import Codec
from kvcodec.identity import Namespace
from kvcodec.layout import PageViews
from kvcodec.plan import PagePlan
from kvcodec.rotary import Rotary
from kvcodec.spec import CodecSpec
from kvcodec.workers import Counters

__all__ = ["PageEncoder"]


class PageEncoder:
    """Encodes pages of one namespace: ``plain`` and ``protected`` ones each by their spec, ``raw``
    ones bit for bit. Thread-safe.
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
    ) -> None:
        """`rotary` tells how the model rotates its keys, for codecs that can use it."""
        self._codec = codec
        self._namespace = namespace
        self._counts = counts
        self._rotary = rotary
        self._specs = {"plain": spec, "protected": protected_spec, "raw": CodecSpec()}
        self._plans: dict[tuple[str, int], PagePlan] = {}

    def plan(self, which: str, key_bytes: int) -> PagePlan:
        """The plan of pages with keys of that length: ``plain``, ``protected`` or ``raw``."""
        plan = self._plans.get((which, key_bytes))
        if plan is None:
            plan = self._plans[which, key_bytes] = PagePlan.for_spec(
                self._namespace, self._specs[which], key_bytes, self._rotary
            )
        return plan

    def largest_page_bytes(self, key_bytes: int) -> int:
        """The most bytes that any page takes."""
        return max(self.plan(which, key_bytes).page_bytes for which in self._specs)

    def encode(
        self,
        which: str,
        keys: Sequence[bytes],
        views: PageViews,
        rows: Sequence[npt.NDArray[np.uint8]],
    ) -> list[memoryview]:
        """Encode pages, whose keys have one length, into the starts of `rows`; what of each row is
        the page. A page with values the codec cannot hold is encoded again, raw.
        """
        plan, raw = self.plan(which, len(keys[0])), self.plan("raw", len(keys[0]))
        encoded = self._codec.encode_into(plan, keys, views, rows)
        sizes = encoded.page_bytes.tolist()
        for row in np.flatnonzero(encoded.nonfinite_groups).tolist():
            self._codec.encode_into(raw, [keys[row]], views.select([row]), [rows[row]])
            sizes[row] = raw.page_bytes
            self._counts.add("backup.nonfinite")
        self._counts.add("backup.raw_bytes", self._namespace.layout.raw_bytes * len(keys))
        self._counts.add("backup.encoded_bytes", sum(sizes))
        return [row.data[:size] for row, size in zip(rows, sizes, strict=True)]
