"""A circuit breaker around a store: one that does not answer is asked no more until it does.

Without it every call of an engine would wait for its deadline as long as a store hangs. The breaker
opens after one call that used up its time without a single answer, or after several in a row that
brought nothing but errors. While it is open, calls are refused at once, which costs an engine
nothing; a thread of the breaker's own asks the store from time to time whether it is back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvcodec.errors import BackendError, BackendTimeout
from kvcodec.log import RateLimitedLog
from kvcodec.workers import Counters, IOThreads

__all__ = ["Attempt", "Breaker"]

_PROBE_SECONDS = 2.0
# Probes that hang for ever keep their threads; with so many of them hanging, no more are started.
_PROBE_THREADS = 4
_MAX_COOLDOWN_FACTOR = 64
# How soon it is asked after the first opening: perhaps it only took its time to connect.
_FIRST_FACTOR = 0.05


class Attempt:
    """What one call of the engine has learnt about the store so far."""

    __slots__ = ("answered", "failed", "silent")

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self.silent = 0

    def note(self, answers: Sequence[object] | None) -> None:
        """Answers per object as a backend gives them; None if it raised."""
        if answers is None:
            self.failed += 1
        for answer in answers or ():
            if isinstance(answer, BackendTimeout):
                self.silent += 1
            elif type(answer) is BackendError:
                self.failed += 1
            else:
                # An object, none, or a store that is full or read-only and says so.
                self.answered += 1


class Breaker:
    """Decides whether a store is asked. Thread-safe; no method but `close` ever waits.

    `probe` asks the store anything that it answers at once when it is well, and raises when it is
    not: soon after the first opening, then every cooldown. A breaker that opens again without an
    answer in between stays open for one cooldown at least, and twice as long each time, up to 64: a
    store that answers probes and nothing else must not cost a deadline each time.
    """

    def __init__(
        self,
        name: str,
        probe: Callable[[], object],
        counts: Counters,
        log: RateLimitedLog,
        *,
        failures: int,
        cooldown_seconds: float,
        recovered: Callable[[], None] = lambda: None,
    ) -> None:
        """`failures` calls in a row with nothing but errors open it; 0 keeps it closed for good.
        `recovered` is called when it closes again.
        """
        self.name = name
        self._probe = probe
        self._counts = counts
        self._log = log
        self._failures = failures
        self._cooldown_seconds = cooldown_seconds
        self._recovered = recovered
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._openings_in_a_row = 0
        self._open = False
        self._closing = threading.Event()
        self._probes = IOThreads(_PROBE_THREADS, limit=_PROBE_THREADS)

    @property
    def admits(self) -> bool:
        """Whether the store is asked."""
        return not self._open

    def settle(self, attempt: Attempt) -> None:
        """A call is over. One answer is enough: the store lives."""
        if not self._failures or not (attempt.answered or attempt.failed or attempt.silent):
            return
        with self._lock:
            if attempt.answered:
                self._failed_in_a_row = self._openings_in_a_row = 0
                return
            self._failed_in_a_row += self._failures if attempt.silent else 1
            if self._open or self._failed_in_a_row < self._failures:
                return
            self._open = True
            factor = min(2.0 ** (self._openings_in_a_row - 1), _MAX_COOLDOWN_FACTOR)
            if not self._openings_in_a_row:
                factor = _FIRST_FACTOR
            self._openings_in_a_row += 1
        seconds = self._cooldown_seconds * factor
        self._counts.add(f"{self.name}_breaker.opened")
        what = "does not answer" if attempt.silent else "answers with errors only"
        self._log.report(
            f"{self.name} breaker",
            "the store %s: no %ss for %.3g s at least",
            what,
            self.name,
            seconds,
        )
        threading.Thread(
            target=self._wait_for_store, args=(seconds,), name="kvcodec-breaker", daemon=True
        ).start()

    def close(self) -> None:
        """Probe no more."""
        self._closing.set()
        self._probes.close(timeout_seconds=0.0)

    def _wait_for_store(self, seconds: float) -> None:
        while not self._closing.wait(seconds):
            if self._probes.call(self._answers, False, _PROBE_SECONDS):
                break
            self._counts.add(f"{self.name}_breaker.probe_failed")
            # A probe costs next to nothing; being late costs every hit until the next one.
            seconds = self._cooldown_seconds
        if self._closing.is_set():
            return
        self._recovered()
        self._counts.add(f"{self.name}_breaker.closed")
        self._log.report(f"{self.name} breaker closed", "the store answers again: %ss", self.name)
        with self._lock:
            # The next failure counts anew, but how often it opened is kept until a call succeeds.
            self._failed_in_a_row = 0
            self._open = False

    def _answers(self) -> bool:
        started = time.monotonic()
        try:
            self._probe()
        except Exception:  # noqa: BLE001 - the border to code that is not ours
            return False
        return time.monotonic() - started < _PROBE_SECONDS
