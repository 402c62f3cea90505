"""Answers at random: dressed in all that is allowed, cut off, and mutated."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from random import Random

import pytest
from google.protobuf.message import DecodeError
from http2_flood import frame
from http2_server import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW,
    OK_FIELDS,
    PADDED,
    PING,
    PRIORITY,
    RST_STREAM,
    TABLE_SIZE,
    WINDOW_UPDATE,
    block,
    get,
    head,
    messages,
    number,
    peer,
    put,
    settings,
    stored_all,
)
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from waiting import SLACK_SECONDS

from kvcodec.errors import BackendError
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server.status import get_result

SECONDS = 5.0
ROOM = 400

objects = st.lists(
    st.none() | st.integers(1, ROOM).map(lambda size: Random(size).randbytes(size)),
    min_size=1,
    max_size=4,
)


class Says:
    """Hears a request, says this, and then no more."""

    said = b""

    def __call__(self, talk) -> None:
        talk.greet()
        talk.request()
        talk.send(self.said)
        talk.socket.shutdown(socket.SHUT_WR)
        talk.linger()


@pytest.fixture(scope="module")
def ask():
    """Asks for so many objects of a server that says this; the answers."""
    script = Says()
    with peer(script) as (door, _):

        def asked(said: bytes, count: int, *, is_put: bool = False) -> list[object]:
            door._close_idle()  # the last one may not have heard yet that its server is done
            script.said = said
            started = time.monotonic()
            if is_put:
                answers = put(door, *[b"x"] * count, seconds=SECONDS)
            else:
                answers = get(door, *[ROOM] * count, seconds=SECONDS)
            assert time.monotonic() - started < SECONDS + SLACK_SECONDS
            assert len(answers) == count
            assert all(each is None or isinstance(each, kinds) for each in answers)
            return answers

        kinds = (bytes, int, BackendError)
        yield asked


# Conversations


def frames_of_fields(random: Random, fields: Sequence[tuple[str, str]], flags: int) -> list[bytes]:
    """In one frame or several, padded or not, with a priority or not."""
    said = block(fields)
    cuts = sorted(random.randrange(len(said) + 1) for _ in range(random.randrange(3)))
    parts = [said[at:end] for at, end in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    first, padding = parts[0], b""
    if random.random() < 0.3:
        first, flags = number(0) + b"\x07" + first, flags | PRIORITY
    if random.random() < 0.3:
        padding, flags = bytes(random.randrange(256)), flags | PADDED
        first = bytes((len(padding),)) + first
    ends = [0] * (len(parts) - 1) + [END_HEADERS]
    rest = [
        frame(CONTINUATION, end, 1, part) for part, end in zip(parts[1:], ends[1:], strict=True)
    ]
    return [frame(HEADERS, flags | ends[0], 1, first + padding), *rest]


def frames_of_data(random: Random, said: bytes) -> list[bytes]:
    frames = []
    while said:
        size = random.choice((0, 1, 2, 7, 50, 300, 16000))
        part, said = said[:size], said[size:]
        if random.random() < 0.3:
            padding = random.randrange(256)
            frames.append(frame(DATA, PADDED, 1, bytes((padding,)) + part + bytes(padding)))
        else:
            frames.append(frame(DATA, 0, 1, part))
    return frames


def conversation(random: Random, said: bytes) -> list[bytes]:
    """An answer of these messages, in frames, among all else that may come."""
    between = (
        frame(PING, 0, 0, b"12345678"),
        frame(WINDOW_UPDATE, 0, 0, number(3)),
        frame(WINDOW_UPDATE, 0, 1, number(3)),
        frame(0x40 + random.randrange(99), 0xFF, random.randrange(9), random.randbytes(9)),
        frame(2, 0, 1, bytes(5)),
        frame(RST_STREAM, 0, 3, number(5)),
        settings((INITIAL_WINDOW, random.randrange(1 << 20)), (TABLE_SIZE, random.randrange(9999))),
    )
    parts = [frames_of_fields(random, OK_FIELDS, 0)]
    if random.random() < 0.2:
        parts.insert(0, frames_of_fields(random, [(":status", "103")], 0))
    parts += [[each] for each in frames_of_data(random, said)]
    parts.append(frames_of_fields(random, [("grpc-status", "0")], END_STREAM))
    frames = []
    for part in parts:
        while random.random() < 0.2:
            frames.append(random.choice(between))
        frames += part
    return frames


def data_of(said: bytes) -> bytes:
    """What these frames have for the call, as far as they go."""
    found, at = b"", 0
    while at + 9 <= len(said):
        size = int.from_bytes(said[at : at + 3], "big")
        kind, flags = said[at + 3], said[at + 4]
        stream = int.from_bytes(said[at + 5 : at + 9], "big") & 0x7FFFFFFF
        payload = said[at + 9 : at + 9 + size]
        at += 9 + size
        if kind == DATA and stream == 1:
            padding = payload[0] if flags & PADDED and payload else 0
            found += payload[bool(flags & PADDED) : max(0, size - padding)]
    return found


def truth(said: bytes, count: int) -> list[object]:
    """What a slow and simple reader makes of messages, up to what it does not understand.

    A message that protobuf would not write like this has no one meaning, and one that is cut off
    has one as far as it goes.
    """
    results: list[object] = []
    stored, wanted, at = b"", 0, 0
    while at + 5 <= len(said) and len(results) < count and not said[at]:
        size = int.from_bytes(said[at + 1 : at + 5], "big")
        body = said[at + 5 : at + 5 + size]
        at += 5 + size
        try:
            message = pb.GetStreamResponse.FromString(body)
        except DecodeError:
            break
        if message.SerializeToString() != body or len(body) != size:
            break
        if wanted:
            stored += message.chunk
        else:
            result = get_result(message.outcome, ROOM)
            if message.outcome.status != pb.STATUS_OK or not isinstance(result, int):
                results.append(result)
                continue
            stored, wanted = message.chunk, result
        if len(stored) > wanted or not message.chunk:
            break
        if len(stored) == wanted:
            results.append(stored)
            wanted = 0
    return results


def is_meant(answer: object, meant: object) -> bool:
    if isinstance(meant, BackendError):
        return type(answer) is type(meant)
    return isinstance(answer, type(meant)) and answer == meant


# Properties


@given(objects, st.integers(0, 2**32), st.integers(1, ROOM))
@examples(150)
def test_what_is_allowed_changes_nothing(ask, stored, seed, chunk_bytes):
    random = Random(seed)
    said = b"".join(conversation(random, messages(stored, chunk_bytes)))
    assert truth(data_of(said), len(stored)) == stored, "the reader of this test is right"
    assert ask(said, len(stored)) == stored
    said = b"".join(conversation(random, stored_all(len(stored))))
    assert ask(said, len(stored), is_put=True) == [None] * len(stored)


@given(objects, st.integers(0, 2**32), st.integers(1, ROOM), st.floats(0, 1))
@examples(150)
def test_an_answer_cut_off_anywhere_says_what_was_whole(ask, stored, seed, chunk_bytes, where):
    frames = conversation(Random(seed), messages(stored, chunk_bytes))
    said = b"".join(frames)
    said = said[: int(where * len(said))]
    answers = ask(said, len(stored))
    count = sum(not isinstance(answer, BackendError) for answer in answers)
    assert answers[:count] == stored[:count]
    assert all(isinstance(answer, BackendError) for answer in answers[count:])
    assert count >= len(truth(data_of(said), len(stored)))


def mutated(random: Random, frames: list[bytes]) -> bytes:
    """Frames lost, doubled and swapped; then bytes of them changed, lost, doubled and made up."""
    frames = list(frames)
    for _ in range(random.randrange(3)):
        at, other = random.randrange(len(frames)), random.randrange(len(frames))
        kind = random.randrange(3)
        if kind == 0 and len(frames) > 1:
            del frames[at]
        elif kind == 1:
            frames.insert(other, frames[at])
        else:
            frames[at], frames[other] = frames[other], frames[at]
    said = bytearray(b"".join(frames))
    for _ in range(random.randrange(5)):
        at = random.randrange(len(said) + 1)
        size = random.choice((1, 2, 9, 100))
        kind = random.randrange(6)
        if kind == 0:
            del said[at : at + size]
        elif kind == 1:
            said[at:at] = said[at : at + size]
        elif kind == 2:
            said[at:at] = random.randbytes(size)
        elif kind == 3:
            del said[at:]
        elif at < len(said):
            near = (said[at] ^ 1 << random.randrange(8), random.choice((0, 1, 0x7F, 0x80, 0xFF)))
            said[at] = random.choice(near)
    return bytes(said)


@given(objects, st.integers(0, 2**32), st.sampled_from([1, 7, ROOM]))
@examples(600)
def test_mutants_are_read_as_what_they_say_or_not_at_all(ask, stored, seed, chunk_bytes):
    random = Random(seed)
    said = mutated(random, conversation(random, messages(stored, chunk_bytes)))
    meant = truth(data_of(said), len(stored))
    answers = ask(said, len(stored))
    for answer, each in zip(answers, meant, strict=False):
        assert isinstance(answer, BackendError) or is_meant(answer, each)


@given(st.integers(1, 3), st.integers(0, 2**32))
@examples(150)
def test_mutants_of_answers_to_a_put_are_answers(ask, count, seed):
    random = Random(seed)
    said = mutated(random, conversation(random, stored_all(count)))
    answers = ask(said, count, is_put=True)
    assert all(each is None or isinstance(each, BackendError) for each in answers)


@given(st.binary(max_size=300))
@examples(150)
def test_noise_is_no_answer(ask, noise):
    for said in (noise, head() + noise, head() + frame(DATA, 0, 1, noise)):
        (answer,) = ask(said, 1)
        assert answer is None or isinstance(answer, (bytes, int, BackendError))
        assert isinstance(answer, BackendError) or data_of(said)
