"""The one table between kvcodec's errors, the status of an object, and the status of a call."""

from __future__ import annotations

import re
from collections.abc import Iterable

import grpc

from kvcodec.backend import GetResult, PutResult
from kvcodec.errors import (
    BackendError,
    BackendFull,
    BackendReadOnly,
    BackendTimeout,
    ConfigError,
    CorruptPage,
    KVCodecError,
    MismatchedPage,
    NativeError,
    PageError,
    QualityBelowMinimum,
    UndecodedPage,
    UnsupportedPage,
)
from kvcodec_proto.v1 import service_pb2 as pb

__all__ = [
    "STATUS_TRAILER",
    "as_backend_error",
    "code_of",
    "error_of",
    "error_of_call",
    "error_of_status",
    "get_outcome",
    "get_result",
    "outcome_of",
    "put_outcome",
    "put_result",
    "worst_label",
]

#: In the trailer of a call that was refused as a whole: the number of its `Status`.
STATUS_TRAILER = "kvcodec-status"

_MAX_DETAIL = 500

_TABLE: tuple[tuple[type[KVCodecError], pb.Status, grpc.StatusCode], ...] = (
    (KVCodecError, pb.STATUS_KVCODEC_ERROR, grpc.StatusCode.UNKNOWN),
    (ConfigError, pb.STATUS_CONFIG_ERROR, grpc.StatusCode.INVALID_ARGUMENT),
    (NativeError, pb.STATUS_NATIVE_ERROR, grpc.StatusCode.INTERNAL),
    (PageError, pb.STATUS_PAGE_ERROR, grpc.StatusCode.DATA_LOSS),
    (CorruptPage, pb.STATUS_CORRUPT_PAGE, grpc.StatusCode.DATA_LOSS),
    (UnsupportedPage, pb.STATUS_UNSUPPORTED_PAGE, grpc.StatusCode.UNIMPLEMENTED),
    (MismatchedPage, pb.STATUS_MISMATCHED_PAGE, grpc.StatusCode.FAILED_PRECONDITION),
    (QualityBelowMinimum, pb.STATUS_QUALITY_BELOW_MINIMUM, grpc.StatusCode.OUT_OF_RANGE),
    (UndecodedPage, pb.STATUS_UNDECODED_PAGE, grpc.StatusCode.ABORTED),
    (BackendError, pb.STATUS_BACKEND_ERROR, grpc.StatusCode.UNAVAILABLE),
    (BackendFull, pb.STATUS_BACKEND_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (BackendReadOnly, pb.STATUS_BACKEND_READ_ONLY, grpc.StatusCode.FAILED_PRECONDITION),
    (BackendTimeout, pb.STATUS_BACKEND_TIMEOUT, grpc.StatusCode.DEADLINE_EXCEEDED),
)
_STATUS = {error: status for error, status, _ in _TABLE}
_ERROR = {status: error for error, status, _ in _TABLE}
_NUMBERED = {int(status): status for _, status, _ in _TABLE}
_CODE = {status: code for _, status, code in _TABLE}


def _status_of(error: KVCodecError) -> pb.Status:
    """Of the nearest class in the table: somebody else's backend may have errors of its own."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def code_of(error: KVCodecError) -> tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]:
    """The gRPC status of a call that failed as a whole, and its trailers."""
    status = _status_of(error)
    return _CODE[status], ((STATUS_TRAILER, str(int(status))),)


def error_of_call(error: grpc.RpcError) -> KVCodecError:
    """Why a call failed as a whole."""
    assert isinstance(error, grpc.Call)
    number = next((v for k, v in error.trailing_metadata() or () if k == STATUS_TRAILER), "")
    return error_of_status(error.code(), str(error.details() or ""), number)


def error_of_status(code: grpc.StatusCode, detail: str, trailer: str | bytes) -> KVCodecError:
    """What the status of a call says, and the trailer `STATUS_TRAILER`, which may be empty.

    Without the trailer the status is gRPC's or the network's own: a deadline is a deadline, and
    anything else means that the sidecar could not be asked.
    """
    is_number = isinstance(trailer, str) and re.fullmatch(r"\d{1,3}", trailer)
    status = _NUMBERED.get(int(trailer)) if is_number else None
    if status is not None:
        return error_of(pb.Outcome(status=status, detail=detail))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return BackendTimeout(detail)
    return BackendError(f"{code.name.lower()}: {detail}")


def as_backend_error(error: KVCodecError) -> BackendError:
    """A backend answers with errors of stores alone. What only a caller can have done wrong was
    checked before.
    """
    return error if isinstance(error, BackendError) else BackendError(str(error))


def outcome_of(error: KVCodecError) -> pb.Outcome:
    """What a message says about an error."""
    outcome = pb.Outcome(status=_status_of(error), detail=str(error)[:_MAX_DETAIL])
    if isinstance(error, PageError):
        outcome.what = error.what
    if isinstance(error, UnsupportedPage):
        found, expected = error.found, error.supported
    elif isinstance(error, MismatchedPage):
        found, expected = error.found, error.expected
    elif isinstance(error, QualityBelowMinimum):
        found, expected = error.found, error.minimum
    else:
        return outcome
    outcome.found, outcome.expected = str(found)[:_MAX_DETAIL], str(expected)[:_MAX_DETAIL]
    return outcome


def error_of(outcome: pb.Outcome) -> KVCodecError:
    """The error that a message tells of; its status must be that of one, or unknown."""
    kind = _ERROR.get(outcome.status, BackendError)
    if kind in (UnsupportedPage, MismatchedPage):
        return kind(outcome.what, outcome.found, outcome.expected)
    if kind is QualityBelowMinimum:
        return QualityBelowMinimum(_number(outcome.found), _number(outcome.expected))
    if issubclass(kind, PageError):
        return kind(outcome.what, outcome.detail)
    return kind(outcome.detail or f"the sidecar answered with status {outcome.status}")


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"\d{1,9}", text) else 0


def get_outcome(result: GetResult, capacity: int) -> pb.Outcome:
    """What became of an object that was read into `capacity` bytes."""
    if result is None:
        return pb.Outcome(status=pb.STATUS_NOT_FOUND)
    if isinstance(result, int):
        status = pb.STATUS_OK if result <= capacity else pb.STATUS_TOO_LONG
        return pb.Outcome(status=status, length=result)
    return outcome_of(result)


def get_result(outcome: pb.Outcome, capacity: int) -> GetResult:
    """The inverse of `get_outcome`. A length that contradicts its status is an error."""
    if outcome.status == pb.STATUS_NOT_FOUND:
        return None
    if outcome.status in (pb.STATUS_OK, pb.STATUS_TOO_LONG):
        fits = 0 < outcome.length <= capacity
        if fits == (outcome.status == pb.STATUS_OK) and outcome.length:
            return outcome.length
        return BackendError(f"the sidecar says {outcome.length} bytes for a room of {capacity}")
    return as_backend_error(error_of(outcome))


def put_outcome(result: PutResult, length: int) -> pb.Outcome:
    """What became of an object of `length` bytes that was to be stored."""
    if result is None:
        return pb.Outcome(status=pb.STATUS_OK, length=length)
    return outcome_of(result)


def put_result(outcome: pb.Outcome) -> PutResult:
    """The inverse of `put_outcome`."""
    return None if outcome.status == pb.STATUS_OK else as_backend_error(error_of(outcome))


def worst_label(outcomes: Iterable[pb.Outcome]) -> str:
    """``ok``, or the label of the most severe answer of a call, for metrics: one of few."""
    worst = max((outcome.status for outcome in outcomes), default=pb.STATUS_OK)
    if worst < pb.STATUS_BACKEND_ERROR:
        return "ok"
    kind = _ERROR.get(worst, KVCodecError)
    if issubclass(kind, BackendError):
        return kind.label
    return kind.kind if issubclass(kind, PageError) else "invalid"
