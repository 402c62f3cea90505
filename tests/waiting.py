"""Waiting for what another thread or process is about to do."""

from __future__ import annotations

import time
from collections.abc import Callable

#: How late a call may end after its deadline on a loaded machine; what hangs in tests hangs longer.
SLACK_SECONDS = 5.0


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Seconds until it was true; fails the test if it is not within `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"it was not true within {seconds:g} s"
        time.sleep(0.005)
    return time.monotonic() - started
