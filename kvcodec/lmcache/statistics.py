"""What the connectors of this process did, for whoever shows it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

__all__ = ["connector_counters", "register_connector"]

_lock = threading.Lock()
_connectors: WeakKeyDictionary[object, Callable[[], Mapping[str, int]]] = WeakKeyDictionary()


def register_connector(connector: object, counters: Callable[[], Mapping[str, int]]) -> None:
    """Let the counters of a connector be seen for as long as it lives."""
    with _lock:
        _connectors[connector] = counters


def connector_counters() -> list[dict[str, int]]:
    """The counters of each connector there is."""
    with _lock:
        readers = list(_connectors.values())
    return [dict(counters()) for counters in readers]
