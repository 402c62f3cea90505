"""The client of HTTP/2 in a sidecar's client, against servers that are right, odd and hostile."""

from __future__ import annotations

import os
import threading

import h2.errors
import pytest
from http2_flood import frame
from http2_server import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    MAX_FRAME,
    MIB,
    OK_FIELDS,
    PADDED,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    TABLE_SIZE,
    WINDOW_UPDATE,
    Sidecar,
    answering,
    block,
    data,
    get,
    head,
    messages,
    number,
    peer,
    put,
    refusal,
    setting,
    settings,
    stored_all,
    tail,
    whole,
)
from waiting import wait_until

from kvcodec.errors import BackendError
from kvcodec_server import _client_remote

OBJECTS = [os.urandom(5000), None, os.urandom(1), os.urandom(70_000)]
ROOMS = [5000, 10, 1, 80_000]


def is_error(answer: object) -> bool:
    return isinstance(answer, BackendError)


# Frames of every form


def test_h2_has_nothing_to_object_to():
    sidecar, objects = Sidecar(), [os.urandom(size) for size in (1, 16384, 3 * MIB, 5 * MIB + 1)]
    with peer(sidecar) as (door, server):
        assert put(door, *objects) == [None] * 4
        assert get(door, *map(len, objects), 9) == [*objects, None]
        assert get(door, 0 + 1, 16384, 3 * MIB - 1) == [*objects[:2], 3 * MIB]
        assert server.connections == 1
        assert sidecar.reset_codes == []


@pytest.mark.parametrize(
    ("frame_bytes", "padding"), [(16384, None), (MIB, None), (1, 0), (300, 255), (16384, 7)]
)
def test_data_comes_in_frames_of_any_size_and_padding(frame_bytes, padding):
    sidecar = Sidecar(frame_bytes=frame_bytes, padding=padding)
    size = 7 * MIB if frame_bytes == MIB else 20 * frame_bytes
    objects = [os.urandom(size), os.urandom(999), os.urandom(size)]
    with peer(sidecar) as (door, server):
        assert put(door, *objects) == [None] * 3
        for _ in range(2):
            assert get(door, *map(len, objects)) == objects
        assert server.connections == 1


@pytest.mark.parametrize("padding", [None, 200])
def test_credit_lasts_for_any_number_of_bytes(padding):
    """`h2` keeps to the windows, of the connection and of every call, padding and all."""
    sidecar, stored = Sidecar(padding=padding), os.urandom(11 * MIB)
    with peer(sidecar) as (door, server):
        assert put(door, stored) == [None]
        for _ in range(6):
            assert get(door, len(stored)) == [stored]
        assert server.connections == 1


def test_frames_may_arrive_byte_by_byte():
    def script(talk):
        talk.greet()
        for _ in range(2):
            for byte in whole(OBJECTS[:3], talk.request()):
                talk.send(bytes((byte,)))

    with peer(script) as (door, server):
        for _ in range(2):
            assert get(door, *ROOMS[:3]) == OBJECTS[:3]
        assert server.connections == 1


def test_messages_may_be_split_over_frames_anywhere():
    objects = [b"first", None, b"x"]
    said = messages(objects, chunk_bytes=3)

    def script(talk):
        talk.greet()
        for at in range(len(said) + 1):
            stream = talk.request()
            talk.send(head(stream), data(said[:at], stream), data(said[at:], stream), tail(stream))

    with peer(script) as (door, server):
        for _ in range(len(said) + 1):
            assert get(door, 5, 5, 5) == objects
        assert server.connections == 1


def split_fields(stream: int, flags: int, fields, *sizes: int) -> bytes:
    """A block of fields in parts of these sizes, and one with the rest."""
    left, kind, frames = block(fields), HEADERS, b""
    for size in sizes:
        frames += frame(kind, flags, stream, left[:size])
        left, kind, flags = left[size:], CONTINUATION, 0
    return frames + frame(kind, flags | END_HEADERS, stream, left)


