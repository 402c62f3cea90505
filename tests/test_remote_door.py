"""A sidecar's door: which connections it leaves, when it may go on, and how it finds a host."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from http2_server import (
    DATA,
    answering,
    data,
    door_to,
    get,
    head,
    messages,
    peer,
    refusal,
    tail,
    whole,
)
from waiting import SLACK_SECONDS, wait_until

from kvcodec.backend import Deadline
from kvcodec.connection import Connection
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec_server import _client_streams
from kvcodec_server.status import STATUS_TRAILER

OBJECTS = [b"first" * 20, b"second" * 20]
ROOMS = [100, 150]


def test_a_timeout_of_the_servers_own_is_an_answer():
    """Its text is told, and nothing is left that is well."""

    def script(talk):
        talk.greet()
        while True:
            trailer = (STATUS_TRAILER, "13")
            talk.send(refusal(talk.request(), trailer, ("grpc-message", "disk%20slow"), status="4"))

    with peer(script) as (door, server):
        line = door._line
        for _ in range(3):
            (answer,) = get(door, 9)
            assert type(answer) is BackendTimeout
            assert str(answer) == "disk slow"
        assert door._line is line
        assert server.connections == 1


@pytest.mark.parametrize("heard", [True, False])
def test_who_heard_something_leaves_no_connection_but_his_own(heard):
    answer = [head(), data(messages(OBJECTS[:1]))] if heard else []
    with peer(answering(*answer)) as (door, _):
        line = door._line
        *_, last = get(door, *ROOMS, seconds=1.0)
        assert isinstance(last, BackendTimeout)
        assert "no answer in time" in str(last)
        assert (door._line is line) == heard


def test_one_deadline_leaves_one_connection():
    """However many calls its objects would have taken."""
    with peer(lambda talk: talk.linger()) as (door, server):
        before = len(door._left)
        answers = get(door, *[1] * 1100, seconds=0.5)
        assert {type(answer) for answer in answers} == {BackendTimeout}
        assert len(answers) == 1100
        assert len(door._left) == before + 1
        assert server.connections == 1


def test_an_answer_whose_end_is_missing_counts(monkeypatch):
    """Every object is there: nobody waits for what the server says last, for long."""
    monkeypatch.setattr(_client_streams, "_TRAILERS_SECONDS", 0.1)

    def script(talk):
        talk.greet()
        talk.request()
        talk.send(head() + data(messages(OBJECTS)) + (tail() if talk.number else b""))
        talk.linger()

    with peer(script) as (door, server):
        started = time.monotonic()
        for connections in (1, 2):
            assert get(door, *ROOMS, seconds=60) == OBJECTS
            assert server.connections == connections
        assert time.monotonic() - started < 30


def test_a_call_that_is_given_up_ends_at_the_server_though_a_child_has_its_connection():
    left = threading.Event()

    def script(talk):
        talk.greet()
        talk.until(DATA)
        talk.linger()
        left.set()

    with peer(script) as (door, _):
        asking = threading.Thread(target=get, args=(door, 9), kwargs={"seconds": 1.0})
        asking.start()
        wait_until(lambda: door._used)
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        try:
            asking.join()
            assert left.wait(20)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, b"", b"\x15\x03\x03\0\2\2\x46"]
)
def test_a_port_of_something_else_is_told_of(said):
    def script(talk):
        talk.send(said)
        talk.socket.shutdown(socket.SHUT_WR)
        talk.linger()

    with peer(script) as (door, _):
        (answer,) = get(door, 9)
        assert type(answer) is BackendError
        assert "tls=1" in str(answer)


# How it finds a host


def addresses(*numbers: tuple[str, int]):
    def resolved(host, port, *, flags=0, **_):
        if flags:
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, number or port))
            for address, number in numbers
        ]

    return resolved


def test_an_address_that_is_silent_leaves_time_for_the_next(monkeypatch):
    with socket.socket() as silent, peer(lambda talk: talk.linger()) as (_, server):
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        full = [socket.socket() for _ in range(4)]
        for each in full:
            each.setblocking(False)
            each.connect_ex(silent.getsockname())
        found = addresses(silent.getsockname(), ("127.0.0.1", server.port))
        monkeypatch.setattr(socket, "getaddrinfo", found)
        Connection("host", 1, Deadline(4)).close()
        wait_until(lambda: server.connections)
        for each in full:
            each.close()


def test_a_name_that_nobody_resolves_costs_a_deadline(monkeypatch):
    over = threading.Event()

    def stuck(*_, flags=0, **__):
        if flags:
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        over.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    door = door_to(1, "sidecar.example")
    started = time.monotonic()
    (answer,) = get(door, 9, seconds=0.5)
    assert isinstance(answer, BackendTimeout)
    assert "no connection in time" in str(answer)
    assert time.monotonic() - started < 0.5 + SLACK_SECONDS
    over.set()
    door.close()


def test_a_name_that_does_not_exist_is_an_error(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "nobody of this name")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    door = door_to(1, "sidecar.example")
    (answer,) = get(door, 9)
    assert type(answer) is BackendError
    assert "nobody of this name" in str(answer)
    door.close()


def test_any_time_is_time_enough():
    with peer(answering(whole(OBJECTS))) as (door, _):
        assert get(door, *ROOMS, seconds=float("inf")) == OBJECTS
