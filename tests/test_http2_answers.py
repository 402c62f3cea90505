"""What a sidecar's client makes of refusals, early ends, lies, and what is not HTTP/2."""

from __future__ import annotations

import os
import socket
import struct
import time
import tracemalloc

import pytest
from http2_flood import frame
from http2_server import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    MAX_FRAME,
    MIB,
    PADDED,
    PING,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    data,
    found,
    get,
    head,
    message,
    messages,
    number,
    part,
    peer,
    put,
    refusal,
    settings,
    stored_all,
    tail,
    whole,
)
from waiting import SLACK_SECONDS, wait_until

from kvcodec.errors import BackendError, BackendFull, BackendReadOnly, BackendTimeout
from kvcodec_proto.v1 import service_pb2 as pb

OBJECTS = [b"first" * 20, b"second" * 20]
ROOMS = [100, 150]
HUGE = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"  # 2^63 - 1


def once(*answer: bytes):
    """This answer first, and right ones to whatever else is asked."""

    def script(talk):
        talk.greet()
        while True:
            stream = talk.request()
            is_first = talk.number == 0 and stream == 1
            talk.send(b"".join(answer) if is_first else whole(OBJECTS, stream))

    return script


def answers_to(*answer: bytes, put_bytes: int = 0) -> list[object]:
    """Of a get of two objects, or a put of one; the next call has to be answered right."""
    with peer(once(*answer)) as (door, _):
        answers = put(door, bytes(put_bytes)) if put_bytes else get(door, *ROOMS)
        assert get(door, *ROOMS) == OBJECTS
    return answers


# Calls that are refused


@pytest.mark.parametrize("put_bytes", [0, 9])
@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("1", BackendError, "cancelled"),
        ("4", BackendTimeout, ""),
        ("8", BackendError, "resource_exhausted"),
        ("14", BackendError, "unavailable"),
        ("17", BackendError, "unknown"),
        ("99999999999999999999", BackendError, "unknown"),
        ("9" * 5000, BackendError, "unknown"),
        ("-1", BackendError, "HTTP status 200"),
        ("\xb2", BackendError, "HTTP status 200"),
        ("", BackendError, "HTTP status 200"),
        ("0", BackendError, "broke off"),
    ],
)
def test_a_status_is_an_error_of_its_kind(status, kind, words, put_bytes):
    for answer in (refusal(1, status=status), head() + tail(1, status=status)):
        answers = answers_to(answer, put_bytes=put_bytes)
        assert [type(each) for each in answers] == [kind] * len(answers)
        assert words in str(answers[0])


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ("100%25 full%2c %E2%82%AC 5", "100% full, € 5"),
        ("100% %zz %f", "100% %zz %f"),
        ("%ff%80", "\ufffd\ufffd"),
        ("x" * 9000, "x" * 9000),
        ("", ""),
    ],
)
def test_a_message_is_read_as_it_was_meant(sent, wanted):
    for put_bytes in (0, 9):
        first, *_ = answers_to(refusal(1, ("grpc-message", sent)), put_bytes=put_bytes)
        assert str(first) == f"resource_exhausted: {wanted}"


@pytest.mark.parametrize(
    ("trailer", "kind"),
    [
        ("11", BackendFull),
        ("12", BackendReadOnly),
        ("13", BackendTimeout),
        ("10", BackendError),
        ("21", BackendError),
        ("22", BackendError),
        ("24", BackendError),
        ("30", BackendError),
        ("0", BackendError),
        ("1", BackendError),
        ("998", BackendError),
        ("11111", BackendError),
        ("x", BackendError),
    ],
)
def test_the_sidecars_own_status_says_more(trailer, kind):
    fields = (("grpc-message", "because"), ("kvcodec-status", trailer))
    for put_bytes in (0, 9):
        first, *_ = answers_to(refusal(1, *fields), put_bytes=put_bytes)
        assert type(first) is kind


@pytest.mark.parametrize("status", ["200", "204", "401", "404", "429", "500", "502", "x", ""])
@pytest.mark.parametrize("body", [None, b"", b"<html>Bad G", b"\0\0\0\0\0", messages(OBJECTS)])
def test_an_answer_that_is_not_grpcs_is_told_by_its_http_status(status, body):
    opened = head(1, [(":status", status), ("content-type", "text/html")], end=body is None)
    rest = b"" if body is None else data(body, end=True)
    if status == "200" and body:
        return  # whose it is shows from its messages alone
    for put_bytes in (0, 9):
        first, *_ = answers_to(opened, rest, put_bytes=put_bytes)
        assert type(first) is BackendError
        assert f"HTTP status {status}" in str(first)
        assert ("unavailable" in str(first)) == (status in ("429", "502"))


