"""Waiting for what another thread or process is about to do."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Return as soon as it is true; fail the test if it is not within `seconds`."""
    stop_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop_at, f"it was not true within {seconds:g} s"
        time.sleep(0.005)
