"""What the adapter tells SGLang of itself: its batches, for SGLang's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.observability.metrics_collector import StorageMetrics

__all__ = ["TransferStats"]


class TransferStats:
    """Pages and GB/s of each batch, in the lists that SGLang's metrics consume.

    `take` swaps the lists for new ones: the scheduler's thread, which asks at every step, waits for
    nothing. A batch that ends at that very moment may be left out.
    """

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._metrics = _empty() if is_wanted else None

    def add_prefetch(self, results: Sequence[bool], page_bytes: int, seconds: float) -> None:
        """A batch of pages was read; `page_bytes` are those of a raw page."""
        metrics = self._metrics
        if metrics is not None and any(results):
            metrics.prefetch_pgs.append(sum(results))
            metrics.prefetch_bandwidth.append(_gigabytes(results, page_bytes, seconds))

    def add_backup(self, results: Sequence[bool], page_bytes: int, seconds: float) -> None:
        """A batch of pages was stored."""
        metrics = self._metrics
        if metrics is not None and any(results):
            metrics.backup_pgs.append(sum(results))
            metrics.backup_bandwidth.append(_gigabytes(results, page_bytes, seconds))

    def take(self) -> StorageMetrics | None:
        """Everything since the last question, None if SGLang does not collect metrics."""
        if not self._is_wanted:
            return None
        taken, self._metrics = self._metrics, _empty()
        return taken


def _empty() -> StorageMetrics:
    from sglang.srt.observability.metrics_collector import StorageMetrics

    return StorageMetrics()


def _gigabytes(results: Sequence[bool], page_bytes: int, seconds: float) -> float:
    return sum(results) * page_bytes / max(seconds, 1e-9) / 1e9