PADDED_FIELDS = frame(
    HEADERS,
    END_HEADERS | PADDED | PRIORITY,
    1,
    b"\x09" + number(3) + b"\x10" + block(OK_FIELDS) + bytes(9),
)
GREASE = frame(0xFA, 0xFF, 0, b"?" * 99) + frame(0x0B, 0, 1) + frame(2, 0, 1, bytes(5))
OPENINGS = {
    "continued": split_fields(1, 0, OK_FIELDS, 0, 1, 5, 0),
    "padded": PADDED_FIELDS,
    "unknown frames": GREASE + head() + GREASE,
    "a long unknown frame": frame(0xBE, 0, 0, bytes(20_000)) + head(),
    "1xx": head(1, [(":status", "103"), ("link", "x")]) + head(1, [(":status", "100")]) + head(),
    "empty data": head() + frame(DATA, 0, 1) * 50 + frame(DATA, PADDED, 1, b"\x03" + bytes(3)),
    "unknown settings": settings((0xFF, 1), (8, 0), (3, 1), (6, 1)) + head(),
    "table size": settings((TABLE_SIZE, 0)) + settings((TABLE_SIZE, MIB)) + head(),
    "window of nobody": frame(WINDOW_UPDATE, 0, 7, number(9)) + head(),
    "reset of nobody": frame(RST_STREAM, 0, 9, number(2)) + head(),
    "fields of nobody": head(8, [(":status", "500")], end=True) + head(),
}


@pytest.mark.parametrize("kind", OPENINGS)
def test_what_is_allowed_before_data_changes_nothing(kind):
    said = data(messages(OBJECTS))
    with peer(answering(OPENINGS[kind] + said + tail())) as (door, _):
        assert get(door, *ROOMS) == OBJECTS


def test_trailers_may_be_continued_and_padded():
    fields = [("grpc-status", "0"), ("x-long", "y" * 30_000)]
    frames = split_fields(1, END_STREAM, fields, 1, 10_000, 10_000)
    with peer(answering(head(), data(messages(OBJECTS)), frames)) as (door, server):
        for _ in range(1):
            assert get(door, *ROOMS) == OBJECTS
        assert server.connections == 1


@pytest.mark.parametrize("size", [0, 1, 100, 4096, MIB])
def test_the_servers_table_for_fields_may_have_any_size(size):
    """What `h2` decodes shows that both have the same table; it changes between calls, too."""
    sidecar = Sidecar()
    sidecar.settings = {TABLE_SIZE: size}

    def script(talk):
        sidecar(talk)

    with peer(script) as (door, server):
        for _ in range(4):
            assert put(door, b"x") == [None]
        assert server.connections == 1


# Pings and settings in the middle


def test_a_ping_in_the_middle_of_a_get_is_answered():
    def script(talk):
        talk.greet()
        stream, said = talk.request(), messages(OBJECTS)
        talk.send(head(), data(said[:5000]), frame(PING, 0, 0, b"12345678"))
        pong = talk.until(PING)
        assert (pong.flags, pong.stream, pong.payload) == (ACK, 0, b"12345678")
        talk.send(frame(PING, ACK, 0, b"87654321"), data(said[5000:]), tail())
        assert stream == 1
        talk.linger()
        assert [each for each in talk.heard if each.kind == PING] == [pong]

    with peer(script) as (door, _):
        assert get(door, *ROOMS) == OBJECTS


def test_a_ping_in_the_middle_of_a_put_is_answered():
    """Without a byte of its own to send, and while there is no room to send anything."""

    def script(talk):
        talk.greet((INITIAL_WINDOW, 5000))
        talk.send(frame(PING, 0, 0, b"12345678"))
        talk.until(SETTINGS, ACK)
        talk.send(frame(PING, 0, 0, b"87654321"))
        while talk.until(PING).payload != b"87654321":
            pass
        talk.send(frame(WINDOW_UPDATE, 0, 1, number(MIB)), frame(WINDOW_UPDATE, 0, 0, number(MIB)))
        talk.request()
        talk.send(head(), data(stored_all(1)), tail())
        talk.linger()

    with peer(script) as (door, _):
        assert put(door, bytes(300_000)) == [None]