def test_an_answer_without_fields_is_refused():
    first, _ = answers_to(data(messages(OBJECTS), end=True))
    assert "HTTP status none" in str(first)


def test_a_status_after_the_last_object_takes_nothing_back():
    """They are there, whole."""
    for end in (tail(1, status="13"), frame(RST_STREAM, 0, 1, number(2)), b"\xff" * 99):
        assert answers_to(head(), data(messages(OBJECTS)), end) == OBJECTS


# Answers that end too early


def check_prefix(answers: list[object], whole_objects: int) -> None:
    """Right objects, then errors."""
    assert answers[:whole_objects] == OBJECTS[:whole_objects]
    assert all(isinstance(answer, BackendError) for answer in answers[whole_objects:])


def whole_objects(size: int, chunk_bytes: int) -> int:
    """How many objects are whole in so many bytes of messages."""
    ends = [len(messages(OBJECTS[:count], chunk_bytes)) for count in (1, 2)]
    return sum(end <= size for end in ends)


ENDS = {
    "ended": lambda stream: frame(DATA, END_STREAM, stream),
    "trailers": tail,
    "error": lambda stream: tail(stream, status="14"),
    "reset": lambda stream: frame(RST_STREAM, 0, stream, number(2)),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_may_end_after_any_byte_of_its_messages(end):
    said = messages(OBJECTS, chunk_bytes=50)

    def script(talk):
        talk.greet()
        for at in range(len(said) + 1):
            stream = talk.request()
            talk.send(head(stream), data(said[:at], stream), ENDS[end](stream))
        talk.linger()

    with peer(script) as (door, server):
        for at in range(len(said) + 1):
            check_prefix(get(door, *ROOMS), whole_objects(at, 50))
        assert server.connections == 1


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_connection_may_end_after_any_byte(is_reset):
    said = head() + data(messages(OBJECTS, chunk_bytes=50), frame_bytes=70) + tail()

    def script(talk):
        talk.greet()
        talk.request()
        talk.send(said[: talk.number])
        if is_reset:
            talk.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with peer(script) as (door, server):
        seen = 0
        for at in range(len(said) + 1):
            answers = get(door, *ROOMS)
            count = sum(not isinstance(answer, BackendError) for answer in answers)
            check_prefix(answers, count)
            # A reset may overtake what was sent before it.
            assert is_reset or count >= seen
            seen = max(count, seen)
            assert server.connections == at + 1
        assert is_reset or seen == 2


@pytest.mark.parametrize("at", [0, 3, 5, 9])
def test_a_put_whose_answer_is_cut_off_has_failed(at):
    said = stored_all(1)[:at] if at < 9 else b""
    for end in ENDS.values():
        (answer,) = answers_to(head(), data(said), end(1), put_bytes=9)
        assert isinstance(answer, BackendError)


# Messages that lie


def field(number_of: int, wire_type: int, payload: bytes) -> bytes:
    return bytes((number_of << 3 | wire_type,)) + payload


def first_of(length: int, fields: bytes) -> bytes:
    """A message with an outcome and then these fields."""
    return message(pb.GetStreamResponse(outcome=found(length)).SerializeToString() + fields)


def chunk_of(payload: bytes, size: int | None = None) -> bytes:
    return field(2, 2, bytes((len(payload) if size is None else size,)) + payload)


FIRST = messages(OBJECTS[:1])
BAD_DETAIL = b"\x0a\x05\x1a\x03\xff\xfe\xfd"
LIES = {
    "longer than its room": part(found(151), bytes(151)),
    "of no length": part(found(0), b"x"),
    "of length 2^64-1": part(found(2**64 - 1), b"x" * 150),
    "more than was said": part(found(50), bytes(60)),
    "more in the end": part(found(50), bytes(40)) + part(None, bytes(20)),
    "longer than the message": first_of(100, chunk_of(b"x" * 90, 100)),
    "longer than the room": first_of(120, field(2, 2, b"\xc8\x01" + bytes(200))),
    "no outcome": part(None, OBJECTS[1]),
    "another outcome": part(found(100), bytes(50)) + part(found(100), b""),
    "an empty message": message(b""),
    "an empty chunk": part(found(100), b""),
    "an empty chunk later": part(found(100), bytes(50)) + message(chunk_of(b"")) + part(None, b"x"),
    "of the wrong length": part(pb.Outcome(status=pb.STATUS_TOO_LONG, length=150)),
    "of no status": part(pb.Outcome(length=100), bytes(100)),
    "of an unknown status": part(pb.Outcome(status=99, length=100), bytes(100)),
    "compressed": message(part(found(9), bytes(9))[5:], compressed=1),
    "of a flag nobody knows": message(part(found(9), bytes(9))[5:], compressed=0x80),
    "of 4 GiB": message(b"", length=2**32 - 1),
    "4 GiB after it is refused": message(
        part(pb.Outcome(status=pb.STATUS_BACKEND_FULL))[5:] + chunk_of(b"x"), length=2**32 - 1
    ),
    "a chunk of 2^63": first_of(100, b"\x12" + HUGE + bytes(100)),
    "a field of 2^63": first_of(100, b"\x7a" + HUGE + bytes(100)),
    "a field of 2^70": first_of(100, b"\x7a" + b"\xff" * 9 + b"\x7f" + bytes(100)),
    "a number without an end": first_of(100, b"\x78" + b"\xff" * 100),
    "a tag without an end": first_of(100, b"\xff" * 20),
    "a number cut off": first_of(100, b"\x78\xff"),
    "a tag cut off": first_of(100, b"\xff"),
    "fixed cut off": first_of(100, b"\x79" + bytes(7)),
    "a group": first_of(100, b"\x7b\x7c"),
    "a group's end": first_of(100, b"\x7c"),
    "a wire type of no kind": first_of(100, b"\x7e"),
    "a field of number 0": first_of(100, b"\x02\x01x" + chunk_of(bytes(100))),
    "no protobuf": message(b"\x0a\x02\x08\xff" + chunk_of(bytes(100))),
    "no UTF-8": message(BAD_DETAIL + chunk_of(bytes(100))),
    "5 MiB before it": message(b"\x7a\x80\x80\xc0\x02" + bytes(5 * MIB)),
    "a MiB of numbers": message(b"\x78\x01" * (MIB // 2)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_an_error_and_what_came_before_is_right(lie):
    """Nothing is written beside a room, and not much is kept."""
    tracemalloc.start()
    try:
        answers = answers_to(head(), data(FIRST + LIES[lie], frame_bytes=MIB), tail())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answers[0] == OBJECTS[0]
    assert type(answers[1]) is (BackendFull if lie.startswith("4 GiB") else BackendError)
    assert peak < 100 * MIB


def test_4_gib_after_an_object_are_not_read():
    """They are skipped before the next object, and not by having room for them."""
    refused = part(pb.Outcome(status=pb.STATUS_NOT_FOUND))[5:] + chunk_of(b"x")
    tracemalloc.start()
    try:
        first, second = answers_to(head(), data(message(refused, length=2**32 - 1)), tail())
        assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    finally:
        tracemalloc.stop()
    assert first is None
    assert "bytes after an object" in str(second)


FUTURE = b"".join(
    (
        field(9, 0, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        field(10, 1, b"eight888"),
        field(11, 5, b"four"),
        field(12, 2, b"\x00"),
        field(13, 2, b"\x81\x00?"),  # a length in more bytes than it needs
        b"\xfa\xff\xff\xff\x0f\x03xyz",  # the largest number of a field
    )
)


def test_fields_of_a_later_version_change_nothing():
    said = b""
    for stored in OBJECTS:
        outcome = FUTURE + pb.GetStreamResponse(outcome=found(len(stored))).SerializeToString()
        for at in range(0, len(stored), 30):
            before = FUTURE + (FUTURE if at else outcome)
            said += message(before + chunk_of(stored[at : at + 30]) + FUTURE)
    assert answers_to(head(), data(said + message(FUTURE)), tail()) == OBJECTS


def test_more_than_was_asked_for_is_not_for_us():
    more = messages([os.urandom(MIB)])
    assert answers_to(head(), data(messages(OBJECTS) + more), tail()) == OBJECTS
    assert answers_to(head(), data(stored_all(1) + more), tail(), put_bytes=9) == [None]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (stored_all(2), "2 answers for 1"),
        (message(b""), "0 answers for 1"),
        (message(b"\x0a\x05\x08"), "cannot be read"),
        (message(b"", length=2**32 - 1), "4294967295 bytes"),
        (message(stored_all(1)[5:], compressed=1), "compressed"),
    ],
)
def test_a_put_with_an_answer_that_is_none_has_failed(answer, words):
    (found_out,) = answers_to(head(), data(answer), tail(), put_bytes=9)
    assert words in str(found_out)


# What is not HTTP/2


OPEN = frame(HEADERS, 0, 1, block([(":status", "200")]))
UNFIT = {
    "HTTP/1": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46" * 9,
    "noise": bytes(range(255, 0, -1)),
    "data too long": b"\x10\x00\x01\x00\x00\x00\x00\x00\x01",
    "a frame too long": b"\x00\x40\x01\x06\x00\x00\x00\x00\x00",
    "an unknown frame too long": b"\x10\x00\x01\x77\x00\x00\x00\x00\x00",
    "data of stream 0": frame(DATA, 0, 0, b"x"),
    "data of a later stream": frame(DATA, 0, 3, b"x"),
    "data padded beyond": frame(DATA, PADDED, 1, b"\x05abcd"),
    "fields padded beyond": frame(HEADERS, PADDED | END_HEADERS, 1, b"\x05abcd"),
    "padded nothing": frame(HEADERS, PADDED | END_HEADERS, 1),
    "a priority cut off": frame(HEADERS, 0x20 | END_HEADERS, 1, b"abcd"),
    "bad HPACK": frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\x0f"),
    "index 0": frame(HEADERS, END_HEADERS, 1, b"\x80"),
    "a table too large": frame(HEADERS, END_HEADERS, 1, b"\x3f\xff\xff\x03"),
    "a number too long": frame(HEADERS, END_HEADERS, 1, b"\xff" * 16_000),
    "bad Huffman": frame(HEADERS, END_HEADERS, 1, b"\x00\x81\xff\x84\xff\xff\xff\xff"),
    "bad HPACK of another": frame(HEADERS, END_HEADERS, 77, b"\xff\xff\xff\xff\x0f"),
    "too many fields": head(1, [(f"x-{index}", "y" * 900) for index in range(17)] * 5),
    "fields for ever": OPEN + frame(CONTINUATION, 0, 1, bytes(16000)) * 5,
    "fields and then data": OPEN + data(b"x"),
    "fields of two streams": OPEN + frame(CONTINUATION, END_HEADERS, 3),
    "fields that never began": frame(CONTINUATION, END_HEADERS, 1),
    "a push": frame(PUSH_PROMISE, END_HEADERS, 1, number(2) + block([(":path", "/")])),
    "a window of 0": frame(WINDOW_UPDATE, 0, 1, number(0)),
    "a window too large": frame(WINDOW_UPDATE, 0, 1, number(2**31 - 1)),
    "a window too large for all": frame(WINDOW_UPDATE, 0, 0, number(2**31 - 1)),
    "a window cut off": frame(WINDOW_UPDATE, 0, 0, b"\0\0\1"),
    "settings cut off": frame(SETTINGS, 0, 0, bytes(5)),
    "a first window too large": settings((INITIAL_WINDOW, 1 << 31)),
    "frames too small": settings((MAX_FRAME, 16383)),
    "frames too large": settings((MAX_FRAME, 1 << 24)),
    "a ping of 7": frame(PING, 0, 0, bytes(7)),
    "a reset of 3": frame(RST_STREAM, 0, 1, bytes(3)),
    "a farewell of 7": frame(GOAWAY, 0, 0, bytes(7)),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_not_http2_is_an_error_at_once(kind):
    """And its connection is used no more."""
    for before in (b"", head() + data(FIRST[:9])):
        with peer(once(before + UNFIT[kind])) as (door, server):
            assert [type(answer) for answer in get(door, *ROOMS)] == [BackendError] * 2
            assert get(door, *ROOMS) == OBJECTS
            assert server.connections == 2
    (answer,) = answers_to(UNFIT[kind], put_bytes=9)
    assert type(answer) is BackendError


TRICKLES = {
    "pings": frame(PING, 0, 0, bytes(8)),
    "settings": settings((INITIAL_WINDOW, 1), (7, 7)),
    "unknown frames": frame(0x77, 0, 0, b"x" * 99),
    "empty data": frame(DATA, 0, 1),
    "padding": frame(DATA, PADDED, 1, b"\x63" + bytes(99)),
    "1xx": head(1, [(":status", "103")]),
    "credit": frame(WINDOW_UPDATE, 0, 9, number(1)),
}


@pytest.mark.parametrize("kind", [*TRICKLES, "fields"])
@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_frames_for_ever_do_not_move_the_deadline(kind, pause):
    """Neither of a get, nor of a put whose window is used up; at any pace."""

    def script(talk):
        talk.greet((INITIAL_WINDOW, 0))
        talk.until(DATA)
        each = TRICKLES.get(kind, frame(CONTINUATION, 0, 1))
        if kind == "fields":
            talk.send(OPEN)
        while True:
            talk.send(each if pause else each * 100)
            time.sleep(pause)

    with peer(script) as (door, _):
        started = time.monotonic()
        answers = [*get(door, *ROOMS, seconds=0.2), *put(door, bytes(MIB), seconds=0.2)]
        assert {type(answer) for answer in answers} == {BackendTimeout}
        assert time.monotonic() - started < SLACK_SECONDS


def test_no_failure_leaves_a_descriptor():
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    answers_to(UNFIT["noise"])
    before = descriptors()
    for answer in (*UNFIT.values(), *list(LIES.values())[:9], *(end(1) for end in ENDS.values())):
        answers_to(answer)
    wait_until(lambda: descriptors() <= before)
