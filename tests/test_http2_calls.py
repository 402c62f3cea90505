"""Several calls of a sidecar's client on one connection: their fields, their results."""

from __future__ import annotations

import pytest
from http2_flood import frame
from http2_server import (
    ACK,
    DATA,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    MIB,
    PADDED,
    RST_STREAM,
    SETTINGS,
    TABLE_SIZE,
    WINDOW_UPDATE,
    Sidecar,
    data,
    get,
    head,
    messages,
    no_channel,
    number,
    peer,
    put,
    settings,
    tail,
    whole,
)

from kvcodec.errors import BackendError
from kvcodec_server._client_remote import Address, RemoteDoor

OBJECTS = [b"first" * 20, b"second" * 20]
ROOMS = [100, 150]


def test_the_servers_table_for_fields_may_change_between_calls():
    """What `h2` decodes shows that both have the same table."""
    sidecar = Sidecar()
    sidecar.changes = [{TABLE_SIZE: size} for size in (4096, 0, 60, 0, 9999, 1, 200)]
    with peer(sidecar) as (door, server):
        for _ in range(10):
            assert put(door, b"x") == [None]
        assert server.connections == 1


@pytest.mark.parametrize("size", [1, 10_000, 20_000])
def test_fields_of_a_request_may_need_several_frames(size):
    sidecar, token = Sidecar(), "~" * size  # which has no shorter code
    with peer(sidecar) as (_, server):
        address = Address("127.0.0.1", server.port)
        door = RemoteDoor(address, no_channel, (("authorization", token),))
        for _ in range(2):
            assert put(door, b"x") == [None]
            assert get(door, 1) == [b"x"]
        door.close()
        assert server.connections == 1
        assert sidecar.fields[b"authorization"] == token.encode()


def test_many_objects_are_asked_for_in_several_calls():
    sidecar, objects = Sidecar(), [bytes((index % 256,)) for index in range(1100)]
    with peer(sidecar) as (door, server):
        assert put(door, *objects) == [None] * 1100
        assert get(door, *[1] * 1100) == objects
        assert server.connections == 1
        assert sidecar.answered == 6


def test_a_call_that_fails_moves_no_result_of_another():
    def script(talk):
        talk.greet()
        stream = talk.request()
        talk.send(head(stream), data(messages([b"a"] * 10), stream), tail(stream, status="14"))
        talk.send(whole([b"b"] * 100, talk.request()))
        talk.linger()

    with peer(script) as (door, server):
        answers = get(door, *[1] * 600)
        assert answers[:10] == [b"a"] * 10
        assert all(isinstance(answer, BackendError) for answer in answers[10:500])
        assert answers[500:] == [b"b"] * 100
        assert server.connections == 1


def test_an_answer_before_the_request_ends_the_call_on_both_sides():
    """There is no window for a request, and no need of one."""

    def script(talk):
        talk.greet()
        talk.send(whole(OBJECTS, talk.request()), settings((INITIAL_WINDOW, 0)))
        talk.until(SETTINGS, ACK)
        for stream in (3, 5):
            talk.until(HEADERS)
            talk.send(whole(OBJECTS, stream))
        talk.until(RST_STREAM)
        talk.send(settings((INITIAL_WINDOW, MIB)))
        talk.send(whole(OBJECTS, talk.request()))
        talk.linger()
        assert [each.stream for each in talk.heard if each.kind == RST_STREAM] == [3, 5]

    with peer(script) as (door, server):
        for _ in range(4):
            assert get(door, *ROOMS) == OBJECTS
        assert server.connections == 1


def test_all_that_was_received_is_credited_and_no_more():
    """Padding, too, and what was for a call that is over; up to a quarter of the window late."""
    stored = bytes(40_000)
    said = messages([stored])
    one_by_one = b"".join(
        frame(DATA, PADDED, 1, b"\xff" + said[at : at + 1] + bytes(255)) for at in range(len(said))
    )
    late = data(bytes(6 * MIB))
    sent = {0: 257 * len(said) + 6 * MIB, 1: 257 * len(said)}
    credit = {0: 65535 - 16 * MIB, 1: 0}

    def script(talk):
        talk.greet()
        talk.request()
        talk.send(head(), one_by_one, tail())
        talk.until(HEADERS)
        talk.request()
        talk.send(late, whole([None], 3))
        talk.linger()
        for each in talk.heard:
            if each.kind == WINDOW_UPDATE and each.stream in credit:
                credit[each.stream] += int.from_bytes(each.payload, "big")

    with peer(script) as (door, server):
        assert get(door, len(stored)) == [stored]
        assert get(door, 9) == [None]
        assert server.connections == 1
    assert all(sent[at] - 4 * MIB < credit[at] <= sent[at] for at in sent), (sent, credit)


REFUSED = frame(RST_STREAM, 0, 1, number(7))
GONE = frame(GOAWAY, 0, 0, number(0) + number(0))


@pytest.mark.parametrize("refusal", [REFUSED, GONE])
@pytest.mark.parametrize("times", [1, 2])
def test_a_call_that_was_not_served_is_made_again_once(refusal, times):
    def script(talk):
        talk.greet()
        if talk.number < times:
            talk.until(HEADERS)
            talk.send(refusal)
        else:
            talk.request()
            talk.send(whole(OBJECTS))
        talk.linger()

    with peer(script) as (door, server):
        answers = get(door, *ROOMS)
        if times == 1:
            assert answers == OBJECTS
        else:
            assert {type(answer) for answer in answers} == {BackendError}
        assert server.connections == 2


@pytest.mark.parametrize("heard", [b"", head(3)])
def test_a_connection_that_dies_with_its_second_call_is_replaced_once(heard):
    """If nothing was heard of it: the server may have ended while it waited."""

    def script(talk):
        talk.greet()
        talk.request()
        talk.send(whole(OBJECTS))
        if not talk.number:
            talk.request()
            talk.send(heard)
        else:
            talk.linger()

    with peer(script) as (door, server):
        assert get(door, *ROOMS) == OBJECTS
        answers = get(door, *ROOMS)
        if heard:
            assert {type(answer) for answer in answers} == {BackendError}
        else:
            assert answers == OBJECTS
        assert server.connections == 2 - bool(heard)


def test_a_new_connection_that_dies_is_not_replaced():
    def script(talk):
        talk.greet()
        talk.request()

    with peer(script) as (door, server):
        assert {type(answer) for answer in get(door, *ROOMS)} == {BackendError}
        assert server.connections == 1
