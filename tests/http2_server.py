"""Sidecars as `kvcodec_server`'s HTTP/2 client may meet them: of scripted frames, and of `h2`.

    with peer(script) as (door, server):      # script(talk) is run for every connection
        answers = get(door, 10)

What a script gets wrong, an assert of its own and what `h2` objects to, fails the test at the end.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
from http2_flood import frame

from kvcodec.backend import Deadline
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server._client_remote import Address, RemoteDoor
from kvcodec_server.status import get_outcome

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY = 0, 1, 3, 4, 5, 6, 7
WINDOW_UPDATE, CONTINUATION = 8, 9
ACK = END_STREAM = 1
END_HEADERS, PADDED, PRIORITY = 4, 8, 32
TABLE_SIZE, INITIAL_WINDOW, MAX_FRAME = 1, 4, 5

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
OK_FIELDS = ((":status", "200"), ("content-type", "application/grpc"))
SECONDS = 20.0
MIB = 1 << 20
_GUARD = b"\xa5" * 64


class Frame(NamedTuple):
    """One frame of the client's."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class Talk:
    """One connection, seen from the server; `number` counts them from 0."""

    def __init__(self, connected: socket.socket, number: int) -> None:
        self.socket = connected
        self.number = number
        self.heard: list[Frame] = []

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def greet(self, *pairs: tuple[int, int]) -> None:
        assert self.read(len(PREFACE)) == PREFACE
        self.send(settings(*pairs))

    def frame(self) -> Frame:
        head = self.read(9)
        kind, flags, stream = struct.unpack_from(">BBI", head, 3)
        found = Frame(kind, flags, stream, self.read(int.from_bytes(head[:3], "big")))
        self.heard.append(found)
        return found

    def until(self, kind: int, flags: int = 0) -> Frame:
        """The next frame of this kind, with these flags; what comes before is in `heard`."""
        while True:
            found = self.frame()
            if found.kind == kind and found.flags & flags == flags:
                return found

    def request(self) -> int:
        """Hear the whole of one; its stream."""
        return self.until(DATA, END_STREAM).stream

    def linger(self) -> None:
        """Hear the client until it leaves."""
        with suppress(EOFError, OSError):
            while True:
                self.frame()


def setting(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack(">HI", *pair) for pair in pairs)


def number(value: int) -> bytes:
    return struct.pack(">I", value)


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, setting(*pairs))


def block(fields: Sequence[tuple[str, str]]) -> bytes:
    """HPACK that leans on nothing that was sent before."""
    return hpack.Encoder().encode(fields)


def head(stream: int = 1, fields: Sequence[tuple[str, str]] = OK_FIELDS, *, end: bool = False):
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block(fields))


def tail(stream: int = 1, *fields: tuple[str, str], status: str = "0") -> bytes:
    return head(stream, [("grpc-status", status), *fields], end=True)


def refusal(stream: int = 1, *fields: tuple[str, str], status: str = "8") -> bytes:
    """An answer of trailers alone."""
    return head(stream, [*OK_FIELDS, ("grpc-status", status), *fields], end=True)


def data(payload: bytes, stream: int = 1, *, frame_bytes: int = 16384, end: bool = False) -> bytes:
    """Frames of so many bytes each."""
    parts = [payload[at : at + frame_bytes] for at in range(0, len(payload), frame_bytes)] or [b""]
    return b"".join(
        frame(DATA, END_STREAM if end and index == len(parts) - 1 else 0, stream, part)
        for index, part in enumerate(parts)
    )


def message(payload: bytes, *, length: int | None = None, compressed: int = 0) -> bytes:
    size = len(payload) if length is None else length
    return bytes((compressed,)) + number(size) + payload


def part(outcome: pb.Outcome | None, chunk: bytes = b"") -> bytes:
    return message(pb.GetStreamResponse(outcome=outcome, chunk=chunk).SerializeToString())


def found(length: int) -> pb.Outcome:
    return pb.Outcome(status=pb.STATUS_OK, length=length)


