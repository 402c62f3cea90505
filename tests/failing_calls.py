"""System calls that fail when a test says so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


class FailingCalls:
    """Counts the system calls in `calls` that are made through `os`, and lets some of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: str) -> None:
        self.count = 0
        self.fails: Callable[[int], bool] = lambda number: False
        self.code = errno.EIO
        for call in calls.split():
            monkeypatch.setattr(os, call, self.wrapped(call, getattr(os, call)))

    def wrapped(self, call: str, real: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **options: object) -> object:
            self.count += 1
            if self.fails(self.count):
                if call == "close":
                    # Linux closes a descriptor even if close reports an error.
                    real(*arguments, **options)
                raise OSError(self.code, f"injected into {call}")
            return real(*arguments, **options)

        return wrapper

    @contextmanager
    def failing(self, code: int, fails: Callable[[int], bool]) -> Iterator[None]:
        self.count, self.code, self.fails = 0, code, fails
        try:
            yield
        finally:
            self.fails = lambda number: False
