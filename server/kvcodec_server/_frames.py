"""Parts of a stream, written and read without protobuf's copies; on the wire they are protobuf.

A part may begin an object, and carries some of its bytes: a message whose last field is `bytes`.
protobuf would copy them into the message, and again into and out of its wire form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import Message

from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server.options import CHUNK_BYTES

__all__ = ["chunks", "get_part", "parse_get", "parse_put", "put_part", "serialized"]

M = TypeVar("M", pb.GetStreamResponse, pb.PutStreamRequest)

_NOTHING = memoryview(b"")
# A field number and wire type 2: a length, and so many bytes.
_GET_TAG = pb.GetStreamResponse.CHUNK_FIELD_NUMBER << 3 | 2
_PUT_TAG = pb.PutStreamRequest.CHUNK_FIELD_NUMBER << 3 | 2


def chunks(data: memoryview) -> Iterator[memoryview]:
    """Equal parts of an object, each of about `CHUNK_BYTES`: no small one at its end."""
    count = max(1, round(len(data) / CHUNK_BYTES))
    size = -(-len(data) // count)
    return (data[at : at + size] for at in range(0, len(data), size))


def get_part(message: pb.GetStreamResponse | None, chunk: memoryview) -> bytes:
    """A part of a get, as on the wire."""
    return _part(message, _GET_TAG, chunk)


def put_part(message: pb.PutStreamRequest | None, chunk: memoryview) -> bytes:
    """A part of a put, as on the wire."""
    return _part(message, _PUT_TAG, chunk)


def serialized(part: bytes | Message) -> bytes:
    """A message as on the wire; one that is already stays as it is."""
    return part if isinstance(part, bytes) else part.SerializeToString()


def parse_get(data: bytes) -> tuple[pb.GetStreamResponse | None, memoryview]:
    """What a part of a get says besides its chunk, None for nothing, and the chunk."""
    return _parsed(pb.GetStreamResponse, _GET_TAG, data)


def parse_put(data: bytes) -> tuple[pb.PutStreamRequest | None, memoryview]:
    """What a part of a put says besides its chunk, None for nothing, and the chunk."""
    return _parsed(pb.PutStreamRequest, _PUT_TAG, data)


def _part(message: Message | None, tag: int, chunk: memoryview) -> bytes:
    head = b"" if message is None else message.SerializeToString()
    size, digits = len(chunk), bytearray((tag,))
    while size > 0x7F:
        digits.append(size & 0x7F | 0x80)
        size >>= 7
    digits.append(size)
    return b"".join((head, digits, chunk))


def _parsed(kind: type[M], tag: int, data: bytes) -> tuple[M | None, memoryview]:
    at = 0
    while at < len(data):
        start, size = _sized(data, at + 1)
        if data[at] == tag and start + size == len(data):
            head = kind.FromString(data[:at]) if at else None
            return head, memoryview(data)[start:]
        if data[at] & 7 != 2 or not start:
            break  # no writer of ours, but protobuf may be able to read it
        at = start + size
    message = kind.FromString(data)
    chunk = memoryview(message.chunk) if message.chunk else _NOTHING
    message.ClearField("chunk")
    return message, chunk


def _sized(data: bytes, at: int) -> tuple[int, int]:
    """Where the bytes of a field begin, and how many they are; 0 where nobody can tell."""
    size = 0
    for digit in range(5):
        if at + digit >= len(data):
            break
        size |= (data[at + digit] & 0x7F) << 7 * digit
        if data[at + digit] < 0x80:
            return at + digit + 1, size
    return 0, 0
