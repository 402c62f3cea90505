"""Names, objects and short forms for the conformance suite."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence

__all__ = [
    "WRONG_NAMES",
    "fresh_name",
    "fresh_names",
    "fresh_namespace",
    "is_sealed",
    "new_buffers",
    "raised",
    "run_threads",
    "sealed",
    "skip",
]

#: What must never reach a store: no digest, upper case, a way out of the directory, a second line.
WRONG_NAMES = (
    "",
    "0" * 97,
    "0" * 32 + "/" + "0" * 63,
    "0" * 32 + "/" + "0" * 65,
    "A" * 32 + "/" + "0" * 64,
    "0" * 32 + "\\" + "0" * 64,
    "0" * 32 + "/" + "0" * 64 + "\n",
    "../" + "0" * 29 + "/" + "0" * 64,
    "0" * 32 + "/../" + "0" * 61,
    "/" + "0" * 31 + "/" + "0" * 64,
    "0" * 32 + "/" + "0" * 63 + "\0",
    "0" * 32 + "/" + "\u0660" * 64,
)


def fresh_namespace() -> str:
    """A namespace digest that nobody has used."""
    return os.urandom(16).hex()


def fresh_name(namespace: str | None = None) -> str:
    """An object name that nobody has used."""
    return f"{namespace or fresh_namespace()}/{os.urandom(32).hex()}"


def fresh_names(count: int) -> list[str]:
    """Names in one namespace."""
    namespace = fresh_namespace()
    return [fresh_name(namespace) for _ in range(count)]


def new_buffers(count: int) -> list[memoryview]:
    """Buffers for small objects."""
    return [memoryview(bytearray(100)) for _ in range(count)]


def sealed(seed: int, size: int) -> bytes:
    """Bytes that carry their own checksum: a mixture of two such objects is found out."""
    body = (hashlib.sha256(str(seed).encode()).digest() * (size // 32 + 1))[: size - 32]
    return hashlib.sha256(body).digest() + body


def is_sealed(data: bytes) -> bool:
    """Whether `data` is whole."""
    return hashlib.sha256(data[32:]).digest() == data[:32]


def raised(
    call: Callable[[], object],
    expected: type[BaseException] | tuple[type[BaseException], ...] = Exception,
) -> bool:
    """Whether `call` raises what is expected; anything else goes on its way."""
    try:
        call()
    except expected:
        return True
    return False


def run_threads(works: Sequence[Callable[[], None]]) -> None:
    """Run all at once; the first exception in any of them fails the test."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def skip(reason: str) -> None:
    """Skip the running test. pytest is there whenever this is called, and not needed before."""
    import pytest

    pytest.skip(reason)
