"""Encoders: what a page store encodes with, one spec or the quickest of several."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvcodec.auto import BatchTimer, SpecChooser, measure_costs
from kvcodec.budget import check_budget
from kvcodec.encoding import PageEncoder
from kvcodec.identity import Namespace
from kvcodec.pipeline import Pipeline
from kvcodec.plan import check_spec
from kvcodec.rotary import Rotary
from kvcodec.spec import CodecSpec

__all__ = ["Encoders"]

logger = logging.getLogger(__name__)

#: Length of the keys that costs are measured with; any will do.
_KEY_BYTES = 64


class Encoders:
    """A `PageEncoder` for each of the specs of a store, the preferred one first. Thread-safe.

    With more than one, the speeds of codec and store choose between them, as `kvcodec.auto` tells.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        namespace: Namespace,
        specs: Sequence[CodecSpec],
        *,
        protected_spec: CodecSpec | None,
        rotary: Rotary | None,
    ) -> None:
        """Raises `ConfigError` where a spec cannot be honoured for this layout, or never within
        the byte budget.
        """
        self._pipeline = pipeline
        self._namespace = namespace
        limit, minimum_bits = pipeline.options.max_page_bytes, pipeline.options.minimum_bits
        for checked in (*specs, protected_spec or CodecSpec()):
            check_spec(checked, namespace.layout, minimum_bits)
        for bound in filter(None, (*specs, protected_spec) if limit else ()):
            check_budget(bound, namespace, limit_bytes=limit, minimum_bits=minimum_bits)
        self._encoders = [
            PageEncoder(
                pipeline.codec,
                namespace,
                pipeline.counts,
                spec=spec,
                protected_spec=protected_spec or CodecSpec(),
                rotary=rotary,
                max_page_bytes=limit,
                minimum_bits=minimum_bits,
            )
            for spec in specs
        ]
        self._specs = specs
        self._chooser: SpecChooser | None = None

    @property
    def spec(self) -> CodecSpec:
        """The spec that pages are encoded by now."""
        return self._specs[self._index]

    @property
    def present(self) -> PageEncoder:
        """The encoder in use."""
        return self._encoders[self._index]

    @property
    def _index(self) -> int:
        return 0 if self._chooser is None else self._chooser.index

    def largest_page_bytes(self, key_bytes: int) -> int:
        """The most memory that encoding any page takes."""
        return max(encoder.largest_page_bytes(key_bytes) for encoder in self._encoders)

    def measure(self, chunk_pages: int) -> None:
        """Learn the speeds of the codecs, where there is a choice: a few tenths of a second.
        `chunk_pages` go to the store at once.
        """
        layout = self._namespace.layout
        if len(self._encoders) == 1 or not layout.dtype.is_quantizable:
            return
        costs = measure_costs(
            self._pipeline.codec,
            self._pipeline.options.codec_threads,
            self._namespace,
            [encoder.plan("plain", _KEY_BYTES) for encoder in self._encoders],
        )
        self._chooser = SpecChooser(costs, page_bytes=layout.raw_bytes, chunk_pages=chunk_pages)

    def choose(self) -> PageEncoder:
        """The encoder for the next batch, another than before where the speeds ask for it."""
        if self._chooser and self._chooser.consider():
            self._pipeline.counts.add("auto.changed")
            logger.info(
                "kvcodec: pages of %s are encoded by %r from now on (%s)",
                self._namespace.digest.hex(),
                self.spec.text,
                self._chooser,
            )
        return self.present

    def note_pages(self, encoder: PageEncoder, pages: Sequence[memoryview]) -> None:
        """An encoder has made these of plain pages."""
        if self._chooser and pages:
            raw_bytes = self._namespace.layout.raw_bytes * len(pages)
            stored_bytes = sum(len(page) for page in pages)
            self._chooser.note_size(self._encoders.index(encoder), raw_bytes, stored_bytes)

    def note_write(self, timer: BatchTimer) -> None:
        """A batch has gone to the store."""
        if self._chooser:
            self._chooser.writes.add(timer.bytes, timer.seconds)

    def note_read(self, timer: BatchTimer) -> None:
        """A batch has come from the store."""
        if self._chooser:
            self._chooser.reads.add(timer.bytes, timer.seconds)
