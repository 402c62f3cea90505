"""How a sidecar's client connects, over TCP and TLS, and what becomes of its idle connections."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import hpack
import pytest
from faulty_proxy import FaultyProxy
from http2_flood import frame
from http2_server import (
    ACK,
    DATA,
    HEADERS,
    INITIAL_WINDOW,
    MIB,
    PING,
    WINDOW_UPDATE,
    Sidecar,
    data,
    door_to,
    get,
    head,
    no_channel,
    number,
    peer,
    put,
    settings,
    stored_all,
    tail,
    whole,
)
from server_redis import certificates
from waiting import SLACK_SECONDS, wait_until

from kvcodec.backend import Deadline
from kvcodec.connection import Connection
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec_server import _client_remote
from kvcodec_server._client_remote import Address, RemoteDoor
from kvcodec_server.options import CLIENT_METADATA

OBJECTS = [b"object" * 10]
ROOM = 60


def serve(talk):
    """Right answers to every get."""
    talk.greet()
    while True:
        talk.send(whole(OBJECTS, talk.request()))


def tls_server(directory: Path, protocols: list[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of certificates."""
    directory = tmp_path_factory.mktemp("tls")
    certificates(directory)
    return directory


@pytest.fixture
def tls(directory):
    """Contexts of a server and of its client."""
    client = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    client.set_alpn_protocols(["h2"])
    return {"server_tls": tls_server(directory, ["h2"]), "client_tls": client}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Connecting


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_server_hears_what_it_is_called(host):
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    seen = {}

    def script(talk):
        talk.greet()
        fields = talk.until(HEADERS)
        found = hpack.Decoder().decode(fields.payload)
        seen.update(found)
        secret = [each[0] for each in found if isinstance(each, hpack.NeverIndexedHeaderTuple)]
        assert "authorization" in secret, "who compresses it together with others may tell it"
        talk.send(whole(OBJECTS, fields.stream))
        talk.linger()

    with peer(script, host=host) as (door, server):
        assert get(door, ROOM, seconds=20) == OBJECTS
        shown = f"[{host}]" if ":" in host else host
        assert seen[":authority"] == f"{shown}:{server.port}"
        timeout = seen.pop("grpc-timeout")
        assert timeout.endswith("m") and 10_000 < int(timeout[:-1]) <= 20_000
    seen.pop(":authority")
    assert seen.pop(CLIENT_METADATA)
    assert seen == {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/kvcodec.v1.PageService/GetStream",
        "te": "trailers",
        "content-type": "application/grpc",
        "user-agent": "kvcodec",
        "authorization": "Bearer a word",
    }


@pytest.mark.parametrize("limit", ["deadline", "attempt"])
def test_a_listener_whose_queue_is_full_costs_a_deadline(limit, monkeypatch):
    if limit == "attempt":
        monkeypatch.setattr(_client_remote, "_CONNECT_SECONDS", 0.2)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        door = door_to(listener.getsockname()[1])
        before, started = descriptors(), time.monotonic()
        answers = get(door, ROOM, seconds=0.2 if limit == "deadline" else 60)
        assert isinstance(answers[0], BackendTimeout)
        assert time.monotonic() - started < SLACK_SECONDS
        wait_until(lambda: descriptors() <= before)
        door.close()


def test_nobody_who_listens_is_an_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    door = door_to(port)
    (answer,) = get(door, ROOM)
    assert type(answer) is BackendError and f"127.0.0.1:{port}" in str(answer)
    door.close()


@pytest.mark.parametrize(
    "host", ["a" * 64, "x..y", ".x", "ü" * 70, "a\0b", "\udc80", "", "no.invalid"]
)
@pytest.mark.parametrize("where", ["host", "server_name"])
def test_a_name_that_is_none_is_an_error_of_the_store(host, where, tls):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, context = listener.getsockname()[1], tls["client_tls"]
        address = Address(host, port, context)
        if where == "server_name":
            address = Address("127.0.0.1", port, context, host)
        door = RemoteDoor(address, no_channel, ())
        assert isinstance(get(door, ROOM, seconds=0.1)[0], BackendError)
        assert isinstance(put(door, b"x", seconds=0.1)[0], BackendError)
        door.close()


