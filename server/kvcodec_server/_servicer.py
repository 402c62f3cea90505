"""The handlers of PageService: admission, arguments, and answers per object."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import grpc

from kvcodec.backend import Backend, ObjectInfo, check_name
from kvcodec.errors import (
    BackendError,
    ConfigError,
    CorruptPage,
    KVCodecError,
    PageError,
)
from kvcodec.format import EncodedPage
from kvcodec.workers import IOThreads
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1 import service_pb2_grpc
from kvcodec_server._listing import Listing
from kvcodec_server._receiving import Deadlines
from kvcodec_server._region_wire import TOKEN_METADATA
from kvcodec_server._steps import step_of
from kvcodec_server.metadata import metadata_of
from kvcodec_server.options import Observe, ServerOptions
from kvcodec_server.raw import RawPages
from kvcodec_server.session import Session, Sessions
from kvcodec_server.status import code_of, get_outcome, outcome_of, put_outcome, worst_label
from kvcodec_server.store_calls import Countdown, StoreCalls
from kvcodec_server.streams import GetStream, PutStream, with_metadata

__all__ = ["Servicer"]

_LIST_THREADS = 4
# A list of a large store takes so many times as long as any other call may.
_LIST_PATIENCE = 60
_MAX_DETAIL = 500


class _Call:
    """One call under way: what admission found out, and what to tell the observer in the end."""

    def __init__(self, seconds: float, session: Session | None) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.session = session
        self.label = "ok"
        self.raw_bytes = 0
        self.encoded_bytes = 0


class Servicer(service_pb2_grpc.PageServiceServicer):
    """PageService, and the state that its handlers share."""

    def __init__(self, store: Backend, options: ServerOptions, observe: Observe) -> None:
        self.options = options
        self.sessions = Sessions()
        self.calls = StoreCalls(store, options)
        self.under_way: Counter[str] = Counter()
        self.changed = threading.Condition()
        self.draining = False
        self._deadlines = Deadlines()
        self._store = store
        self._observe = observe
        self.listing = IOThreads(_LIST_THREADS, limit=_LIST_THREADS)

    # Same node

    def Get(  # noqa: N802 - the service's name
        self, request: pb.GetRequest, context: grpc.ServicerContext
    ) -> pb.GetResponse:
        """Objects from the store into ranges of the region."""
        with self._call("get", context) as call:
            session, views = self._ranges(call, request.objects)
            raw = self._raw(request)
            names = _names(request.objects, checked=raw is None)
            lease = session.begin(request.call_id)
            if raw is not None:
                try:
                    outcomes, finished = raw.get(names, views, call.seconds), True
                finally:
                    lease.release()
            else:
                results, finished = self.calls.get(names, views, call.seconds, lease.release).wait()
                outcomes = list(map(get_outcome, results, map(len, views)))
                if request.with_metadata and finished:
                    for outcome, view in zip(outcomes, views, strict=True):
                        if outcome.status == pb.STATUS_OK:
                            with_metadata(outcome, view[: outcome.length])
            self._settle("get", call, outcomes, raw)
            return pb.GetResponse(outcomes=outcomes, unfinished=not finished)

    def Put(  # noqa: N802
        self, request: pb.PutRequest, context: grpc.ServicerContext
    ) -> pb.PutResponse:
        """Objects from ranges of the region into the store."""
        with self._call("put", context) as call:
            session, views = self._ranges(call, request.objects)
            raw = self._raw(request)
            names = _names(request.objects, checked=raw is None)
            lease = session.begin(request.call_id)
            if raw is not None:
                outcomes, finished = raw.put(names, views, call.seconds, lease.release), True
            else:
                results, finished = self.calls.put(names, views, call.seconds, lease.release).wait()
                outcomes = list(map(put_outcome, results, map(len, views)))
            self._settle("put", call, outcomes, raw)
            return pb.PutResponse(outcomes=outcomes, unfinished=not finished)

    # Anywhere

    def GetStream(  # noqa: N802
        self, request: pb.GetStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetStreamResponse | bytes]:
        """Objects from the store in chunks."""
        with self._call("get_stream", context, stream=True) as call:
            self._check_count(request.objects)
            stream = GetStream(self.calls, request, self.options, call.deadline)
            try:
                yield from stream.parts()
            finally:
                self._settle("get", call, stream.outcomes, stream.raw)

    def PutStream(  # noqa: N802
        self,
        request_iterator: Iterator[tuple[pb.PutStreamRequest | None, memoryview]],
        context: grpc.ServicerContext,
    ) -> pb.PutStreamResponse:
        """Objects in chunks into the store."""
        with self._call("put_stream", context, stream=True) as call:
            stream = PutStream(self.calls, self.options, call.deadline)
            outcomes = stream.receive(request_iterator)
            self._settle("put", call, outcomes, stream.raw)
            return pb.PutStreamResponse(outcomes=outcomes)

    # Names alone

    def Exists(  # noqa: N802
        self, request: pb.ExistsRequest, context: grpc.ServicerContext
    ) -> pb.ExistsResponse:
        """Whether objects are there."""
        with self._call("exists", context) as call:
            names = self._checked(request.names)
            found = self.calls.exists(names, call.seconds)
            self._count_found("exists", found.count(True), found.count(False))
            return pb.ExistsResponse(exists=found)

    def ExistsPrefix(  # noqa: N802
        self, request: pb.ExistsPrefixRequest, context: grpc.ServicerContext
    ) -> pb.ExistsPrefixResponse:
        """The length of the leading run."""
        with self._call("exists", context) as call:
            names = self._checked(request.names)
            count = self.calls.exists_prefix(names, call.seconds)
            self._count_found("exists", count, len(names) - count)
            return pb.ExistsPrefixResponse(count=count)

    def Delete(  # noqa: N802
        self, request: pb.DeleteRequest, context: grpc.ServicerContext
    ) -> pb.DeleteResponse:
        """Remove objects."""
        with self._call("delete", context) as call:
            names = self._checked(request.names)
            deleted = self.calls.delete(names, call.seconds)
            self._count_found("delete", deleted.count(True), deleted.count(False))
            return pb.DeleteResponse(deleted=deleted)

    def Stat(  # noqa: N802
        self, request: pb.StatRequest, context: grpc.ServicerContext
    ) -> pb.StatResponse:
        """One object's description."""
        with self._call("stat", context) as call:
            found = self.calls.stat(check_name(request.name), call.seconds)
            if isinstance(found, BackendError):
                raise found
            return pb.StatResponse(object=None if found is None else _stored(found))

    def List(  # noqa: N802
        self, request: pb.ListRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListResponse]:
        """All objects, some at a time."""
        with self._call("list", context, stream=True, patience=_LIST_PATIENCE) as call:
            listing = Listing(self._store, request.prefix)
            work = partial(self.calls.pipeline.guarded, "list", listing.run)
            if not self.listing.submit(work):
                raise BackendError("too many lists are under way")
            try:
                # All of it may take long, but not the next step.
                step = min(call.seconds, self.options.max_call_seconds)
                while batch := listing.next(step):
                    yield pb.ListResponse(objects=map(_stored, batch))
            finally:
                listing.leave()

    def Inspect(  # noqa: N802
        self, request: pb.InspectRequest, context: grpc.ServicerContext
    ) -> pb.InspectResponse:
        """What pages say about themselves."""
        with self._call("inspect", context) as call:
            names = self._checked(request.names)
            outcomes = [self._inspect(name, request.verify, call) for name in names]
            self._settle("inspect", call, outcomes)
            return pb.InspectResponse(outcomes=outcomes)

    def Stats(  # noqa: N802
        self, request: pb.StatsRequest, context: grpc.ServicerContext
    ) -> pb.StatsResponse:
        """Counters, and what is there now."""
        del request
        with self._call("stats", context):
            return pb.StatsResponse(
                counters=self.calls.pipeline.counters(),
                sessions=self.sessions.count,
                calls=self.under_way["call"],
                region_bytes=self.sessions.mapped_bytes,
            )

    # What they share

    @contextmanager
    def _call(
        self,
        operation: str,
        context: grpc.ServicerContext,
        *,
        stream: bool = False,
        patience: int = 1,
    ) -> Iterator[_Call]:
        """Admit a call, end it with the status of what it raises, and tell the observer."""
        started = time.monotonic()
        seconds = min(context.time_remaining(), patience * self.options.max_call_seconds)
        call = _Call(seconds, self._session(context))
        ended = self._deadlines.until(call.deadline, context.cancel) if stream else nullcontext()
        try:
            with self._slot(stream=stream), ended:
                yield call
        except KVCodecError as error:
            call.label = worst_label([outcome_of(error)])
            code, trailers = code_of(error)
            context.set_trailing_metadata(trailers)
            context.abort(code, str(error)[:_MAX_DETAIL])
        finally:
            seconds = time.monotonic() - started
            self._observe(operation, call.label, seconds, call.raw_bytes, call.encoded_bytes)

    @contextmanager
    def _slot(self, *, stream: bool) -> Iterator[None]:
        """Count a call among those under way. Raises `BackendError` if there may be no more."""
        with self.changed:
            if self.draining:
                raise BackendError("the sidecar is going away")
            self.under_way["call"] += 1
            self.under_way["stream"] += stream
        try:
            yield
        finally:
            with self.changed:
                self.under_way["call"] -= 1
                self.under_way["stream"] -= stream
                self.changed.notify_all()

    def _session(self, context: grpc.ServicerContext) -> Session | None:
        """The session of a call. One over the Unix socket has to have one: its token is the proof
        that the other side of the socket was asked who it is.
        """
        token = dict(context.invocation_metadata() or ()).get(TOKEN_METADATA)
        session = self.sessions.find(token) if isinstance(token, str) else None
        if session is None and (token is not None or context.peer().startswith("unix:")):
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                f"no session has this {TOKEN_METADATA}: the socket for regions gives one",
            )
        return session

    def _ranges(
        self, call: _Call, objects: Sequence[pb.ObjectRange]
    ) -> tuple[Session, list[memoryview]]:
        self._check_count(objects)
        if call.session is None:
            raise ConfigError("ranges are for clients with a region; others use the streams")
        longest = max((item.length for item in objects), default=0)
        if longest > self.options.max_object_bytes:
            raise ConfigError(
                f"a range of {longest} bytes, allowed are {self.options.max_object_bytes} "
                f"(max_object_bytes)"
            )
        return call.session, [call.session.view(item.offset, item.length) for item in objects]

    def _raw(self, request: pb.GetRequest | pb.PutRequest) -> RawPages | None:
        if not request.HasField("raw"):
            return None
        return RawPages(self.calls, request.raw, self.options.max_object_bytes)

    def _checked(self, names: Sequence[str]) -> list[str]:
        """The names of a call; `ConfigError` for too many, or one that is none."""
        self._check_count(names)
        return list(map(check_name, names))

    def _check_count(self, objects: Sequence[object]) -> None:
        if len(objects) > self.options.max_objects:
            raise ConfigError(
                f"{len(objects)} objects in a call, allowed are {self.options.max_objects} "
                f"(max_objects)"
            )

    def _settle(
        self,
        operation: str,
        call: _Call,
        outcomes: Sequence[pb.Outcome],
        raw: RawPages | None = None,
    ) -> None:
        call.label = worst_label(outcomes)
        lengths = [outcome.length for outcome in outcomes if outcome.status == pb.STATUS_OK]
        if raw is not None:
            call.raw_bytes = raw.layout.raw_bytes * len(lengths)
        if raw is None or operation == "put":
            call.encoded_bytes = sum(lengths)
        for status, amount in Counter(outcome.status for outcome in outcomes).items():
            name = pb.Status.Name(status).removeprefix("STATUS_").lower()
            self.calls.pipeline.counts.add(f"{operation}.{name}", amount)

    def _count_found(self, operation: str, found: int, missing: int) -> None:
        """Objects that were there and that were not, an unanswered question among the latter."""
        for name, amount in (("ok", found), ("not_found", missing)):
            if amount:
                self.calls.pipeline.counts.add(f"{operation}.{name}", amount)

    def _inspect(self, name: str, verify: bool, call: _Call) -> pb.Outcome:
        left = max(0.0, call.deadline - time.monotonic())
        found = self.calls.stat(name, left)
        if found is None:
            return pb.Outcome(status=pb.STATUS_NOT_FOUND)
        if isinstance(found, BackendError):
            return outcome_of(found)
        if not 1 <= found.stored_bytes <= self.options.max_object_bytes:
            return pb.Outcome(status=pb.STATUS_TOO_LONG, length=found.stored_bytes)
        buffers = self.calls.pipeline.buffers
        buffer = buffers.acquire(found.stored_bytes, left)
        if buffer is None:
            return outcome_of(self.calls.no_memory("get"))
        release = Countdown(2, partial(buffers.release, buffer))
        try:
            left = max(0.0, call.deadline - time.monotonic())
            ((result,), _) = self.calls.get([name], [buffer.data], left, release).wait()
            outcome = get_outcome(result, len(buffer))
            if outcome.status != pb.STATUS_OK:
                return outcome
            try:
                page = EncodedPage.parse(buffer.data[: outcome.length])
                outcome.metadata.CopyFrom(metadata_of(page.header))
                if verify:
                    with step_of("verify", 1, outcome.length):
                        page.verify()
            except PageError as error:
                refused = outcome_of(error)
                refused.length = outcome.length
                if isinstance(error, CorruptPage) and outcome.HasField("metadata"):
                    refused.metadata.CopyFrom(outcome.metadata)
                return refused
            return outcome
        finally:
            release()


def _names(objects: Sequence[pb.ObjectRange], *, checked: bool) -> list[str]:
    """Names of objects, or keys of pages."""
    return [check_name(item.name) if checked else item.name for item in objects]


def _stored(info: ObjectInfo) -> pb.StoredObject:
    return pb.StoredObject(
        name=info.name, stored_bytes=info.stored_bytes, modified_seconds=info.modified_seconds
    )
