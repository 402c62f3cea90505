"""What the connectors of this process did, for whoever shows it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol
from weakref import WeakSet

__all__ = ["Counted", "connector_counters", "register_connector"]


class Counted(Protocol):
    """Something that counts what it does."""

    def counters(self) -> Mapping[str, int]:
        """Every count so far; never blocks."""


_lock = threading.Lock()
_connectors: WeakSet[Counted] = WeakSet()


def register_connector(connector: Counted) -> None:
    """Let the counters of a connector be seen for as long as it lives."""
    with _lock:
        _connectors.add(connector)


def connector_counters() -> list[dict[str, int]]:
    """The counters of each connector there is."""
    with _lock:
        connectors = list(_connectors)
    return [dict(connector.counters()) for connector in connectors]
