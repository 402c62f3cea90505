"""The table of errors and statuses, both ways."""

from __future__ import annotations

import grpc
import pytest

import kvcodec.errors
from kvcodec.errors import (
    BackendError,
    BackendTimeout,
    ConfigError,
    CorruptPage,
    KVCodecError,
    MismatchedPage,
    PageError,
    QualityBelowMinimum,
    UndecodedPage,
    UnsupportedPage,
)
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server import status

ERRORS = [getattr(kvcodec.errors, name) for name in kvcodec.errors.__all__]
EXAMPLES = {
    PageError: PageError("page", "not a page"),
    CorruptPage: CorruptPage("magic", "no magic"),
    UnsupportedPage: UnsupportedPage("version", 2, 1),
    MismatchedPage: MismatchedPage("model", "a", "b"),
    QualityBelowMinimum: QualityBelowMinimum(2, 4),
    UndecodedPage: UndecodedPage("deadline", "too late"),
}


class FailedCall(grpc.RpcError, grpc.Call):
    """What a client gets to see of a call that was refused."""

    def __init__(self, code, details, trailers):
        self._said = code, details, trailers

    def code(self):
        return self._said[0]

    def details(self):
        return self._said[1]

    def trailing_metadata(self):
        return self._said[2]

    def _unused(self, *_):
        raise NotImplementedError

    initial_metadata = is_active = time_remaining = cancel = add_callback = _unused


def example(kind: type[KVCodecError]) -> KVCodecError:
    return EXAMPLES[kind] if kind in EXAMPLES else kind("something happened")


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_as_itself_with_an_object(kind):
    error = example(kind)
    outcome = pb.Outcome.FromString(status.outcome_of(error).SerializeToString())
    back = status.error_of(outcome)
    assert type(back) is kind
    assert str(back) == str(error)
    for field in ("what", "kind", "label", "reason", "minimum"):
        assert getattr(back, field, None) == getattr(error, field, None)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_as_its_class_with_a_call(kind):
    code, trailers = status.code_of(example(kind))
    assert type(status.error_of_call(FailedCall(code, "why", trailers))) is kind


def test_every_error_has_a_status_of_its_own():
    used = [status.outcome_of(example(kind)).status for kind in ERRORS]
    assert len(set(used)) == len(ERRORS)
    plain = {pb.STATUS_UNSPECIFIED, pb.STATUS_OK, pb.STATUS_NOT_FOUND, pb.STATUS_TOO_LONG}
    assert set(used) | plain == set(pb.Status.values())


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_a_call_that_the_network_ended_is_an_error_of_the_store(code):
    wanted = BackendTimeout if code is grpc.StatusCode.DEADLINE_EXCEEDED else BackendError
    for trailers in ((), None, ((status.STATUS_TRAILER, "999"),), ((status.STATUS_TRAILER, "x"),)):
        assert type(status.error_of_call(FailedCall(code, "why", trailers))) is wanted


def test_an_error_of_somebody_elses_making_has_the_status_of_its_nearest_kin():
    class Strange(BackendTimeout):
        pass

    assert type(status.error_of(status.outcome_of(Strange("x")))) is BackendTimeout


@pytest.mark.parametrize("result", [None, 1, 99, 100])
def test_what_was_read_comes_back(result):
    assert status.get_result(status.get_outcome(result, 99), 99) == result


def test_what_was_stored_comes_back():
    assert status.put_result(status.put_outcome(None, 10)) is None
    back = status.put_result(status.put_outcome(BackendTimeout("late"), 10))
    assert type(back) is BackendTimeout


@pytest.mark.parametrize(
    "outcome",
    [
        pb.Outcome(status=pb.STATUS_OK, length=0),
        pb.Outcome(status=pb.STATUS_OK, length=101),
        pb.Outcome(status=pb.STATUS_TOO_LONG, length=100),
        pb.Outcome(status=pb.STATUS_TOO_LONG),
        pb.Outcome(status=pb.STATUS_CORRUPT_PAGE),
        pb.Outcome(status=77),
        pb.Outcome(),
    ],
)
def test_an_impossible_answer_is_an_error(outcome):
    assert type(status.get_result(outcome, 100)) is BackendError


def test_details_are_bounded():
    outcome = status.outcome_of(ConfigError("x" * 10_000))
    assert len(outcome.detail) <= 500
    assert status.outcome_of(MismatchedPage("m", "y" * 10_000, "")).ByteSize() < 2000


def test_labels_are_few():
    labels = {status.worst_label([status.outcome_of(example(kind))]) for kind in ERRORS}
    assert "timeout" in labels and len(labels) <= 12
    assert status.worst_label([]) == "ok"
    missing = pb.Outcome(status=pb.STATUS_NOT_FOUND)
    assert status.worst_label([missing]) == "ok"
    assert status.worst_label([missing, status.outcome_of(BackendTimeout("x"))]) == "timeout"
