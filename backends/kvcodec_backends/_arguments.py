"""What every backend asks of its arguments, and the deadline of one call."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvcodec.backend import check_name
from kvcodec.errors import BackendError, BackendTimeout, ConfigError

__all__ = ["Deadline", "checked_buffers", "checked_names", "checked_objects", "closed_error"]


class Deadline:
    """The moment a call has to answer by, on the clock that nobody can set."""

    __slots__ = ("_at", "_timeout_seconds")

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._at = time.monotonic() + timeout_seconds

    def passed(self) -> bool:
        """Whether it is too late to start anything."""
        return time.monotonic() >= self._at

    def remaining_seconds(self) -> float:
        """How much time is left for the next step; never negative."""
        return max(0.0, self._at - time.monotonic())

    def error(self, verb: str, name: str) -> BackendTimeout:
        """The answer for an object that was not reached."""
        return BackendTimeout(f"{verb} {name}: not reached within {self._timeout_seconds:g} s")


def checked_names(names: Sequence[str]) -> list[str]:
    """The names, each of the one allowed form; `ConfigError` otherwise."""
    return [check_name(name) for name in names]


def checked_objects(
    names: Sequence[str], objects: Sequence[memoryview]
) -> list[tuple[str, memoryview]]:
    """Names paired with flat views of the bytes to store; `ConfigError` for what cannot be stored.

    An empty object is refused: a page is never empty, while a file of no bytes is what a crash
    leaves behind, and a reader has to be able to tell them apart.
    """
    pairs = _paired(names, objects, "objects")
    for name, view in pairs:
        if not len(view):
            raise ConfigError(f"object {name} is empty; an object has at least one byte")
    return pairs


def checked_buffers(
    names: Sequence[str], buffers: Sequence[memoryview]
) -> list[tuple[str, memoryview]]:
    """Names paired with flat writable views of the buffers to read into."""
    pairs = _paired(names, buffers, "buffers")
    for name, view in pairs:
        if view.readonly:
            raise ConfigError(f"the buffer for {name} is read-only")
    return pairs


def closed_error(url: str) -> BackendError:
    """The answer of a backend that was closed."""
    return BackendError(f"{url} is closed")


def _paired(
    names: Sequence[str], views: Sequence[memoryview], what: str
) -> list[tuple[str, memoryview]]:
    if len(names) != len(views):
        raise ConfigError(f"{len(names)} names for {len(views)} {what}")
    pairs = []
    for name, view in zip(names, views, strict=True):
        check_name(name)
        if not view.c_contiguous:
            raise ConfigError(f"the memory for {name} is not contiguous")
        pairs.append((name, view if view.format == "B" and view.ndim == 1 else view.cast("B")))
    return pairs
