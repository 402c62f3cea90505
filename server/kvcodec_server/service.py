"""PageService over any store: what a sidecar does, without its listeners and its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from kvcodec.backend import Backend
from kvcodec.errors import ConfigError
from kvcodec_server.options import (
    CHUNK_BYTES,
    RELOADABLE,
    Observe,
    ServerOptions,
    ignore_observation,
)

__all__ = ["PageServer", "ServerOptions", "new_grpc_server"]

# A chunk with its frame, or a request that names as many objects as is allowed.
_MAX_MESSAGE_BYTES = CHUNK_BYTES + (3 << 20)
_MAX_METADATA_BYTES = 16 << 10


def new_grpc_server(
    options: ServerOptions, interceptors: Sequence[grpc.ServerInterceptor] = ()
) -> grpc.Server:
    """A gRPC server with the limits that `PageServer` counts on; it has no listener yet."""
    return grpc.server(
        ThreadPoolExecutor(options.grpc_threads, thread_name_prefix="kvcodec-grpc"),
        interceptors=list(interceptors),
        options=[
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", 4 * options.grpc_threads),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=4 * options.grpc_threads,
    )


class PageServer:
    """Serves the objects of `store`, which stays the caller's to close.

    Thread-safe. `stats` are numbers of now, `counters` only grow.
    """

    def __init__(
        self,
        store: Backend,
        options: ServerOptions | None = None,
        observe: Observe = ignore_observation,
    ) -> None:
        self.store = store
        self.options = options or ServerOptions()
        self._observe = observe

    def add_to(self, grpc_server: grpc.Server) -> None:
        """Register PageService. Calls that come over a Unix socket need a session."""

    def listen(self, region_path: str | Path, *, mode: int = 0o660) -> None:
        """Take regions on this Unix socket: for a gRPC listener on ``unix:<path>`` it is
        ``<path>.region``. Raises `ConfigError` if the socket cannot be made.
        """

    def reconfigure(self, options: ServerOptions) -> None:
        """Take over the limits that can change while running; what is under way keeps its own.

        Raises `ConfigError`, and changes nothing, if another option differs.
        """
        fixed = set(self.options.changed(options)) - RELOADABLE
        if fixed:
            raise ConfigError(f"{', '.join(sorted(fixed))}: only a restart changes that")
        self.options = options

    def stats(self) -> Mapping[str, int]:
        """Gauges: ``calls``, ``streams``, ``sessions``, ``region_bytes``, ``staging_bytes``,
        ``reads_refused`` and ``writes_refused`` (1 while that breaker is open), ``draining``.
        """
        return {}

    def counters(self) -> Mapping[str, int]:
        """Monotonic counts, ``operation.outcome`` per object, the store's own under ``backend.``;
        never blocks.
        """
        return {}

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new calls (UNAVAILABLE) and wait for those under way; whether all ended."""
        del timeout_seconds
        return True

    def close(self) -> None:
        """End the sessions and the threads. Twice is fine."""
