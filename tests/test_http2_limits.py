"""Where a call of a sidecar's client ends: at its deadline, its message, its credit, its answer."""

from __future__ import annotations

import time

import pytest
from http2_flood import frame
from http2_server import (
    MIB,
    WINDOW_UPDATE,
    answering,
    data,
    found,
    get,
    head,
    message,
    messages,
    part,
    peer,
    put,
    tail,
    whole,
)
from waiting import SLACK_SECONDS

from kvcodec.errors import BackendError, BackendTimeout
from kvcodec_proto.v1 import service_pb2 as pb


@pytest.mark.parametrize("call", [get, put])
def test_frames_that_come_faster_than_they_are_read_do_not_move_the_deadline(call):
    """Nor before a call, on a connection that waits."""
    flood = frame(0x77, 0, 0) * 100_000

    def script(talk):
        talk.greet()
        if talk.number:
            talk.send(whole([b"x"], talk.request()))
        while True:
            talk.send(flood)

    with peer(script) as (door, server):
        for _ in range(3):
            started = time.monotonic()
            (answer,) = call(door, 9 if call is get else bytes(MIB), seconds=0.3)
            assert isinstance(answer, BackendTimeout) or (call is get and answer == b"x")
            assert time.monotonic() - started < SLACK_SECONDS
        assert server.connections > 1


def test_what_comes_before_an_answer_is_not_the_answer():
    early = head(1, [(":status", "103"), ("grpc-status", "8")])
    late = head(1, [(":status", "502")], end=True)
    with peer(answering(early, late)) as (door, _):
        (answer,) = get(door, 9)
        assert "HTTP status 502" in str(answer)


def test_a_chunk_does_not_reach_into_the_next_message():
    """Its length says so, and there is enough to come."""
    outcome = pb.GetStreamResponse(outcome=found(100)).SerializeToString()
    said = message(outcome + b"\x12\x64" + bytes(90)) + message(bytes(90))
    with peer(answering(head(), data(said), tail())) as (door, _):
        (answer,) = get(door, 100)
        assert "a field of 100 bytes in 90" in str(answer)


def test_a_chunk_of_nobody_gives_no_object_to_another():
    """Whoever went on after it would take each object for the one before."""
    said = messages([b"first"]) + part(None, b"stray") + messages([b"second", b"third"])
    with peer(answering(head(), data(said), tail())) as (door, _):
        first, *others = get(door, 9, 9, 9)
        assert first == b"first"
        assert all(isinstance(other, BackendError) for other in others)


def test_a_call_gives_no_credit_for_the_call_before():
    """Both have less than it takes to say so once more, and together more."""
    sizes = {1: 3 * MIB, 3: 3 * MIB, 5: 7 * MIB}
    credit = dict.fromkeys(sizes, 0)

    def script(talk):
        talk.greet()
        for size in sizes.values():
            talk.send(whole([bytes(size)], talk.request()))
        talk.linger()
        for each in talk.heard:
            if each.kind == WINDOW_UPDATE and each.stream:
                credit[each.stream] += int.from_bytes(each.payload, "big")

    with peer(script) as (door, server):
        for size in sizes.values():
            assert get(door, size) == [bytes(size)]
        assert server.connections == 1
    assert credit[1] == credit[3] == 0
    assert 4 * MIB <= credit[5] < 8 * MIB