def test_every_address_of_a_host_is_tried(monkeypatch):
    """One is of a family that this machine does not have, and at one nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        nobody, port = other.getsockname()[1], listener.getsockname()[1]
        found = [
            (99, socket.SOCK_STREAM, 6, "", ("::1", port)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", nobody)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        before = descriptors()
        Connection("host", port, Deadline(5)).close()
        del found[2]
        with pytest.raises(ConnectionRefusedError):
            Connection("host", port, Deadline(5))
        del found[1]
        with pytest.raises(OSError, match=r"."):
            Connection("host", port, Deadline(5))
        wait_until(lambda: descriptors() <= before)


# TLS


def test_large_objects_pass_through_tls(tls):
    sidecar, objects = Sidecar(frame_bytes=MIB), [os.urandom(size) for size in (5 * MIB, 1, MIB)]
    with peer(sidecar, **tls) as (door, server):
        assert put(door, *objects) == [None] * 3
        for _ in range(2):
            assert get(door, *map(len, objects)) == objects
        assert server.connections == 1


def test_session_tickets_hold_up_no_put(tls):
    """They make the socket readable and bring no data; this server says nothing else meanwhile."""
    tls["server_tls"].num_tickets = 20

    def script(talk):
        assert talk.socket.version() == "TLSv1.3"
        stream = 0
        while not stream:
            if not talk.heard:
                talk.read(24)
            stream = talk.request()
        talk.send(settings(), head(), data(stored_all(1)), tail())
        talk.linger()

    with peer(script, **tls) as (door, _):
        for _ in range(3):
            assert put(door, bytes(60_000)) == [None]
            door._close_idle()


@pytest.mark.parametrize("protocols", [[], ["http/1.1"]])
def test_a_server_that_does_not_speak_http2_is_refused(tls, directory, protocols):
    server = tls_server(directory, protocols)
    with peer(serve, server_tls=server, client_tls=tls["client_tls"]) as (door, _):
        before = descriptors()
        for call in (get, put):
            (answer,) = call(door, ROOM if call is get else b"x")
            assert "does not speak HTTP/2" in str(answer)
        wait_until(lambda: descriptors() <= before)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x03", b"\x16\x03\x03\x40\x00\x02"])
def test_a_handshake_that_never_ends_costs_a_deadline(said, tls):
    def script(connected):
        connected.socket.sendall(said)
        connected.linger()

    with peer(script, client_tls=tls["client_tls"]) as (door, _):
        started = time.monotonic()
        assert isinstance(get(door, ROOM, seconds=0.3)[0], BackendTimeout)
        assert time.monotonic() - started < SLACK_SECONDS


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\0\x02\x02\x28", b""]
)
def test_a_handshake_that_fails_is_an_error_at_once(said, tls):
    def script(connected):
        connected.socket.recv(9)
        connected.socket.sendall(said)

    with peer(script, client_tls=tls["client_tls"]) as (door, _):
        get(door, ROOM)
        before = descriptors()
        for _ in range(3):
            (answer,) = get(door, ROOM)
            assert type(answer) is BackendError
        wait_until(lambda: descriptors() <= before)


def test_a_tls_connection_that_stands_still_costs_a_deadline(tls):
    """In the middle of a record, either way."""
    sidecar, stored = Sidecar(frame_bytes=MIB), os.urandom(8 * MIB)
    with peer(sidecar, **tls) as (door, server):
        assert put(door, stored) == [None]
        with FaultyProxy("127.0.0.1", server.port) as proxy:
            slow = door_to(proxy.port, tls=tls["client_tls"])
            assert get(slow, len(stored)) == [stored]
            for rate in (1_000_000, 0):
                for call in (get, put):
                    argument = len(stored) if call is get else stored
                    proxy.rate = None
                    assert get(slow, len(stored)) == [stored]
                    proxy.rate, started = rate, time.monotonic()
                    assert isinstance(call(slow, argument, seconds=0.5)[0], BackendTimeout)
                    assert time.monotonic() - started < SLACK_SECONDS
            slow.close()


# Waiting for a server


@pytest.mark.parametrize("over", ["tcp", "tls"])
@pytest.mark.parametrize("kind", ["get", "put", "full"])
def test_close_ends_a_call_under_way(kind, over, tls):
    """Of a get that waits for an answer, a put that waits for room, or whose socket is full."""
    waits, finished = threading.Event(), threading.Event()

    def script(talk):
        talk.greet((INITIAL_WINDOW, {"get": 9999, "put": 0, "full": 1 << 30}[kind]))
        talk.send(frame(WINDOW_UPDATE, 0, 0, number(1 << 30)))
        talk.until(HEADERS if kind == "put" else DATA)
        waits.set()
        if kind == "full":
            finished.wait(60)
        talk.linger()

    answers: list[object] = []
    with peer(script, **(tls if over == "tls" else {})) as (door, _):
        call = {"get": lambda: get(door, ROOM, seconds=120)}.get(
            kind, lambda: put(door, *[bytes(40 * MIB)] * 3, seconds=120)
        )
        thread = threading.Thread(target=lambda: answers.extend(call()))
        thread.start()
        assert waits.wait(20)
        time.sleep(0.1)
        started = time.monotonic()
        door.close()
        thread.join(60)
        finished.set()
        assert time.monotonic() - started < SLACK_SECONDS
    assert {type(answer) for answer in answers} == {BackendError}


def test_a_closed_door_opens_nothing():
    opened = []

    def open_channel():
        opened.append(grpc.insecure_channel("127.0.0.1:1"))
        return opened[-1]

    with peer(serve) as (_, server):
        door = RemoteDoor(Address("127.0.0.1", server.port), open_channel, ())
        assert get(door, ROOM) == OBJECTS
        door.close()
        assert isinstance(get(door, ROOM)[0], BackendError)
        assert isinstance(put(door, b"x", seconds=0)[0], BackendTimeout)
        assert len(opened) == 1


def test_a_server_that_does_not_read_costs_a_deadline():
    ended = threading.Event()

    def script(talk):
        talk.greet((INITIAL_WINDOW, 1 << 30))
        talk.send(frame(WINDOW_UPDATE, 0, 0, number(1 << 30)))
        ended.wait(60)

    with peer(script) as (door, _):
        started = time.monotonic()
        assert isinstance(put(door, bytes(64 * MIB), seconds=0.5)[0], BackendTimeout)
        assert time.monotonic() - started < SLACK_SECONDS
        ended.set()


# Idle connections


def test_an_idle_connection_is_closed_after_a_while(monkeypatch):
    left = threading.Event()

    def script(talk):
        talk.greet()
        talk.send(whole(OBJECTS, talk.request()))
        talk.linger()
        left.set()

    with peer(script) as (door, server):
        assert get(door, ROOM) == OBJECTS
        monkeypatch.setattr(_client_remote, "_IDLE_SECONDS", 0.0)
        time.sleep(0.01)
        assert get(door, ROOM) == OBJECTS
        assert left.wait(20)
        assert server.connections == 2


@pytest.mark.parametrize("end", ["closed", "reset", "noise", "half a frame and closed"])
def test_an_idle_connection_that_died_costs_nothing(end):
    heard, dead = threading.Event(), threading.Event()

    def script(talk):
        talk.greet()
        talk.send(whole(OBJECTS, talk.request()))
        if not talk.number:
            assert heard.wait(20)
            if end == "reset":
                linger = struct.pack("ii", 1, 0)
                talk.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif end != "closed":
                talk.send(b"\xff" * 99 if end == "noise" else frame(PING, 0, 0, bytes(8))[:11])
            if end != "noise":
                talk.socket.close()
            dead.set()
        talk.linger()

    with peer(script) as (door, server):
        assert get(door, ROOM) == OBJECTS
        heard.set()
        assert dead.wait(20)
        before = descriptors()
        assert get(door, ROOM) == OBJECTS
        assert server.connections == 2
        wait_until(lambda: descriptors() <= before + 1)


def test_an_idle_connection_answers_what_came_meanwhile():
    """Pings, settings, credit, and half a frame, whose other half comes with the answer."""
    said = threading.Event()
    late = settings((1, 0), (INITIAL_WINDOW, 7000))

    def script(talk):
        talk.greet()
        talk.send(whole(OBJECTS, talk.request()))
        talk.send(frame(PING, 0, 0, b"idle-now"), settings((INITIAL_WINDOW, 9000)), late[:11])
        said.set()
        heard = len(talk.heard)
        stream = talk.request()
        kinds = [(each.kind, each.flags & ACK) for each in talk.heard[heard:]]
        assert kinds.index((PING, ACK)) < next(
            at for at, (kind, _) in enumerate(kinds) if kind == HEADERS
        )
        talk.send(late[11:], whole(OBJECTS, stream))
        talk.linger()

    with peer(script) as (door, server):
        assert get(door, ROOM) == OBJECTS
        assert said.wait(20)
        time.sleep(0.05)
        assert get(door, ROOM) == OBJECTS
        assert server.connections == 1


def test_threads_have_connections_of_their_own_and_few_are_kept():
    barrier, answers = threading.Barrier(25), []

    def script(talk):
        talk.greet()
        stream = talk.request()
        barrier.wait(20)
        talk.send(whole(OBJECTS, stream))
        talk.linger()

    with peer(script) as (door, server):
        threads = [
            threading.Thread(target=lambda: answers.extend(get(door, ROOM))) for _ in range(25)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == OBJECTS * 25
        assert server.connections == 25
        assert len(door._idle) == _client_remote._MAX_IDLE
        assert not door._used
