"""Tiers over stores, and short forms of their calls, for the tests of TierBackend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest
from fake_backend import FakeBackend

from kvcodec.backend import Backend
from kvcodec_backends import tier as tier_module
from kvcodec_backends.tier import TierBackend


def tier_url(store: str, **options: object) -> str:
    words = [f"{name}={value}" for name, value in ({"bytes": "64MiB"} | options).items()]
    return "tier+ram://?" + "&".join([*words, f"store={quote(store)}"])


def name(number: int, namespace: int = 0) -> str:
    return f"{namespace:032x}/{number:064x}"


def data(number: int, size: int = 1000) -> bytes:
    return bytes((number + index) & 255 for index in range(size))


def put(backend: Backend, *numbers: int, size: int = 1000, seconds: float = 5) -> list:
    views = [memoryview(data(number, size)) for number in numbers]
    return backend.put([name(number) for number in numbers], views, timeout_seconds=seconds)


def get(backend: Backend, *numbers: int, size: int = 1000, seconds: float = 5) -> list:
    """The objects, or what was answered in place of a length."""
    buffers = [bytearray(size) for _ in numbers]
    answers = backend.get_into(
        [name(number) for number in numbers],
        list(map(memoryview, buffers)),
        timeout_seconds=seconds,
    )
    return [
        bytes(buffer[:answer]) if isinstance(answer, int) else answer
        for buffer, answer in zip(buffers, answers, strict=True)
    ]


def fake_stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple]]:
    """For a fixture: makes tiers with the options it is given, each over its own FakeBackend."""
    made: list[TierBackend] = []

    def make(**options: object) -> tuple[TierBackend, FakeBackend]:
        store = FakeBackend()
        monkeypatch.setattr(tier_module, "open_backend", lambda url, **_: store)
        backend = TierBackend.from_url(tier_url(f"fake://{len(made)}", **options))
        made.append(backend)
        return backend, store

    yield make
    for backend in made:
        backend.close()
