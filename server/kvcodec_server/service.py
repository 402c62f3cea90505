"""PageService over any store: what a sidecar does, without its listeners and its configuration."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from kvcodec.backend import Backend
from kvcodec.errors import ConfigError
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server._frames import parse_put, serialized
from kvcodec_server._places import Admission, Room, only
from kvcodec_server._servicer import Servicer
from kvcodec_server.options import (
    CHUNK_BYTES,
    RELOADABLE,
    Observe,
    ServerOptions,
    ignore_observation,
)
from kvcodec_server.region import RegionServer

__all__ = ["PageServer", "ServerOptions", "new_grpc_server"]

# A chunk with its frame, or a request that names as many objects as is allowed.
_MAX_MESSAGE_BYTES = CHUNK_BYTES + (3 << 20)
_MAX_METADATA_BYTES = 16 << 10
# A connection that is silent is asked so often whether it still is one, and left without an answer:
# a client that vanished, or a firewall that forgot, says nothing. An answer may have to wait behind
# what a slow network has to carry.
_PING_SECONDS = 10.0
_ANSWER_SECONDS = 20.0
# Who connects and does not say the first word of HTTP/2, or has no call for that long, goes too.
_HANDSHAKE_SECONDS = 10.0
_IDLE_SECONDS = 600.0
# Of one listener; each takes a descriptor, which the store needs as well.
_MAX_CONNECTIONS = 1024
# Clients may ask, too; who does so more often than that is a flood.
_LEAST_PING_SECONDS = 5.0


def new_grpc_server(
    options: ServerOptions,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    crowded: Callable[[], object] = lambda: None,
) -> grpc.Server:
    """A gRPC server with the limits that `PageServer` counts on; it has no listener yet.

    `crowded` hears of every call that is refused because there are too many.
    """
    # Some threads are left to those that are on their way in or out.
    places = options.grpc_threads - max(1, options.grpc_threads // 8)
    return grpc.server(
        ThreadPoolExecutor(options.grpc_threads, thread_name_prefix="kvcodec-grpc"),
        # Who has no token or certificate is refused before that, and is never waited for.
        interceptors=[*interceptors, Admission(places, crowded)],
        options=[
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
            # Of one connection, which is not all there may be.
            ("grpc.max_concurrent_streams", max(1, options.grpc_threads // 8)),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", int(1000 * _PING_SECONDS)),
            ("grpc.keepalive_timeout_ms", int(1000 * _ANSWER_SECONDS)),
            # The one above has no effect without this one, which is a minute.
            ("grpc.http2.ping_timeout_ms", int(1000 * _ANSWER_SECONDS)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", int(1000 * _LEAST_PING_SECONDS)),
            ("grpc.server_handshake_timeout_ms", int(1000 * _HANDSHAKE_SECONDS)),
            ("grpc.max_allowed_incoming_connections", _max_connections()),
            ("grpc.max_connection_idle_ms", int(1000 * _IDLE_SECONDS)),
        ],
        maximum_concurrent_rpcs=2 * options.grpc_threads,
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
        crowded: Callable[[], object] = lambda: None,
    ) -> None:
        """`crowded` hears of every stream that is refused because there are too many."""
        self.store = store
        self._servicer = Servicer(store, options or ServerOptions(), observe)
        self._streams = Room("streams", "max_streams", lambda: self.options.max_streams, crowded)
        self._regions: list[RegionServer] = []

    @property
    def options(self) -> ServerOptions:
        """The limits in force."""
        return self._servicer.options

    def add_to(self, grpc_server: grpc.Server) -> None:
        """Register PageService. Calls that come over a Unix socket need a session."""
        grpc_server.add_generic_rpc_handlers((_handlers(self._servicer, self._streams),))

    def listen(self, region_path: str | Path, *, mode: int = 0o660) -> None:
        """Take regions on this Unix socket: for a gRPC listener on ``unix:<path>`` it is
        ``<path>.region``. Raises `ConfigError` if the socket cannot be made.
        """
        server = RegionServer(region_path, self._servicer.sessions, lambda: self.options, mode=mode)
        self._regions.append(server)

    def reconfigure(self, options: ServerOptions) -> None:
        """Take over the limits that can change while running; what is under way keeps its own.

        Raises `ConfigError`, and changes nothing, if another option differs.
        """
        fixed = set(self.options.changed(options)) - RELOADABLE
        if fixed:
            raise ConfigError(f"{', '.join(sorted(fixed))}: only a restart changes that")
        self._servicer.options = options

    def stats(self) -> Mapping[str, int]:
        """Gauges: ``calls``, ``streams``, ``sessions``, ``region_bytes``, ``staging_bytes``,
        ``waiting_pages`` and ``asked_pages`` of the store, ``reads_refused`` and
        ``writes_refused`` (1 while that breaker is open), ``draining``; the store's own under
        ``backend.``.
        """
        servicer, pipeline = self._servicer, self._servicer.calls.pipeline
        behind = {f"backend.{name}": number for name, number in self.store.gauges().items()}
        return {
            "calls": servicer.under_way["call"],
            "streams": servicer.under_way["stream"],
            "sessions": servicer.sessions.count,
            "region_bytes": servicer.sessions.mapped_bytes,
            "staging_bytes": pipeline.buffers.allocated_bytes,
            "reads_refused": int(not pipeline.reads.admits),
            "writes_refused": int(not pipeline.writes.admits),
            "waiting_pages": servicer.calls.waiting_pages,
            "asked_pages": servicer.calls.asked_pages,
            "draining": int(servicer.draining),
        } | behind

    def counters(self) -> Mapping[str, int]:
        """Monotonic counts, ``operation.outcome`` per object, the store's own under ``backend.``;
        never blocks.
        """
        return self._servicer.calls.pipeline.counters()

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new calls (UNAVAILABLE) and wait for those under way; whether all ended."""
        servicer = self._servicer
        with servicer.changed:
            servicer.draining = True
            return servicer.changed.wait_for(
                lambda: not servicer.under_way["call"], timeout_seconds
            )

    def close(self) -> None:
        """End the sessions and the threads; the store stays open. Twice is fine."""
        self._servicer.draining = True
        for region in self._regions:
            region.close()
        self._servicer.listing.close(timeout_seconds=0.0)
        self._servicer.calls.close()


