"""A client that opens HTTP/2 streams by the thousand and heeds no limit of the server's.

    python tests/http2_flood.py HOST:PORT KIND STREAMS CONNECTIONS PER_SECOND HOLD_SECONDS

It writes what became of the streams as JSON. A gRPC library would wait for streams to come free;
this one writes frames as they are, so that what a server refuses is seen to be refused.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass

from grpc_health.v1 import health_pb2

from kvcodec_proto.v1 import service_pb2 as pb

__all__ = ["KINDS", "Connection", "Kind", "flood", "frame"]

_NAME = f"{'e' * 32}/{'f' * 64}"
_SERVICE = "/kvcodec.v1.PageService/"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_CONTINUATION = 9
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_TABLE_SIZE, _INITIAL_WINDOW = 1, 4
_GRPC_NAMES = {0: "OK", 1: "CANCELLED", 4: "DEADLINE_EXCEEDED", 8: "RESOURCE_EXHAUSTED"}
_HTTP2_NAMES = {0: "NO_ERROR", 7: "REFUSED_STREAM", 8: "CANCEL", 11: "ENHANCE_YOUR_CALM"}
_READ_BYTES = 1 << 16
# Of another machine, as far as a server on the loopback interface can tell.
_SOURCE = "127.0.0.2"


@dataclass(frozen=True)
class Kind:
    """What each stream asks for: a method, its request or none, and how much may be answered.

    With `claimed` the request is said to be so long.
    """

    path: str
    request: bytes | None
    ends: bool = False
    window: int = 1 << 20
    claimed: int | None = None


KINDS = {
    # Complete calls, which are served: what a flood is compared with.
    "health": Kind(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest().SerializeToString(),
        ends=True,
    ),
    "exists": Kind(
        _SERVICE + "Exists", pb.ExistsRequest(names=[_NAME]).SerializeToString(), ends=True
    ),
    # Streams that begin and never go on.
    "silent_put": Kind(_SERVICE + "PutStream", None),
    "silent_get": Kind(_SERVICE + "GetStream", None),
    "silent_call": Kind(_SERVICE + "Exists", None),
    "silent_health": Kind("/grpc.health.v1.Health/Check", None),
    # The beginning of a message of a GiB.
    "gibibyte": Kind(_SERVICE + "PutStream", bytes(10_000), claimed=1 << 30),
    # Streams whose answers nobody takes.
    "unread_get": Kind(
        _SERVICE + "GetStream",
        pb.GetStreamRequest(
            objects=[pb.ObjectRoom(name=_NAME, capacity=1 << 20)] * 8
        ).SerializeToString(),
        ends=True,
        window=0,
    ),
}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _header_block(path: str, authority: str) -> bytes:
    """HPACK, of literals alone that neither side has to remember."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b""
    for name, value in fields.items():
        assert len(name) < 127
        assert len(value) < 127
        block += bytes((0, len(name))) + name.encode() + bytes((len(value),)) + value.encode()
    return block


