"""Room for so many calls at a time, shared between callers: who opens many shuts nobody out.

A call that says nothing holds its thread as one that works does. When there is no room left, who
has less than others takes the place of the oldest call of whoever has most; the others are refused.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc

from kvcodec.errors import BackendError
from kvcodec_server._receiving import Receiving
from kvcodec_server.options import CLIENT_METADATA

__all__ = ["Admission", "Crowded", "Place", "Places", "Room", "only"]

_MAX_CLIENT = 64

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Crowded(BackendError):
    """All places are taken, and the caller has no smaller share of them than others."""


class Place:
    """One call that has been let in."""

    __slots__ = ("client", "host", "leave")

    def __init__(self, peer: str, client: str, leave: Callable[[], object]) -> None:
        self.host, self.client, self.leave = peer.rpartition(":")[0], client or peer, leave


class Places:
    """Places for calls, by the host they come from, and there by the client: what says so of all of
    its connections, or a connection. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Place, None] = {}  # the oldest first
        self._hosts: Counter[str] = Counter()
        # Told to leave, and still there: they have their threads, so they may not be many.
        self._leaving: set[Place] = set()

    def take(self, limit: int, peer: str, leave: Callable[[], object], client: str = "") -> Place:
        """A place among `limit`; `leave` is called if another call needs it more.

        Raises `Crowded`.
        """
        place, other = Place(peer, client, leave), None
        with self._lock:
            if len(self._held) >= limit:
                other = self._next_to_leave(place)
                if other is None or len(self._leaving) >= max(2, limit // 16):
                    raise Crowded(f"all {limit} are busy")
                self._remove(other)
                self._leaving.add(other)
            self._held[place] = None
            self._hosts[place.host] += 1
        if other is not None:
            other.leave()
        return place

    def free(self, place: Place) -> None:
        """Its call is over."""
        with self._lock:
            if place in self._held:
                self._remove(place)
            self._leaving.discard(place)

    def _next_to_leave(self, place: Place) -> Place | None:
        """The oldest call of who has most, if the caller has fewer even with one more."""
        ((host, most),) = self._hosts.most_common(1)
        if most <= self._hosts[place.host] + 1:
            # No host has too many: perhaps a client of this one has.
            host = place.host
        theirs = [other for other in self._held if other.host == host]
        clients = Counter(other.client for other in theirs)
        if host == place.host:
            own = clients.get(place.client, 0) + 1
            clients = Counter({name: n for name, n in clients.items() if n > own})
        if not clients:
            return None
        ((client, _),) = clients.most_common(1)
        return next(other for other in theirs if other.client == client)

    def _remove(self, place: Place) -> None:
        del self._held[place]
        self._hosts[place.host] -= 1
        if not self._hosts[place.host]:
            del self._hosts[place.host]


class Room:
    """Places for the calls of one kind, of which there are `limit` at the moment.

    Who gets none is told by which `option`; `refused` hears of it.
    """

    def __init__(
        self, kind: str, option: str, limit: Callable[[], int], refused: Callable[[], object]
    ) -> None:
        self._kind = kind
        self._option = option
        self._limit = limit
        self._refused = refused
        self._places = Places()

    @contextmanager
    def place(self, context: grpc.ServicerContext) -> Iterator[None]:
        """A place for this call, as long as the body; the call is aborted if there is none."""
        client = dict(context.invocation_metadata() or ()).get(CLIENT_METADATA)
        client = client if isinstance(client, str) and len(client) <= _MAX_CLIENT else ""
        try:
            place = self._places.take(self._limit(), context.peer(), context.cancel, client)
        except Crowded as error:
            self._refused()
            reason = f"{self._kind}: {error} ({self._option})"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            raise AssertionError("abort raises") from error
        try:
            yield
        finally:
            self._places.free(place)


class Admission(grpc.ServerInterceptor):
    """Lets `limit` calls in at a time, of any service, each before it has said what it wants.

    gRPC reads the request of a call on the thread that is to serve it, and waits for it as long as
    the call lasts: a few calls without one would be all that a server ever hears of. Here every
    call has a place before it is waited for. `refused` hears of each that gets none.
    """

    def __init__(self, limit: int, refused: Callable[[], object]) -> None:
        self._room = Room("calls", "grpc_threads", lambda: limit, refused)
        self._receiving = Receiving()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Part of gRPC's interface."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        codecs = handler.request_deserializer, handler.response_serializer
        read = self._each if handler.request_streaming else self._only
        if handler.response_streaming:
            serve = handler.stream_stream or handler.unary_stream
            assert serve is not None
            return grpc.stream_stream_rpc_method_handler(self._parts(serve, read), *codecs)
        serve = handler.stream_unary or handler.unary_unary
        assert serve is not None
        return grpc.stream_unary_rpc_method_handler(self._whole(serve, read), *codecs)

    def _whole(self, serve: Callable[..., Any], read: Callable[..., Any]) -> Callable[..., Any]:
        def respond(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: ANN401
            with self._room.place(context):
                return serve(read(requests, context), context)

        return respond

    def _parts(self, serve: Callable[..., Any], read: Callable[..., Any]) -> Callable[..., Any]:
        def respond(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._room.place(context):
                yield from serve(read(requests, context), context)

        return respond

    def _each(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        return self._receiving.each(requests, context.cancel)

    def _only(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: ANN401
        return only(self._each(requests, context), context)


def only(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: ANN401
    """The request of a call that has one."""
    for request in requests:
        return request
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "this call has one request, and none came")
    raise AssertionError("abort raises")