def parts(stored: bytes | None, chunk_bytes: int = 1 << 21) -> list[bytes]:
    """The messages of one object."""
    if stored is None:
        return [part(pb.Outcome(status=pb.STATUS_NOT_FOUND))]
    chunks = [stored[at : at + chunk_bytes] for at in range(0, len(stored), chunk_bytes)]
    return [part(None if at else found(len(stored)), each) for at, each in enumerate(chunks)]


def messages(objects: Sequence[bytes | None], chunk_bytes: int = 1 << 21) -> bytes:
    return b"".join(each for stored in objects for each in parts(stored, chunk_bytes))


def stored_all(count: int) -> bytes:
    """The answer to a put of so many objects."""
    outcomes = [pb.Outcome(status=pb.STATUS_OK)] * count
    return message(pb.PutStreamResponse(outcomes=outcomes).SerializeToString())


def whole(objects: Sequence[bytes | None], stream: int = 1) -> bytes:
    """A complete answer to a get."""
    return head(stream) + data(messages(objects), stream) + tail(stream)


def answering(
    *answer: bytes, then: Callable[[Talk], object] | None = None
) -> Callable[[Talk], None]:
    """Greets, hears a request, and says this."""

    def script(talk: Talk) -> None:
        talk.greet()
        talk.request()
        talk.send(*answer)
        if then is not None:
            then(talk)
        talk.linger()

    return script


class Server:
    """Listens, and runs the script for every connection."""

    def __init__(self, script: Callable[[Talk], object], tls: ssl.SSLContext | None, host: str):
        self._script, self._tls = script, tls
        self._errors: list[BaseException] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self._run(self._accept)

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connected, _ = self._listener.accept()
                self._sockets.append(connected)
                self.connections += 1
                self._run(self._serve, connected, self.connections - 1)

    def _serve(self, connected: socket.socket, number: int) -> None:
        try:
            with connected:
                connected.settimeout(SECONDS)
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    connected = self._tls.wrap_socket(connected, server_side=True)
                with connected:
                    self._script(Talk(connected, number))
        except (EOFError, OSError):
            pass  # the client left
        except BaseException as error:  # noqa: BLE001 - for the test to raise
            self._errors.append(error)

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        if self._errors:
            raise self._errors[0]


def no_channel() -> grpc.Channel:
    """It connects at a call, and there is none."""
    return grpc.insecure_channel("127.0.0.1:1")