class Connection:
    """One connection: frames to be sent, and what is heard of its streams."""

    def __init__(self, host: str, port: int, kind: Kind) -> None:
        self._kind = kind
        self._block = _header_block(kind.path, f"{host}:{port}")
        self._next = 1
        self._buffer = b""
        # No table: then the server's headers are literals, too, and can be searched for.
        settings = struct.pack(">HIHI", _TABLE_SIZE, 0, _INITIAL_WINDOW, kind.window)
        self.out = bytearray(_PREFACE + frame(_SETTINGS, 0, 0, settings))
        self.open: set[int] = set()
        self.seen: Counter[str] = Counter()
        self.closed = False
        self.socket = socket.create_connection((host, port), 10, (_SOURCE, 0))
        self.socket.setblocking(False)

    def begin(self, count: int) -> None:
        """Open more streams."""
        for _ in range(count):
            stream, self._next = self._next, self._next + 2
            self.open.add(stream)
            self.out += frame(_HEADERS, _END_HEADERS, stream, self._block)
            if self._kind.request is not None:
                request = self._kind.request
                claimed = self._kind.claimed or len(request)
                message = struct.pack(">BI", 0, claimed) + request
                self.out += frame(_DATA, _END_STREAM if self._kind.ends else 0, stream, message)

    def send(self) -> None:
        """Send what can be sent now."""
        try:
            while self.out:
                del self.out[: self.socket.send(self.out)]
        except BlockingIOError:
            pass
        except OSError:
            self._lost()

    def receive(self) -> None:
        """Hear what there is to hear."""
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= 9:
            size = int.from_bytes(self._buffer[at : at + 3], "big")
            if len(self._buffer) - at < 9 + size:
                break
            kind, flags, stream = struct.unpack_from(">BBI", self._buffer, at + 3)
            self._hear(kind, flags, stream, self._buffer[at + 9 : at + 9 + size])
            at += 9 + size
        self._buffer = self._buffer[at:]

    def _hear(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (_HEADERS, _CONTINUATION) and (at := payload.find(b"grpc-status")) >= 0:
            at += len(b"grpc-status")
            code = int(payload[at + 1 : at + 1 + payload[at]])
            self._over(stream, _GRPC_NAMES.get(code, f"status {code}"))
        elif kind == _RST_STREAM:
            (code,) = struct.unpack(">I", payload)
            self._over(stream, _HTTP2_NAMES.get(code, f"error {code}"))
        elif kind == _SETTINGS and not flags & _ACK:
            self.out += frame(_SETTINGS, _ACK, 0)
        elif kind == _PING and not flags & _ACK:
            self.out += frame(_PING, _ACK, 0, payload)
        elif kind == _GOAWAY:
            self.seen["goaway"] += 1

    def _over(self, stream: int, how: str) -> None:
        if stream in self.open:
            self.open.remove(stream)
            self.seen[how] += 1

    def _lost(self) -> None:
        self.closed = True
        self.out.clear()
        self.seen["connection closed"] += 1
        self.seen["lost"] += len(self.open)
        self.open.clear()
        self.socket.close()


def flood(
    target: str, kind: Kind, streams: int, connections: int, per_second: float, hold_seconds: float
) -> dict[str, int | float]:
    """Open so many streams, hold what is left when no more of them end, then leave.

    What is answered says which streams ended how; ``held_most`` is how many were open at once.
    """
    host, _, port = target.rpartition(":")
    links = [Connection(host, int(port), kind) for _ in range(connections)]
    selector = selectors.DefaultSelector()
    for link in links:
        selector.register(link.socket, selectors.EVENT_READ, link)
    begun, held_most, held = 0, 0, 0
    started = changed_at = time.monotonic()
    while not all(link.closed for link in links):
        due = min(streams, int(per_second * (time.monotonic() - started))) - begun
        alive = [link for link in links if not link.closed]
        for index, link in enumerate(alive):
            if due > 0:
                link.begin(due // len(alive) + (index < due % len(alive)))
            link.send()
        begun += max(0, due)
        for key, _ in selector.select(0.01):
            key.data.receive()
            if key.data.closed:
                selector.unregister(key.fileobj)
        now, before, held = time.monotonic(), held, sum(len(link.open) for link in links)
        held_most = max(held_most, held)
        if held != before or begun < streams or any(link.out for link in alive):
            changed_at = now
        if begun == streams and (not held or now > changed_at + hold_seconds):
            break
    seen: Counter[str] = Counter()
    for link in links:
        seen += link.seen
    still_open = sum(len(link.open) for link in links)
    for link in links:
        link.socket.close()
    return {
        "streams": begun,
        "seconds": round(time.monotonic() - started, 2),
        "held_most": held_most,
        "open_at_end": still_open,
        **seen,
    }


def main(
    target: str, kind: str, streams: str, connections: str, per_second: str, hold_seconds: str
) -> None:
    found = flood(
        target, KINDS[kind], int(streams), int(connections), float(per_second), float(hold_seconds)
    )
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