class Window:
    """What the client may send, counted as the server grants it, and what it sends."""

    def __init__(self, talk) -> None:
        self.talk = talk
        self.initial, self.max_frame = 65535, 16384
        self.stream = self.connection = 65535
        self.received = bytearray()
        self.ended = False
        talk.greet()

    def grant(self, *, stream: int = 0, connection: int = 0) -> None:
        self.stream += stream
        self.connection += connection
        for which, amount in ((1, stream), (0, connection)):
            if amount:
                self.talk.send(frame(WINDOW_UPDATE, 0, which, number(amount)))

    def resize(self, initial: int, max_frame: int = 16384) -> None:
        """It holds from where the client says so."""
        self.talk.send(settings((INITIAL_WINDOW, initial), (MAX_FRAME, max_frame)))
        while self.hear()[:2] != (SETTINGS, ACK):
            pass
        self.stream += initial - self.initial
        self.initial, self.max_frame = initial, max_frame

    def hear(self):
        found = self.talk.frame()
        if found.kind == DATA:
            self.stream -= len(found.payload)
            self.connection -= len(found.payload)
            assert len(found.payload) <= self.max_frame
            assert not found.payload or min(self.stream, self.connection) >= 0
            self.received += found.payload
            self.ended = bool(found.flags & END_STREAM)
        return found

    def is_used_up(self) -> bool:
        """The client sends all that it may, and no more."""
        while min(self.stream, self.connection) > 0 and not self.ended:
            self.hear()
        self.talk.send(frame(PING, 0, 0, b"anything"))
        while (found := self.hear()).kind != PING:
            pass
        return found.flags == ACK and not self.ended


def test_a_put_never_sends_more_than_it_may():
    sidecar, stored = Sidecar(), os.urandom(400_000)

    def script(talk):
        window = Window(talk)
        talk.until(HEADERS)
        window.resize(65535)
        assert window.is_used_up()
        for _ in range(5):
            window.grant(stream=1)
            assert window.is_used_up(), "the connection has no room"
            window.grant(connection=1)
            assert window.is_used_up()
        window.grant(connection=70_000)
        assert window.is_used_up(), "the stream has no room"
        window.resize(1000)
        assert window.stream < -60_000
        window.grant(stream=-window.stream)
        assert window.stream == 0 and window.is_used_up()
        for amount in (1, 2, 3, 40_000):
            window.grant(stream=amount)
            assert window.is_used_up()
        window.resize(30_000, (1 << 24) - 1)
        window.grant(connection=29_000)
        assert window.is_used_up()
        assert max(len(each.payload) for each in talk.heard) > 16384
        window.resize(0)
        window.grant(connection=MIB)
        assert window.is_used_up()
        window.resize(MIB)
        while not window.ended:
            window.hear()
        answer = sidecar.PutStream(memoryview(window.received))
        talk.send(head(), data(answer), tail())
        talk.linger()

    with peer(script) as (door, server):
        assert put(door, stored) == [None]
        assert list(sidecar.objects.values()) == [stored]
        assert server.connections == 1


def test_a_put_ends_while_its_window_is_below_zero(monkeypatch):
    """All was sent when the server made the window smaller; the end itself needs no room."""

    def script(talk):
        talk.greet()
        while b"x" * 9 not in talk.until(DATA).payload:
            pass
        if not talk.heard[-1].flags & END_STREAM:
            talk.request()
        talk.send(head(), data(stored_all(1)), tail())
        talk.linger()

    class Shrinks(_client_remote.Http2Connection):
        """As if the settings had arrived just then, which no server can arrange."""

        def send(self, parts, *, last=False):
            if last and not parts:
                self._set(0, setting((INITIAL_WINDOW, 1)))
                assert self._stream_window < 0
            return super().send(parts, last=last)

    monkeypatch.setattr(_client_remote, "Http2Connection", Shrinks)
    with peer(script) as (door, _):
        assert put(door, b"x" * 9) == [None]


