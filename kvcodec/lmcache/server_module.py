r"""kvcodec's extension of LMCache's server, for its option ``--server-module``::

    lmcache server ... --server-module \
      '{"module_path": "kvcodec.lmcache.server_module", "config": {"port": 65500}}'

It lends LMCache's memory to kvcodec as the store ``lmcache://host:65500``, and shows in LMCache's
``/status`` what this store and the connectors of the process do.

config:

=============  ===========  =====================================================================
port           none         where the store listens; without it there is only the status
host           127.0.0.1    the address it listens on. There is no authentication: whoever reaches
                            the port may read, replace and delete every object.
cache_salt     ""           the name under which LMCache's quotas count the objects
=============  ===========  =====================================================================
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvcodec.errors import ConfigError
from kvcodec.lmcache.objects import Objects
from kvcodec.lmcache.service import Service
from kvcodec.lmcache.statistics import connector_counters

if TYPE_CHECKING:
    from lmcache.v1.multiprocess.engine_context import MPCacheServerContext
    from lmcache.v1.multiprocess.ext_server_module import ExtServerModuleBuildContext

__all__ = ["SUPPORTED_RELEASES", "ServerModule", "build_server_modules"]

logger = logging.getLogger(__name__)

#: LMCache's storage manager changes with nearly every release; others are refused.
SUPPORTED_RELEASES = ("0.5.6",)
_OPTIONS = frozenset({"port", "host", "cache_salt"})


def build_server_modules(build_context: ExtServerModuleBuildContext) -> ServerModule:
    """What LMCache calls. Raises `ConfigError` for an option or a release it does not know."""
    return ServerModule(build_context.server_context, build_context.config)


class ServerModule:
    """An engine module in LMCache's sense: a context, a status, an end."""

    def __init__(self, context: MPCacheServerContext, config: Mapping[str, object]) -> None:
        host, port, cache_salt = _parse(config)
        self._context = context
        self._objects: Objects | None = None
        self._service: Service | None = None
        if port is None:
            return
        _check_release(importlib.metadata.version("lmcache"))
        self._objects = Objects(context.storage_manager, cache_salt=cache_salt)
        try:
            self._service = Service(self._objects, host, port)
        except OSError as error:
            self._objects.close()
            raise ConfigError(f"kvcodec cannot listen on {host}:{port}: {error}") from error
        logger.warning("kvcodec's store listens on %s:%d", host, self._service.port)

    @property
    def context(self) -> MPCacheServerContext:
        """LMCache's own context."""
        return self._context

    def report_status(self) -> dict[str, object]:
        """A part of LMCache's ``/status``: counts of the store and of each connector."""
        status: dict[str, object] = {"connectors": connector_counters()}
        if self._objects is not None and self._service is not None:
            store = self._objects.status() | {"connections": self._service.connection_count()}
            status["store"] = store
        return {"kvcodec": status}

    def close(self) -> None:
        """Take no more requests."""
        if self._service is not None:
            self._service.close()
        if self._objects is not None:
            self._objects.close()


def _parse(config: Mapping[str, object]) -> tuple[str, int | None, str]:
    unknown = sorted(set(config) - _OPTIONS)
    if unknown:
        raise ConfigError(
            f"unknown option {unknown[0]!r} of kvcodec.lmcache.server_module; known are "
            f"{', '.join(sorted(_OPTIONS))}"
        )
    port, host, salt = config.get("port"), config.get("host", "127.0.0.1"), config.get("cache_salt")
    is_port = isinstance(port, int) and not isinstance(port, bool) and 0 <= port <= 65535
    if port is not None and not is_port:
        raise ConfigError(f"port is {port!r}, allowed is 0 to 65535; 0 is any that is free")
    if not isinstance(host, str) or not host:
        raise ConfigError(f"host is {host!r}, wanted an address such as 127.0.0.1")
    if not isinstance(salt, str | None):
        raise ConfigError(f"cache_salt is {salt!r}, wanted a text")
    if port is None and len(config):
        raise ConfigError(f"{', '.join(sorted(config))} without port has no effect")
    assert port is None or isinstance(port, int)
    return host, port, salt or ""


def _check_release(version: str) -> None:
    # Builds of a release ("0.5.6+cu130") and repairs of its package ("0.5.6.post1") count as it.
    release = ".".join(version.partition("+")[0].split(".")[:3])
    if release not in SUPPORTED_RELEASES:
        raise ConfigError(
            f"LMCache {version} is none that kvcodec's store was tested in "
            f"({', '.join(SUPPORTED_RELEASES)}): pip install 'lmcache=={SUPPORTED_RELEASES[-1]}', "
            "or leave out the port; kvcodec as an L2 adapter needs no certain release"
        )