def _max_connections() -> int:
    """As many as are left when the store has half of the descriptors that the process may have."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return min(_MAX_CONNECTIONS, max(1, descriptors // 4))


def _handlers(servicer: Servicer, streams: Room) -> grpc.GenericRpcHandler:
    """What the generated code would register, but for how chunks are read and written, and that a
    stream has its place before its request is waited for.
    """
    service = pb.DESCRIPTOR.services_by_name["PageService"]
    handlers = {}
    for method in service.methods:
        serve = getattr(servicer, method.name)
        if method.server_streaming:
            make, serve = grpc.stream_stream_rpc_method_handler, _parts(serve, streams)
        elif method.client_streaming:
            make, serve = grpc.stream_unary_rpc_method_handler, _whole(serve, streams)
        else:
            make = grpc.unary_unary_rpc_method_handler
        parse = GetMessageClass(method.input_type).FromString
        handlers[method.name] = make(
            serve,
            request_deserializer=parse_put if method.name == "PutStream" else parse,
            response_serializer=serialized,
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _parts(serve: Callable[..., Any], streams: Room) -> Callable[..., Any]:
    def respond(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with streams.place(context):
            yield from serve(only(requests, context), context)

    return respond


def _whole(serve: Callable[..., Any], streams: Room) -> Callable[..., Any]:
    def respond(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: ANN401
        with streams.place(context):
            return serve(requests, context)

    return respond
