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

import server_juicefs
import server_s3
from real_server import free_port
from server_juicefs import juicefs_volume
from server_lmcache import MPServer, legacy_server
from server_mooncake import MooncakeMaster, mooncake_provider, use_mooncake
from server_redis import RedisServer
from server_s3 import s3_server

__all__ = ["STORES", "real_store"]


@contextmanager
def _file(directory: Path) -> Iterator[str]:
    yield f"file://{directory}/store"


@contextmanager
def _segments(directory: Path) -> Iterator[str]:
    yield f"file://{directory}/store?engine=segments&segment_bytes=8MiB&max_bytes=64MiB"


@contextmanager
def _memory(directory: Path) -> Iterator[str]:
    yield f"memory://{os.urandom(8).hex()}"


@contextmanager
def _tier(directory: Path) -> Iterator[str]:
    yield f"tier+ram://?bytes=64MiB&store=file://{directory}/store"


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


@contextmanager
def _juicefs_gateway(directory: Path) -> Iterator[str]:
    with juicefs_volume(directory) as volume, volume.gateway() as (_, port):
        login = f"key={server_juicefs.USER}&secret={server_juicefs.PASSWORD}"
        yield f"fsspec+s3://{volume.name}/pages?endpoint_url=http://127.0.0.1:{port}&{login}"


@contextmanager
def _s3(directory: Path) -> Iterator[str]:
    with s3_server(directory) as server:
        login = f"key={server_s3.USER}&secret={server_s3.PASSWORD}"
        yield f"fsspec+s3://pages?endpoint_url={server.endpoint}&{login}"


@contextmanager
def _lmcache(directory: Path) -> Iterator[str]:
    server = MPServer()
    with server.server:
        yield server.url


@contextmanager
def _lm(directory: Path) -> Iterator[str]:
    port = free_port()
    with legacy_server(port):
        yield f"lm://127.0.0.1:{port}"


@contextmanager
def _hicache_file(directory: Path) -> Iterator[str]:
    yield f"hicache+file://?file_storage_path={directory}&slot_bytes=1MiB"


@contextmanager
def _mooncake(directory: Path) -> Iterator[str]:
    use_mooncake()
    with MooncakeMaster() as master, mooncake_provider(master):
        yield master.url


STORES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "file": _file,
    "file, segments": _segments,
    "memory": _memory,
    "tier+ram": _tier,
    "redis": _redis,
    "redis+unix": _redis_unix,
    "juicefs mount": _juicefs_mount,
    "juicefs gateway": _juicefs_gateway,
    "s3": _s3,
    "lmcache": _lmcache,
    "lm": _lm,
    "hicache+file": _hicache_file,
    "hicache+mooncake": _mooncake,
}


def real_store(name: str, directory: Path) -> AbstractContextManager[str]:
    """The URL of a running store of that kind, which ends with the context."""
    return STORES[name](directory)