def door_to(port: int, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> RemoteDoor:
    return RemoteDoor(Address(host, port, tls), no_channel, (("authorization", "Bearer a word"),))


@contextmanager
def peer(
    script: Callable[[Talk], object],
    *,
    server_tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> Iterator[tuple[RemoteDoor, Server]]:
    server = Server(script, server_tls, host)
    door = door_to(server.port, host, client_tls)
    try:
        yield door, server
    finally:
        door.close()
        server.close()


class Rooms:
    """Memory for objects, between bytes that are nobody's."""

    def __init__(self, *capacities: int) -> None:
        self._memory = bytearray(_GUARD)
        self._places = []
        for capacity in capacities:
            self._places.append((len(self._memory), capacity))
            self._memory += bytes(capacity) + _GUARD
        view = memoryview(self._memory)
        self.views = [view[at : at + capacity] for at, capacity in self._places]

    def check(self) -> None:
        """Nothing was written beside them."""
        end = 0
        for at, capacity in [*self._places, (len(self._memory), 0)]:
            assert self._memory[end:at] == _GUARD
            end = at + capacity


def name(index: int) -> str:
    return f"{7:032x}/{index:064x}"


def get(door: RemoteDoor, *capacities: int, seconds: float = SECONDS) -> list[object]:
    """What it answers, with what was read in place of its length."""
    rooms = Rooms(*capacities)
    pairs = [(name(index), view) for index, view in enumerate(rooms.views)]
    answers = door.get(pairs, Deadline(seconds))
    rooms.check()
    return [
        bytes(view[:answer]) if isinstance(answer, int) and answer <= len(view) else answer
        for view, answer in zip(rooms.views, answers, strict=True)
    ]


def put(door: RemoteDoor, *objects: bytes, seconds: float = SECONDS) -> list[object]:
    pairs = [(name(index), memoryview(each)) for index, each in enumerate(objects)]
    return door.put(pairs, Deadline(seconds))


class Sidecar:
    """Stores and serves objects by way of `h2`, which knows what a client may do.

    `frame_bytes` is the most of one frame of data, `padding` what each of them has in addition;
    `settings` hold from the first call on, and each of the `changes` after another call.
    """

    def __init__(self, *, frame_bytes: int = 16384, padding: int | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        self.settings: Mapping[int, int] = {}
        self.changes: list[Mapping[int, int]] = []
        self.frame_bytes = frame_bytes
        self.padding = padding
        self.answered = 0
        self.reset_codes: list[int] = []
        self.fields: dict[bytes, bytes] = {}

    def __call__(self, talk: Talk) -> None:
        link = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        link.initiate_connection()
        if self.settings:
            link.update_settings(dict(self.settings))
        requests: dict[int, tuple[str, bytearray]] = {}
        answers: dict[int, memoryview] = {}
        while True:
            talk.send(link.data_to_send())
            received = talk.socket.recv(1 << 16)
            if not received:
                return
            for event in link.receive_data(received):
                if isinstance(event, h2.events.RequestReceived):
                    self.fields = dict(event.headers)
                    path = self.fields[b":path"].decode().rpartition("/")[2]
                    requests[event.stream_id] = (path, bytearray())
                elif isinstance(event, h2.events.DataReceived):
                    requests[event.stream_id][1].extend(event.data)
                    if size := event.flow_controlled_length:
                        self.credit(link, size, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    path, request = requests.pop(event.stream_id)
                    link.send_headers(event.stream_id, OK_FIELDS)
                    answer = getattr(self, path)(memoryview(request))
                    answers[event.stream_id] = memoryview(answer)
                elif isinstance(event, h2.events.StreamReset):
                    self.reset_codes.append(event.error_code)
                    requests.pop(event.stream_id, None)
            for stream in list(answers):
                self._send(talk, link, stream, answers)

    def credit(self, link: h2.connection.H2Connection, size: int, stream: int) -> None:
        link.acknowledge_received_data(size, stream)

    def _send(self, talk, link, stream: int, answers: dict[int, memoryview]) -> None:
        extra = 0 if self.padding is None else 1 + self.padding
        while answers[stream]:
            room = min(
                link.local_flow_control_window(stream) - extra,
                link.max_outbound_frame_size - extra,
                self.frame_bytes,
            )
            if room <= 0:
                return
            link.send_data(stream, answers[stream][:room], pad_length=self.padding)
            answers[stream] = answers[stream][room:]
            talk.send(link.data_to_send())
        del answers[stream]
        link.send_headers(stream, [("grpc-status", "0")], end_stream=True)
        self.answered += 1
        if self.changes:
            link.update_settings(dict(self.changes.pop(0)))

    def GetStream(self, request: memoryview) -> bytes:  # noqa: N802 - as the method is called
        asked = pb.GetStreamRequest.FromString(bytes(request[5:]))
        answer = b""
        for each in asked.objects:
            stored = self.objects.get(each.name)
            if stored is not None and len(stored) > each.capacity:
                answer += part(get_outcome(len(stored), each.capacity))
            else:
                answer += messages([stored])
        return answer

    def PutStream(self, request: memoryview) -> bytes:  # noqa: N802
        at, count, last, lengths = 0, 0, "", {}
        while at < len(request):
            size = int.from_bytes(request[at + 1 : at + 5], "big")
            said = pb.PutStreamRequest.FromString(bytes(request[at + 5 : at + 5 + size]))
            at += 5 + size
            if said.HasField("start"):
                last, count = said.start.name, count + 1
                self.objects[last], lengths[last] = b"", said.start.length
            if last:
                self.objects[last] += said.chunk
        assert {each: len(self.objects[each]) for each in lengths} == lengths
        return stored_all(count)
