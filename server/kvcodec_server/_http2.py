"""HTTP/2 as a client of gRPC's streams needs it: one call at a time on a connection, whose bytes go
from the socket into the caller's memory, and from there to the socket, without another copy.

RFC 9113, and HPACK by the library of that name. What is not here is what one call at a time makes
superfluous: priorities, pushed streams, several streams.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import hpack

from kvcodec.backend import Deadline
from kvcodec.connection import Connection, ConnectionEnded
from kvcodec_server._http2_fields import Block, FieldBlocks, Http2Error

__all__ = ["Http2Connection", "NotServed"]

_HINT = "is it a sidecar's port, and is tls=1 missing, or a certificate of ours?"

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER_BYTES = 9

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY = 0, 1, 3, 4, 5, 6, 7
_WINDOW_UPDATE, _CONTINUATION = 8, 9
_ACK = _END_STREAM = 0x1
_END_HEADERS, _PADDED = 0x4, 0x8

_HEADER_TABLE_SIZE, _ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 2, 4, 5
_MAX_HEADER_LIST_SIZE = 6

_REFUSED_STREAM, _CANCEL = 7, 8
_MAX_WINDOW = (1 << 31) - 1
_LAST_STREAM = (1 << 31) - 1

# What the server may send before it hears that we took it, and after how much of it we say so.
_WINDOW_BYTES = 16 << 20
_CREDIT_BYTES = 4 << 20
# Of one frame of data that the server may send.
_FRAME_BYTES = 1 << 20
# Of any other frame that we know.
_CONTROL_BYTES = 16 << 10
_BUFFER_BYTES = 32 << 10

Field = tuple[str, str] | hpack.HeaderTuple


class NotServed(ConnectionError):
    """The server has done nothing about the call, which may be made again."""


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _frame_header(kind, flags, stream, len(payload)) + payload


def _frame_header(kind: int, flags: int, stream: int, length: int) -> bytes:
    return struct.pack(">HBBBI", length >> 8, length & 0xFF, kind, flags, stream)


def _settings(*pairs: tuple[int, int]) -> bytes:
    return _frame(_SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


class Http2Connection:
    """A connection, and the calls on it, one after the other. For one thread at a time.

    `begin` opens a call, of which `heard` says whether the server has answered anything; it is over
    when `ended`, and then `fields` has all that the server said in headers and trailers. Every step
    raises `TimeoutError` at the deadline of the call, and another `OSError` when the call or the
    connection is lost: the latter unless `ended`.
    """

    def __init__(
        self, transport: Connection, scheme: str, authority: str, deadline: Deadline
    ) -> None:
        """Greet the server."""
        self.transport = transport
        self.ended = True
        self.heard = False
        self.fields: dict[str, str] = {}
        self._target: list[Field] = [(":scheme", scheme), (":authority", authority)]
        self._deadline = deadline
        self._encoder = hpack.Encoder()
        self._blocks = FieldBlocks()
        self._stream = -1
        self._asking = False
        self._greeted = False
        self._going = False
        # Of the server, until it says otherwise.
        self._initial_window = 65535
        self._max_frame = 16384
        self._connection_window = 65535
        self._stream_window = 0
        # Received and not yet taken: of the frames, and of the frame of data that is under way.
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._stop = 0
        self._data_left = 0
        self._data_ends = False
        # To be read over, and whether it counts as data.
        self._skip = 0
        self._skip_counts = True
        # Taken since the server heard of it last.
        self._owed_connection = self._owed_stream = 0
        greeting = _settings(
            (_ENABLE_PUSH, 0),
            (_INITIAL_WINDOW_SIZE, _WINDOW_BYTES),
            (_MAX_FRAME_SIZE, _FRAME_BYTES),
            (_MAX_HEADER_LIST_SIZE, _CONTROL_BYTES),
        )
        self._send(_PREFACE + greeting)
        self._grant(0, _WINDOW_BYTES - 65535)

    def is_usable(self, deadline: Deadline) -> bool:
        """Whether another call may begin, as far as what has arrived since the last one tells."""
        self._deadline = deadline
        if not self.ended or self._going or self._stream > _LAST_STREAM - 4:
            return False
        try:
            while self._next(wait=False):
                pass
        except OSError:
            return False
        return not self._going

    def begin(self, path: str, fields: Iterable[Field], deadline: Deadline) -> None:
        """Open a call: POST `path`, with these fields besides those that every request has."""
        self._deadline = deadline
        self._stream += 2
        self._stream_window = self._initial_window
        self._owed_stream = 0
        self.ended, self.heard, self.fields, self._asking = False, False, {}, True
        request = [(":method", "POST"), (":path", path), *self._target, *fields]
        # As they are: to shorten a token by a third took a millisecond, under the GIL.
        block = self._encoder.encode(request, huffman=False)
        parts = [block[at : at + self._max_frame] for at in range(0, len(block), self._max_frame)]
        for index, part in enumerate(parts):
            kind = _CONTINUATION if index else _HEADERS
            flags = _END_HEADERS if index == len(parts) - 1 else 0
            self._send(_frame(kind, flags, self._stream, part))

    def send(self, parts: Sequence[bytes | memoryview], *, last: bool = False) -> bool:
        """Send bytes of the request, the `last` of it if so; False if the server has answered, and
        takes no more.
        """
        left = [memoryview(part) for part in parts if len(part)]
        size = sum(map(len, left))
        while True:
            while not self.ended and not self._data_left and self._next(wait=False):
                pass
            if self.ended or self._data_left:
                return False
            if not size and not last:
                return True
            room = min(self._connection_window, self._stream_window)
            if size and room <= 0:
                self._next(wait=True)
                continue
            # Without data nothing is asked of a window, which may be below zero.
            length = min(size, room, self._max_frame) if size else 0
            size -= length
            ends = last and not size
            header = _frame_header(_DATA, _END_STREAM if ends else 0, self._stream, length)
            self.transport.send([header, *_taken(left, length)], self._deadline)
            self._connection_window -= length
            self._stream_window -= length
            self._asking = not ends
            if not size:
                return True

    def receive_into(self, view: memoryview) -> bool:
        """Fill the view with the next bytes of the response; False if they ended before."""
        while len(view):
            if not self._data_left:
                if self.ended:
                    return False
                self._next(wait=True)
                continue
            length = min(len(view), self._data_left)
            buffered = min(length, self._stop - self._start)
            if buffered:
                view[:buffered] = self._buffer[self._start : self._start + buffered]
                self._start += buffered
                length = buffered
            else:
                length = self.transport.receive_some(view[:length], self._deadline)
            view = view[length:]
            self._data_left -= length
            self._take_in(length, length)
            if self._data_ends and not self._data_left:
                self._end()
        return True

    def finish(self, seconds: float | None = None) -> None:
        """Read over what is left of the response, for so many seconds if that ends earlier."""
        if seconds is not None:
            self._deadline = Deadline(min(seconds, self._deadline.remaining_seconds()))
        while not self.ended:
            if self._data_left:
                self._skip += self._data_left
                self._data_left = 0
                if self._data_ends:
                    self._end()
            else:
                self._next(wait=True)

    def _end(self) -> None:
        """The server has said all. It may wait for the rest of a request, which will not come."""
        if self._asking:
            try:
                self._send(_frame(_RST_STREAM, 0, self._stream, struct.pack(">I", _CANCEL)))
            except OSError:  # no reason to forget what the server has said
                self._going = True
        # Last: a call that is over has a connection that no step has failed on.
        self.ended = True

    def _next(self, *, wait: bool) -> bool:
        """Take in a frame; False if it has not arrived, and is not to be waited for."""
        while self._skip:
            if self._start == self._stop and not self._fill(wait=wait):
                return False
            skipped = min(self._skip, self._stop - self._start)
            self._start += skipped
            self._skip -= skipped
            self._take_in(skipped * self._skip_counts, 0)
        if not self._buffered(_HEADER_BYTES, wait=wait):
            return False
        high, low, kind, flags, stream = struct.unpack_from(">HBBBI", self._buffer, self._start)
        length, stream = high << 8 | low, stream & _MAX_WINDOW
        if not self._greeted and (kind != _SETTINGS or flags & _ACK):
            raise Http2Error(f"no HTTP/2 is spoken there; {_HINT}")
        self._greeted = True
        if length > (_CONTROL_BYTES if _DATA < kind <= _CONTINUATION else _FRAME_BYTES):
            raise Http2Error(f"a frame of {length} bytes")
        self._blocks.check_next(stream if kind == _CONTINUATION else None)
        if kind == _DATA:
            return self._begin_data(flags, stream, length, wait=wait)
        if kind > _CONTINUATION:  # of a kind that is for others
            self._start += _HEADER_BYTES
            self._skip, self._skip_counts = length, False
            return True
        if not self._buffered(_HEADER_BYTES + length, wait=wait):
            return False
        at = self._start + _HEADER_BYTES
        self._start = at + length
        self._control(kind, flags, stream, bytes(self._buffer[at : at + length]))
        return True

    def _begin_data(self, flags: int, stream: int, length: int, *, wait: bool) -> bool:
        """The data of another call, which is over, and padding are skipped."""
        padding = 0
        if flags & _PADDED:
            if not self._buffered(_HEADER_BYTES + 1, wait=wait):
                return False
            padding = 1 + self._buffer[self._start + _HEADER_BYTES]
            if padding > length:
                raise Http2Error("more padding than there is in the frame")
        if not 0 < stream <= self._stream:
            raise Http2Error("data of a call that nobody made")
        self._start += _HEADER_BYTES
        self._skip_counts = True
        if stream != self._stream or self.ended:
            self._skip = length
            return True
        self.heard = True
        if padding:
            self._start += 1
            self._take_in(1, padding)
            self._skip = padding - 1
        self._data_left = length - padding
        self._data_ends = bool(flags & _END_STREAM)
        if self._data_ends and not self._data_left:
            self._end()
        return True

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS:
            self._set(flags, payload)
        elif kind == _PING:
            _check_length(payload, 8)
            if not flags & _ACK:
                self._send(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE:
            self._widen(stream, _number(payload) & _MAX_WINDOW)
        elif kind == _RST_STREAM:
            code = _number(payload)
            if stream == self._stream and not self.ended:
                self.ended = True
                if code == _REFUSED_STREAM and not self.heard:
                    raise NotServed("the server refused the call")
                raise ConnectionError(f"the server broke the call off (HTTP/2 error code {code})")
        elif kind == _GOAWAY:
            self._going = True
            if len(payload) < 8:
                raise Http2Error("a GOAWAY that is cut off")
            if not self.ended and _number(payload[:4]) & _MAX_WINDOW < self._stream:
                raise NotServed("the server is going away")
        elif kind == _HEADERS:
            self._hear(self._blocks.begin(flags, stream, payload))
        elif kind == _CONTINUATION:
            self._hear(self._blocks.go_on(flags, payload))
        elif kind == _PUSH_PROMISE:
            raise Http2Error("a pushed stream")

    def _set(self, flags: int, payload: bytes) -> None:
        if flags & _ACK:
            return
        if len(payload) % 6:
            raise Http2Error("settings that are cut off")
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW_SIZE:
                if value > _MAX_WINDOW:
                    raise Http2Error(f"a window of {value} bytes")
                self._stream_window += value - self._initial_window
                self._initial_window = value
            elif name == _MAX_FRAME_SIZE:
                if not 16384 <= value < 1 << 24:
                    raise Http2Error(f"frames of up to {value} bytes")
                self._max_frame = value
            elif name == _HEADER_TABLE_SIZE:
                self._encoder.header_table_size = min(value, 4096)
        self._send(_frame(_SETTINGS, _ACK, 0))

    def _widen(self, stream: int, amount: int) -> None:
        if not stream:
            self._connection_window += amount
        elif stream == self._stream:
            self._stream_window += amount
        if not amount or max(self._connection_window, self._stream_window) > _MAX_WINDOW:
            raise Http2Error(f"a window that grows by {amount} bytes")

    def _hear(self, block: Block | None) -> None:
        """What the server says of the call: its headers, but for those in between, and trailers."""
        if block is None or block.stream != self._stream or self.ended:
            return
        self.heard = True
        if not block.fields.get(":status", "").startswith("1"):
            self.fields |= block.fields
            if block.ends:
                self._end()

    def _take_in(self, of_connection: int, of_stream: int) -> None:
        """Count received data, and now and then tell the server that there is room again."""
        self._owed_connection += of_connection
        self._owed_stream += of_stream
        if self._owed_connection >= _CREDIT_BYTES:
            self._grant(0, self._owed_connection)
            self._owed_connection = 0
        if self._owed_stream >= _CREDIT_BYTES:
            self._grant(self._stream, self._owed_stream)
            self._owed_stream = 0

    def _grant(self, stream: int, amount: int) -> None:
        self._send(_frame(_WINDOW_UPDATE, 0, stream, struct.pack(">I", amount)))

    def _send(self, data: bytes) -> None:
        self.transport.send([data], self._deadline)

    def _buffered(self, size: int, *, wait: bool) -> bool:
        """Whether so many bytes of frames have arrived."""
        while self._stop - self._start < size:
            if not self._fill(wait=wait):
                return False
        return True

    def _fill(self, *, wait: bool) -> bool:
        if self._deadline.passed():
            raise TimeoutError
        left = self._stop - self._start
        if self._start:
            self._buffer[:left] = self._buffer[self._start : self._stop]
            self._start, self._stop = 0, left
        try:
            received = self.transport.receive_some(self._buffer[left:], self._deadline, wait=wait)
        except ConnectionEnded as error:
            if self._greeted:
                raise
            raise ConnectionEnded(f"{error} without a greeting; {_HINT}") from error
        self._stop += received
        return received > 0


def _taken(parts: list[memoryview], size: int) -> list[memoryview]:
    """The next `size` bytes of these parts, which have so many, and are left without them."""
    taken = []
    while size:
        part = parts[0][:size]
        taken.append(part)
        size -= len(part)
        if len(part) == len(parts[0]):
            del parts[0]
        else:
            parts[0] = parts[0][len(part) :]
    return taken


def _number(payload: bytes) -> int:
    _check_length(payload, 4)
    return int.from_bytes(payload, "big")


def _check_length(payload: bytes, length: int) -> None:
    if len(payload) != length:
        raise Http2Error(f"a frame of {len(payload)} bytes that should have {length}")
