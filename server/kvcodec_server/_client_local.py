"""Objects to and from a sidecar of the same node, through shared memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from kvcodec.backend import Deadline, GetResult, PutResult
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1.service_pb2_grpc import PageServiceStub
from kvcodec_server._client_link import Link
from kvcodec_server._client_region import ClientRegion, Slot
from kvcodec_server.options import Metadata
from kvcodec_server.status import as_backend_error, error_of_call, get_result, put_result

__all__ = ["LocalDoor"]

# Objects of one call: more at once would wait for each other.
_OBJECTS_PER_CALL = 64


@dataclass(slots=True)
class _Placed:
    """One object with its place in the region: a slot where its memory lies elsewhere."""

    name: str
    view: memoryview
    offset: int
    slot: Slot | None

    @property
    def range(self) -> pb.ObjectRange:
        return pb.ObjectRange(name=self.name, offset=self.offset, length=self.size)

    @property
    def size(self) -> int:
        return max(1, len(self.view))


class LocalDoor:
    """A sidecar behind the Unix socket `path`, and a region of `region_bytes` between it and this
    process. Thread-safe; not for both sides of a fork.
    """

    def __init__(self, path: str, region_bytes: int, count: Callable[[str], None]) -> None:
        try:
            self.region = ClientRegion(region_bytes)
        except OSError as error:
            raise BackendError(f"no region of {region_bytes} bytes: {error}") from error
        self._link = Link(path, self.region, count)
        self._count = count
        self._call_ids = itertools.count(1)

    def stub(self, deadline: Deadline) -> tuple[PageServiceStub, Metadata]:
        """For calls that move no objects. Raises `BackendError` while the sidecar is away."""
        session = self._link.session(deadline)
        return session.stub, session.metadata

    def suspect(self, stub: PageServiceStub, error: grpc.RpcError) -> None:
        """A call has failed; whether the sidecar is gone, the session will show."""

    def get(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[GetResult]:
        """Read objects into memory, of the region or of anything else."""
        results: list[GetResult] = []
        for group in self._groups(pairs, deadline):
            if isinstance(group, BackendError):
                results.append(group)
                continue
            answers = self._call("Get", pb.GetRequest, group, deadline)
            for item, answer in zip(group, answers, strict=True):
                if isinstance(answer, BackendError):
                    results.append(answer)
                    continue
                result = get_result(answer, len(item.view))
                if item.slot is not None and isinstance(result, int) and result <= len(item.view):
                    _copy(item.view[:result], item.slot.bytes[:result])
                results.append(result)
            _free(group)
        return results

    def put(self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline) -> list[PutResult]:
        """Store objects from memory, of the region or of anything else."""
        results: list[PutResult] = []
        for group in self._groups(pairs, deadline):
            if isinstance(group, BackendError):
                results.append(group)
                continue
            for item in group:
                if item.slot is not None:
                    _copy(item.slot.bytes, item.view)
            for answer in self._call("Put", pb.PutRequest, group, deadline):
                results.append(answer if isinstance(answer, BackendError) else put_result(answer))
            _free(group)
        return results

    def close(self) -> None:
        """End the session. The region's memory is freed with the last view of it."""
        self._link.close()
        self.region.close()

    def _groups(
        self, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline
    ) -> Iterator[list[_Placed] | BackendError]:
        """Objects of one call each, as many as the region has room for. Who takes a group empties
        it when done, which frees its slots for the next.
        """
        group: list[_Placed] = []
        for name, view in pairs:
            placed = self._place(name, view, 0.0)
            if group and (placed is None or len(group) == _OBJECTS_PER_CALL):
                yield group
                group = []
            if placed is None and len(view) <= self.region.size:
                placed = self._place(name, view, deadline.remaining_seconds())
            if placed is None:
                if group:
                    yield group
                    group = []
                kind = BackendTimeout if len(view) <= self.region.size else BackendError
                yield kind(
                    f"no room for {len(view)} bytes in the region of {self.region.size}: raise "
                    f"region_bytes"
                )
            else:
                group.append(placed)
        if group:
            yield group

    def _place(self, name: str, view: memoryview, timeout_seconds: float) -> _Placed | None:
        offset = self.region.offset_of(view)
        if offset is not None:
            return _Placed(name, view, offset, None)
        slot = self.region.slot(max(1, len(view)), timeout_seconds)
        return None if slot is None else _Placed(name, view, slot.offset, slot)

    def _call(
        self,
        verb: str,
        request: type[pb.GetRequest] | type[pb.PutRequest],
        group: Sequence[_Placed],
        deadline: Deadline,
    ) -> Sequence[pb.Outcome | BackendError]:
        """Ask the sidecar to read or write the ranges of a group. Where it does not say that it is
        done with them, they are in doubt.
        """
        try:
            session = self._link.session(deadline)
        except BackendError as error:
            return [error] * len(group)
        call_id = next(self._call_ids)
        message = request(call_id=call_id, objects=[item.range for item in group])
        answers: Sequence[pb.Outcome | BackendError]
        finished = False
        try:
            response = getattr(session.stub, verb)(
                message, timeout=deadline.remaining_seconds(), metadata=session.metadata
            )
            finished, answers = not response.unfinished, response.outcomes
            if len(answers) != len(group):
                wrong = BackendError(f"{len(answers)} answers for {len(group)} objects")
                answers = [wrong] * len(group)
        except grpc.RpcError as error:
            answers = [as_backend_error(error_of_call(error))] * len(group)
        except ValueError:  # the session ended, and with it its channel
            answers = [BackendError("the sidecar has ended the session")] * len(group)
        finally:
            if not finished:
                self._count("calls_in_doubt")
                parts = [(item.offset, item.size) for item in group]
                session.doubt(call_id, parts, [(item.view, item.slot) for item in group])
        return answers


def _free(group: list[_Placed]) -> None:
    """Give the slots of a group back, whoever still has one of its objects in a variable."""
    for item in group:
        item.slot = None
    group.clear()


def _copy(target: memoryview, source: memoryview) -> None:
    """Without the GIL, unlike an assignment to a view."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
