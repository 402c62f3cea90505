"""What the page stores of one process share: a backend behind circuit breakers, threads, staging
memory and counters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from kvcodec.backend import Backend, check_number, parse_byte_count
from kvcodec.codec import Codec
from kvcodec.guard import Breaker
from kvcodec.log import RateLimitedLog
from kvcodec.workers import Buffers, Counters, IOThreads

__all__ = ["Pipeline", "StoreOptions"]

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """How much a pipeline may use, and how long a call may take.

    `buffer_bytes` bounds staging memory. A stored page with fewer than `minimum_bits` bits per
    element is a miss. No page is stored with more than `max_page_bytes` bytes (0: no bound): `ecq`
    sections lose bits until it fits, down to `minimum_bits`. A store that lets a whole call pass
    without an answer, or fails in `breaker_failures` calls in a row, is not asked again before
    `breaker_cooldown_seconds` and a probe that succeeds; 0 failures switch this off.
    """

    codec_threads: int = 2
    io_threads: int = 4
    buffer_bytes: int = 256 << 20
    exists_timeout_seconds: float = 0.5
    prefetch_timeout_seconds: float = 5.0
    backup_timeout_seconds: float = 10.0
    minimum_bits: int = 0
    max_page_bytes: int = 0
    breaker_failures: int = 3
    breaker_cooldown_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name, whole, low, high in (
            ("codec_threads", True, 1, 64),
            ("io_threads", True, 1, 256),
            ("buffer_bytes", True, 1 << 16, 1 << 40),
            ("exists_timeout_seconds", False, 0.001, 3600),
            ("prefetch_timeout_seconds", False, 0.001, 3600),
            ("backup_timeout_seconds", False, 0.001, 3600),
            ("minimum_bits", True, 0, 32),
            ("max_page_bytes", True, 0, 1 << 32),
            ("breaker_failures", True, 0, 1_000_000),
            ("breaker_cooldown_seconds", False, 0.01, 3600),
        ):
            check_number(name, getattr(self, name), whole, low, high)

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> StoreOptions:
        """From a user's options; numbers of bytes may be texts such as ``"256MiB"``. Raises
        `ConfigError`.
        """
        values = dict(options)
        for name in ("buffer_bytes", "max_page_bytes"):
            value = values.get(name)
            if isinstance(value, str):
                values[name] = parse_byte_count(name, value)
        return cls(**values)  # type: ignore[arg-type]


class Pipeline:
    """A backend with the threads, buffers and counters that the page stores of one process share.

    Counters are named ``operation.outcome``, such as ``prefetch.hit``,
    ``prefetch.corrupt:section_checksum``, ``backup.stored`` or ``backup.full``. Reading and writing
    have a breaker each: a full disk or a choked uplink must not cost the hits.
    """

    def __init__(self, backend: Backend, options: StoreOptions | None = None) -> None:
        self.backend = backend
        self.options = options or StoreOptions()
        self.codec = Codec(self.options.codec_threads)
        self.io = IOThreads(self.options.io_threads)
        self.buffers = Buffers(self.options.buffer_bytes, backend.staging_memory, backend.is_idle)
        self.counts = Counters()
        self._log = RateLimitedLog(logger)
        self.reads = self._breaker("read")
        self.writes = self._breaker("write")

    def _breaker(self, name: str) -> Breaker:
        def probe() -> None:
            # A name nobody has: the answer is None, or the store is not well.
            unknown = f"{os.urandom(16).hex()}/{os.urandom(32).hex()}"
            self.backend.stat(unknown, timeout_seconds=_PROBE_SECONDS)

        def recovered() -> None:
            longest = max(
                self.options.exists_timeout_seconds,
                self.options.prefetch_timeout_seconds,
                self.options.backup_timeout_seconds,
            )
            self.counts.add("io.replaced_threads", self.io.replace_stuck(longest))

        return Breaker(
            name,
            probe,
            self.counts,
            self._log,
            failures=self.options.breaker_failures,
            cooldown_seconds=self.options.breaker_cooldown_seconds,
            recovered=recovered,
        )

    def counters(self) -> dict[str, int]:
        """Every count so far, the backend's own under ``backend.``; never blocks."""
        own = self.counts.snapshot()
        return own | {f"backend.{name}": count for name, count in self.backend.counters().items()}

    def guarded(self, operation: str, call: Callable[[], T]) -> T | None:
        """The result of a backend call; None, counted and logged now and then, if it raises.

        A backend answers with errors and raises none; but it may be anybody's code, and an I/O
        thread must outlive it.
        """
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - the border to code that is not ours
            self._log.report(operation, "the backend raised during %s: %r", operation, error)
            self.counts.add(f"{operation}.raised")
            return None

    def close(self) -> None:
        """Finish what is under way (briefly), then let go of threads and store. Twice is fine."""
        self.stop()
        self.backend.close()

    def stop(self) -> None:
        """The same, for a backend that goes on without this pipeline."""
        self.reads.close()
        self.writes.close()
        self.io.close(timeout_seconds=2.0)
        self.codec.close()
        self.buffers.close()