def test_the_windows_of_h2_are_kept_to():
    """A window of a byte that grows slowly, and credit in small pieces."""

    class Slow(Sidecar):
        owed = (0, 0)

        def credit(self, link, size, stream):
            before = self.owed[1] if self.owed[0] == stream else 0
            self.owed = (stream, before + size)
            link.increment_flow_control_window(size)
            if self.owed[1] > 1000:
                link.increment_flow_control_window(self.owed[1], stream)
                self.owed = (stream, 0)

    sidecar, objects = Slow(), [os.urandom(size) for size in (1, 30_000, 200_000)]
    sidecar.settings = {INITIAL_WINDOW: 1500}
    with peer(sidecar) as (door, server):
        for _ in range(2):
            assert put(door, *objects) == [None] * 3
            assert get(door, *map(len, objects)) == objects
        assert server.connections == 1


def test_settings_in_the_middle_of_a_get_change_nothing():
    said = messages(OBJECTS)

    def script(talk):
        talk.greet((INITIAL_WINDOW, 0))
        for stream in (1, 3):
            talk.until(HEADERS)
            talk.send(settings((INITIAL_WINDOW, 0)), settings((INITIAL_WINDOW, 99_999)))
            if not talk.heard[-1].flags & END_STREAM:
                talk.request()
            for at in range(0, len(said), 10_000):
                talk.send(data(b"", stream) if at else head(stream))
                talk.send(settings((INITIAL_WINDOW, at), (MAX_FRAME, 16384 + at), (TABLE_SIZE, at)))
                talk.send(data(said[at : at + 10_000], stream))
            talk.send(tail(stream))
        talk.linger()

    with peer(script) as (door, server):
        for _ in range(2):
            assert get(door, *ROOMS) == OBJECTS
        assert server.connections == 1


# Calls that are broken off


@pytest.mark.parametrize("last", [1, 3, 2**31 - 1])
def test_a_call_goes_on_while_its_server_goes_away(last):
    going = frame(GOAWAY, 0, 0, number(last) + number(0) + b"for a while")
    said = messages(OBJECTS)
    answer = going + head() + data(said[:9]) + going + data(said[9:]) + tail()
    with peer(answering(answer)) as (door, server):
        for connections in (1, 2):
            assert get(door, *ROOMS) == OBJECTS
            assert server.connections == connections


def test_a_call_that_a_server_will_not_serve_fails_at_once():
    def script(talk):
        talk.greet()
        talk.until(HEADERS)
        talk.send(frame(GOAWAY, 0, 0, number(0) + number(0)))
        talk.linger()

    with peer(script) as (door, server):
        (answer,) = get(door, 9)
        assert "going away" in str(answer)
        (answer,) = put(door, bytes(MIB))
        assert "going away" in str(answer)
        assert server.connections == 4, "each is made again, once"


def test_a_server_that_went_away_between_calls_is_left():
    gone = threading.Event()

    def script(talk):
        talk.greet()
        talk.send(whole(OBJECTS, talk.request()))
        if not talk.number:
            talk.send(frame(GOAWAY, 0, 0, number(1) + number(0)))
            gone.set()
        talk.linger()

    with peer(script) as (door, server):
        assert get(door, *ROOMS) == OBJECTS
        assert gone.wait(20)
        assert get(door, *ROOMS) == OBJECTS
        assert server.connections == 2


