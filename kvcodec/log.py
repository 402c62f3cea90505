"""A log that stays quiet: one line per kind of event and minute, whatever a broken store does."""

from __future__ import annotations

import logging
import threading
import time

__all__ = ["RateLimitedLog"]


class RateLimitedLog:
    """One line per kind of event and interval, with the number of those left out. Thread-safe."""

    def __init__(self, logger: logging.Logger, interval_seconds: float = 60.0) -> None:
        self._logger = logger
        self._interval_seconds = interval_seconds
        self._quiet_until: dict[str, float] = {}
        self._left_out: dict[str, int] = {}
        self._lock = threading.Lock()

    def report(self, kind: str, message: str, *arguments: object) -> None:
        """Log unless an event of this kind was logged within the interval.

        `kind` is one of few: each is remembered for good.
        """
        now = time.monotonic()
        with self._lock:
            if now < self._quiet_until.get(kind, 0.0):
                self._left_out[kind] = self._left_out.get(kind, 0) + 1
                return
            self._quiet_until[kind] = now + self._interval_seconds
            left_out = self._left_out.pop(kind, 0)
        text = message % arguments
        if left_out:
            text += f" ({left_out} like this since the last line)"
        self._logger.warning("kvcodec: %s", text)
