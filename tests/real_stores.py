"""Every kind of store that kvcodec knows, each real, behind its URL: for tests of what lies above.

    with real_store("redis", directory) as url:
        ...

A store that is not installed skips the test, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from server_juicefs import juicefs_volume
from server_redis import RedisServer

__all__ = ["STORES", "real_store"]


@contextmanager
def _file(directory: Path) -> Iterator[str]:
    yield f"file://{directory}/store"


@contextmanager
def _memory(directory: Path) -> Iterator[str]:
    yield f"memory://{os.urandom(8).hex()}"


@contextmanager
def _redis(directory: Path) -> Iterator[str]:
    with RedisServer(directory) as server:
        yield server.url


@contextmanager
def _redis_unix(directory: Path) -> Iterator[str]:
    with RedisServer(directory) as server:
        yield server.unix_url


@contextmanager
def _juicefs_mount(directory: Path) -> Iterator[str]:
    with juicefs_volume(directory) as volume, volume.mount() as mount:
        yield f"file://{mount.path}/store"


STORES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "file": _file,
    "memory": _memory,
    "redis": _redis,
    "redis+unix": _redis_unix,
    "juicefs mount": _juicefs_mount,
}


def real_store(name: str, directory: Path) -> AbstractContextManager[str]:
    """The URL of a running store of that kind, which ends with the context."""
    return STORES[name](directory)