@pytest.mark.parametrize("code", [0, 2, 8, 11, 0xFFFFFFFF])
def test_a_reset_call_leaves_its_connection_to_others(code):
    reset = [frame(RST_STREAM, 0, stream, number(code)) for stream in (1, 3, 5)]

    def script(talk):
        talk.greet()
        said = messages(OBJECTS)
        talk.request()
        # In the middle of an object, of which more arrives that was under way.
        talk.send(head() + data(said[:6000]) + reset[0] + data(said[6000:]) + tail())
        talk.until(DATA)
        talk.send(reset[1])
        while (found := talk.frame()).stream != 5:
            assert found.kind in (DATA, WINDOW_UPDATE)
        talk.send(head(5) + reset[2])
        while (found := talk.frame()).stream != 7:
            assert found.kind in (DATA, WINDOW_UPDATE)
        talk.send(head(1) + reset[0] + whole(OBJECTS, 7))
        talk.linger()

    with peer(script) as (door, server):
        # What came before counts, and nothing of what came after.
        *before, last = get(door, *ROOMS)
        assert before == OBJECTS[:3]
        assert f"error code {code})" in str(last)
        for _ in range(2):
            (answer,) = put(door, bytes(100_000))
            assert f"error code {code})" in str(answer)
        assert get(door, *ROOMS) == OBJECTS
        assert server.connections == 1


@pytest.mark.parametrize("is_reset", [True, False])
def test_an_early_refusal_ends_the_call_on_both_sides(is_reset):
    """The server may wait for the rest of the request, which will not come: it is told so."""

    def script(talk):
        talk.greet((INITIAL_WINDOW, 10_000))
        for stream in (1, 3, 5):
            talk.send(frame(WINDOW_UPDATE, 0, 0, number(MIB)))
            while talk.until(HEADERS).stream != stream:
                pass
            talk.until(DATA)
            talk.send(refusal(stream, ("grpc-message", "too many")))
            if is_reset:
                talk.send(frame(RST_STREAM, 0, stream, number(0)))
        talk.send(whole(OBJECTS, talk.request()))
        talk.linger()
        resets = [each.stream for each in talk.heard if each.kind == RST_STREAM]
        ended = [each.stream for each in talk.heard if each.kind == DATA and each.flags & 1]
        assert (resets, ended) == ([1, 3, 5], [7])

    with peer(script) as (door, server):
        for _ in range(3):
            (answer,) = put(door, bytes(5 * MIB))
            assert "too many" in str(answer)
        assert get(door, *ROOMS) == OBJECTS
        assert server.connections == 1


def test_refused_puts_do_not_add_up():
    """`h2` counts the streams that are open, and allows ten."""

    class Refuses(Sidecar):
        refused = 0

        def credit(self, link, size, stream):
            link.increment_flow_control_window(size)
            if stream > self.refused:
                link.send_headers(stream, [*OK_FIELDS, ("grpc-status", "8")], end_stream=True)
                self.refused = stream

    sidecar = Refuses()
    sidecar.settings = {3: 10, INITIAL_WINDOW: 1000}
    with peer(sidecar) as (door, server):
        for count in range(1, 30):
            (answer,) = put(door, bytes(100_000))
            assert "resource_exhausted" in str(answer)
            wait_until(lambda: len(sidecar.reset_codes) == count)  # noqa: B023 - at once
        assert set(sidecar.reset_codes) == {h2.errors.ErrorCodes.CANCEL}
        assert server.connections == 1


def test_what_is_wrong_after_the_end_of_a_call_ends_its_connection():
    """It arrives with the end: only the next call may find it, and it does."""

    def script(talk):
        talk.greet()
        if talk.number == 0:
            talk.until(HEADERS)
            bad = frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\x0f")
            talk.send(refusal(), bad)
        else:
            talk.send(whole(OBJECTS, talk.request()))
        talk.linger()

    with peer(script) as (door, server):
        assert is_error(*put(door, bytes(4 * MIB)))
        assert get(door, *ROOMS) == OBJECTS
        assert server.connections == 2
